"""The UNet's parts, each against its formula in float64."""

import math

import pytest
import torch
from torch import nn

from diffusion.unet import (
    Downsample,
    NoiseEmbedding,
    ResidualBlock,
    SelfAttention,
    Upsample,
    group_norm,
    sinusoids,
)


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def scrambled(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double()


def silu(x):
    return x / (1 + torch.exp(-x))


def normalised(x, norm):
    """Wu and He 2018, Equation 1, group by group."""
    grouped = x.unflatten(1, (norm.num_groups, -1))
    mean = grouped.mean(dim=(2, 3, 4), keepdim=True)
    variance = (grouped - mean).square().mean(dim=(2, 3, 4), keepdim=True)
    plain = ((grouped - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
    return plain * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)


def test_the_noise_level_is_embedded_as_cosines_and_sines():
    waves = sinusoids(torch.tensor([0.5, -2.0]), 4)
    expected = torch.tensor([[0.5, 0.005], [-2.0, -0.02]])
    torch.testing.assert_close(waves, torch.cat([expected.cos(), expected.sin()], 1))


@pytest.mark.parametrize(
    "dtype, answer",
    [(torch.bfloat16, torch.float32), (torch.int64, torch.float32), (torch.float64, torch.float64)],
)
def test_sinusoids_are_float32_at_least(dtype, answer):
    assert sinusoids(torch.tensor([7]).to(dtype), 4).dtype == answer


@pytest.mark.parametrize(
    "width, groups", [(224, 32), (64, 32), (32, 16), (16, 8), (48, 16), (36, 4), (2, 1)]
)
def test_group_count(width, groups):
    assert group_norm(width).num_groups == groups


def test_the_embedding_is_the_sum_of_what_is_known():
    embed = scrambled(NoiseEmbedding(4, classes=3, augment_parameters=2))
    c_noise, labels = torch.tensor([0.5, -1.0]).double(), torch.tensor([2, -1])
    augment = torch.randn(2, 2).double()
    into, out = embed.linear_in, embed.linear_out
    hidden = silu(sinusoids(c_noise, 4) @ into.weight.T + into.bias)
    expected = hidden @ out.weight.T + out.bias + augment @ embed.augment.weight.T
    expected[0] += embed.classes.weight[2]
    torch.testing.assert_close(embed(c_noise, labels, augment), silu(expected))


@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("out_width", [8, 12])
def test_residual_block_is_its_formula(out_width, scale_shift, resample):
    block = scrambled(ResidualBlock(8, out_width, 6, 0.0, scale_shift, resample))
    x, embedding = torch.randn(2, 8, 4, 6).double(), torch.randn(2, 6).double()
    before = x.clone()

    def resized(x):
        if resample == "down":  # means of 2×2
            return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else x

    def conv(x, layer):
        return torch.conv2d(x, layer.weight, layer.bias, padding=layer.kernel_size[0] // 2)

    told = (embedding @ block.shift.weight.T + block.shift.bias)[:, :, None, None]
    h = conv(resized(silu(normalised(x, block.norm1))), block.conv1)
    if scale_shift:
        scale, shift = told[:, :out_width], told[:, out_width:]
        h = normalised(h, block.norm2) * (1 + scale) + shift
    else:
        h = normalised(h + told, block.norm2)
    skip = resized(x) if out_width == 8 else conv(resized(x), block.skip)
    expected = skip + conv(silu(h), block.conv2)
    with torch.no_grad():
        torch.testing.assert_close(block(x, embedding), expected)
    torch.testing.assert_close(block(x, embedding), expected)
    assert torch.equal(x, before)


def test_sums_in_place_leave_the_gradients_right():
    for scale_shift, resample in ((False, None), (True, "down")):
        block = scrambled(ResidualBlock(4, 8, 3, 0.0, scale_shift, resample))
        x, embedding = torch.randn(1, 4, 2, 2).double(), torch.randn(1, 3).double()
        inputs = x.requires_grad_(), embedding.requires_grad_()
        assert torch.autograd.gradcheck(block, inputs)


@pytest.mark.parametrize("head_width", [4, 8])
def test_attention_is_the_textbooks(head_width):
    attention = scrambled(SelfAttention(8, head_width))
    x = torch.randn(2, 8, 3, 2).double()
    tokens = normalised(x, attention.norm).flatten(2).transpose(1, 2)
    q, k, v = (tokens @ attention.qkv.weight.T + attention.qkv.bias).split(8, dim=2)
    heads = []
    for start in range(0, 8, head_width):
        part = slice(start, start + head_width)
        # Vaswani et al. 2017, Equation 1
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(head_width)
        heads.append(torch.softmax(scores, dim=-1) @ v[..., part])
    mixed = torch.cat(heads, dim=2) @ attention.proj.weight.T + attention.proj.bias
    expected = x + mixed.transpose(1, 2).unflatten(2, (3, 2))
    torch.testing.assert_close(attention(x), expected)


def test_down_and_up_change_the_resolution_by_two():
    x = torch.randn(1, 4, 6, 10)
    assert Downsample(4)(x).shape == (1, 4, 3, 5)
    up = Upsample(4)
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(x), up.conv(doubled))
