"""Networks that a smoke test uses where the published ones are missing."""

import pytest
import torch

from ldm.metrics.inception import load_extractor
from pipelines.reproduce import rows
from pipelines.reproduce.rows import FEATURES, smoke_esrgan, smoke_lpips


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def images(seed):
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_esrgan_of_random_weights_has_a_useful_gradient(tmp_path):
    loss = smoke_esrgan()
    a, b = images(0).requires_grad_(), images(1)
    value = loss(a, b)
    value.backward()
    assert 0.01 < value.item() < 100 and a.grad.abs().max() > 0
    assert loss(b, b).item() == 0
    assert not list(tmp_path.iterdir()), "nothing is fetched or written"


def test_random_weights_are_the_same_every_time():
    before = torch.get_rng_state()
    for load in (smoke_lpips, smoke_esrgan):
        values = [load()(images(0), images(1)).item() for _ in range(2)]
        assert values[0] == values[1] > 0
    assert torch.equal(before, torch.get_rng_state())


def test_published_weights_come_first(monkeypatch):
    monkeypatch.setattr(rows, "find_lpips", lambda: "published LPIPS")
    monkeypatch.setattr(rows, "has_backbone", lambda network: network == "VGG-19")
    monkeypatch.setattr(rows, "load_esrgan", lambda: "published VGG-19")
    assert (smoke_lpips(), smoke_esrgan()) == ("published LPIPS", "published VGG-19")


def test_features_tell_images_apart():
    extractor = load_extractor(FEATURES, "clean", None, "cpu", 32)
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    pixels[1, 0, :16, :16] = 255
    features = extractor(pixels)
    assert features.shape == (2, 12) and not extractor.is_published
    assert features[1].tolist() == [255.0] + 11 * [0.0]
