import pytest
import torch

from ldm.checkpoint import ModelFile, load_model, save_model
from ldm.errors import LdmError, UsageError
from ldm.logbook import read_rows
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_diffusion import train_diffusion
from tests.small import autoencoder_recipe, diffusion_recipe


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory):
    return train_autoencoder(autoencoder_recipe(), "tiny", tmp_path_factory.mktemp("one") / "ae")


@pytest.fixture(scope="module")
def stage_two(stage_one):
    recipe = diffusion_recipe(stage_one / "ckpt.pt")
    return train_diffusion(recipe, "tiny", stage_one.parent / "ldm")


def test_the_run_leaves_what_it_promises(stage_one, stage_two):
    for name in ("run.json", "config.yaml", "metrics.jsonl", "result.json", "ckpt.pt",
                 "ckpt.safetensors", "state/32/state.pt", "tensorboard"):  # fmt: skip
        assert (stage_two / name).exists(), name
    assert len(list((stage_two / "pictures").glob("samples-*.png"))) == 1
    assert "loss" in read_rows(stage_two / "metrics.jsonl")[-1]
    model = load_model(stage_two, "diffusion")
    one = load_model(stage_one, "autoencoder")
    assert model.autoencoder.sha256 == one.sha256 == model.provenance["autoencoder_sha256"]
    assert len(model.statistics["mean"]) == 4


def test_one_file_samples(stage_two, tmp_path):
    file = tmp_path / "only.pt"
    file.write_bytes((stage_two / "ckpt.pt").read_bytes())
    pipe = LatentDiffusionPipeline.from_pretrained(file, "cpu", "fp32")
    images = pipe(n=3, seed=0, steps=2)
    assert images.shape == (3, 3, 32, 32) and images.abs().max() <= 1
    twin = LatentDiffusionPipeline.from_pretrained(stage_two / "ckpt.safetensors", "cpu", "fp32")
    assert torch.equal(images, twin(n=3, seed=0, steps=2))


def test_a_sample_depends_on_seed_and_number_alone(stage_two):
    pipe = LatentDiffusionPipeline.from_pretrained(stage_two, "cpu", "fp32")
    done = []
    together = pipe(n=5, seed=3, steps=3, batch_size=5, callback=done.append)
    apart = pipe(n=5, seed=3, steps=3, batch_size=2)
    assert (together - apart).abs().max() < 1 / 255
    assert done == [5]
    assert (together[0] - pipe(n=1, seed=4, steps=3)[0]).abs().max() > 0.01


def test_an_altered_autoencoder_is_noticed(stage_two, tmp_path):
    model = load_model(stage_two, "diffusion")
    name = next(iter(model.autoencoder.weights))
    model.autoencoder.weights[name] += 1
    save_model(tmp_path / "ckpt.pt", model)
    with pytest.raises(LdmError, match="carries another autoencoder"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "ckpt.pt")
    alone = ModelFile(**{**vars(model), "autoencoder": None})
    save_model(tmp_path / "ckpt.pt", alone)
    with pytest.raises(LdmError, match="lacks"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "ckpt.pt")


def test_another_autoencoder_under_a_started_run_is_refused(stage_one, tmp_path):
    file = tmp_path / "ckpt.pt"
    file.write_bytes((stage_one / "ckpt.pt").read_bytes())
    folder = train_diffusion(diffusion_recipe(file), "tiny", tmp_path / "run")
    (folder / "result.json").unlink()
    model = load_model(file, "autoencoder")
    name = next(iter(model.weights))
    model.weights[name] += 1
    save_model(file, model)
    with pytest.raises(LdmError, match=r"not the autoencoder .* was started with"):
        train_diffusion(diffusion_recipe(file), "tiny", tmp_path / "run")


def test_a_resolution_the_network_cannot_take_is_told_at_once(stage_one, tmp_path):
    recipe = diffusion_recipe(stage_one, "resolution=40")
    with pytest.raises(UsageError, match="resolution=40 must be a multiple of 16"):
        train_diffusion(recipe, "tiny", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_latent_channels_than_the_autoencoders_are_refused(stage_one, tmp_path):
    recipe = diffusion_recipe(stage_one, "network.latent_channels=8")
    with pytest.raises(UsageError, match=r"network.latent_channels=8, but .* has 4"):
        train_diffusion(recipe, "tiny", tmp_path / "run")


def test_stage_two_is_no_stage_one(stage_two, tmp_path):
    with pytest.raises(LdmError, match="is a stage-two diffusion model"):
        train_diffusion(diffusion_recipe(stage_two / "ckpt.pt"), "tiny", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stage_one_does_not_sample(stage_one):
    with pytest.raises(LdmError, match="is a stage-one autoencoder"):
        LatentDiffusionPipeline.from_pretrained(stage_one)
