import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from autoencoders.layers import (
    Block,
    Downsample,
    GroupNorm,
    Quantizer,
    ResidualBlock,
    SelfAttention,
    SelfModulatedConv2d,
    Upsample,
    checkpoint_blocks,
    fuse,
    group_norm,
    middle,
)


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(("width", "groups"), [(16, 16), (32, 32), (48, 16), (96, 32), (12, 4)])
def test_groups_are_32_or_the_largest_power_of_two(width, groups):
    assert group_norm(width).num_groups == groups


@pytest.mark.parametrize(
    ("width", "least", "groups"),
    [(32, 4, 8), (48, 4, 8), (96, 4, 16), (128, 4, 32), (32, 5, 4), (8, 16, 1), (12, 2, 4)],
)
def test_groups_hold_the_least_number_of_channels(width, least, groups):
    assert group_norm(width, least).num_groups == groups


@pytest.mark.parametrize("norm", ["group", "smc"])
def test_least_channels_reach_every_norm_of_a_middle(norm):
    found = [m for m in middle(32, norm, least=4).modules() if isinstance(m, nn.GroupNorm)]
    assert [m.num_groups for m in found] == [8] * (5 if norm == "group" else 1)


def modulated_by_the_equation(conv, eps):
    """Equation 3, one weight at a time, in Python's own float64."""
    weight, scales = conv.weight.tolist(), conv.scales.tolist()
    out_width, in_width, size, _ = conv.weight.shape
    result = torch.empty(conv.weight.shape, dtype=torch.float64)
    for j in range(out_width):
        total = 0.0
        for i in range(in_width):
            for row in range(size):
                for column in range(size):
                    total += (scales[i] * weight[j][i][row][column]) ** 2
        for i in range(in_width):
            for row in range(size):
                for column in range(size):
                    w = conv.gain.item() * scales[i] * weight[j][i][row][column]
                    result[j, i, row, column] = w / math.sqrt(total + eps)
    return result


@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_self_modulated_weight_is_equation_3(eps):
    conv = SelfModulatedConv2d(3, 5)
    nn.init.normal_(conv.scales)
    nn.init.constant_(conv.gain, 1.7)
    expected = modulated_by_the_equation(conv, eps)
    torch.testing.assert_close(conv.modulated_weight(eps).double(), expected, rtol=1e-6, atol=1e-7)


def test_self_modulated_output_is_a_convolution_with_a_plain_bias():
    conv = SelfModulatedConv2d(3, 5)
    nn.init.normal_(conv.scales)
    x = torch.randn(2, 3, 6, 7)
    expected = torch.conv2d(x, modulated_by_the_equation(conv, 1e-8).float(), conv.bias, padding=1)
    torch.testing.assert_close(conv(x), expected)


def test_self_modulation_ignores_the_scale_of_its_weight():
    conv = SelfModulatedConv2d(4, 4)
    before = conv.modulated_weight().detach()
    with torch.no_grad():
        conv.weight.mul_(37.0)
    torch.testing.assert_close(conv.modulated_weight(), before)
    norms = conv.modulated_weight().square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(norms, torch.ones(4))


def test_self_modulated_filters_start_long_enough_to_turn_slowly():
    norms = SelfModulatedConv2d(64, 64).weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((64,), 4.0), rtol=0.15, atol=0)


def test_self_modulated_weight_is_float32_under_autocast_and_all_of_it_learns():
    conv = SelfModulatedConv2d(3, 5)
    expected = conv.modulated_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv.modulated_weight(), expected)
        out = conv(torch.randn(2, 3, 8, 8))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for name, parameter in conv.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_dead_input_scales_give_finite_gradients():
    conv = SelfModulatedConv2d(3, 5)
    nn.init.zeros_(conv.scales)
    conv(torch.randn(1, 3, 4, 4)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in conv.parameters())


@pytest.mark.parametrize("norm", ["group", "smc"])
@pytest.mark.parametrize("out_width", [32, 64])
def test_residual_block_adds_to_its_skip(norm, out_width):
    block = ResidualBlock(32, out_width, norm)
    x = torch.randn(2, 32, 8, 8)
    assert block(x).shape == (2, out_width, 8, 8)
    kinds = {type(module) for module in block.modules()}
    assert (GroupNorm in kinds) == (norm == "group")
    assert (SelfModulatedConv2d in kinds) == (norm == "smc")
    assert isinstance(block.skip, nn.Identity) == (out_width == 32)
    # without the branch, only the skip is left
    if norm == "group":
        nn.init.zeros_(block.conv2.weight)
    else:
        nn.init.zeros_(block.conv2.gain)
    nn.init.zeros_(block.conv2.bias)
    torch.testing.assert_close(block(x), block.skip(x))


def test_attention_equals_the_textbook():
    attention = SelfAttention(32)
    x = torch.randn(2, 32, 3, 5)
    tokens = attention.norm(x).flatten(2).transpose(1, 2).double()
    query, key, value, out = (
        (layer.weight.double(), layer.bias.double())
        for layer in (attention.query, attention.key, attention.value, attention.out)
    )
    q, k, v = (tokens @ weight.T + bias for weight, bias in (query, key, value))
    # Vaswani et al. 2017, Equation 1
    mixed = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(32), dim=-1) @ v
    mixed = (mixed @ out[0].T + out[1]).transpose(1, 2).unflatten(2, (3, 5))
    torch.testing.assert_close(attention(x).double(), x + mixed, rtol=1e-5, atol=1e-5)


def test_down_and_up_change_the_resolution_by_two():
    x = torch.randn(1, 4, 6, 10)
    assert Downsample(4)(x).shape == (1, 4, 3, 5)
    assert Upsample(4)(x).shape == (1, 4, 12, 20)


# ------------------------------------------------------------------- without gradients, and with
@pytest.mark.parametrize("norm", ["group", "smc"])
@pytest.mark.parametrize("out_width", [32, 64])
def test_without_gradients_the_input_is_kept_and_the_output_is_the_same(norm, out_width):
    block, x = ResidualBlock(32, out_width, norm), torch.randn(2, 32, 8, 8)
    before, expected = x.clone(), block(x)
    with torch.no_grad():
        got = block(x)
    assert torch.equal(x, before)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------- fusing
def test_fused_convolution_is_the_same_and_plain():
    conv = SelfModulatedConv2d(3, 5)
    nn.init.normal_(conv.scales)
    nn.init.constant_(conv.gain, 1.7)
    x, plain = torch.randn(2, 3, 6, 7), conv.fused()
    assert type(plain) is nn.Conv2d
    torch.testing.assert_close(plain(x), conv(x), rtol=0, atol=1e-6)
    nn.init.zeros_(conv.bias)
    assert plain.bias.abs().max() > 0  # its own


def test_a_fused_upsampling_is_the_same_in_any_layout_and_at_any_border():
    upsample = Upsample(5)
    for size in ((1, 1), (1, 4), (3, 2)):
        x = torch.randn(2, 5, *size)
        expected = upsample(x)
        for layout in (torch.contiguous_format, torch.channels_last):
            fused = fuse(upsample).to(memory_format=layout)
            answer = fused(x.contiguous(memory_format=layout))
            torch.testing.assert_close(answer, expected, rtol=0, atol=1e-6)


def test_a_group_of_one_value_is_normalised_to_its_shift():
    norm = group_norm(4)
    torch.nn.init.normal_(norm.bias)
    expected = norm.bias.detach().view(1, 4, 1, 1)
    answer = norm(torch.randn(1, 4, 1, 1))
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-3)  # x − x, over √ε


def test_fuse_makes_a_frozen_copy_and_leaves_the_module_alone():
    module = nn.Sequential(ResidualBlock(8, 8, "smc"), nn.Sequential(SelfModulatedConv2d(8, 4)))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fused, x = fuse(module), torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(fused(x), module(x), rtol=0, atol=1e-5)
    assert not any(isinstance(part, SelfModulatedConv2d) for part in fused.modules())
    assert not fused.training and module.training
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert type(fused[1][0]) is nn.Conv2d
    assert type(fuse(SelfModulatedConv2d(2, 2))) is nn.Conv2d
    kept = {id(p) for p in module.parameters()}
    assert not kept & {id(p) for p in fused.parameters()}


# ---------------------------------------------------------------------- gradient checkpointing
def gradients_and_memory(module, x):
    """Gradients of a sum of squares, and the bytes that the forward pass keeps for them."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    module.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module(x).square().sum()
    bytes_kept = sum(kept.values())
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}, bytes_kept


@pytest.mark.parametrize("norm", ["group", "smc"])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(norm):
    module, x = middle(32, norm), torch.randn(2, 32, 16, 16)
    names = list(module.state_dict())
    plain, plain_bytes = gradients_and_memory(module, x)
    checkpoint_blocks(module)
    checkpoint_blocks(module)  # a second time changes nothing
    recomputed, fewer_bytes = gradients_and_memory(module, x)
    assert list(module.state_dict()) == names
    assert fewer_bytes < plain_bytes / 3
    for name in plain:
        assert torch.equal(recomputed[name], plain[name]), name


def test_checkpointing_is_idle_without_gradients_and_copied_with_its_module(monkeypatch):
    module, x = middle(8), torch.randn(1, 8, 4, 4)
    checkpoint_blocks(module)
    copy = deepcopy(module)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
        expected = middle_without_recomputing(module)(x)
        calls = []
        monkeypatch.setattr("autoencoders.layers.checkpoint", lambda *a, **k: calls.append(a))
        assert torch.equal(module(x), expected)
        assert torch.equal(copy(x), x)  # the copy computes with its own weights
    assert calls == []


def middle_without_recomputing(module):
    plain = middle(module[0].conv1.in_channels)
    plain.load_state_dict(module.state_dict())
    return plain


def test_a_block_must_say_what_it_computes():
    with pytest.raises(TypeError, match=r"abstract method '?transform'?"):
        Block()


# --------------------------------------------------------------------------------- quantizer
def test_quantizer_takes_the_nearest_code():
    quantizer = Quantizer(3, 2)
    quantizer.codes.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    points = [[0.4, 0.0], [0.6, 0.0], [0.1, 1.4], [0.1, 1.6], [9.0, 9.0], [-1.0, -1.0]]
    latents = torch.tensor(points).T.reshape(1, 2, 2, 3)
    expected = [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 3.0], [0.0, 3.0], [0.0, 0.0]]
    found = quantizer(latents).reshape(2, 6).T
    torch.testing.assert_close(found, torch.tensor(expected))


@torch.no_grad()
def test_quantizer_is_the_same_in_parts_and_in_batches(monkeypatch):
    quantizer, latents = Quantizer(500, 3), torch.randn(4, 3, 7, 5) / 500
    whole = quantizer(latents)
    brute = (latents[:, None] - quantizer.codes[:, :, None, None]).square().sum(2).argmin(1)
    torch.testing.assert_close(whole, quantizer.codes[brute].permute(0, 3, 1, 2))
    assert torch.equal(torch.cat([quantizer(part) for part in latents.split(1)]), whole)
    monkeypatch.setattr(Quantizer, "AT_ONCE", 11)
    assert torch.equal(quantizer(latents), whole)
    assert quantizer(latents[:0]).shape == (0, 3, 7, 5)
    assert quantizer(latents.bfloat16()).dtype == torch.float32


def test_quantizer_passes_gradients_straight_through():
    quantizer, latents = Quantizer(5, 3), torch.randn(2, 3, 4, 4, requires_grad=True)
    weight = torch.randn(2, 3, 4, 4)
    (quantizer(latents) * weight).sum().backward()
    assert torch.equal(latents.grad, weight) and quantizer.codes.grad is None


@torch.no_grad()
def test_quantizer_does_not_hide_what_is_not_finite():
    latents = torch.zeros(1, 3, 2, 2)
    latents[0, 1, 0, 0] = float("nan")
    assert Quantizer(5, 3)(latents).isnan().sum() == 1
