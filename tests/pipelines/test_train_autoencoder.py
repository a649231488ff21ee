import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders import Autoencoder, load_autoencoder
from autoencoders.discriminators.unet import UNetDiscriminator
from autoencoders.losses import Objective
from ldm.checkpoint import load_model
from ldm.errors import LdmError, UsageError
from ldm.logbook import read_rows
from ldm.run import Run, RunConfig, make_accelerator
from pipelines.train_autoencoder import train_autoencoder, train_step
from tests.small import autoencoder_recipe


class Recorder(torch.optim.SGD):
    """An optimiser that changes nothing and keeps the gradients it was given."""

    def step(self, closure=None):
        self.gradients = [
            None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]
        ]


def gradients(tmp_path, weight: float, **loss: float):
    """Gradients of one step: of the encoder, of the whole autoencoder, of the discriminator."""
    torch.manual_seed(0)
    recipe = autoencoder_recipe()
    run = Run(tmp_path, RunConfig(device="cpu"), make_accelerator("cpu"))
    ae, critic = Autoencoder(recipe.model), UNetDiscriminator(recipe.discriminator)
    off = dict.fromkeys(type(recipe.loss).model_fields, 0.0)
    objective = Objective(
        recipe.loss.model_copy(update=off | loss), recipe.adversarial,
        perceptual=lambda recon, images: (recon - images).abs().amax(),
    )  # fmt: skip
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    noise = torch.randn(2, 4, 4, 4)
    opt_ae, opt_critic = Recorder(ae.parameters()), Recorder(critic.parameters())
    terms = train_step(run, ae, critic, opt_ae, opt_critic, images, noise, objective, weight, None)
    encoder = len(list(ae.encoder.parameters()))
    return opt_ae.gradients[:encoder], opt_ae, opt_critic, terms, ae, critic


@pytest.mark.parametrize("term", ["l1", "lpips", "kl", "gaussian", "wavelet"])
def test_every_term_reaches_the_encoder_and_not_the_discriminator(tmp_path, term):
    encoder, _, opt_critic, terms, _, critic = gradients(tmp_path, 0.0, **{term: 1.0})
    assert sum(g.abs().sum() for g in encoder if g is not None) > 0
    assert set(terms) == {term, "gradient_norm"}
    assert not hasattr(opt_critic, "gradients")
    assert all(p.grad is None for p in critic.parameters())


def test_every_term_changes_the_encoders_gradient(tmp_path):
    base, *_ = gradients(tmp_path, 0.0, l1=1.0)
    for weight, extra in (
        (0.0, {"lpips": 1.0}), (0.0, {"kl": 1.0}), (0.0, {"gaussian": 1.0}),
        (0.0, {"wavelet": 1.0}), (1.0, {}),
    ):  # fmt: skip
        other, *_ = gradients(tmp_path, weight, l1=1.0, **extra)
        assert any(not torch.allclose(a, b) for a, b in zip(base, other, strict=True)), extra


def test_the_discriminators_loss_does_not_reach_the_autoencoder(tmp_path):
    """With the judge's verdict weighing next to nothing, its own training must not show."""
    without, *_ = gradients(tmp_path, 0.0, l1=1.0)
    with_critic, _, opt_critic, terms, ae, _ = gradients(tmp_path, 1e-30, l1=1.0)
    assert "critic" in terms
    for a, b in zip(without, with_critic, strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is None for p in ae.parameters())
    # biases aside: real and fake pull the last ones in opposite directions, to exactly 0
    assert all(g.abs().sum() > 0 for g in opt_critic.gradients if g.ndim > 1)


def test_the_generators_terms_do_not_reach_the_discriminator(tmp_path):
    """Its gradient is that of its own loss, computed alone, whatever the generator's weights."""
    one = gradients(tmp_path, 1.0, l1=1.0)
    many = gradients(tmp_path, 50.0, l1=3.0, kl=2.0, wavelet=9.0)
    for a, b in zip(one[2].gradients, many[2].gradients, strict=True):
        assert torch.equal(a, b)
    assert all(p.requires_grad for p in one[5].parameters())


def test_the_run_leaves_what_it_promises(tmp_path):
    recipe = autoencoder_recipe()
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    for name in ("run.json", "config.yaml", "metrics.jsonl", "result.json", "ckpt.pt",
                 "ckpt.safetensors", "state/32/state.pt", "tensorboard"):  # fmt: skip
        assert (folder / name).exists(), name
    assert len(list((folder / "pictures").glob("recon-*.png"))) == 1
    rows = read_rows(folder / "metrics.jsonl")
    assert {"l1", "kl", "gaussian", "wavelet", "adversarial", "critic", "lr"} <= rows[-2].keys()
    assert "val_psnr" in rows[-1]
    assert "adversarial" not in rows[0] and rows[0]["adversarial_weight"] == 0

    loaded = load_autoencoder(folder)
    assert not loaded.training
    origin = load_model(folder, "autoencoder").provenance
    assert origin["images_seen"] == 32 and origin["recipe"]["batch_size"] == 4


def test_phases_train_at_their_resolutions(tmp_path):
    folder = train_autoencoder(autoencoder_recipe(), "tiny", tmp_path / "run")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "resolution" in row]
    assert [row["resolution"] for row in rows] == [32, 32, 64, 64]


@pytest.mark.slow
def test_the_loss_falls(tmp_path):
    recipe = autoencoder_recipe(
        "phases=[{resolution: 32, steps: 60}]", "batch_size=8", "run.log_every_steps=10",
        "adversarial.weight=0",
    )  # fmt: skip
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "l1" in row]
    assert rows[-1]["l1"] < 0.8 * rows[0]["l1"]


def test_accumulation_sees_the_same_images(tmp_path):
    whole = train_autoencoder(autoencoder_recipe(), "tiny", tmp_path / "whole")
    parts = train_autoencoder(autoencoder_recipe("accumulate=2"), "tiny", tmp_path / "parts")
    a, b = (read_rows(f / "metrics.jsonl")[0]["l1"] for f in (whole, parts))
    assert a == pytest.approx(b, rel=1e-3)


def test_a_death_between_the_last_model_and_the_last_state_leaves_no_stale_model(
    tmp_path, monkeypatch
):
    import pipelines.train_autoencoder as job

    whole = train_autoencoder(autoencoder_recipe(), "tiny", tmp_path / "whole")
    save = job.save_model

    def dies_at_the_end(path, model):
        if model.provenance["images_seen"] == 32:
            raise LdmError("disk full")
        save(path, model)

    monkeypatch.setattr(job, "save_model", dies_at_the_end)
    with pytest.raises(LdmError, match="disk full"):
        train_autoencoder(autoencoder_recipe(), "tiny", tmp_path / "run")
    assert load_model(tmp_path / "run", "autoencoder").provenance["images_seen"] < 32
    monkeypatch.setattr(job, "save_model", save)
    folder = train_autoencoder(autoencoder_recipe(), "tiny", tmp_path / "run")
    ours, theirs = (load_model(path, "autoencoder") for path in (folder, whole))
    assert ours.sha256 == theirs.sha256 and ours.provenance["images_seen"] == 32


def make_pictures(folder, count: int) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def test_a_corrupt_held_out_picture_does_not_end_the_training(tmp_path):
    make_pictures(tmp_path / "data", 128)
    (tmp_path / "data" / "008.png").write_bytes(b"no picture")  # the first of those held out
    recipe = autoencoder_recipe(f"data.source={tmp_path / 'data'}", "data.workers=0",
                                "data.held_out=120", "validate_images=300")  # fmt: skip
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    assert read_rows(folder / "metrics.jsonl")[-1]["val_count"] == 119


def test_with_nothing_held_out_it_trains_without_validation(tmp_path):
    make_pictures(tmp_path / "data", 8)
    recipe = autoencoder_recipe(f"data.source={tmp_path / 'data'}", "data.workers=0",
                                "data.held_out=0")  # fmt: skip
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    assert (folder / "result.json").is_file() and not (folder / "pictures").exists()


def test_missing_vgg_weights_stop_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(LdmError) as caught:
        train_autoencoder(autoencoder_recipe("loss.lpips=1"), "tiny", tmp_path / "run")
    text = str(caught.value)
    assert "vgg16-397923af.pth" in text and "loss.lpips=0" in text and str(tmp_path) in text
    assert not (tmp_path / "run").exists()


def test_missing_data_says_how_to_prepare_it_and_what_else_there_is(tmp_path):
    with pytest.raises(LdmError) as caught:
        train_autoencoder(autoencoder_recipe("data.source=data/nowhere"), "x", tmp_path / "run")
    text = str(caught.value)
    assert "ldm data prepare" in text and "data.source=photos" in text and "data/nowhere" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("accumulate=3", "multiple of accumulate"),
        ("phases=[]", "phases is empty"),
        ("phases.0.steps=0", r"'phases.0.steps': .*greater than 0"),
        ("phases.0.resolution=36", "resolution 36 must be a multiple of 8"),
        ("discriminator.multipliers=[1, 2, 2, 2, 2, 2]", "must be a multiple of 64"),
        ("clip_norm=0", "'clip_norm'"),
        ("lr=-1", "'lr'"),
        ("run.log_every_steps=0", "'run.log_every_steps'"),
        ("run.keep_states=0", "'run.keep_states'"),
        ("validate_images=0", "'validate_images'"),
    ],
)
def test_recipes_that_cannot_be(setting, told):
    with pytest.raises(UsageError, match=told):
        autoencoder_recipe(setting)
