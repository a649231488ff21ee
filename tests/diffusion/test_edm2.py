"""The EDM2 network: its size, its blocks against the paper, and its magnitudes."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusion.edm2 import CosineAttention, EDM2Block, EDM2Config, EDM2UNet, MPLayer
from ldm.config import validate
from ldm.errors import UsageError
from tests.diffusion.test_network import EDM2, build, normal

LABELLED = EDM2.model_copy(update={"classes": 5})


# --------------------------------------------------------------------------------- its size
@pytest.mark.parametrize(
    "channels, millions",
    [(128, 124.7), (192, 280.2), (256, 497.8), (320, 777.5), (384, 1119.3), (448, 1523.2)],
)
def test_parameters_are_those_of_the_paper(channels, millions):
    """Table 6, "Model capacity", ImageNet-512: XS, S, M, L, XL and XXL."""
    with torch.device("meta"):
        network = EDM2UNet(EDM2Config(channels=channels, classes=1000))
    count = sum(parameter.numel() for parameter in network.parameters())
    assert round(count / 1e6, 1) == millions


def test_default_takes_the_latents_of_512_pixels():
    with torch.device("meta"):
        network = EDM2UNet(EDM2Config())
        out = network(torch.empty(2, 4, 64, 64), torch.empty(2))
    assert out.shape == (2, 4, 64, 64)
    assert network.factor == 8
    assert network.config == EDM2Config()


def test_attention_stands_where_the_paper_has_it():
    """Figure 22: 15 attention blocks, at 16×16 and 8×8, one of them the first in the middle."""
    with torch.device("meta"):
        network = EDM2UNet(EDM2Config())

    def attends(blocks):
        return [block.attention is not None for block in blocks]

    assert [attends(level) for level in network.encoder] == [[False] * 3] * 2 + [[True] * 3] * 2
    assert [attends(level) for level in network.decoder] == [[True] * 4] * 2 + [[False] * 4] * 2
    assert attends([network.middle_in, network.middle_out]) == [True, False]
    assert attends([*network.enter[1:], *network.leave]) == [False] * 6


# -------------------------------------------------------------------------------- its blocks
def used(layer):
    """A layer's filters at norm 1."""
    w = layer.weight.detach()
    return w / w.flatten(1).norm(dim=1).view(-1, *[1] * (w.ndim - 1))


def convolve(x, layer):
    return F.conv2d(x, used(layer), padding="same")


def standardise(x, dim):
    """Eq. 30."""
    return x / (x.square().mean(dim=dim, keepdim=True).sqrt() + 1e-4)


def silu(x):
    return x * torch.sigmoid(x) / 0.596


def blend(a, b, t):
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def attend(x, attention, head_width):
    """Eq. 32 head by head, with query, key and value standardised."""
    qkv = convolve(x, attention.qkv).flatten(2)  # (B, 3·width, positions)
    mixed = torch.zeros_like(x).flatten(2)
    width = x.shape[1]
    for b in range(len(x)):
        for start in range(0, width, head_width):
            q, k, v = (
                standardise(qkv[b, part * width + start :][:head_width], dim=0) for part in range(3)
            )
            weights = (q.T @ k / math.sqrt(head_width)).softmax(dim=1)
            mixed[b, start : start + head_width] = v @ weights.T
    return convolve(mixed.view_as(x), attention.proj)


def test_cosine_attention_follows_its_formula():
    torch.manual_seed(0)
    attention, x = CosineAttention(12, head_width=6).double(), normal(2, 12, 3, 4).double()
    torch.testing.assert_close(attention(x), attend(x, attention, 6))
    larger = attention(100 * x)  # lengths do not count
    torch.testing.assert_close(larger, attention(x), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    "encodes, widths, way",
    [(True, (8, 12), None), (True, (12, 12), "down"), (False, (20, 12), None),
     (False, (12, 12), "up")],
)  # fmt: skip
def test_blocks_follow_figure_22(encodes, widths, way):
    torch.manual_seed(1)
    config = EDM2Config(channels=4, multipliers=(3,), head_width=6, attention_balance=0.4, clip=2.0)
    block = EDM2Block(*widths, config, encodes, attends=True, way=way).double()
    nn.init.constant_(block.residual.gain, 0.8)
    x, embedding = normal(2, widths[0], 4, 6).double(), normal(2, 12, seed=1).double()

    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    y = {"down": F.avg_pool2d(x, 2), None: x, "up": doubled}[way]
    main = y if widths[0] == widths[1] else convolve(y, block.fit)
    if encodes:
        y = main = standardise(main, dim=1)
    scales = 1 + 0.8 * embedding @ used(block.residual.scale).T
    h = convolve(silu(y), block.residual.conv1) * scales[:, :, None, None]
    expected = blend(main, convolve(silu(h), block.residual.conv2), 0.3)
    expected = blend(expected, attend(expected, block.attention, 6), 0.4)
    out = block(x, embedding)
    torch.testing.assert_close(out, expected.clamp(-2, 2))
    assert out.abs().max() == 2


# ---------------------------------------------------------------------------- its magnitudes
def test_a_constant_stands_in_for_the_biases():
    out = build(LABELLED, scramble=True)(torch.zeros(1, 4, 8, 8), torch.zeros(1))
    assert out.abs().max() > 0.1  # without it, zeros would stay zeros


def test_activations_have_magnitude_one_through_all_depths():
    config = EDM2Config(channels=32, classes=10, head_width=32)
    network, seen = build(config, scramble=True), {}
    for name, module in network.named_modules():
        if isinstance(module, EDM2Block) or name in ("embed", "enter.0"):

            def look(module, args, out, name=name):
                seen[name] = out.square().mean().sqrt().item()

            module.register_forward_hook(look)
    for gain in (
        block.residual.gain for block in network.modules() if isinstance(block, EDM2Block)
    ):
        nn.init.zeros_(gain)  # as they start
    with torch.no_grad():
        out = network(normal(4, 4, 32, 32), torch.tensor([-1.0, 0, 0.5, 1]), torch.arange(4))
    assert len(seen) == 2 + 12 + 3 + 2 + 16 + 3
    assert all(0.7 < value < 1.4 for value in seen.values()), seen
    assert 0.7 * 0.7 < out.square().mean().sqrt().item() < 0.7 * 1.4  # times the gain


def norms(network):
    """Norm of every filter over the root of its fan-in: 1 where it is held."""
    flat = [m.weight.detach().flatten(1) for m in network.modules() if isinstance(m, MPLayer)]
    return torch.cat([w.norm(dim=1) / math.sqrt(w.shape[1]) for w in flat])


def test_every_layer_is_held_at_its_norm_and_none_has_a_bias():
    network = build(LABELLED)
    kinds = {name.rpartition(".")[2] for name, _ in network.named_parameters()}
    assert kinds == {"weight", "gain"}
    torch.testing.assert_close(norms(network), torch.ones_like(norms(network)))
    weights = sum(name.endswith("weight") for name, _ in network.named_parameters())
    assert weights == sum(isinstance(module, MPLayer) for module in network.modules())


def test_norms_are_forced_after_every_step():
    network = build(LABELLED, scramble=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05, betas=(0.9, 0.99))
    for step in range(10):
        optimizer.zero_grad()
        network(normal(2, 4, 8, 8, seed=step), torch.zeros(2)).square().mean().backward()
        optimizer.step()
        assert (norms(network) - 1).abs().max() > 1e-3
        network.normalize_weights()
        assert (norms(network) - 1).abs().max() < 1e-6


def test_gradients_are_orthogonal_to_filters():
    config = LABELLED.model_copy(update={"augment_parameters": 3})
    network = build(config, scramble=True).double()
    condition = torch.tensor([0, 3]), normal(2, 3, seed=1)
    x = normal(2, 4, 8, 8).double()
    network(x, torch.tensor([-1.0, 0.5]).double(), *condition).pow(3).mean().backward()
    for name, parameter in network.named_parameters():
        if parameter.ndim:
            w, gradient = parameter.detach().flatten(1), parameter.grad.flatten(1)
            along = (w * gradient).sum(dim=1).abs()
            assert (along <= 1e-10 * w.norm(dim=1) * gradient.norm(dim=1)).all(), name


# ------------------------------------------------------------------------------- conditions
@pytest.mark.parametrize("multipliers", [(1, 2, 3, 4), (1, 2), (2, 1)])
def test_the_embedding_is_as_wide_as_the_widest_level(multipliers):
    config = LABELLED.model_copy(update={"multipliers": multipliers})
    assert len(EDM2UNet(config).embed.noise.weight) == max(multipliers) * EDM2.channels
    config = config.model_copy(update={"embedding_multiplier": 3})
    assert len(EDM2UNet(config).embed.noise.weight) == 3 * EDM2.channels


def test_class_and_noise_level_share_the_embedding():
    embed, c_noise = build(LABELLED).embed.double(), torch.tensor([-0.3, 0.6], dtype=torch.float64)
    noise = embed.fourier(c_noise) @ used(embed.noise).T
    label = math.sqrt(5) * used(embed.label).T[[4, 1]]
    expected = silu(blend(noise, label, 0.5))
    out = embed(c_noise, torch.tensor([4, 1]), None)
    torch.testing.assert_close(out, expected)
    out = embed(c_noise, torch.tensor([-1, -1]), None)
    torch.testing.assert_close(out, silu(noise / math.sqrt(2)))


def test_at_a_label_balance_of_one_the_noise_level_is_unheard():
    embed = build(LABELLED.model_copy(update={"label_balance": 1.0})).embed
    outs = [embed(torch.full((1,), c), torch.tensor([3]), None) for c in (-0.3, 0.6)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("balance, heard", [(0.5, True), (1.0, False)])
def test_at_a_concatenation_balance_of_one_the_middle_is_unheard(balance, heard):
    config = EDM2Config(channels=16, multipliers=(1,), blocks=1, head_width=16)
    network = build(config.model_copy(update={"concat_balance": balance}), scramble=True)
    batch = normal(2, 4, 8, 8), torch.zeros(2)
    before = network(*batch)
    network.middle_out.register_forward_hook(lambda module, args, out: -out)
    assert torch.equal(network(*batch), before) != heard


def test_without_classes_the_embedding_is_that_of_the_noise_level():
    embed = build(EDM2).embed.double()
    c_noise = torch.tensor([-0.3, 0.6], dtype=torch.float64)
    expected = silu(embed.fourier(c_noise) @ used(embed.noise).T)
    for labels in (None, torch.tensor([-1, -1])):
        out = embed(c_noise, labels, None)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"channels": 48}, "'head_width'.*must divide the 144 channels at factor 4"),
        ({"multipliers": []}, "'multipliers'"),
        ({"residual_balance": 1.1}, "'residual_balance'"),
        ({"type": "adm"}, "'type'"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(tree, message):
    with pytest.raises(UsageError, match=message):
        validate(EDM2Config, {"multipliers": [1, 2, 3], "attention_factors": [4], **tree})


# --------------------------------------------------------------------------- how it is used
def test_autocast_to_bfloat16_stays_close():
    network, x = build(LABELLED, scramble=True), normal(2, 4, 8, 8)
    condition = torch.tensor([-1.0, 0.5]), torch.tensor([0, 4])
    plain = network(x, *condition)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedding = network.embed(*condition, None)
        cast = network(x, *condition)
    assert embedding.dtype == torch.float32
    assert cast.dtype == torch.bfloat16
    assert 0 < (cast - plain).abs().max() < 0.05
    cast.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())
