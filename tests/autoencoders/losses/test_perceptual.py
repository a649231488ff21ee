import copy
import urllib.error

import pytest
import torch
from torch import nn

from autoencoders.losses.perceptual import LPIPS, load_lpips
from ldm.errors import LdmError


@pytest.fixture
def pair():
    return tuple(torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub, and no network."""

    def no_network(*_args, **_kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


def test_equals_the_package(random_lpips, pair):
    with torch.no_grad():
        expected = random_lpips(*pair).mean()
        torch.testing.assert_close(LPIPS(random_lpips)(*pair), expected, rtol=1e-5, atol=0)
    assert expected > 0


def test_faint_features_give_finite_gradients(random_lpips):
    """Features whose squares vanish in float32: the package's own gradient is not a number."""
    faint = copy.deepcopy(random_lpips)
    with torch.no_grad():
        for name, parameter in faint.net.named_parameters():
            parameter.fill_(1e-25 if name.endswith("bias") else 0)
    images = torch.zeros(1, 3, 32, 32)
    for distance, finite in ((LPIPS(faint), True), (faint, False)):
        recon = images.clone().requires_grad_()
        loss = distance(recon, images)
        loss.sum().backward()
        assert loss.item() == 0
        assert recon.grad.isfinite().all().item() == finite


def test_frozen_asleep_and_out_of_every_tree(random_lpips, pair):
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.perceptual = LPIPS(random_lpips.train())

    parent = Parent().train()
    assert not parent.state_dict()
    assert not list(parent.parameters())
    assert not any(module.training for module in random_lpips.modules())
    assert not any(parameter.requires_grad for parameter in random_lpips.parameters())
    recon = pair[0].clone().requires_grad_()
    parent.perceptual(recon, pair[1]).backward()
    assert recon.grad.abs().max() > 0


def test_loads_the_trunk_from_torch_hub(hub, random_lpips, pair, capfd):
    layers = {
        f"features.{name.partition('.')[2]}": tensor
        for name, tensor in random_lpips.net.state_dict().items()
    }
    torch.save(layers | {"classifier.0.weight": torch.zeros(1)}, hub / "vgg16-397923af.pth")
    state_before = torch.random.get_rng_state()
    loaded = load_lpips()
    assert torch.equal(torch.random.get_rng_state(), state_before)
    with torch.no_grad():
        assert torch.equal(loaded(*pair), LPIPS(random_lpips)(*pair))
    assert capfd.readouterr() == ("", "")


def test_missing_weights_say_what_to_do(hub, capfd):
    with pytest.raises(LdmError) as caught:
        load_lpips()
    said = str(caught.value)
    assert "vgg16-397923af.pth is not on this machine" in said
    assert f"put the file at {hub}" in said
    assert said.endswith("or turn the loss off with loss.lpips=0")
    assert "\n" not in said
    assert not list(hub.iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"features.0.weight": torch.zeros(3)}, "no VGG-16"),
        ([1, 2], "no VGG-16"),
        (None, "damaged"),
    ],
)
def test_another_file_under_that_name(hub, content, said):
    path = hub / "vgg16-397923af.pth"
    torch.save(content, path) if content is not None else path.write_bytes(b"PK\x03\x04")
    with pytest.raises(LdmError, match=said):
        load_lpips()
