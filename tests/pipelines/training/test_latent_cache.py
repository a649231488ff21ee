import json

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders import build_autoencoder
from ldm.checkpoint import fingerprint
from ldm.data import DataConfig, batches, open_source
from ldm.errors import Interrupted, LdmError
from ldm.images import to_float
from ldm.run import start_run
from pipelines import latents as latent_cache
from pipelines.codec import Codec
from pipelines.latents import open_cache
from tests.small import autoencoder_recipe, diffusion_recipe

SIDE = 32


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return build_autoencoder(autoencoder_recipe().model).eval()


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "images"
    for i in range(10):
        kind = folder / ("cat" if i % 2 else "dog")
        kind.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(kind / f"{i}.png")
    return DataConfig(source=str(folder), flip=True, held_out=1, workers=0, labels=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(latent_cache, "BLOCK", 4)


def cached(folder, autoencoder, data, *settings, stop=False):
    """The cache that a run of these data and settings opens."""
    recipe = diffusion_recipe("none", *settings)
    recipe = recipe.model_copy(update={"data": data, "cache": str(folder)})
    source = open_source(data, "train", recipe.resolution)
    codec = Codec(autoencoder, torch.zeros(4), torch.ones(4))
    sha = fingerprint(autoencoder.state_dict())
    at = folder.parent / f"run-{len(list(folder.parent.glob('run-*')))}"
    with start_run("diffusion", "tiny", recipe, recipe.run, 1, at) as run:
        if stop:
            run.ask_to_stop()
        return open_cache(recipe, codec, sha, source, run)


def test_it_gives_the_posteriors_of_the_images_that_pixels_would_give(autoencoder, data, tmp_path):
    cache = cached(tmp_path / "cache", autoencoder, data)
    source = open_source(data, "train", SIDE)
    from_pixels = batches(source, data, SIDE, 3, start=4, stop=24, batch_size=4)
    from_cache = cache.batches(3, start=4, stop=24, batch_size=4)
    batches_seen = 0
    for pixels, kept in zip(from_pixels, from_cache, strict=True):
        with torch.no_grad():
            posterior = autoencoder.encode(to_float(pixels.images))
        assert (kept.posterior.mean - posterior.mean).abs().max() < 1e-5
        assert (kept.posterior.logvar - posterior.logvar).abs().max() < 1e-4
        assert torch.equal(kept.labels, pixels.labels) and torch.equal(kept.k, pixels.k)
        batches_seen += 1
    assert batches_seen == 5 and set(kept.labels.tolist()) <= {0, 1}


def test_processes_share_a_batch(autoencoder, data, tmp_path):
    cache = cached(tmp_path / "cache", autoencoder, data)
    whole = torch.cat([b.posterior.mean for b in cache.batches(0, 0, 8, 4)])
    halves = [list(cache.batches(0, 0, 8, 4, rank, 2)) for rank in range(2)]
    joined = [half[step].posterior.mean for step in range(2) for half in halves]
    assert torch.equal(whole, torch.cat(joined))


def test_what_is_missing_is_made_and_what_is_there_is_left(autoencoder, data, tmp_path):
    folder = tmp_path / "cache"
    cached(folder, autoencoder, data)
    blocks = sorted(folder.glob("*.npy"))
    assert [np.load(block).shape[0] for block in blocks] == [4, 4, 1]
    before = {block: block.read_bytes() for block in blocks}
    blocks[1].unlink()
    kept = blocks[0].stat().st_mtime_ns
    cached(folder, autoencoder, data)
    assert {block: block.read_bytes() for block in blocks} == before
    assert blocks[0].stat().st_mtime_ns == kept


def test_a_corrupt_image_is_replaced_as_it_is_from_pixels(autoencoder, data, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.data.loader.TOLERATED", 0.5)
    (tmp_path / "images" / "cat" / "3.png").write_bytes(b"no image")
    cache = cached(tmp_path / "cache", autoencoder, data)
    source = open_source(data, "train", SIDE)
    pixels = next(batches(source, data, SIDE, 0, start=0, stop=9, batch_size=9))
    kept = next(cache.batches(0, 0, 9, 9))
    with torch.no_grad():
        posterior = autoencoder.encode(to_float(pixels.images))
    assert (kept.posterior.mean - posterior.mean).abs().max() < 1e-5
    assert torch.equal(kept.labels, pixels.labels)


def test_one_corrupt_image_of_many_is_no_reason_to_stop(autoencoder, data, tmp_path, monkeypatch):
    """Alone in the last file of latents it is all of that, and a ninth of the images."""
    monkeypatch.setattr("ldm.data.loader.TOLERATED", 0.12)
    names = sorted((tmp_path / "images").rglob("*.png"))
    source = open_source(data, "train", SIDE)
    next(name for name in names if name.match(source.name(8))).write_bytes(b"no image")
    cache = cached(tmp_path / "cache", autoencoder, data)
    assert sum(len(b.k) for b in cache.batches(0, 0, 9, 9)) == 9


def test_latents_of_another_autoencoder_are_refused(autoencoder, data, tmp_path):
    cached(tmp_path / "cache", autoencoder, data)
    next(autoencoder.parameters()).data.add_(1)
    with pytest.raises(LdmError, match="holds latents of another autoencoder"):
        cached(tmp_path / "cache", autoencoder, data)


@pytest.mark.parametrize(
    ("setting", "differs"),
    [("resolution=16", "resolution"), ("run.precision=bf16", "precision")],
)
def test_latents_made_otherwise_are_refused(autoencoder, data, tmp_path, setting, differs):
    cached(tmp_path / "cache", autoencoder, data)
    with pytest.raises(LdmError, match=rf"holds other latents \({differs} differ"):
        cached(tmp_path / "cache", autoencoder, data, setting)


def test_other_images_are_refused_though_they_have_the_same_names(autoencoder, data, tmp_path):
    cached(tmp_path / "cache", autoencoder, data)
    for path in (tmp_path / "images").rglob("*.png"):
        Image.open(path).rotate(90).save(path)
    with pytest.raises(LdmError, match="images_sha256 differ"):
        cached(tmp_path / "cache", autoencoder, data)


@pytest.mark.parametrize("harm", ["cut short", "another shape"])
def test_damaged_latents_are_told_with_the_file_to_delete(autoencoder, data, tmp_path, harm):
    cached(tmp_path / "cache", autoencoder, data)
    block = tmp_path / "cache" / "latents-00001.npy"
    if harm == "cut short":
        block.write_bytes(block.read_bytes()[:-100])
    else:
        np.save(block, np.zeros((4, 2), np.float32))
    with pytest.raises(LdmError, match=r"latents-00001.npy is damaged: delete it"):
        cached(tmp_path / "cache", autoencoder, data)
    block.unlink()
    cached(tmp_path / "cache", autoencoder, data)


def test_it_can_be_stopped_while_it_encodes(autoencoder, data, tmp_path):
    with pytest.raises(Interrupted, match="stopped while encoding into"):
        cached(tmp_path / "cache", autoencoder, data, stop=True)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    (tmp_path / "cache" / ".cache.json.1.partial").touch()
    cached(tmp_path / "cache", autoencoder, data)
    assert not list((tmp_path / "cache").glob(".*.partial"))


def test_a_folder_with_other_files_is_left_alone(autoencoder, data, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("mine")
    with pytest.raises(LdmError, match="is not empty and holds no cache"):
        cached(tmp_path / "cache", autoencoder, data)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["thesis.txt"]


def test_a_damaged_description_is_told(autoencoder, data, tmp_path):
    cached(tmp_path / "cache", autoencoder, data)
    (tmp_path / "cache" / "cache.json").write_text("[")
    with pytest.raises(LdmError, match="is damaged"):
        cached(tmp_path / "cache", autoencoder, data)


def test_latents_that_are_not_finite_are_told_and_not_kept(autoencoder, data, tmp_path):
    next(autoencoder.encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(LdmError, match=r"the latents of .*png are not finite"):
        cached(tmp_path / "cache", autoencoder, data)
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_the_description_says_what_it_is_of(autoencoder, data, tmp_path):
    cached(tmp_path / "cache", autoencoder, data)
    told = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert told["images"] == 9 and told["mirrored"] is True and told["precision"] == "fp32"
    assert told["autoencoder_sha256"] == fingerprint(autoencoder.state_dict())
