"""The average of weights against a float64 loop, and an exact resume."""

import io

import pytest
import torch
from torch import nn

from ldm.ema import Ema
from ldm.errors import LdmError


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


def test_first_update_copies_and_zero_half_life_always_does():
    model, values = Counting(), trajectory(3)
    ema, plain = Ema(model, 1e9, ramp_up=None), Ema(model, 0)
    train(model, ema, values[:1], 4)
    assert torch.equal(ema.model.weight, values[0, 0])
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


def test_resumed_average_is_the_unbroken_one_bit_for_bit():
    values = trajectory(60)
    model = Counting()
    unbroken = Ema(model, 200)
    train(model, unbroken, values[:25], 8)
    file = io.BytesIO()
    torch.save(unbroken.state_dict(), file)
    train(model, unbroken, values[25:], 8, start=25)

    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other = Counting()
    other.count.fill_(25)
    resumed = Ema(other, 200)
    resumed.load_state_dict(state)
    train(other, resumed, values[25:], 8, start=25)
    for name, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_state_of_another_model_is_refused():
    with pytest.raises(LdmError, match="do not fit this model"):
        Ema(Counting(5), 10).load_state_dict(Ema(Counting(6), 10).state_dict())
    with pytest.raises(LdmError, match="do not fit this model"):
        Ema(Counting(5), 10).load_state_dict({})
