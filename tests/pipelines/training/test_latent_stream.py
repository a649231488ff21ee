import pytest
import torch

from autoencoders import build_autoencoder
from diffusion.augment import augment, draw_augmentation
from diffusion.edm import sample_sigma
from ldm.data import batches, open_source
from ldm.images import to_float
from ldm.run import start_run
from ldm.seeds import normal
from pipelines.codec import Codec
from pipelines.latents import LatentBatch, latent_batches, one_ahead
from pipelines.recipes import fit
from tests.small import autoencoder_recipe, diffusion_recipe


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    autoencoder = build_autoencoder(autoencoder_recipe().model)
    return Codec(autoencoder, torch.zeros(4), torch.ones(4))


TOLD = ["augment.probability=0.5", "data={labels: true, flip: false}"]


def stream(codec, folder, *settings, start=0):
    recipe = diffusion_recipe("none", *settings)
    source = open_source(recipe.data, "train", recipe.resolution)
    recipe = fit(recipe, codec.autoencoder, source)
    with start_run("diffusion", "tiny", recipe, recipe.run, recipe.accumulate, folder) as run:
        return recipe, list(latent_batches(run, recipe, codec, source, None, start))


def test_every_draw_belongs_to_its_image(codec, tmp_path):
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


def test_it_goes_on_where_a_run_was_stopped(codec, tmp_path):
    _, whole = stream(codec, tmp_path / "run", *TOLD)
    _, rest = stream(codec, tmp_path / "run", *TOLD, start=20)
    for (k, ours), (other, theirs) in zip(rest, whole[5:], strict=True):
        assert k == other
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_mean_needs_no_draw(codec, tmp_path):
    recipe, got = stream(codec, tmp_path / "run", "posterior=mean")
    source = open_source(recipe.data, "train", 32)
    raw = next(batches(source, recipe.data, 32, 0, 0, 4, 4))
    torch.testing.assert_close(got[0][1].z, codec.encode(to_float(raw.images)))


def test_pixels_are_augmented_and_the_network_is_told(codec, tmp_path):
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


def test_labels_are_hidden_as_often_as_asked(codec, tmp_path):
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
    """A tensor that says it is on a GPU, and notes which stream reads it."""

    is_cuda = True

    def record_stream(self, stream):
        self.read_on = stream.name


class Stream:
    """A CUDA stream that writes down what it is asked for."""

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


def test_on_a_gpu_the_next_is_begun_before_this_one_is_handed_out(monkeypatch):
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
