"""The UNet: its parts against their formulas, its size, gradients, refusals, and that it learns."""

import math

import pytest
import torch
from torch import nn

from diffusion import EDM, DiT, DiTConfig, EDM2Config, EDM2UNet, UNet, UNetConfig, denoising_loss
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
from ldm.errors import LdmError, UsageError


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
TINY = UNetConfig(channels=16, multipliers=(1, 2), blocks=1, head_width=8)
TOLD = TINY.model_copy(update={"classes": 3, "augment_parameters": 9})
FULL = TOLD.model_copy(update={"scale_shift": True, "resample_blocks": True, "heads": 2})
EVERY = pytest.mark.parametrize("config", [TINY, TOLD, FULL], ids=["tiny", "told", "full"])


def build(config=TINY, scramble=False, seed=0):
    """A UNet from a seed; scrambled, so that the layers that start at 0 count too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UNet(config)
        if scramble:
            for parameter in network.parameters():
                nn.init.normal_(parameter, std=0.1)
    return network


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_default_is_the_network_of_ffhq_256():
    with torch.device("meta"):
        network = UNet(UNetConfig())
        out = network(torch.empty(2, 4, 32, 32), torch.empty(2))
    # Rombach et al.'s UNet of FFHQ-256 with 4 channels in and out
    assert sum(parameter.numel() for parameter in network.parameters()) == 274_060_196
    assert out.shape == (2, 4, 32, 32)


# ------------------------------------------------------------------------------- behaviour
@EVERY
def test_starts_as_zero_made_of_identities(config):
    network, h = build(config), normal(2, 32, 4, 4)
    assert network.config is config
    assert network(normal(2, 4, 8, 8), torch.zeros(2)).abs().max() == 0
    assert torch.equal(network.middle_in(h, normal(2, 64)), h)


@EVERY
def test_gradient_reaches_every_parameter(config):
    network = build(config, scramble=True).double()
    x = normal(3, 4, 8, 8).double().requires_grad_()
    c_noise, labels, augment = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0, 1, 2]), None
    if config.augment_parameters:
        augment = normal(3, 9)
    labels = labels if config.classes else None
    network(x, c_noise.double(), labels, augment).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 1e-9, name  # rounding alone gives 1e-17
    assert x.grad.abs().min() > 0


def test_every_parameter_has_a_gradient_without_conditions():
    """DDP waits for one of each."""
    network = build(TOLD, scramble=True)
    network(normal(1, 4, 8, 8), torch.zeros(1)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert network.embed.classes.weight.grad.abs().max() == 0


def test_no_label_and_no_augmentation_are_minus_one_and_zeros():
    network, x, c_noise = build(FULL, scramble=True).eval(), normal(3, 4, 8, 8), torch.zeros(3)
    nothing = network(x, c_noise)
    labels, augment = torch.tensor([-1, 2, -1]), torch.zeros(3, 9)
    assert torch.equal(network(x, c_noise, torch.full((3,), -1), augment), nothing)
    labelled = network(x, c_noise, labels)
    torch.testing.assert_close(labelled[[0, 2]], nothing[[0, 2]], rtol=1e-4, atol=1e-5)
    assert (labelled[1] - nothing[1]).abs().max() > 1e-3
    assert not torch.allclose(network(x, c_noise, torch.tensor([-1, 1, -1]))[1], labelled[1])
    augment[0, 3] = 1
    augmented = network(x, c_noise, None, augment)
    assert (augmented[0] - nothing[0]).abs().max() > 1e-3
    torch.testing.assert_close(augmented[1:], nothing[1:], rtol=1e-4, atol=1e-5)


def test_a_network_without_classes_is_the_same_with_labels_of_none():
    network, x = build(scramble=True).eval(), normal(2, 4, 8, 8)
    assert torch.equal(
        network(x, torch.zeros(2), torch.tensor([-1, -1])), network(x, torch.zeros(2))
    )


@EVERY
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_in_bfloat16_it_is_nearly_the_same(config, way):
    network = build(config, scramble=True).eval()
    x, c_noise = normal(2, 4, 8, 8), torch.tensor([-1.0, 0.5])
    labels = torch.tensor([0, -1]) if config.classes else None
    plain = network(x, c_noise, labels)
    if way == "weights":
        answer = network.to(torch.bfloat16)(x.bfloat16(), c_noise.bfloat16(), labels)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            answer = network(x, c_noise, labels)
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer.float(), plain, rtol=0, atol=0.05 * plain.abs().max().item())


def test_a_time_step_keeps_its_precision_in_a_network_of_bfloat16():
    """999 is 1000 in bfloat16, so it is given in float32."""
    network = build(scramble=True).eval().bfloat16()
    x = normal(1, 4, 8, 8).bfloat16()
    answers = [network(x, torch.tensor([t])) for t in (999.0, 1000.0)]
    assert not torch.equal(*answers)


def test_noise_level_matters_and_images_do_not_mix():
    network = build(scramble=True).eval()
    x, c_noise = normal(3, 4, 8, 8), torch.tensor([-1.0, 0.0, 1.0])
    out = network(x, c_noise)
    assert (out - network(x, c_noise + 0.5)).abs().max() > 1e-3
    torch.testing.assert_close(network(x[1:2], c_noise[1:2]), out[1:2], rtol=1e-4, atol=1e-5)


def test_channels_last_gives_the_same():
    network = build(scramble=True).eval()
    x, c_noise = normal(2, 4, 8, 8), torch.tensor([-1.0, 0.5])
    plain = network(x, c_noise)
    network, x = (t.to(memory_format=torch.channels_last) for t in (network, x))
    inside = []
    network.middle_in.register_forward_hook(lambda *call: inside.append(call[-1]))
    torch.testing.assert_close(network(x, c_noise), plain, rtol=1e-4, atol=1e-5)
    assert inside[0].is_contiguous(memory_format=torch.channels_last)


def test_dropout_acts_in_training_only():
    network = build(TINY.model_copy(update={"dropout": 0.5}), scramble=True)
    batch = normal(1, 4, 8, 8), torch.zeros(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(network(*batch), network(*batch))
    network.eval()
    assert torch.equal(network(*batch), network(*batch))


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
    network = build(TINY.model_copy(update={"heads": heads, "attention_factors": (1,)}))
    found = [network.encoder[0][0].attention.head_width, network.middle_in.attention.head_width]
    assert found == expected


def test_blocks_that_resample_stand_between_the_levels():
    network = build(FULL)
    assert [type(layer) for layer in network.enter] == [nn.Conv2d, UNetResidual]
    assert [type(layer) for layer in network.leave] == [UNetResidual, nn.Sequential]
    assert [network.enter[1].way, network.leave[0].way] == ["down", "up"]
    assert network.middle_in.residual.way is None


def test_sides_that_cannot_be_halved_are_refused():
    network = build(UNetConfig(channels=16, multipliers=(1, 1, 1), blocks=1, head_width=8))
    with pytest.raises(LdmError, match=r"10×8 do not fit this UNet.*multiples of 4"):
        network(normal(1, 4, 10, 8), torch.zeros(1))
    assert network(normal(1, 4, 12, 8), torch.zeros(1)).shape == (1, 4, 12, 8)


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


def test_learns_four_images():
    """Trained on four latents, it denoises them far better than Gaussian data can be denoised."""
    z = 0.5 * normal(4, 4, 8, 8).repeat_interleave(4, dim=0)  # every image at every noise level
    sigma = torch.tensor([0.2, 0.5, 1.0, 2.0]).repeat(4)
    denoiser = EDM(build())
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)

    def loss(seed):
        return denoising_loss(denoiser, z, sigma, normal(16, 4, 8, 8, seed=seed)).mean()

    before = loss(seed=1).item()  # the network is 0: as good as the best for Gaussian data
    for step in range(150):
        optimizer.zero_grad()
        loss(seed=2 + step).backward()
        optimizer.step()
    assert before == pytest.approx(1, abs=0.1)
    assert loss(seed=1).item() < 0.45


SIZES = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "head_width": 16}


@pytest.mark.parametrize("build", [lambda **s: UNet(UNetConfig(**SIZES, **s)),
                                   lambda **s: EDM2UNet(EDM2Config(**SIZES, **s)),
                                   lambda **s: DiT(DiTConfig(width=8, heads=2, **s))])  # fmt: skip
@pytest.mark.parametrize(
    ("knows", "labels", "augment", "message"),
    [
        ({"classes": 3}, [0, 3], None, "^label 3 is none of this network's 3 classes: use 0"),
        ({"classes": 3}, [-2, 0], None, "^label -2 is none of"),
        ({}, [-1, 0], None, "^label 0 was given to a network without classes: leave labels out"),
        (
            {"augment_parameters": 9},
            None,
            8,
            "^augmentation parameters are .2, 8.: .* takes .2, 9",
        ),
        ({}, None, 9, "^augmentation parameters are .2, 9.: .* takes .2, 0"),
        ({"classes": 3}, 1, None, "^labels are torch.int64 .*: they must be int64 .2,.$"),
        ({"classes": 3}, [1], None, "^labels are torch.int64 .1,."),
        ({"classes": 3}, [0.5, 1.0], None, "^labels are torch.float32"),
    ],
)
def test_all_networks_refuse_unknown_conditions(build, knows, labels, augment, message):
    labels = None if labels is None else torch.tensor(labels)
    augment = None if augment is None else torch.zeros(2, augment)
    with pytest.raises(LdmError, match=message):
        build(**knows)(torch.zeros(2, 4, 8, 8), torch.zeros(2), labels, augment)


# ---------------------------------------------------------------------- gradient checkpointing
SMALL = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "attention_factors": (2,)}
NETWORKS = {
    "ldm": lambda: UNet(UNetConfig(**SMALL, head_width=8, classes=3, dropout=0.2)),
    "resample blocks": lambda: UNet(UNetConfig(**SMALL, head_width=8, resample_blocks=True)),
    "edm2": lambda: EDM2UNet(EDM2Config(**SMALL, head_width=8, classes=3, dropout=0.2)),
}


def gradients_and_memory(network, autocast):
    """Gradients of a sum of squares, and the bytes that the forward pass keeps for them."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    network.zero_grad()
    torch.manual_seed(1)  # of dropout
    x = torch.randn(2, 4, 16, 16)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        loss = network(x, torch.zeros(2)).float().square().sum()
    loss.backward()
    bytes_kept = sum(size for pointer, size in kept.items() if pointer not in own)
    return {name: p.grad.clone() for name, p in network.named_parameters()}, bytes_kept


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_keeps_less_and_gives_the_same_gradients(name, autocast):
    network = NETWORKS[name]()
    for parameter in network.parameters():  # none at 0, which would hide a gradient
        nn.init.normal_(parameter, std=0.3)
    names = list(network.state_dict())
    plain, plain_bytes = gradients_and_memory(network, autocast)
    network.checkpoint_blocks()
    recomputed, fewer_bytes = gradients_and_memory(network, autocast)
    assert list(network.state_dict()) == names
    assert fewer_bytes < plain_bytes / 3
    for parameter in plain:
        assert torch.equal(recomputed[parameter], plain[parameter]), parameter


def test_checkpointing_is_idle_without_gradients(monkeypatch):
    network = NETWORKS["ldm"]().eval()
    network.checkpoint_blocks()
    calls = []
    monkeypatch.setattr("diffusion.network.checkpoint", lambda *a, **k: calls.append(a))
    with torch.no_grad():
        network(torch.randn(1, 4, 8, 8), torch.zeros(1))
    assert calls == []
