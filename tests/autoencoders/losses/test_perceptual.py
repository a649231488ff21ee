import copy
import warnings

import pytest
import torch
from torch import nn

from autoencoders.losses.perceptual import LPIPS, find_lpips, load_lpips
from ldm.errors import LdmError


@pytest.fixture
def pair():
    return tuple(torch.rand(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def test_equals_the_package(random_lpips, pair):
    with torch.no_grad():
        expected = random_lpips(*pair).mean()
        torch.testing.assert_close(LPIPS(random_lpips)(*pair), expected, rtol=1e-5, atol=0)
    assert expected > 0


def test_each_pair_by_itself(random_lpips, pair):
    lpips = LPIPS(random_lpips)
    each = lpips.each(*pair)
    alone = torch.stack([lpips(a[None], b[None]) for a, b in zip(*pair, strict=True)])
    assert each.shape == (2,)
    torch.testing.assert_close(each, alone, rtol=1e-5, atol=0)


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


FILES = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


@pytest.mark.parametrize("network", FILES)
def test_loads_the_backbone_from_torch_hub(hub, network, pair, capfd):
    """Random numbers under torchvision's names, against the package on the same backbone."""
    import lpips

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        package = lpips.LPIPS(net=network, pnet_rand=True, verbose=False).eval()
    layers = {
        f"features.{name.partition('.')[2]}": tensor
        for name, tensor in package.net.state_dict().items()
    }
    torch.save(layers | {"classifier.0.weight": torch.zeros(1)}, hub / FILES[network])
    state_before = torch.random.get_rng_state()
    loaded = load_lpips(network=network)
    assert torch.equal(torch.random.get_rng_state(), state_before)
    with torch.no_grad():
        expected = package(*pair).mean()
        torch.testing.assert_close(loaded(*pair), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(find_lpips(network=network)(*pair), expected, rtol=1e-5, atol=0)
    assert expected > 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("network", FILES)
def test_torchvisions_own_names_fit(hub, network):
    """A file of torchvision's whole classifier, like the published ones."""
    import torchvision

    name = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}[network]
    with torch.device("meta"):
        classifier = getattr(torchvision.models, name)()
    tensors = {k: torch.zeros(v.shape) for k, v in classifier.features.state_dict().items()}
    torch.save({f"features.{k}": v for k, v in tensors.items()}, hub / FILES[network])
    loaded = load_lpips(network=network)
    assert sum(p.numel() for p in loaded.network.net.parameters()) == sum(
        p.numel() for p in classifier.features.parameters()
    )
    assert not any(p.any() for p in loaded.network.net.parameters())


@pytest.mark.parametrize("network", FILES)
def test_find_without_the_file_fetches_nothing(hub, network, capfd):
    assert find_lpips(network=network) is None
    assert capfd.readouterr() == ("", "")
    assert not list(hub.iterdir())


def test_float32_under_autocast(random_lpips, pair):
    distance = LPIPS(random_lpips)
    with torch.no_grad():
        expected = distance(*pair)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(distance(*pair), expected)


@pytest.mark.parametrize("network", FILES)
def test_missing_weights_say_what_to_do(hub, network, capfd):
    with pytest.raises(LdmError) as caught:
        load_lpips(network=network)
    said = str(caught.value)
    assert f"{FILES[network]} is not on this machine" in said
    assert f"put the file at {hub}" in said
    assert said.endswith("or turn the loss off with loss.lpips=0")
    assert "\n" not in said
    assert not list(hub.iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"features.0.weight": torch.zeros(3)}, "not torchvision's VGG-16"),
        ([1, 2], "not torchvision's VGG-16"),
        (None, "damaged"),
    ],
)
@pytest.mark.parametrize("load", [load_lpips, find_lpips])
def test_another_file_under_that_name(hub, load, content, said):
    path = hub / "vgg16-397923af.pth"
    torch.save(content, path) if content is not None else path.write_bytes(b"PK\x03\x04")
    with pytest.raises(LdmError, match=said):
        load()
