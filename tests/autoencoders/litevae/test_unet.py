import torch
from torch import nn

from autoencoders.litevae.nets import FeatureUNet, FeatureUNetConfig
from tests.autoencoders.parameters import count


def by_the_listing(channels, multipliers, blocks, in_width, out_width):
    """Parameters of the UNet of Appendix G, summed layer by layer."""

    def conv(a, b, size):
        return a * b * size**2 + b

    def residual(a, b):
        return 2 * a + conv(a, b, 3) + 2 * b + conv(b, b, 3) + (conv(a, b, 1) if a != b else 0)

    total, width, skips = conv(in_width, channels, 3), channels, [channels]
    for multiplier in multipliers:
        for _ in range(blocks):
            total += residual(width, channels * multiplier)
            width = channels * multiplier
            skips.append(width)
    total += 2 * residual(width, width)
    for multiplier in reversed(multipliers):
        for _ in range(blocks):
            total += residual(width + skips.pop(), channels * multiplier)
            width = channels * multiplier
    return total + conv(width, out_width, 3)


def test_parameters_are_those_of_the_listing():
    for channels, multipliers, blocks in ((16, (1, 2, 2), 2), (8, (1, 3), 1), (4, (2,), 3)):
        config = FeatureUNetConfig(channels=channels, multipliers=multipliers, blocks=blocks)
        expected = by_the_listing(channels, multipliers, blocks, 12, 7)
        assert count(FeatureUNet(config, 12, 7)) == expected


def test_resolution_never_changes_and_widths_do():
    net = FeatureUNet(FeatureUNetConfig(channels=8, multipliers=(1, 2)), 12, 5)
    resolutions = set()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out: resolutions.add(out.shape[-2:]))
    assert net(torch.randn(2, 12, 6, 10)).shape == (2, 5, 6, 10)
    assert resolutions == {(6, 10)}


def test_every_parameter_learns():
    net = FeatureUNet(FeatureUNetConfig(channels=8, multipliers=(1, 2, 3)), 12, 5)
    net(torch.randn(2, 12, 8, 8)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad.abs().max() > 0, name
