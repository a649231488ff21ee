"""Averages of weights against float64 loops and closed forms, and an exact resume."""

import io
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

from ldm.ema import LARGEST_STD, Ema, PowerEma, gamma_of_std
from ldm.errors import LdmError, UsageError


class Counting(nn.Module):
    """Weights, a buffer of floats and a counter."""

    def __init__(self, width=5):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.register_buffer("count", torch.tensor(0))
        self.dropout = nn.Dropout(0.5)


def trajectory(steps, width=5):
    return torch.randn(steps, 2, width, generator=torch.Generator().manual_seed(0))


def train(model, ema, values, batch_size, start=0):
    for step, (weight, scale) in enumerate(values, start + 1):
        with torch.no_grad():
            model.weight.copy_(weight)
            model.scale.copy_(scale)
            model.count.add_(1)
        ema.update(images_seen=step * batch_size, batch_size=batch_size)


@pytest.mark.parametrize("half_life, ramp_up", [(500, 0.05), (500, None), (40, 0.5), (0, 0.05)])
def test_follows_the_definition(half_life, ramp_up):
    values, batch = trajectory(200), 8
    model = Counting()
    ema = Ema(model, half_life, ramp_up)
    train(model, ema, values, batch)

    expected = values[0].double()
    for step, value in enumerate(values[1:].double(), 2):
        half = half_life if ramp_up is None else min(half_life, ramp_up * step * batch)
        decay = 0.0 if half == 0 else 0.5 ** (batch / half)
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(ema.model.weight.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ema.model.scale.double(), expected[1], rtol=1e-5, atol=1e-6)
    assert ema.model.count.item() == 200


def test_half_life_is_what_it_says_whatever_the_batch():
    """From 0, following a constant 1: half the way after a half-life of images."""
    for batch in (10, 50):
        model = Counting()
        ema = Ema(model, half_life_images=1000, ramp_up=None)
        train(model, ema, torch.zeros(1, 2, 5), batch)
        train(model, ema, torch.ones(1000 // batch, 2, 5), batch, start=1)
        torch.testing.assert_close(ema.model.weight, torch.full((5,), 0.5))


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.25, LARGEST_STD])
def test_power_average_is_the_integral_against_its_profile(std):
    """(γ+1)/t^(γ+1) ∫ τ^γ θ(τ) dτ with θ constant in a step: Karras et al. 2023, Eq. 2, exactly,
    here with batches that grow."""
    values, gamma = trajectory(200), gamma_of_std(std)
    model = Counting()
    ema, seen = PowerEma(model, std), [0]
    for step, (weight, scale) in enumerate(values, 1):
        with torch.no_grad():
            model.weight.copy_(weight)
            model.scale.copy_(scale)
            model.count.add_(1)
        batch = 8 if step < 100 else 24
        seen.append(seen[-1] + batch)
        ema.update(seen[-1], batch)

    profile = np.diff((np.array(seen) / seen[-1]) ** (gamma + 1))
    assert profile.sum() == pytest.approx(1, rel=1e-12)
    expected = (torch.from_numpy(profile)[:, None, None] * values.double()).sum(0)
    torch.testing.assert_close(ema.model.weight.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ema.model.scale.double(), expected[1], rtol=1e-5, atol=1e-6)
    assert ema.model.count.item() == 200


def test_widest_power_average_is_the_mean():
    values, model = trajectory(50), Counting()
    ema = PowerEma(model, LARGEST_STD)
    train(model, ema, values, 4)
    assert ema.gamma == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(ema.model.weight, values[:, 0].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 6.94, 16.97, 1000])
def test_gamma_of_the_width_of_its_density(gamma):
    mean = quad(lambda t: t * (gamma + 1) * t**gamma, 0, 1)[0]
    square = quad(lambda t: (t - mean) ** 2 * (gamma + 1) * t**gamma, 0, 1, epsabs=1e-14)[0]
    std = min(math.sqrt(square), LARGEST_STD)
    assert gamma_of_std(std) == pytest.approx(gamma, rel=1e-6, abs=1e-9)


def test_gamma_inverts_the_width():
    # as the paper gives them
    assert gamma_of_std(0.1) == pytest.approx(6.94, abs=5e-3)
    assert gamma_of_std(0.05) == pytest.approx(16.97, abs=5e-3)
    for std in np.geomspace(1e-4, LARGEST_STD, 50):
        gamma = gamma_of_std(std)
        # Karras et al. 2023, Eq. 126
        width = math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
        assert width == pytest.approx(std, rel=1e-9)


@pytest.mark.parametrize("std", [0.0, -0.1, 0.29, math.nan, math.inf])
def test_widths_that_no_average_has_are_refused(std):
    with pytest.raises(UsageError, match=r"above 0 and at most 0\.28868"):
        PowerEma(Counting(), std)


def test_first_update_copies_and_zero_half_life_always_does():
    model, values = Counting(), trajectory(3)
    ema, plain = Ema(model, 1e9, ramp_up=None), Ema(model, 0)
    power = PowerEma(model, 0.2)
    train(model, ema, values[:1], 4)
    assert torch.equal(ema.model.weight, values[0, 0])
    power.update(images_seen=1000, batch_size=4)  # whatever came before
    assert torch.equal(power.model.weight, values[0, 0])
    train(model, plain, values, 4)
    assert torch.equal(plain.model.weight, values[-1, 0])


def test_average_is_a_frozen_model_of_its_own():
    model = Counting().train()
    ema = Ema(model, 100)
    assert type(ema.model) is Counting
    assert not ema.model.training and not ema.model.dropout.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert model.training and model.weight.requires_grad
    train(model, ema, trajectory(1), 4)
    with torch.no_grad():
        model.weight.add_(1)
    assert not torch.equal(ema.model.weight, model.weight)
    assert ema.model.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("average", [lambda m: Ema(m, 200), lambda m: PowerEma(m, 0.1)])
def test_resumed_average_is_the_unbroken_one_bit_for_bit(average):
    values = trajectory(60)
    model = Counting()
    unbroken = average(model)
    train(model, unbroken, values[:25], 8)
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    train(model, unbroken, values[25:], 8, start=25)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other = Counting()
    other.count.fill_(25)
    resumed = average(other)
    resumed.load_state_dict(state)
    train(other, resumed, values[25:], 8, start=25)
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_state_of_another_model_is_refused():
    with pytest.raises(LdmError, match="do not fit this model"):
        Ema(Counting(5), 10).load_state_dict(Ema(Counting(6), 10).state_dict())
    with pytest.raises(LdmError, match="do not fit this model"):
        Ema(Counting(5), 10).load_state_dict({})
