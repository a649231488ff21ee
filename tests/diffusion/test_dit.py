"""DiT: its size, its formula in plain operations, and positions at other sizes."""

import math

import pytest
import torch

from diffusion import DiT, DiTConfig
from diffusion.dit import angles, coordinates, rotate, rotation, sincos
from ldm.config import load_preset, resolve, validate
from ldm.errors import UsageError
from pipelines.recipes import DiffusionRecipe
from tests.diffusion.test_network import CONFIGS, DIT, build, each, normal

EVERY = each(lambda config: config.type == "dit")


# ------------------------------------------------------------------------------------ size
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
# parameters of the published networks: latents of 4 × 32 × 32, 1000 classes
PUBLISHED = {
    ("S", 2): 32_963_360, ("S", 4): 32_945_024, ("S", 8): 33_148_160,
    ("B", 2): 130_512_416, ("L", 2): 458_102_816, ("XL", 2): 675_129_632,
}  # fmt: skip


@pytest.mark.parametrize(("size", "patch"), PUBLISHED)
def test_parameters_are_those_of_the_published_networks(size, patch):
    width, depth, heads = SIZES[size]
    config = DiTConfig(width=width, depth=depth, heads=heads, patch=patch, classes=1000)
    with torch.device("meta"):
        network = DiT(config)
        out = network(torch.empty(2, 4, 32, 32), torch.empty(2))
    assert out.shape == (2, 4, 32, 32)
    # they count the table of positions, a parameter that is not trained
    positions = (32 // patch) ** 2 * width
    # their last layer has 8 channels of each value of a patch: 4 more, for the variance
    variance = 4 * patch**2 * (width + 1)
    ours = sum(parameter.numel() for parameter in network.parameters())
    assert ours == PUBLISHED[size, patch] - positions - variance


def test_without_classes_there_is_no_table():
    names = build(DIT).state_dict().keys()
    assert not any("classes" in name or "augment" in name for name in names)
    embed = build(CONFIGS["dit-conditional"]).embed
    assert embed.classes.weight.shape == (4, 32)  # and a row for none


def test_begins_as_the_authors_draw_it():
    network = build(DiTConfig(width=256, depth=1, heads=4, classes=1000, augment_parameters=9))
    block, embed = network.blocks[0], network.embed
    for layer in (embed.linear_in, embed.linear_out, embed.classes):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02)
    # Glorot and Bengio 2010, Equation 16
    layers = [block.attention.qkv, block.attention.proj, block.mlp.linear_in, network.patches]
    for layer in layers:
        weight = layer.weight.flatten(1)
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    for layer in (block.modulation, network.last.modulation, network.last.linear):
        assert not any(parameter.any() for parameter in layer.parameters())
    biases = [p for name, p in network.named_parameters() if name.endswith("bias")]
    assert not any(bias.any() for bias in biases)


def test_presets_are_the_papers():
    """Peebles and Xie 2023, Section 4, and Table 1."""
    for size, (width, depth, heads) in SIZES.items():
        recipe = resolve(
            DiffusionRecipe, load_preset("diffusion", f"dit-{size.lower()}-2-imagenet256")
        )
        network = recipe.network
        assert (network.width, network.depth, network.heads) == (width, depth, heads)
        assert (network.patch, network.mlp, network.positions) == (2, "gelu", "sincos")
        assert (recipe.lr, recipe.batch_size, recipe.steps) == (1e-4, 256, 400_000)
        assert (recipe.clip_norm, recipe.warmup_images, recipe.label_dropout) == (None, 0, 0.1)
        assert 0.5 ** (256 / recipe.ema_half_life_images) == pytest.approx(0.9999, abs=1e-9)
        assert recipe.data.labels and recipe.data.flip
    faces = resolve(DiffusionRecipe, load_preset("diffusion", "ffhq256-dit-b-2"))
    assert faces.network.width == 768 and not faces.data.labels


# --------------------------------------------------------------------------------- formula
def naive(network, x, c_noise, labels, augment):
    """The paper's network in plain operations on single tokens' values, in float64."""
    config, t = network.config, {n: w.double() for n, w in network.state_dict().items()}
    size, width, heads = x.shape[2] // config.patch, config.width, config.heads
    side = x.shape[3] // config.patch

    def linear(name, x):
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0)

    def silu(x):
        return x / (1 + torch.exp(-x))

    def norm(name, x, eps):
        centred = x if config.norm == "rms" else x - x.mean(-1, keepdim=True)
        plain = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return plain * t.get(f"{name}.weight", 1) + t.get(f"{name}.bias", 0)

    def changed(name, x, shift, scale):
        return norm(name, x, 1e-6) * (1 + scale[:, None]) + shift[:, None]

    turns = [c_noise[:, None].double() * 10_000 ** (-i / (128 - config.frequency_shift))
             for i in range(128)]  # fmt: skip
    waves = torch.cat([f(turn) for f in (torch.cos, torch.sin) for turn in turns], 1)
    c = linear("embed.linear_out", silu(linear("embed.linear_in", waves)))
    if config.classes:
        c = c + t["embed.classes.weight"][[label if label >= 0 else -1 for label in labels]]
    if config.augment_parameters:
        c = c + linear("embed.augment", augment.double())
    c = silu(c)

    tokens, places = [], [(row, column) for row in range(size) for column in range(side)]
    for row, column in places:
        p = config.patch
        part = x[:, :, row * p : row * p + p, column * p : column * p + p].double().flatten(1)
        token = part @ t["patches.weight"].flatten(1).T + t["patches.bias"]
        if config.positions != "rotary":
            count = width // 4
            token = token + torch.tensor(
                [f(at * 10_000 ** (-i / count))
                 for at in (column, row) for f in (math.sin, math.cos) for i in range(count)]
            ).double()  # fmt: skip
        tokens.append(token)
    x = torch.stack(tokens, 1)

    def turned(q):  # (B, N, d)
        count, out = q.shape[-1] // 4, q.clone()
        for n, place in enumerate(places):
            for pair in range(2 * count):
                angle = place[pair // count] * 10_000 ** (-(pair % count) / count)
                one, other = q[:, n, 2 * pair], q[:, n, 2 * pair + 1]
                out[:, n, 2 * pair] = one * math.cos(angle) - other * math.sin(angle)
                out[:, n, 2 * pair + 1] = one * math.sin(angle) + other * math.cos(angle)
        return out

    for block in (f"blocks.{index}" for index in range(config.depth)):
        b1, g1, a1, b2, g2, a2 = linear(f"{block}.modulation", c).split(width, 1)
        q, k, v = linear(f"{block}.attention.qkv", changed(f"{block}.norm1", x, b1, g1)).split(
            width, 2
        )
        mixed = []
        for part in (slice(h * width // heads, (h + 1) * width // heads) for h in range(heads)):
            one, other = q[..., part], k[..., part]
            if config.qk_norm:
                eps = 1e-6 if config.norm == "rms" else 1e-5
                one = norm(f"{block}.attention.query_norm", one, eps)
                other = norm(f"{block}.attention.key_norm", other, eps)
            if config.positions != "sincos":
                one, other = turned(one), turned(other)
            scores = one @ other.transpose(1, 2) / math.sqrt(width / heads)
            mixed.append(scores.softmax(-1) @ v[..., part])
        x = x + a1[:, None] * linear(f"{block}.attention.proj", torch.cat(mixed, 2))
        h = linear(f"{block}.mlp.linear_in", changed(f"{block}.norm2", x, b2, g2))
        if config.mlp == "swiglu":
            gate, value = h.chunk(2, -1)
            h = silu(gate) * value
        else:
            h = h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + a2[:, None] * linear(f"{block}.mlp.linear_out", h)

    b, g = linear("last.modulation", c).split(width, 1)
    values = linear("last.linear", changed("last.norm", x, b, g))
    out = values.new_zeros(len(values), config.latent_channels, size * p, side * p)
    for n, (row, column) in enumerate(places):
        patch = values[:, n].view(len(values), p, p, -1).permute(0, 3, 1, 2)
        out[:, :, row * p : row * p + p, column * p : column * p + p] = patch
    return out


@EVERY
@torch.no_grad()
def test_is_the_papers_formula(config):
    network = build(config, scramble=True).double().eval()
    height, width = 3 * config.patch, 2 * config.patch
    x, c_noise = normal(3, 4, height, width).double(), torch.tensor([-1.2, 0.5, 999.0]).double()
    labels, augment = torch.tensor([2, -1, 0]), normal(3, 9)
    given = (labels, augment) if config.classes else (None, None)
    expected = naive(network, x, c_noise, labels.tolist(), augment)
    assert expected.std() > 0.1
    # the sinusoids of the noise level are float32
    torch.testing.assert_close(network(x, c_noise, *given), expected, rtol=1e-4, atol=1e-4)


def test_hidden_width_is_that_of_the_authors_code():
    for size, hidden in {"S": 1024, "B": 2048, "L": 2730, "XL": 3072}.items():
        width, depth, heads = SIZES[size]
        config = DiTConfig(width=width, depth=depth, heads=heads, mlp="swiglu")
        assert config.hidden_width == hidden


# ------------------------------------------------------------------------------- positions
def test_positions_are_scaled_to_the_training_grid():
    """At twice the size, every second patch lies where one of the training lay."""
    at, device = {}, torch.device("cpu")
    for side in (4, 8):
        rows = coordinates(side, 4, device)
        at[side] = sincos(rows, rows, 16).unflatten(0, (side, side))
    torch.testing.assert_close(at[8][::2, ::2], at[4])
    assert coordinates(8, 4, device).tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]


@pytest.mark.parametrize("positions", ["sincos", "rotary", "both"])
@torch.no_grad()
def test_another_size_than_that_of_training_is_another_grid_of_the_same_span(positions):
    config = DIT.model_copy(update={"positions": positions, "grid": (4, 2)})
    network, x = build(config, scramble=True).eval(), normal(1, 4, 4, 8)
    c_noise = torch.zeros(1)
    answers = [network(x, c_noise)]
    for grid in ((2, 4), None):  # the latents' own
        network.config = config.model_copy(update={"grid": grid})
        answers.append(network(x, c_noise))
    assert torch.equal(answers[1], answers[2])
    assert (answers[0] - answers[1]).abs().max() > 1e-3


@torch.no_grad()
def test_rotations_read_differences_of_positions_alone():
    query, key = normal(1, 2, 6, 8).double(), normal(1, 2, 6, 8, seed=1).double()
    rows, columns = torch.arange(2).double(), torch.arange(3).double()

    def products(down, right):
        by = rotation(rows + down, columns + right, 8)
        return rotate(query, by) @ rotate(key, by).mT

    torch.testing.assert_close(products(5, -3), products(0, 0))
    assert (products(0, 0) - query @ key.mT).abs().max() > 0.1
    network = build(CONFIGS["dit-rotary"], scramble=True).double().eval()
    x = normal(1, 4, 4, 4).double()
    moved = network(x.flip(3), torch.zeros(1)).flip(3)
    assert (moved - network(x, torch.zeros(1))).abs().max() > 1e-3


def test_angles_fall_from_the_coordinate_to_nearly_none():
    turns = angles(torch.tensor([0.0, 2.0]).double(), 4)
    assert turns.tolist() == [[0] * 4, pytest.approx([2, 0.2, 0.02, 0.002])]


# ------------------------------------------------------------------------------- behaviour
@EVERY
def test_starts_made_of_identities(config):
    tokens = normal(2, 16, 32)
    assert torch.equal(build(config).blocks[1](tokens, normal(2, 32)), tokens)


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"heads": 12}, "heads: 12 do not divide the 32 channels of width"),
        ({"heads": 16, "positions": "rotary"}, "rotations need a multiple of 4 channels, not 2"),
        ({"mlp_ratio": 1e-3}, "mlp_ratio: the MLP would have no channels"),
        ({"width": 0}, "'width'"),
        ({"depth": 65}, "'depth'"),
        ({"patch": 0}, "'patch'"),
        ({"mlp_ratio": 0}, "'mlp_ratio'"),
        ({"mlp": "relu"}, "'mlp'"),
        ({"positions": "learned"}, "'positions'"),
        ({"frequency_shift": 2}, "'frequency_shift'"),
        ({"grid": 0}, "'grid"),
        ({"classes": -1}, "'classes'"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(tree, message):
    with pytest.raises(UsageError, match=message) as caught:
        validate(DiTConfig, {"width": 32, "heads": 2, **tree})
    assert "\n" not in str(caught.value)
