import math

import numpy as np
import pytest
import torch
from scipy.signal import upfirdn
from torch import nn
from torch.nn import functional as F

from autoencoders.discriminators import Blur, StyleGANConfig, StyleGANDiscriminator


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def scipy_blur(x, padding, stride):
    """(B, C, H, W) in float64: pad by zeros, filter along either side, keep every stride-th."""
    x = np.pad(x.double().numpy(), [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    taps = np.array([1, 3, 3, 1]) / 8
    for axis in (2, 3):
        full = upfirdn(taps, x, axis=axis)  # the filter hangs over by 3 at either end
        x = np.take(full, np.arange(3, x.shape[axis], stride), axis=axis)
    return torch.from_numpy(x)


@pytest.mark.parametrize(("padding", "stride"), [(2, 1), (1, 2)])
def test_blur_is_scipys(padding, stride):
    x = torch.randn(2, 3, 8, 12)
    expected = scipy_blur(x, padding, stride)
    torch.testing.assert_close(Blur()(x, padding, stride).double(), expected, rtol=0, atol=1e-6)


def test_blur_keeps_flat_images():
    flat = torch.full((1, 2, 8, 8), 0.25)
    torch.testing.assert_close(Blur()(flat, padding=0), flat[..., :5, :5])


def test_golden_parameter_counts():
    """Of the official network at 1024² (29,012,513), less the channel of the standard deviation."""
    net = StyleGANDiscriminator(StyleGANConfig(resolution=1024))
    count = sum(p.numel() for p in net.parameters())
    assert count + 512 * 3 * 3 == 29_012_513


@pytest.mark.parametrize(
    ("resolution", "widths"),
    [
        (64, [512, 512, 512, 512, 512]),
        (128, [256, 512, 512, 512, 512, 512]),
        (256, [128, 256, 512, 512, 512, 512, 512]),
        (1024, [32, 64, 128, 256, 512, 512, 512, 512, 512]),
    ],
)
def test_default_widths_are_the_papers(resolution, widths):
    assert StyleGANConfig(resolution=resolution).widths == widths


def by_the_paper(state, images, blocks):
    """The network once more from its tensors, in float64: nothing of ours but their names."""

    def act(x):
        return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)

    def weight(name):
        unit = state[f"{name}.parametrizations.weight.original"]
        return unit / math.prod(unit.shape[1:]) ** 0.5

    def conv(name, x, **how):
        return F.conv2d(x, weight(name), state.get(f"{name}.bias"), **how)

    x = act(conv("from_rgb", images))
    for i in range(blocks):
        h = act(conv(f"blocks.{i}.conv1", x, padding=1))
        h = act(conv(f"blocks.{i}.conv2", scipy_blur(h, 2, 1), stride=2))
        # the skip as the paper has it: filter, then a convolution that drops pixels
        skip = conv(f"blocks.{i}.skip", scipy_blur(x, 1, 1), stride=2)
        x = (h + skip) / math.sqrt(2)
    x = act(conv("conv", x, padding=1)).flatten(1)
    x = act(x @ weight("linear").T + state["linear.bias"])
    return x @ weight("logit").T + state["logit.bias"]


def test_is_the_papers_layer_by_layer():
    config = StyleGANConfig(resolution=32, channels=4, max_channels=8)
    net = StyleGANDiscriminator(config)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
        images = torch.rand(2, 3, 32, 32) * 2 - 1
        (logits,) = net(images)
        state = {name: tensor.double() for name, tensor in net.state_dict().items()}
        expected = by_the_paper(state, images.double(), blocks=3)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)


def test_features_keep_their_scale_at_the_start():
    """Initial weights keep the mean square of the image's at any depth."""
    net = StyleGANDiscriminator(StyleGANConfig(resolution=256, channels=16, max_channels=64))
    squares = []
    for block in net.blocks:
        block.register_forward_hook(lambda _m, _i, out: squares.append(out.square().mean().item()))
    net(torch.randn(2, 3, 256, 256))
    assert len(squares) == 6
    assert all(0.05 < square < 5 for square in squares), squares


def test_adam_moves_every_weight_by_the_same_share():
    """The equalised learning rate: a step of 1e-3 is 1e-3 of a weight's spread, wide or narrow."""
    net = StyleGANDiscriminator(StyleGANConfig(resolution=32, channels=4, max_channels=64))
    layers = {
        name: layer
        for name, layer in net.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    }
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    adam = torch.optim.Adam(net.parameters(), lr=1e-3)
    (logits,) = net(torch.rand(2, 3, 32, 32) * 2 - 1)
    logits.sum().backward()
    adam.step()
    assert len(layers) == 13
    for name, layer in layers.items():
        spread = layer.weight[0].numel() ** -0.5  # He's standard deviation at the start
        moved = (layer.weight - before[name]).abs().max().item()
        assert moved == pytest.approx(1e-3 * spread, rel=0.01), name
