"""The codec; batches of latents, encoded on the fly or from a cache."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders import DiagonalGaussian, build_autoencoder
from diffusion.augment import augment, draw_augmentation
from diffusion.edm import sample_sigma
from ldm.checkpoint import fingerprint
from ldm.data import DataConfig, batches, open_source
from ldm.device import one_ahead
from ldm.errors import Interrupted, LdmError
from ldm.images import to_float
from ldm.run import start_run
from ldm.seeds import normal
from pipelines import latents
from pipelines.latents import (
    Codec,
    LatentBatch,
    LatentCache,
    latent_batches,
    measure_latents,
    open_cache,
)
from pipelines.recipes import fit
from tests.small import autoencoder_recipe, diffusion_recipe


# ------------------------------------------------------------------------------- the codec
@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return build_autoencoder(autoencoder_recipe().model).eval()


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) * 2 - 1


def test_statistics_are_those_of_the_sampled_latents(autoencoder):
    with torch.no_grad():
        mean, std = measure_latents(map(autoencoder.encode, images(48).split(8)))
        posterior = autoencoder.encode(images(48))
        draws = torch.stack([
            posterior.sample(torch.Generator().manual_seed(i)) for i in range(200)
        ]).double()  # fmt: skip
    flat = draws.transpose(0, 2).flatten(1)
    assert torch.allclose(mean, flat.mean(1), atol=5e-3)
    assert torch.allclose(std, flat.std(1), rtol=5e-3)


def test_statistics_of_the_means_leave_the_posteriors_width_out():
    mean = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    posteriors = [DiagonalGaussian(mean, torch.full_like(mean, 1.0))]
    _, of_draws = measure_latents(posteriors)
    _, of_means = measure_latents(posteriors, drawn=False)
    torch.testing.assert_close(of_means, mean.double().transpose(0, 1).flatten(1).std(1, False))
    torch.testing.assert_close(of_draws.square() - of_means.square(), torch.ones(2).double().exp())


def test_z_is_standardised_to_sigma_data(autoencoder):
    with torch.no_grad():
        mean, std = measure_latents(map(autoencoder.encode, images(48).split(8)))
    codec = Codec(autoencoder, mean, std, sigma_data=0.5)
    noise = torch.randn(48, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    z = codec.encode(images(48), noise)
    assert z.mean((0, 2, 3)).abs().max() < 0.03
    assert (z.std((0, 2, 3)) - 0.5).abs().max() < 0.03


def test_decode_undoes_the_standardisation(autoencoder):
    codec = Codec(autoencoder, torch.tensor([1.0, -2, 3, 0.5]), torch.tensor([2.0, 0.1, 1, 7]))
    with torch.no_grad():
        direct = autoencoder.decode(autoencoder.encode(images(2)).mode()).clamp(-1, 1)
    assert (codec.decode(codec.encode(images(2))) - direct).abs().max() < 1e-4
    again = Codec.from_statistics(autoencoder, codec.statistics())
    assert torch.equal(again.encode(images(2)), codec.encode(images(2)))


def test_it_is_frozen_whatever_happens(autoencoder):
    codec = Codec(autoencoder, torch.zeros(4), torch.ones(4)).train()
    assert not codec.training and not codec.autoencoder.training
    assert not any(p.requires_grad for p in codec.parameters())


@pytest.mark.parametrize("std", [[1, 1, 0, 1], [1, float("nan"), 1, 1]])
def test_degenerate_statistics_are_told(autoencoder, std):
    with pytest.raises(LdmError, match="degenerate"):
        Codec(autoencoder, torch.zeros(4), torch.tensor(std).float())


def test_pixels_in_the_wrong_range_are_told(autoencoder):
    with pytest.raises(ValueError, match="must lie in"):
        Codec(autoencoder, torch.zeros(4), torch.ones(4)).encode(images(1) * 255)


def test_z_has_the_layout_that_training_is_quick_in(autoencoder):
    """Channels last, which the encoder is quick in, costs a UNet's training step a fifth here."""
    codec = Codec(autoencoder, torch.zeros(4), torch.ones(4))
    assert codec.encode(images(2)).is_contiguous()
    assert codec.encode(images(2), torch.randn(2, 4, 4, 4)).is_contiguous()


# ------------------------------------------------------------------------ training batches
@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    autoencoder = build_autoencoder(autoencoder_recipe().model)
    return Codec(autoencoder, torch.zeros(4), torch.ones(4))


LABELLED = ["augment.probability=0.5", "data={labels: true, flip: false}"]


def stream(codec, folder, *settings, start=0):
    recipe = diffusion_recipe("none", *settings)
    source = open_source(recipe.data, "train", recipe.resolution)
    recipe = fit(recipe, codec.autoencoder, len(source.classes))
    with start_run("diffusion", "tiny", recipe, recipe.run, recipe.accumulate, folder) as run:
        return recipe, list(latent_batches(run, recipe, codec, source, None, start))


def test_every_draw_is_a_function_of_seed_and_image(codec, tmp_path):
    recipe, got = stream(codec, tmp_path / "run", "posterior=sample")
    assert [k for k, _ in got] == list(range(0, 32, 4))
    source = open_source(recipe.data, "train", 32)
    for (k, batch), raw in zip(got, batches(source, recipe.data, 32, 0, 0, 32, 4), strict=True):
        ks = range(k, k + 4)
        noise = normal(0, "posterior", ks, (4, 4, 4))
        torch.testing.assert_close(batch.z, codec.encode(to_float(raw.images), noise))
        assert torch.equal(batch.noise, normal(0, "noise", ks, (4, 4, 4)))
        sigma = sample_sigma(normal(0, "sigma", ks, ()), recipe.denoiser)
        assert torch.equal(batch.sigma, sigma)
        assert batch.labels is None and batch.augment is None


def test_stream_resumes_at_any_image(codec, tmp_path):
    _, whole = stream(codec, tmp_path / "run", *LABELLED)
    _, rest = stream(codec, tmp_path / "run", *LABELLED, start=20)
    for (k, ours), (other, theirs) in zip(rest, whole[5:], strict=True):
        assert k == other
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_posterior_mean_needs_no_draw(codec, tmp_path):
    recipe, got = stream(codec, tmp_path / "run", "posterior=mean")
    source = open_source(recipe.data, "train", 32)
    raw = next(batches(source, recipe.data, 32, 0, 0, 4, 4))
    torch.testing.assert_close(got[0][1].z, codec.encode(to_float(raw.images)))


def test_pixels_and_condition_are_augmented_alike(codec, tmp_path):
    recipe, got = stream(
        codec, tmp_path / "run", "augment.probability=1", "data.flip=false", "posterior=mean"
    )
    assert recipe.network.augment_parameters == 9
    source = open_source(recipe.data, "train", 32)
    raw = next(batches(source, recipe.data, 32, 0, 0, 4, 4))
    parameters = draw_augmentation(0, range(4), recipe.augment)
    batch = got[0][1]
    assert torch.equal(batch.augment, parameters) and parameters.any()
    moved = augment(to_float(raw.images), parameters)
    torch.testing.assert_close(batch.z, codec.encode(moved))


def test_label_dropout_is_the_share_of_hidden_labels(codec, tmp_path):
    settings = ["data.labels=true", "steps=64", "label_dropout=0.25"]
    recipe, got = stream(codec, tmp_path / "run", *settings)
    assert recipe.network.classes == 8
    labels = torch.cat([batch.labels for _, batch in got])
    assert 0.15 < (labels == -1).float().mean() < 0.35
    _, shown = stream(codec, tmp_path / "other", "data.labels=true", "label_dropout=0", "steps=64")
    truth = torch.cat([batch.labels for _, batch in shown])
    assert truth.min() >= 0 and torch.equal(labels[labels >= 0], truth[labels >= 0])


def test_one_ahead_changes_nothing_on_a_cpu():
    assert list(one_ahead([1, 2, 3], str, torch.device("cpu"))) == ["1", "2", "3"]
    assert list(one_ahead([], str, torch.device("cpu"))) == []


class OnGpu(torch.Tensor):
    """A tensor that claims to be on a GPU and records the stream that reads it."""

    is_cuda = True

    def record_stream(self, stream):
        self.read_on = stream.name


class Stream:
    """A CUDA stream that logs its calls."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __enter__(self):
        self.log.append(f"on {self.name}")

    def __exit__(self, *_):
        self.log.append(f"off {self.name}")

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        return f"event of {self.name}"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")


def test_one_ahead_begins_the_next_before_yielding_on_a_gpu(monkeypatch):
    log = []
    side, main = Stream(log, "side"), Stream(log, "main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)

    def prepare(item):
        log.append(f"prepare {item}")
        z, labels = torch.zeros(1).as_subclass(OnGpu), torch.zeros(1)  # these stay on the CPU
        return item, LatentBatch(z, z, z, labels, None)

    for item, batch in one_ahead([1, 2, 3], prepare, torch.device("cuda")):
        log.append(f"use {item}")
        assert batch.z.read_on == "main"
    begin = [["on side", f"prepare {i}", "off side"] for i in (1, 2, 3)]
    hand_out = ["main waits for event of side"]
    assert log == [
        "side waits for main", *begin[0], *begin[1], *hand_out, "use 1",
        *begin[2], *hand_out, "use 2", *hand_out, "use 3",
    ]  # fmt: skip


# -------------------------------------------------------------------------------- the cache
@pytest.mark.parametrize("from_cache", [False, True])
def test_batches_are_the_same_whichever_process_loads_and_draws(
    codec, data, tmp_path, from_cache, monkeypatch
):
    monkeypatch.setattr(latents, "BLOCK", 1000)  # as in a worker
    settings = ["posterior=sample", "label_dropout=0.5", "steps=3", "data.flip=false"]
    if not from_cache:
        settings.append("augment.probability=0.5")
        data = data.model_copy(update={"flip": False})
    recipe = diffusion_recipe("none", *settings).model_copy(update={"data": data})
    source = open_source(data, "train", SIDE)
    recipe = fit(recipe, codec.autoencoder, len(source.classes))
    cache = cached(tmp_path / "cache", codec.autoencoder, data) if from_cache else None
    seen = []
    for workers in (0, 2):
        loaded = recipe.model_copy(update={"data": data.model_copy(update={"workers": workers})})
        with start_run("diffusion", "x", recipe, recipe.run, 1, tmp_path / f"{workers}") as run:
            seen.append(list(latent_batches(run, loaded, codec, source, cache, 0)))
    assert len(seen[0]) == 3
    for (k, here), (same_k, there) in zip(*seen, strict=True):
        assert k == same_k and here.labels is not None
        assert torch.equal(here.noise, normal(0, "noise", range(k, k + len(here.z)), (4, 4, 4)))
        for one, other in zip(here, there, strict=True):
            assert one is other is None or torch.equal(one, other)


SIDE = 32


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
    monkeypatch.setattr(latents, "BLOCK", 4)


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
            run.request_stop()
        return open_cache(recipe, codec, sha, source, run)


def test_cache_gives_the_posteriors_of_the_same_images(autoencoder, data, tmp_path):
    cache = cached(tmp_path / "cache", autoencoder, data)
    source = open_source(data, "train", SIDE)
    from_pixels = batches(source, data, SIDE, 3, start=4, stop=24, batch_size=4)
    from_cache = cache.batches(3, start=4, stop=24, batch_size=4)
    batches_seen = 0
    for pixels, (kept, ks, labels, _) in zip(from_pixels, from_cache, strict=True):
        with torch.no_grad():
            posterior = autoencoder.encode(to_float(pixels.images))
        assert (kept.mean - posterior.mean).abs().max() < 1e-5
        assert (kept.logvar - posterior.logvar).abs().max() < 1e-4
        assert torch.equal(labels, pixels.labels) and ks == pixels.k.tolist()
        batches_seen += 1
    assert batches_seen == 5 and set(labels.tolist()) <= {0, 1}


def test_processes_share_a_cached_batch(autoencoder, data, tmp_path):
    cache = cached(tmp_path / "cache", autoencoder, data)
    whole = torch.cat([posterior.mean for posterior, *_ in cache.batches(0, 0, 8, 4)])
    halves = [list(cache.batches(0, 0, 8, 4, rank, 2)) for rank in range(2)]
    steps = [torch.stack([half[step][0].mean for half in halves], 1) for step in range(2)]
    assert torch.equal(whole, torch.cat(steps).flatten(0, 1))


def test_only_missing_blocks_are_encoded(autoencoder, data, tmp_path):
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


def test_corrupt_image_is_replaced_as_from_pixels(autoencoder, data, tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.data.loader.TOLERATED", 0.5)
    (tmp_path / "images" / "cat" / "3.png").write_bytes(b"no image")
    cache = cached(tmp_path / "cache", autoencoder, data)
    source = open_source(data, "train", SIDE)
    pixels = next(batches(source, data, SIDE, 0, start=0, stop=9, batch_size=9))
    kept, _, labels, _ = next(cache.batches(0, 0, 9, 9))
    with torch.no_grad():
        posterior = autoencoder.encode(to_float(pixels.images))
    assert (kept.mean - posterior.mean).abs().max() < 1e-5
    assert torch.equal(labels, pixels.labels)


def test_corrupt_images_are_counted_over_the_whole_source(autoencoder, data, tmp_path, monkeypatch):
    """The corrupt image is all of its block, and a ninth of the images."""
    monkeypatch.setattr("ldm.data.loader.TOLERATED", 0.12)
    names = sorted((tmp_path / "images").rglob("*.png"))
    source = open_source(data, "train", SIDE)
    next(name for name in names if name.match(source.name(8))).write_bytes(b"no image")
    cache = cached(tmp_path / "cache", autoencoder, data)
    assert sum(len(ks) for _, ks, *_ in cache.batches(0, 0, 9, 9)) == 9


def test_latents_of_another_autoencoder_are_refused(autoencoder, data, tmp_path):
    cached(tmp_path / "cache", autoencoder, data)
    next(autoencoder.parameters()).data.add_(1)
    with pytest.raises(LdmError, match="holds latents of another autoencoder"):
        cached(tmp_path / "cache", autoencoder, data)


@pytest.mark.parametrize(
    ("setting", "differs"),
    [("resolution=16", "resolution"), ("run.precision=bf16", "precision")],
)
def test_latents_of_other_settings_are_refused(autoencoder, data, tmp_path, setting, differs):
    cached(tmp_path / "cache", autoencoder, data)
    with pytest.raises(LdmError, match=rf"holds other latents \({differs} differ"):
        cached(tmp_path / "cache", autoencoder, data, setting)


def test_other_images_of_the_same_names_are_refused(autoencoder, data, tmp_path):
    cached(tmp_path / "cache", autoencoder, data)
    for path in (tmp_path / "images").rglob("*.png"):
        Image.open(path).rotate(90).save(path)
    with pytest.raises(LdmError, match="images_sha256 differ"):
        cached(tmp_path / "cache", autoencoder, data)


@pytest.mark.parametrize("harm", ["cut short", "another shape"])
def test_damaged_block_error_names_the_file(autoencoder, data, tmp_path, harm):
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


def test_encoding_can_be_interrupted(autoencoder, data, tmp_path):
    with pytest.raises(Interrupted, match="stopped while encoding into"):
        cached(tmp_path / "cache", autoencoder, data, stop=True)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    (tmp_path / "cache" / ".cache.json.1.partial").touch()
    cached(tmp_path / "cache", autoencoder, data)
    assert not list((tmp_path / "cache").glob(".*.partial"))


def test_folder_of_other_files_is_refused(autoencoder, data, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("mine")
    with pytest.raises(LdmError, match="is not empty and holds no cache"):
        cached(tmp_path / "cache", autoencoder, data)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["thesis.txt"]


def test_damaged_manifest_is_refused(autoencoder, data, tmp_path):
    cached(tmp_path / "cache", autoencoder, data)
    (tmp_path / "cache" / "cache.json").write_text("[")
    with pytest.raises(LdmError, match="is damaged"):
        cached(tmp_path / "cache", autoencoder, data)


def test_latents_that_are_not_finite_are_not_kept(autoencoder, data, tmp_path):
    next(autoencoder.encoder.parameters()).data.fill_(float("nan"))
    with pytest.raises(LdmError, match=r"corrupt.*png \(latents not finite: train the autoencoder"):
        cached(tmp_path / "cache", autoencoder, data)
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_one_image_with_latents_that_are_not_finite_counts_as_corrupt(
    autoencoder, data, tmp_path, monkeypatch, caplog
):
    def spoiled(codec, images):
        posterior = posterior_of(codec, images)
        posterior.mean[0, 0, 0, 0] = float("inf")
        return posterior

    posterior_of = Codec.posterior
    monkeypatch.setattr(Codec, "posterior", spoiled)
    monkeypatch.setattr("ldm.data.loader.TOLERATED", 0.5)
    cache = cached(tmp_path / "cache", autoencoder, data)
    bad = {name for name in map(cache.source.name, range(9)) if name in caplog.text}
    assert len(bad) == 3 and "latents not finite" in caplog.text  # of three blocks
    loaded = [cache.load(0, k) for k in range(9)]
    assert not bad & {cache.source.name(index) for _, index in loaded}


@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_cached_latents_that_are_not_finite_name_image_and_file(
    autoencoder, data, tmp_path, damage
):
    cache = cached(tmp_path / "cache", autoencoder, data)
    block = np.load(path := tmp_path / "cache" / "latents-00001.npy")
    block[1, :, 1, 2, 3, 0] = damage
    np.save(path, block)
    cache = LatentCache(tmp_path / "cache", cache.source, block.shape[1:])
    with pytest.raises(LdmError) as refused:
        [cache.load(0, k) for k in range(9)]
    name = cache.source.name(5)
    assert str(refused.value).startswith(f"{path} is damaged: the latents of {name} are not finite")


def test_a_cache_without_an_image_is_an_error(autoencoder, data, tmp_path):
    cache = cached(tmp_path / "cache", autoencoder, data)
    for path in (tmp_path / "cache").glob("*.npy"):
        np.save(path, np.full_like(np.load(path), np.nan))
    shape = np.load(path).shape[1:]
    with pytest.raises(LdmError, match="delete it, and it is encoded again"):
        LatentCache(tmp_path / "cache", cache.source, shape).load(0, 0)


def test_manifest_identifies_the_latents(autoencoder, data, tmp_path):
    cached(tmp_path / "cache", autoencoder, data)
    manifest = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert manifest["images"] == 9 and manifest["mirrored"] is True
    assert manifest["precision"] == "fp32"
    assert manifest["autoencoder_sha256"] == fingerprint(autoencoder.state_dict())
