import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders import Autoencoder, load_autoencoder
from autoencoders.losses import Objective
from autoencoders.sdvae import SDVAEDecoder
from ldm.checkpoint import load_model
from ldm.distributed import make_accelerator
from ldm.errors import LdmError
from ldm.logbook import read_rows
from ldm.run import Run, RunConfig
from pipelines.train_autoencoder import AutoencoderState, train_autoencoder, train_step
from tests.small import ROOT, autoencoder_recipe, count_graphs

SHORT = "phases=[{resolution: 32, steps: 2}, {resolution: 64, steps: 2}]"


def test_checkpointing_trains_to_the_same_bits(tmp_path):
    plain, sparing = (
        train_autoencoder(
            autoencoder_recipe(SHORT, f"checkpointing={flag}"), "tiny", tmp_path / flag
        )
        for flag in ("false", "true")
    )
    a, b = (load_model(folder, "autoencoder") for folder in (plain, sparing))
    assert a.sha256 == b.sha256


@pytest.mark.slow
def test_compiled_training_gives_the_same_weights(tmp_path, monkeypatch):
    """Compiled by the backend that needs no C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = (
        train_autoencoder(
            autoencoder_recipe(f"run.compile={flag}", "phases=[{resolution: 32, steps: 4}]"),
            "tiny",
            tmp_path / flag,
        )
        for flag in ("false", "true")
    )
    a, b = (load_model(folder, "autoencoder").weights for folder in (plain, compiled))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-2, atol=1e-3)


def test_a_deterministic_run_trains_on_deterministic_algorithms(tmp_path, monkeypatch):
    import pipelines.train_autoencoder as job

    seen = []

    def step(*arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return train_step(*arguments)

    monkeypatch.setattr(job, "train_step", step)
    train_autoencoder(autoencoder_recipe(SHORT, "run.deterministic=true"), "tiny", tmp_path / "run")
    assert all(seen) and len(seen) == 4
    assert not torch.are_deterministic_algorithms_enabled()


def test_networks_compile_to_a_fixed_number_of_graphs(tmp_path, monkeypatch):
    """At each resolution one of the encoder, one of the decoder, and two of the discriminator:
    frozen, and trained."""
    graphs = count_graphs(monkeypatch)
    train_autoencoder(autoencoder_recipe("run.compile=true"), "tiny", tmp_path / "run")
    assert len(graphs) == 4 * 2


def test_best_weights_are_kept_in_best_pt(tmp_path, monkeypatch):
    import pipelines.train_autoencoder as job

    scores = iter([20.0, 25.0, 22.0, 24.0])
    monkeypatch.setattr(job, "evaluate_autoencoder", lambda *_: {"psnr": next(scores), "count": 4})
    recipe = autoencoder_recipe("run.validate_every_steps=2")
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    best = load_model(folder / "best.pt", "autoencoder")
    assert best.provenance["images_seen"] == 16
    assert best.provenance["held_out"] == {"psnr": 25.0, "count": 4}
    assert load_model(folder, "autoencoder").provenance["images_seen"] == 32
    result = json.loads((folder / "result.json").read_text())
    assert result["best"] == {"images_seen": 16, "psnr": 25.0, "count": 4}
    assert result["psnr"] == 24.0
    assert not load_autoencoder(folder / "best.pt").training


def test_best_by_lpips_needs_its_weights_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(LdmError, match=r"vgg16-397923af.pth.*best_by=psnr"):
        train_autoencoder(autoencoder_recipe("best_by=lpips"), "tiny", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_run_folder_holds_every_file(tmp_path):
    recipe = autoencoder_recipe()
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    for name in ("run.json", "config.yaml", "metrics.jsonl", "result.json", "ckpt.pt",
                 "ckpt.safetensors", "best.pt", "state/32/state.pt", "tensorboard"):  # fmt: skip
        assert (folder / name).exists(), name
    assert len(list((folder / "pictures").glob("recon-*.png"))) == 1
    rows = read_rows(folder / "metrics.jsonl")
    assert {"l1", "kl", "gaussian", "wavelet", "adversarial", "discriminator", "lr"} <= rows[
        -2
    ].keys()
    assert rows[-2]["gradient_ratio"] > 0 and rows[-2]["adversarial_weight"] == 0.1
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


def test_the_learning_rate_follows_its_schedule_over_all_phases(tmp_path):
    recipe = autoencoder_recipe("lr=1e-3", "lr_schedule=cosine", "warmup_images=8")
    rows = read_rows(train_autoencoder(recipe, "tiny", tmp_path / "run") / "metrics.jsonl")
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.25e-3, 0], rel=1e-9, abs=1e-12)


@pytest.mark.slow
def test_loss_falls(tmp_path):
    recipe = autoencoder_recipe(
        "phases=[{resolution: 32, steps: 60}]", "batch_size=8", "run.log_every_steps=10",
        "adversarial.weight=0",
    )  # fmt: skip
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "l1" in row]
    assert rows[-1]["l1"] < 0.8 * rows[0]["l1"]


def test_accumulation_sees_the_same_images(tmp_path):
    whole = train_autoencoder(autoencoder_recipe(SHORT), "tiny", tmp_path / "whole")
    parts = train_autoencoder(autoencoder_recipe(SHORT, "accumulate=2"), "tiny", tmp_path / "parts")
    a, b = (read_rows(f / "metrics.jsonl")[0]["l1"] for f in (whole, parts))
    assert a == pytest.approx(b, rel=1e-3)


def test_failed_last_export_is_repeated_on_resume(tmp_path, monkeypatch):
    from ldm import run as job

    whole = train_autoencoder(autoencoder_recipe(SHORT), "tiny", tmp_path / "whole")
    save = job.save_model

    def dies_at_the_end(path, model):
        if model.provenance["images_seen"] == 16:
            raise LdmError("disk full")
        save(path, model)

    monkeypatch.setattr(job, "save_model", dies_at_the_end)
    with pytest.raises(LdmError, match="disk full"):
        train_autoencoder(autoencoder_recipe(SHORT), "tiny", tmp_path / "run")
    assert load_model(tmp_path / "run", "autoencoder").provenance["images_seen"] < 16
    monkeypatch.setattr(job, "save_model", save)
    folder = train_autoencoder(autoencoder_recipe(SHORT), "tiny", tmp_path / "run")
    ours, theirs = (load_model(path, "autoencoder") for path in (folder, whole))
    assert ours.sha256 == theirs.sha256 and ours.provenance["images_seen"] == 16


def make_pictures(folder, count: int) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def test_corrupt_held_out_image_is_skipped(tmp_path):
    make_pictures(tmp_path / "data", 128)
    (tmp_path / "data" / "008.png").write_bytes(b"no picture")  # the first of those held out
    recipe = autoencoder_recipe(f"data.source={tmp_path / 'data'}", "data.workers=0",
                                "data.held_out=120", "validate_images=300")  # fmt: skip
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    assert read_rows(folder / "metrics.jsonl")[-1]["val_count"] == 119


def test_trains_without_held_out_images(tmp_path):
    make_pictures(tmp_path / "data", 8)
    recipe = autoencoder_recipe(f"data.source={tmp_path / 'data'}", "data.workers=0",
                                "data.held_out=0")  # fmt: skip
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    assert (folder / "result.json").is_file() and not (folder / "pictures").exists()


def test_missing_vgg_weights_fail_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(LdmError) as caught:
        train_autoencoder(autoencoder_recipe("loss.lpips=1"), "tiny", tmp_path / "run")
    text = str(caught.value)
    assert "vgg16-397923af.pth" in text and "loss.lpips=0" in text and str(tmp_path) in text
    assert not (tmp_path / "run").exists()


def test_missing_data_error_names_the_ways_out(tmp_path):
    with pytest.raises(LdmError) as caught:
        train_autoencoder(autoencoder_recipe("data.source=data/nowhere"), "x", tmp_path / "run")
    text = str(caught.value)
    assert "ldm data prepare" in text and "data.source=photos" in text and "data/nowhere" in text
    assert not (tmp_path / "run").exists()


def test_training_imports_no_measuring():
    code = (
        "import sys, pipelines.train_autoencoder, pipelines.train_diffusion; sys.exit(any("
        "name.startswith(('pipelines.fid', 'pipelines.evaluate', 'pipelines.measuring', "
        "'pipelines.sampling')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# -------------------------------------------------------------------------------- one step
class Recorder(torch.optim.SGD):
    """An optimiser that changes nothing and keeps the gradients it was given."""

    def step(self, closure=None):
        self.gradients = [
            None if p.grad is None else p.grad.clone() for p in self.param_groups[0]["params"]
        ]


def gradients(tmp_path, ramp: float, *settings: str, log_gradients: bool = False, **loss: float):
    """Gradients of one step: of the encoder, of the whole autoencoder, of the discriminator."""
    torch.manual_seed(0)
    recipe = autoencoder_recipe("adversarial.weight=1", "clip_norm=null", *settings)
    run = Run(tmp_path, RunConfig(device="cpu"), make_accelerator("cpu"))
    state = AutoencoderState(recipe, run, {})
    state.prepare(run)
    off = dict.fromkeys(recipe.loss.weights, 0.0)
    objective = state.objective = Objective(
        recipe.loss.model_copy(update=off | loss), recipe.adversarial,
        perceptual=dict.fromkeys(("lpips", "esrgan"), lambda recon, x: (recon - x).abs().amax()),
    )  # fmt: skip
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    state.averaged = Autoencoder(recipe.model) if objective.needs_averaged else None
    ae, discriminator = state.autoencoder, state.discriminator
    opt_ae = state.opt_autoencoder = Recorder(ae.parameters())
    opt_discriminator = state.opt_discriminator = Recorder(discriminator.parameters())
    terms = train_step(run, state, images, [0, 1], ramp, log_gradients)
    encoder = len(list(ae.encoder.parameters()))
    return opt_ae.gradients[:encoder], opt_ae, opt_discriminator, terms, ae, discriminator


TERMS = ["l1", "l2", "lpips", "esrgan", "ldl", "kl", "gaussian", "wavelet"]


@pytest.mark.parametrize("term", TERMS)
def test_every_term_reaches_the_encoder_and_not_the_discriminator(tmp_path, term):
    encoder, _, opt_discriminator, terms, _, discriminator = gradients(tmp_path, 0.0, **{term: 1.0})
    assert sum(g.abs().sum() for g in encoder if g is not None) > 0
    assert set(terms) == {term, "gradient_norm", "adversarial_weight"}
    assert not hasattr(opt_discriminator, "gradients")
    assert all(p.grad is None for p in discriminator.parameters())


def test_every_term_changes_the_encoders_gradient(tmp_path):
    base, *_ = gradients(tmp_path, 0.0, l1=1.0)
    for ramp, extra in ((1.0, {}), *((0.0, {term: 1.0}) for term in TERMS[1:])):
        other, *_ = gradients(tmp_path, ramp, l1=1.0, **extra)
        assert any(not torch.allclose(a, b) for a, b in zip(base, other, strict=True)), extra


def test_discriminator_loss_does_not_reach_the_autoencoder(tmp_path):
    """With an adversarial weight of next to 0, training the discriminator must not show."""
    without, *_ = gradients(tmp_path, 0.0, l1=1.0)
    with_discriminator, _, opt_discriminator, terms, ae, _ = gradients(tmp_path, 1e-30, l1=1.0)
    assert "discriminator" in terms
    for a, b in zip(without, with_discriminator, strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is None for p in ae.parameters())
    # biases aside: real and fake pull the last ones in opposite directions, to exactly 0
    assert all(g.abs().sum() > 0 for g in opt_discriminator.gradients if g.ndim > 1)


def test_generator_terms_do_not_reach_the_discriminator(tmp_path):
    """Its gradient is that of its own loss, computed alone, whatever the generator's weights."""
    one = gradients(tmp_path, 1.0, l1=1.0)
    many = gradients(tmp_path, 50.0, l1=3.0, kl=2.0, wavelet=9.0)
    for a, b in zip(one[2].gradients, many[2].gradients, strict=True):
        assert torch.equal(a, b)
    assert all(p.requires_grad for p in one[5].parameters())


def test_the_discriminator_pays_nothing_outside_the_range_of_images(tmp_path, monkeypatch):
    """Farther out its logits grow, and the hinge loss of them has no bound."""
    decode = SDVAEDecoder.forward

    def step(beyond):
        monkeypatch.setattr(SDVAEDecoder, "forward", lambda self, z: decode(self, z) + beyond)
        _, opt_ae, opt_discriminator, terms, *_ = gradients(tmp_path, 1.0, "adversarial.cutmix=1")
        return opt_ae.gradients, opt_discriminator.gradients, terms

    inside, out, farther = step(0), step(10), step(1000)
    assert any(g is not None and g.any() for g in inside[0])
    for gradient in (*out[0], *farther[0]):
        assert gradient is None or not gradient.any()
    for a, b in zip(out[1], farther[1], strict=True):
        assert torch.equal(a, b)
    for name in ("adversarial", "discriminator", "logit_fake", "cutmix"):
        assert out[2][name] == farther[2][name] != inside[2][name], name


def test_adaptive_weight_is_the_gradient_ratio_at_the_last_layer(tmp_path):
    settings = ("adversarial={weighting: adaptive, weight: 0.5}",)
    _, _, _, terms, ae, _ = gradients(tmp_path, 0.5, *settings, l1=2.0, kl=7.0)
    # the two gradients again, one of them as a difference
    _, recon_only, *_ = gradients(tmp_path, 0.0, l1=2.0)
    last = [name for name, _ in ae.named_parameters()].index("decoder.conv_out.weight")
    recon = recon_only.gradients[last].norm()
    _, both, *_ = gradients(tmp_path, 1.0, l1=2.0)
    adversarial = (both.gradients[last] - recon_only.gradients[last]).norm()
    assert terms["gradient_ratio"].item() == pytest.approx(
        (recon / (adversarial + 1e-4)).item(), rel=1e-3
    )
    weight = 0.5 * 0.5 * terms["gradient_ratio"].item()  # ramp × Equation 2
    assert float(terms["adversarial_weight"]) == pytest.approx(weight, rel=1e-6)


def test_logging_the_ratio_changes_no_gradient(tmp_path):
    plain = gradients(tmp_path, 1.0, l1=1.0)
    logged = gradients(tmp_path, 1.0, l1=1.0, log_gradients=True)
    assert "gradient_ratio" in logged[3] and "gradient_ratio" not in plain[3]
    for which in (1, 2):
        pairs = zip(plain[which].gradients, logged[which].gradients, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_cutmix_adds_to_the_discriminators_gradient_alone(tmp_path):
    plain = gradients(tmp_path, 1.0, l1=1.0)
    mixed = gradients(tmp_path, 1.0, "adversarial.cutmix=1", l1=1.0)
    assert mixed[3]["cutmix"] > 0 and "cutmix" not in plain[3]
    assert all(torch.equal(a, b) for a, b in zip(plain[0], mixed[0], strict=True))
    pairs = zip(plain[2].gradients, mixed[2].gradients, strict=True)
    assert any(not torch.allclose(a, b) for a, b in pairs)
