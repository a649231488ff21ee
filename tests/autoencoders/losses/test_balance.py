import pytest
import torch
from torch import nn

from autoencoders.losses import adaptive_weight, gradient_ratio


@pytest.fixture
def layer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Conv2d(4, 3, 3, padding=1)


@pytest.fixture
def features():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def losses(layer, features):
    out = layer(features)
    return out.abs().mean(), -out.square().mean()


def numerical_norm(layer, features, which, step=1e-6):
    """Norm of a loss's gradient by central differences, in float64, weight by weight."""
    weight = layer.weight.detach().double().clone()
    squares = 0.0
    for index in range(weight.numel()):
        values = []
        for sign in (1, -1):
            moved = weight.clone()
            moved.view(-1)[index] += sign * step
            out = nn.functional.conv2d(features.double(), moved, layer.bias.double(), padding=1)
            values.append((out.abs().mean(), -out.square().mean())[which].item())
        squares += ((values[0] - values[1]) / (2 * step)) ** 2
    return squares**0.5


def test_ratio_is_that_of_the_gradients_norms(layer, features):
    with torch.no_grad():
        recon, adversarial = (numerical_norm(layer, features, which) for which in (0, 1))
    ratio = gradient_ratio(*losses(layer, features), layer.weight, delta=1e-2)
    assert ratio.item() == pytest.approx(recon / (adversarial + 1e-2), rel=1e-4)
    assert ratio.dtype == torch.float32
    assert not ratio.requires_grad


def test_no_gradient_is_left_and_the_graphs_stay(layer, features):
    recon, adversarial = losses(layer, features)
    gradient_ratio(recon, adversarial, layer.weight)
    assert layer.weight.grad is None
    (recon + adversarial).backward()
    assert layer.weight.grad.isfinite().all()


def test_gradients_are_averaged_before_their_norm_is_taken(layer, features):
    """Two processes' halves of a batch, whose gradients point apart: as one process with both."""
    whole = gradient_ratio(*losses(layer, features), layer.weight, delta=0)
    others = (
        torch.autograd.grad(loss, layer.weight, retain_graph=True)[0]
        for loss in losses(layer, features[1:])
    )
    halves = gradient_ratio(
        *losses(layer, features[:1]), layer.weight,
        reduce=lambda gradient: (gradient + next(others)) / 2, delta=0,
    )  # fmt: skip
    torch.testing.assert_close(halves, whole)


def test_bf16_autocast_measures_in_float32(layer, features):
    expected = gradient_ratio(*losses(layer, features), layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        ratio = gradient_ratio(*losses(layer, features), layer.weight)
    assert ratio.dtype == torch.float32
    assert ratio.item() == pytest.approx(expected.item(), rel=0.05)


def test_a_discriminator_without_gradient_gives_no_nan(layer, features):
    recon, adversarial = losses(layer, features)
    ratio = gradient_ratio(recon, 0 * adversarial, layer.weight, delta=1e-9)
    assert adaptive_weight(0.5, ratio).item() == 1e4
    assert gradient_ratio(0 * recon, 0 * adversarial, layer.weight).item() == 0


def test_half_of_the_ratio_is_the_papers_weight():
    assert adaptive_weight(0.5, torch.tensor(3.0)).item() == 1.5
