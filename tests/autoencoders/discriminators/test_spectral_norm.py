import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm

from autoencoders.discriminators import spectral_norm


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def largest_singular_value(weight):
    return torch.linalg.svdvals(weight.detach().double().flatten(1))[0].item()


@pytest.mark.parametrize(
    "build",
    [lambda: nn.Conv2d(6, 9, 3), lambda: nn.Linear(7, 5), lambda: nn.Linear(8, 1)],
)
def test_largest_singular_value_becomes_one(build):
    layer = build()  # here, where the seed is set
    original = layer.weight.detach().clone()
    layer = spectral_norm(layer)
    for _ in range(100):
        weight = layer.weight
    assert largest_singular_value(weight) == pytest.approx(1, abs=1e-5)
    expected = original / largest_singular_value(original)
    torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


def test_gradient_is_that_of_pytorchs_own():
    layer = nn.Conv2d(6, 9, 3)
    ours, theirs = spectral_norm(copy.deepcopy(layer)), torch_spectral_norm(copy.deepcopy(layer))
    x = torch.randn(2, 6, 8, 8)
    for module in (ours, theirs):
        for _ in range(100):
            _ = module.weight  # both converge
        module(x).square().sum().backward()
    expected = theirs.parametrizations.weight.original.grad
    torch.testing.assert_close(
        ours.parametrizations.weight.original.grad, expected, rtol=1e-3, atol=1e-3
    )


def test_autocast_changes_nothing():
    layer = spectral_norm(nn.Conv2d(6, 9, 3))
    twin = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16):
        weights = [layer.weight for _ in range(3)]
    expected = [twin.weight for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))


def test_iterates_in_training_only_and_keeps_its_vectors_in_the_state():
    layer = spectral_norm(nn.Conv2d(6, 9, 3))
    before = copy.deepcopy(layer.state_dict())
    assert {name.rpartition(".")[2] for name in before} == {"bias", "original", "u", "v"}
    layer.eval()
    _ = layer.weight
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    layer.train()
    _ = layer.weight
    assert not torch.equal(
        before["parametrizations.weight.0.u"], layer.parametrizations.weight[0].u
    )


def test_two_forward_passes_before_a_backward():
    layer = spectral_norm(nn.Conv2d(3, 4, 3))
    x = torch.randn(1, 3, 8, 8)
    (layer(x).sum() - layer(-x).sum()).backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()
