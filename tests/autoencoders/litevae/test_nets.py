import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoencoders.litevae.nets import (
    FeatureUNet,
    FeatureUNetConfig,
    NAFBlock,
    NAFNet,
    NAFNetConfig,
    TransformerBlock,
    ViT,
    ViTConfig,
)
from ldm.config import resolve
from ldm.errors import UsageError
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


def by_the_paper(x, p):
    """A block of Chen et al. 2022 (Figure 3d, Section 3.4), with a block's parameters by name."""

    def norm(x, name):
        mean, var = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        weight, bias = (p[f"{name}.{what}"].view(1, -1, 1, 1) for what in ("weight", "bias"))
        return (x - mean) / (var + 1e-6).sqrt() * weight + bias

    def conv1x1(x, name):
        weight, bias = p[f"{name}.weight"][:, :, 0, 0], p[f"{name}.bias"]
        return torch.einsum("oc,bchw->bohw", weight, x) + bias.view(1, -1, 1, 1)

    def gate(x):
        half = x.shape[1] // 2
        return x[:, :half] * x[:, half:]

    h = conv1x1(norm(x, "spatial.0"), "spatial.1")
    kernels = p["spatial.2.weight"]
    padded, (height, width) = F.pad(h, (1, 1, 1, 1)), h.shape[-2:]
    h = p["spatial.2.bias"].view(1, -1, 1, 1) + sum(
        kernels[:, 0, i, j].view(1, -1, 1, 1) * padded[..., i : i + height, j : j + width]
        for i in range(3)
        for j in range(3)
    )
    h = gate(h)
    h = h * conv1x1(h.mean((2, 3), keepdim=True), "spatial.4.conv")
    x = x + p["beta"] * conv1x1(h, "spatial.5")
    h = gate(conv1x1(norm(x, "pointwise.0"), "pointwise.1"))
    return x + p["gamma"] * conv1x1(h, "pointwise.3")


def test_block_is_the_papers():
    torch.manual_seed(0)
    block = NAFBlock(6).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    expected = by_the_paper(x, dict(block.named_parameters()))
    torch.testing.assert_close(block(x), expected)
    torch.testing.assert_close(block(x.to(memory_format=torch.channels_last)), expected)


def test_parameters_by_hand():
    width, blocks = 8, 3
    conv = 7 * width**2 + 7 * width  # 1×1: w→2w, w→w, w→w, then w→2w, w→w
    block = conv + 2 * width * (9 + 1) + 2 * 2 * width + 2 * width
    ends = 9 * width * (12 + 5) + width + 5
    net = NAFNet(NAFNetConfig(channels=width, blocks=blocks), 12, 5)
    assert count(net) == blocks * block + ends


def test_a_fresh_network_is_its_outer_convolutions():
    net = NAFNet(NAFNetConfig(channels=8, blocks=2), 12, 5)
    x = torch.randn(2, 12, 6, 10)
    assert net(x).shape == (2, 5, 6, 10)
    torch.testing.assert_close(net(x), net.conv_out(net.conv_in(x)))


def test_channel_attention_sees_the_whole_image():
    net = NAFNet(NAFNetConfig(channels=8, blocks=1), 12, 5)
    torch.nn.init.ones_(net.blocks[0].beta)
    x = torch.randn(1, 12, 16, 16)
    changed = x.clone()
    changed[..., 15, 15] += 10
    assert (net(changed) - net(x))[..., 0, 0].abs().max() > 1e-6


SMALL = ViTConfig(width=16, depth=2, heads=2, grid=4)


def test_block_is_pytorchs_pre_norm_layer():
    ours = TransformerBlock(16, heads=4)
    theirs = nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0, activation="gelu", batch_first=True, norm_first=True
    )
    names = {
        "self_attn.in_proj_": "query_key_value.",
        "self_attn.out_proj.": "mix.",
        "linear1.": "mlp.0.",
        "linear2.": "mlp.2.",
    }
    state = {}
    for name, tensor in theirs.state_dict().items():
        for their_name, our_name in names.items():
            name = name.replace(their_name, our_name)
        state[name] = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
        tensor.copy_(state[name])
    ours.load_state_dict(state)
    tokens = torch.randn(2, 9, 16)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-4, atol=1e-4)


def test_without_positions_tokens_are_a_set():
    net = ViT(SMALL, 12, 5)
    nn.init.zeros_(net.positions)
    x = torch.randn(2, 12, 4, 4)
    torch.testing.assert_close(net(x.flip(2)), net(x).flip(2), rtol=1e-4, atol=1e-5)
    nn.init.normal_(net.positions)
    assert (net(x.flip(2)) - net(x).flip(2)).abs().max() > 1e-2


def test_positions_lie_row_by_row_as_the_tokens():
    net = ViT(SMALL, 12, 5)
    nn.init.zeros_(net.positions)
    with torch.no_grad():
        net.positions[..., 1, 2] = torch.randn(16)
    net.blocks = nn.Identity()
    x = torch.zeros(1, 12, 4, 4)
    moved = (net(x) - net(x)[..., :1, :1]).abs().amax(dim=(0, 1)) > 1e-4
    assert moved.nonzero().tolist() == [[1, 2]]


def test_positions_are_interpolated_to_other_grids():
    def keys(distance, a=-0.75):
        """Keys 1981, Equation 4: the kernel of cubic convolution, with the a of PyTorch."""
        d = abs(distance)
        if d < 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    def weights(size):  # each of `size` centres, half a pixel in, on 8 positions; borders repeated
        matrix = torch.zeros(size, 8)
        for i in range(size):
            at = (i + 0.5) * 8 / size - 0.5
            for j in range(-3, 11):
                matrix[i, min(max(j, 0), 7)] += keys(at - j)
        return matrix

    net = ViT(ViTConfig(width=4, depth=1, heads=1, grid=8), 12, 5)
    assert net.positions_on(8, 8) is net.positions
    for height, width in ((16, 24), (8, 5)):
        expected = weights(height) @ net.positions @ weights(width).T
        torch.testing.assert_close(net.positions_on(height, width), expected)
    assert net(torch.randn(2, 12, 3, 5)).shape == (2, 5, 3, 5)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(UsageError, match=r"^'heads': must divide width, 128 \(got 3\)$"):
        resolve(ViTConfig, {}, ["heads=3"])
