import pytest
import torch
from torch import nn
from torchvision.models import vgg19

from autoencoders.losses.perceptual import load_esrgan
from ldm.errors import LdmError

FILE = "vgg19-dcbb9e9d.pth"


@pytest.fixture(scope="module")
def features():
    """Torchvision's own VGG-19 with made-up numbers, all of its feature layers."""
    with torch.device("meta"):
        network = vgg19().features
    rng = torch.Generator().manual_seed(0)
    network.load_state_dict(
        {
            # of a scale at which features neither vanish nor overflow on the way
            name: torch.randn(v.shape, generator=rng) * (2 / max(1, v[0].numel())) ** 0.5
            for name, v in network.state_dict().items()
        },
        assign=True,
    )
    return network.eval().requires_grad_(False)


@pytest.fixture
def published(hub, features):
    tensors = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save(tensors | {"classifier.0.weight": torch.zeros(1)}, hub / FILE)
    return load_esrgan


@pytest.fixture
def pair():
    return tuple(torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def normalise(images):
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    return (images / 2 + 0.5 - mean) / std


def test_is_l1_of_the_last_convolutions_output(published, features, pair):
    """Torchvision's network, read by a hook at its sixteenth convolution: VGG-19 has no more."""
    convolutions = [layer for layer in features if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 16
    seen = []
    hook = convolutions[-1].register_forward_hook(lambda _m, _i, out: seen.append(out.clone()))
    with torch.no_grad():
        for images in pair:
            features(normalise(images))
    hook.remove()
    assert (seen[0] < 0).any()  # before activation
    expected = (seen[0] - seen[1]).abs().mean()
    assert expected > 0.01
    torch.testing.assert_close(published()(*pair), expected, rtol=1e-4, atol=0)


def test_equal_images_cost_nothing(published, pair):
    assert published()(pair[0], pair[0]).item() == 0


def test_frozen_asleep_and_out_of_every_tree(published, pair):
    state_before = torch.random.get_rng_state()
    parent = nn.Module()
    parent.perceptual = published()
    assert torch.equal(torch.random.get_rng_state(), state_before)
    assert not parent.state_dict()
    assert not any(p.requires_grad for p in parent.perceptual.network.parameters())
    recon = pair[0].clone().requires_grad_()
    parent.perceptual(recon, pair[1]).backward()
    assert recon.grad.isfinite().all()
    assert recon.grad.abs().max() > 0


def test_float32_under_autocast(published, pair):
    distance = published()
    expected = distance(*pair)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(*pair), expected)
        half = distance(*(images.bfloat16() for images in pair))
    assert half.dtype == torch.float32


def test_missing_weights_say_what_to_do(hub, capfd):
    with pytest.raises(LdmError) as caught:
        load_esrgan()
    said = str(caught.value)
    assert f"{FILE} is not on this machine" in said
    assert f"put the file at {hub}" in said
    assert said.endswith("or turn the loss off with loss.esrgan=0")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"features.0.weight": torch.zeros(3)}, "not torchvision's VGG-19"),
        ([1, 2], "not torchvision's VGG-19"),
        (None, "damaged"),
    ],
)
def test_another_file_under_that_name(hub, content, said):
    path = hub / FILE
    torch.save(content, path) if content is not None else path.write_bytes(b"PK\x03\x04")
    with pytest.raises(LdmError, match=said):
        load_esrgan()
