import torch
from torch.nn import functional as F

from autoencoders.litevae.nets import NAFBlock, NAFNet, NAFNetConfig
from tests.autoencoders.parameters import count


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
