"""The learned uncertainty: its formula, its minimum, and that training finds it."""

import math

import pytest
import torch

from diffusion.edm import Uncertainty, weigh


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Uncertainty()


def test_weighing_divides_by_the_expected_loss_and_charges_for_it():
    loss, u = torch.tensor([0.5, 2.0]), torch.tensor([0.0, math.log(4)])
    expected = [0.5, 2 / 4 + math.log(4)]
    assert weigh(loss, u).tolist() == pytest.approx(expected)


def test_least_where_the_exponential_of_u_is_the_mean_loss():
    losses = torch.tensor([0.1, 0.7, 2.2, 0.2], dtype=torch.float64)
    u = losses.mean().log().requires_grad_()
    weigh(losses, u).mean().backward()
    assert u.grad.item() == pytest.approx(0, abs=1e-12)
    best = weigh(losses, u).mean()
    for off in (-0.1, 0.1):
        assert weigh(losses, u + off).mean() > best


def test_gradient_of_the_loss_is_scaled_by_the_expected_loss():
    loss = torch.tensor([0.5, 2.0], requires_grad=True)
    weigh(loss, torch.tensor([0.3, -1.0])).sum().backward()
    assert loss.grad.tolist() == pytest.approx([math.exp(-0.3), math.exp(1.0)])


def test_one_number_for_each_noise_level_from_128_weights():
    uncertainty, c_noise = build(), torch.tensor([-0.9, 0.0, 0.6])
    out = uncertainty(c_noise)
    assert out.shape == (3,)
    weight, fourier = uncertainty.linear.weight[0], uncertainty.fourier
    assert [p.numel() for p in uncertainty.parameters()] == [128]
    for u, number in zip(out.tolist(), c_noise.tolist(), strict=True):
        angles = 2 * math.pi * (fourier.frequencies * number + fourier.phases)
        expected = (weight * math.sqrt(2) * angles.cos()).sum() / weight.norm()
        assert u == pytest.approx(expected.item(), abs=1e-3)


def test_state_dict_round_trip():
    ours, theirs, c_noise = build(), build(seed=1), torch.tensor([-0.5, 0.5])
    assert not torch.equal(ours(c_noise), theirs(c_noise))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(c_noise), theirs(c_noise))


def test_stays_in_float32_under_autocast():
    uncertainty, c_noise = build(), torch.tensor([-0.5, 0.5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = uncertainty(c_noise)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, uncertainty(c_noise))


def expected_loss(ln_sigma):
    """A loss that differs 30-fold between noise levels, as those of a trained denoiser do."""
    return 0.03 + torch.exp(-((ln_sigma + 0.4) ** 2))


def test_training_finds_the_expected_loss_at_every_noise_level():
    """Random losses of a known mean at every σ: e^u comes to that mean."""
    uncertainty = build()
    optimizer = torch.optim.Adam(uncertainty.parameters(), lr=0.03, betas=(0.9, 0.99))
    for step in range(600):
        ln_sigma = -0.4 + normal(256, seed=2 * step)
        loss = expected_loss(ln_sigma) * normal(256, seed=2 * step + 1).square()  # of mean 1
        optimizer.param_groups[0]["lr"] = 0.03 / max(step / 100, 1) ** 0.5
        optimizer.zero_grad()
        weigh(loss, uncertainty(ln_sigma / 4)).mean().backward()
        optimizer.step()
        uncertainty.normalize_weights()
    ln_sigma = torch.linspace(-2.0, 1.2, 17)  # where 19 of 20 noise levels are drawn
    learned = uncertainty(ln_sigma / 4).exp()
    torch.testing.assert_close(learned, expected_loss(ln_sigma), rtol=0.2, atol=0)
    assert uncertainty.linear.weight.norm().item() == pytest.approx(math.sqrt(128), rel=1e-6)
