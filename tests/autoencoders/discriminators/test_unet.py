import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from autoencoders.discriminators import UNetDiscriminator, UNetDiscriminatorConfig
from ldm.config import validate
from ldm.errors import LdmError, UsageError


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def small(multipliers=(1, 2, 4)):
    return UNetDiscriminator(UNetDiscriminatorConfig(channels=4, multipliers=multipliers))


@pytest.mark.parametrize(
    ("multipliers", "upward"),
    [
        ((1, 2, 4, 8, 16), (8, 4, 2, 1, 1)),
        ((1, 2, 4, 8, 8, 16), (8, 8, 4, 2, 1, 1)),
    ],
)
def test_widths_are_the_papers(multipliers, upward):
    """The multipliers of the U-Net GAN, for 128² and 256², down and up."""
    net = small(multipliers)
    assert tuple(block.conv2.out_channels // 4 for block in net.down) == multipliers
    assert tuple(block.conv2.out_channels // 4 for block in net.up) == upward
    # all but the first read their counterpart's features as well
    skips = [block.conv1.in_channels // 4 for block in net.up]
    assert skips == [multipliers[-1], *(2 * width for width in upward[:-1])]
    bottleneck = []
    net.down[-1].register_forward_hook(lambda _m, _i, out: bottleneck.append(out.shape[-2:]))
    side = 4 * 2 ** len(multipliers)
    net(torch.zeros(1, 3, side, side))
    assert bottleneck == [(4, 4)]


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (64, 24)])
def test_two_heads_at_any_size_it_can_halve(size):
    logits = small()(torch.randn(2, 3, *size))
    assert [tuple(maps.shape) for maps in logits] == [(2, 1, *size), (2, 1)]


def test_pixel_logits_are_linear_in_the_last_features():
    net, features = small(), []
    net.up[-1].register_forward_hook(lambda _m, _i, out: features.append(out))
    pixels, _ = net(torch.randn(2, 3, 16, 16))
    assert (features[0] < 0).any()  # U-Net GAN's code has no activation in between
    torch.testing.assert_close(pixels, net.pixels(features[0]))


def test_spectral_norm_everywhere_but_at_the_last_convolution():
    net = small()
    plain = [
        name
        for name, module in net.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not is_parametrized(module, "weight")
    ]
    assert plain == ["pixels"]


def test_weights_start_orthogonal():
    weight = small().down[1].conv2.parametrizations.weight.original.flatten(1)  # (8, 72)
    torch.testing.assert_close(weight @ weight.T, torch.eye(8), rtol=0, atol=1e-5)


def test_bf16_autocast_answers_in_float32_and_its_vectors_stay_so():
    net = small()
    twin = copy.deepcopy(net)
    images = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(images)
    expected = twin(images)
    for head, other in zip(logits, expected, strict=True):
        assert head.dtype == torch.float32
        assert (head - other).abs().max() < 0.1 * (1 + other.abs().max())
    for (name, value), other in zip(net.named_buffers(), twin.buffers(), strict=True):
        assert value.dtype == torch.float32
        assert torch.equal(value, other), name


def test_names_in_the_state_are_those_of_earlier_checkpoints():
    names = small(multipliers=(1, 2)).state_dict()
    layers = {name.rpartition(".parametrizations")[0] or name for name in names}
    assert {name for name in layers if "." in name and "bias" not in name} == {
        *(f"{way}.{i}.{conv}" for way in ("down", "up") for i in (0, 1)
          for conv in ("conv1", "conv2", "skip")),
        "pixels.weight",
    }  # fmt: skip
    spectral = {name.rpartition(".")[2] for name in names if "parametrizations" in name}
    assert spectral == {"original", "u", "v"}


def test_state_dict_keeps_the_power_iterations_vectors():
    net, twin = small(), small()
    images = torch.randn(1, 3, 16, 16)
    net(images)  # its vectors move
    twin.load_state_dict(net.state_dict())
    for head, other in zip(net.eval()(images), twin.eval()(images), strict=True):
        assert torch.equal(head, other)


@pytest.mark.parametrize("size", [(4, 8), (20, 16), (16, 36)])
def test_a_resolution_it_cannot_halve_is_refused(size):
    with pytest.raises(LdmError) as caught:
        small()(torch.zeros(1, 3, *size))
    said = str(caught.value)
    assert f"{size[0]}×{size[1]} pixels: the U-Net discriminator halves images 3 times" in said
    assert "multiples of 8" in said
    assert "\n" not in said


def test_no_levels_are_refused():
    with pytest.raises(UsageError, match="'multipliers': "):
        validate(UNetDiscriminatorConfig, {"multipliers": []})
