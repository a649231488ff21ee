"""Networks of random weights, found where the published ones would be."""

import os

import pytest
import torch

from autoencoders.losses import load_esrgan, load_lpips
from autoencoders.losses.perceptual import has_backbone
from ldm.metrics.inception import load_extractor
from pipelines.reproduce.rows import FEATURES, random_backbone


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def images(seed):
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_esrgans_loss_and_its_gradient_are_of_a_size_that_counts(tmp_path):
    with random_backbone("VGG-19"):
        loss = load_esrgan()
        assert not has_backbone("VGG-16")
    a, b = images(0).requires_grad_(), images(1)
    value = loss(a, b)
    value.backward()
    assert 0.01 < value.item() < 100 and a.grad.abs().max() > 0
    assert loss(b, b).item() == 0
    assert os.environ["TORCH_HOME"] == str(tmp_path) and not has_backbone("VGG-19")


def test_lpips_and_the_same_weights_every_time():
    values = []
    for _ in range(2):
        with random_backbone("VGG-16"):
            values.append(load_lpips()(images(0), images(1)).item())
    assert values[0] == values[1] > 0


def test_published_weights_come_first(tmp_path):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "vgg16-397923af.pth").touch()
    with random_backbone("VGG-16"):
        assert os.environ["TORCH_HOME"] == str(tmp_path)
    with random_backbone("VGG-19", wanted=False):
        assert not has_backbone("VGG-19")


def test_features_tell_images_apart():
    extractor = load_extractor(FEATURES, "clean", None, "cpu", 32)
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    pixels[1, 0, :16, :16] = 255
    features = extractor(pixels)
    assert features.shape == (2, 12) and not extractor.is_published
    assert features[1].tolist() == [255.0] + 11 * [0.0]
