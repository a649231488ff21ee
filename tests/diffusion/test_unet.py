"""The UNet: its parts against their formulas, its size, where its parts stand, and refusals."""

import math

import pytest
import torch
from torch import nn

from diffusion import UNet, UNetConfig
from diffusion.network import sinusoids
from diffusion.unet import (
    NoiseEmbedding,
    UNetAttention,
    UNetDownsample,
    UNetResidual,
    UNetUpsample,
    attending,
    group_norm,
)
from ldm.config import validate
from ldm.errors import UsageError
from tests.diffusion.test_network import CONFIGS, UNET, build, each, normal


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
    config = UNetConfig(channels=4, multipliers=(1,), head_width=4, classes=3, augment_parameters=2)
    embed = scrambled(NoiseEmbedding(config))
    c_noise, labels = torch.tensor([0.5, -1.0]).double(), torch.tensor([2, -1])
    augment = torch.randn(2, 2).double()
    into, out = embed.linear_in, embed.linear_out
    hidden = silu(sinusoids(c_noise, 4) @ into.weight.T + into.bias)
    expected = hidden @ out.weight.T + out.bias + augment @ embed.augment.weight.T
    expected[0] += embed.classes.weight[2]
    torch.testing.assert_close(embed(c_noise, labels, augment), silu(expected))


def residual(in_width, out_width, scale_shift, way):
    """A block of a UNet of 2 channels, whose embedding is 8 wide."""
    config = UNetConfig(channels=2, multipliers=(1,), head_width=2, scale_shift=scale_shift)
    return scrambled(UNetResidual(in_width, out_width, config, way))


@pytest.mark.parametrize("way", [None, "down", "up"])
@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("out_width", [8, 12])
def test_residual_block_is_its_formula(out_width, scale_shift, way):
    block = residual(8, out_width, scale_shift, way)
    x, embedding = torch.randn(2, 8, 4, 6).double(), torch.randn(2, 8).double()
    before = x.clone()

    def resized(x):
        if way == "down":  # means of 2×2
            return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if way == "up" else x

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
    for scale_shift, way in ((False, None), (True, "down")):
        block = residual(4, 8, scale_shift, way)
        x, embedding = torch.randn(1, 4, 2, 2).double(), torch.randn(1, 8).double()
        inputs = x.requires_grad_(), embedding.requires_grad_()
        assert torch.autograd.gradcheck(block, inputs)


@pytest.mark.parametrize("head_width", [4, 8])
def test_attention_is_the_textbooks(head_width):
    attention = scrambled(UNetAttention(8, head_width))
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
    assert UNetDownsample(4)(x).shape == (1, 4, 3, 5)
    up = UNetUpsample(4)
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(x), up.conv(doubled))


# --------------------------------------------------------------------------------- network
def test_default_is_the_network_of_ffhq_256():
    with torch.device("meta"):
        network = UNet(UNetConfig())
        out = network(torch.empty(2, 4, 32, 32), torch.empty(2))
    # Rombach et al.'s UNet of FFHQ-256 with 4 channels in and out
    assert sum(parameter.numel() for parameter in network.parameters()) == 274_060_196
    assert out.shape == (2, 4, 32, 32)


@each(lambda config: config.type == "ldm")
def test_starts_made_of_identities(config):
    h = normal(2, 32, 4, 4)
    assert torch.equal(build(config).middle_in(h, normal(2, 64)), h)


def test_attention_stands_at_the_configured_factors():
    config = UNetConfig(channels=16, multipliers=(1, 2, 2), attention_factors=(2,), head_width=16)
    network = build(config)

    def attends(blocks):
        return [not isinstance(block.attention, nn.Identity) for block in blocks]

    assert [attends(level) for level in network.encoder] == [[False] * 2, [True] * 2, [False] * 2]
    assert [attends(level) for level in network.decoder] == [[False] * 3, [True] * 3, [False] * 3]
    assert attends([network.middle_in, network.middle_out]) == [True, False]


@pytest.mark.parametrize("heads, expected", [(None, [8, 8]), (2, [8, 16]), (1, [16, 32])])
def test_heads_are_counted_or_of_one_width(heads, expected):
    network = build(UNET.model_copy(update={"heads": heads, "attention_factors": (1,)}))
    found = [network.encoder[0][0].attention.head_width, network.middle_in.attention.head_width]
    assert found == expected


def test_blocks_that_resample_stand_between_the_levels():
    network = build(CONFIGS["unet-full"])
    assert [type(layer) for layer in network.enter] == [nn.Conv2d, UNetResidual]
    assert [type(layer) for layer in network.leave] == [UNetResidual, nn.Sequential]
    assert [network.enter[1].way, network.leave[0].way] == ["down", "up"]
    assert network.middle_in.residual.way is None


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"channels": 48}, "'head_width'.*must divide the 144 channels at factor 4"),
        ({"channels": 15}, "'channels'.*multiple of 2"),
        ({"multipliers": []}, "'multipliers'"),
        ({"channels": 48, "heads": 7}, "'heads'.*must divide the 144 channels at factor 4"),
        ({"heads": 0}, "'heads'"),
        ({"classes": -1}, "'classes'"),
        ({"dropout": 1.0}, "'dropout'"),
        ({"type": "adm"}, "'type'"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(tree, message):
    with pytest.raises(UsageError, match=message):
        validate(UNetConfig, {"multipliers": [1, 2, 3], "attention_factors": [4], **tree})


def test_head_width_is_ignored_where_heads_are_counted():
    config = validate(UNetConfig, {"channels": 48, "multipliers": [1, 2], "heads": 8})
    assert attending(dict(config)) == {2: 96}


def test_heads_must_fit_the_middle_even_without_other_attention():
    with pytest.raises(UsageError, match="must divide the 48 channels at factor 1"):
        validate(UNetConfig, {"channels": 48, "multipliers": [1], "attention_factors": []})
