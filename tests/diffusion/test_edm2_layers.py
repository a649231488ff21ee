"""Magnitude-preserving layers against the paper's formulas in float64."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.edm2 import (
    MPConv2d,
    MPFourier,
    MPLinear,
    MPModule,
    mp_cat,
    mp_silu,
    mp_sum,
    pixel_norm,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def magnitude(x):
    """Eq. 68 of a known vector."""
    return x.double().square().mean().sqrt().item()


def build(layer_class, *args, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return layer_class(*args)


# ------------------------------------------------------------------------- fixed functions
def test_silu_is_divided_by_its_magnitude_on_normal_values():
    x = normal(3, 4)
    expected = [v / (0.596 * (1 + math.exp(-v))) for v in x.flatten().tolist()]  # Eq. 81
    assert mp_silu(x).flatten().tolist() == pytest.approx(expected)
    points, weights = np.polynomial.hermite_e.hermegauss(60)  # E over N(0, 1), Eq. 78
    squares = mp_silu(torch.from_numpy(points)).square().numpy()
    assert weights @ squares / weights.sum() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_sum_follows_its_formula_and_keeps_the_magnitude(t):
    a, b = normal(8, 16, 8, 8), normal(8, 16, 8, 8, seed=1)
    expected = ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)  # Eq. 88
    torch.testing.assert_close(mp_sum(a, b, t), expected)
    assert magnitude(mp_sum(a, b, t)) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("t", [0.3, 0.5, 0.8])
def test_concatenation_follows_its_formula_and_keeps_the_magnitude(t):
    a, b = normal(8, 96, 4, 4), normal(8, 32, 4, 4, seed=1)
    out = mp_cat(a, b, t)
    c = math.sqrt(128 / ((1 - t) ** 2 + t**2))  # Eq. 102
    torch.testing.assert_close(out[:, :96], c * (1 - t) / math.sqrt(96) * a)  # Eq. 103
    torch.testing.assert_close(out[:, 96:], c * t / math.sqrt(32) * b)
    assert magnitude(out) == pytest.approx(1, abs=0.02)
    shares = out[:, :96].square().sum() / (1 - t) ** 2, out[:, 96:].square().sum() / t**2
    assert shares[0].item() == pytest.approx(shares[1].item(), rel=0.05)  # whatever the widths


def test_pixel_norm_follows_its_formula():
    x = normal(2, 5, 3, 4)
    expected = x.clone()
    for b, i, j in np.ndindex(2, 3, 4):
        expected[b, :, i, j] /= x[b, :, i, j].square().mean().sqrt() + 1e-4  # Eq. 30
    torch.testing.assert_close(pixel_norm(x), expected)
    torch.testing.assert_close(pixel_norm(x, dim=-1), pixel_norm(x.mT, dim=-2).mT)


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_pixel_norm_in_low_precision_is_off_by_rounding_only(dtype, error):
    x = (1e4 * normal(2, 512, 2, 2)).to(dtype)  # of norm 226,000: too large for float16
    out, exact = pixel_norm(x), pixel_norm(x.double())
    assert out.dtype == dtype
    assert ((out.double() - exact).norm() / exact.norm()).item() < error


def test_pixel_norm_of_zeros_is_zeros_with_a_finite_gradient():
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    out = pixel_norm(x)
    out.sum().backward()
    assert out.abs().max() == 0
    assert x.grad.isfinite().all()


# ------------------------------------------------------------------------- Fourier features
def test_fourier_features_follow_their_formula():
    fourier = build(MPFourier, 6).double()
    numbers = [-1.3, 0.0, 0.7]
    out = fourier(torch.tensor(numbers, dtype=torch.float64))
    for row, number in zip(out.tolist(), numbers, strict=True):
        pairs = zip(fourier.frequencies.tolist(), fourier.phases.tolist(), strict=True)
        expected = [math.sqrt(2) * math.cos(2 * math.pi * (f * number + p)) for f, p in pairs]
        assert row == pytest.approx(expected)  # Eq. 75


def test_fourier_features_have_magnitude_one_from_draws_of_the_right_laws():
    fourier = build(MPFourier, 20_000)
    assert magnitude(fourier(torch.tensor([-1.0, 0.3]))) == pytest.approx(1, abs=0.02)
    assert fourier.frequencies.mean().item() == pytest.approx(0, abs=0.03)
    assert fourier.frequencies.std().item() == pytest.approx(1, abs=0.03)
    assert 0 <= fourier.phases.min() < 0.01 < 0.99 < fourier.phases.max() < 1


def test_fourier_features_travel_in_the_state_dict():
    ours, theirs, a = build(MPFourier, 8), build(MPFourier, 8, seed=1), torch.tensor([0.4])
    assert not torch.equal(ours(a), theirs(a))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(a), theirs(a))
    assert not list(ours.parameters())


# ------------------------------------------------------------------------- learned layers
LAYERS = [(MPLinear, (24, 7)), (MPConv2d, (5, 7, 3)), (MPConv2d, (24, 7, 1))]


def norms(layer):
    """Norm of every filter over the root of its fan-in: 1 where it is held."""
    flat = layer.weight.detach().double().flatten(1)
    return flat.norm(dim=1) / math.sqrt(flat.shape[1])


def test_linear_layer_follows_its_formula():
    layer, x = build(MPLinear, 24, 7).double(), normal(3, 24)
    layer.weight.data *= 1.7  # as an optimiser may leave it
    out = layer(x, 0.5)
    for i, w in enumerate(layer.weight.detach()):
        unit = w / w.norm()  # Eq. 46
        torch.testing.assert_close(out[:, i], 0.5 * (x @ unit))


def test_convolution_follows_its_formula():
    layer, x = build(MPConv2d, 5, 7, 3).double(), normal(2, 5, 4, 6)
    out, padded = layer(x), nn.functional.pad(x, (1, 1, 1, 1))
    assert out.shape == (2, 7, 4, 6)
    for b, c, i, j in np.ndindex(2, 7, 4, 6):
        w = layer.weight[c]
        patch = padded[b, :, i : i + 3, j : j + 3]
        expected = (patch * w).sum() / w.square().sum().sqrt()
        torch.testing.assert_close(out[b, c, i, j], expected)


def test_weights_of_a_skipped_step_keep_every_bit():
    layer = MPConv2d(5, 7, 3)
    with torch.no_grad():
        layer.weight.mul_(1.7)
    before, twin = layer.weight.clone(), deepcopy(layer)
    layer.normalize_(unless=torch.ones(()))
    assert torch.equal(layer.weight, before)
    layer.normalize_(unless=torch.zeros(()))
    twin.normalize_()
    assert torch.equal(layer.weight, twin.weight)
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("layer_class, shape", LAYERS)
def test_there_is_no_bias_and_filters_are_held_at_the_root_of_their_fan_in(layer_class, shape):
    layer = build(layer_class, *shape)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert norms(layer).tolist() == pytest.approx([1.0] * 7, rel=1e-6)
    layer.weight.data *= torch.arange(1.0, 8).view(-1, *[1] * (layer.weight.ndim - 1))
    layer.normalize_()
    assert norms(layer).tolist() == pytest.approx([1.0] * 7, rel=1e-6)


def test_learned_layers_keep_the_magnitude():
    linear, conv = build(MPLinear, 256, 512).double(), build(MPConv2d, 64, 256, 3).double()
    assert magnitude(linear(normal(64, 256))) == pytest.approx(1, abs=0.03)
    inside = conv(normal(4, 64, 16, 16))[:, :, 1:-1, 1:-1]  # the border sees zeros
    assert magnitude(inside) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("layer_class, shape", LAYERS)
def test_gradient_is_orthogonal_to_every_filter(layer_class, shape):
    layer = build(layer_class, *shape).double()
    x = normal(4, shape[0]) if layer_class is MPLinear else normal(4, shape[0], 6, 6)
    (layer(x) * normal(*layer(x).shape, seed=1)).sum().backward()
    w, gradient = layer.weight.detach().flatten(1), layer.weight.grad.flatten(1)
    cosine = torch.cosine_similarity(w, gradient, dim=1)
    assert gradient.norm(dim=1).min() > 0.1
    assert cosine.abs().max() < 1e-12  # Eq. 59


def test_one_learning_rate_is_the_same_relative_change_in_narrow_and_wide_layers():
    changes = []
    for width in (16, 1024):
        layer = build(MPLinear, width, 32)
        before = layer.weight.detach().clone()
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        layer(normal(8, width).float()).pow(3).sum().backward()
        optimizer.step()
        changes.append(((layer.weight - before).norm() / before.norm()).item())
    assert changes == pytest.approx([0.01, 0.01], rel=0.01)


def test_norms_stay_only_where_they_are_forced():
    def train(forced):
        model = MPModule()
        model.first, model.last = build(MPLinear, 16, 32), build(MPLinear, 32, 8, seed=1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        x, y = normal(32, 16).float(), normal(32, 8, seed=1).float()
        for _ in range(30):
            optimizer.zero_grad()
            (model.last(nn.functional.silu(model.first(x))) - y).square().mean().backward()
            optimizer.step()
            if forced:
                model.normalize_weights()
        return torch.cat([norms(model.first), norms(model.last)])

    assert (train(forced=True) - 1).abs().max() < 1e-6
    assert train(forced=False).min() > 1.05  # Eq. 65: it only ever grows


def test_autocast_reaches_convolutions_and_spares_fully_connected_layers():
    linear, conv = build(MPLinear, 24, 7), build(MPConv2d, 24, 7, 1)
    x = normal(3, 24).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear(x), conv(x[:, :, None, None])
        from_bfloat16 = linear(x.bfloat16())
    assert torch.equal(inside[0], linear(x))
    assert inside[1].dtype == torch.bfloat16
    assert from_bfloat16.dtype == torch.float32
    assert (inside[1][:, :, 0, 0] - conv(x[:, :, None, None])[:, :, 0, 0]).abs().max() < 0.05
