"""Schedules and the Heun sampler against the paper's equations, in plain loops."""

import math
from itertools import pairwise

import pytest
import torch

from diffusion import EDM, UNet, UNetConfig, karras_sigmas, make_churn, sample_heun
from ldm.errors import UsageError
from ldm.seeds import normal

MEAN, STD = 0.3, 0.7


def denoise_gaussian(x, sigma):
    """E[z | x] for z ~ N(MEAN, STD²) and x = z + σn."""
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def solve_gaussian(x, sigma, sigma_end):
    """The probability-flow ODE from σ to σ_end, solved by hand for the same data."""
    return MEAN + (x - MEAN) * math.sqrt((STD**2 + sigma_end**2) / (STD**2 + sigma**2))


def noise(count=3, purpose="start"):
    return normal(0, purpose, range(count), (2, 4, 4))


# -------------------------------------------------------------------------------- schedule
@pytest.mark.parametrize("steps", [2, 18, 40])
def test_schedule_is_equation_5(steps):
    sigmas = karras_sigmas(steps)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (steps + 1,)
    expected = [
        (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        for i in range(steps)
    ]
    assert sigmas.tolist() == pytest.approx([*expected, 0.0], rel=1e-12)
    assert sigmas[0].item() == pytest.approx(80)
    assert sigmas[-2].item() == pytest.approx(0.002)
    assert (sigmas.diff() < 0).all()


def test_schedule_of_rho_1_is_linear():
    assert karras_sigmas(5, 1.0, 5.0, rho=1).tolist() == pytest.approx([5, 4, 3, 2, 1, 0])


def test_a_single_step_goes_straight_to_the_denoised():
    sigmas = karras_sigmas(1)
    assert sigmas.tolist() == pytest.approx([80, 0])
    out = sample_heun(denoise_gaussian, noise(), sigmas)
    torch.testing.assert_close(out, denoise_gaussian(noise().double() * 80, 80))


def test_no_steps_are_refused():
    with pytest.raises(UsageError, match="at least 1 step, not 0"):
        karras_sigmas(0)


@pytest.mark.parametrize("low, high", [(0.0, 80.0), (2.0, 1.0), (1.0, 1.0), (-1.0, 1.0)])
def test_a_schedule_that_does_not_fall_is_refused(low, high):
    with pytest.raises(UsageError, match="must fall from sigma_max to sigma_min"):
        karras_sigmas(4, low, high)


# ------------------------------------------------------------------------------------ Heun
def algorithm_2(denoise, start, sigmas, draw, S_churn, S_min, S_max, S_noise):
    """Karras et al. 2022, Algorithm 2, value by value in Python's floats."""
    steps, samples = len(sigmas) - 1, []
    draws = [draw(i).double().flatten().tolist() for i in range(steps)]
    for index, first in enumerate(start.double().flatten().tolist()):
        x = first * sigmas[0]
        for i in range(steps):
            t, t_next = sigmas[i], sigmas[i + 1]
            gamma = min(S_churn / steps, math.sqrt(2) - 1) if S_min <= t <= S_max else 0
            epsilon = draws[i][index] * S_noise
            t_hat = t + gamma * t
            x_hat = x + math.sqrt(t_hat**2 - t**2) * epsilon
            d = (x_hat - denoise(x_hat, t_hat)) / t_hat
            x = x_hat + (t_next - t_hat) * d
            if t_next != 0:
                d_next = (x - denoise(x, t_next)) / t_next
                x = x_hat + (t_next - t_hat) * (d / 2 + d_next / 2)
        samples.append(x)
    return torch.tensor(samples, dtype=torch.float64).view(start.shape)


def draw(step):
    return noise(purpose=f"churn {step}")


@pytest.mark.parametrize(
    "churn",
    [
        (0, 0.0, math.inf, 1.0),
        (3, 0.05, 50.0, 1.003),  # γ = 0.25 in the middle
        (40, 0.0, math.inf, 1.0),  # γ at its bound √2 − 1
    ],
)
def test_heun_is_algorithm_2(churn):
    sigmas = karras_sigmas(12)
    out = sample_heun(denoise_gaussian, noise(), sigmas, make_churn(sigmas, draw, *churn))
    expected = algorithm_2(denoise_gaussian, noise(), sigmas.tolist(), draw, *churn)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_heun_solves_the_gaussian_case_at_second_order():
    """Halving the steps' size divides the error by four, measured at σ_min, before the last step.

    (That step, from σ_min to 0, is of first order, and its size is the same in both.)
    """
    errors = []
    for steps in (32, 64, 128, 256):
        sigmas = karras_sigmas(steps)[:-1]
        out = sample_heun(denoise_gaussian, noise(), sigmas)
        exact = solve_gaussian(noise().double() * 80, 80, sigmas[-1].item())
        errors.append((out - exact).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.15)
    assert errors[-1] < 2e-3 * STD


def test_heun_reaches_the_data():
    out = sample_heun(denoise_gaussian, noise(), karras_sigmas(400))
    torch.testing.assert_close(out, solve_gaussian(noise().double() * 80, 80, 0), rtol=0, atol=2e-4)


def test_churned_samples_keep_the_distribution():
    """Fresh noise moves every sample, yet leaves their mean and spread as they are."""
    sigmas = karras_sigmas(60)
    start = normal(0, "many", range(4), (1, 64, 64))
    churn = make_churn(sigmas, lambda i: normal(0, f"many {i}", range(4), (1, 64, 64)), 20)
    out = sample_heun(denoise_gaussian, start, sigmas, churn)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert out.std().item() == pytest.approx(STD, abs=0.02)
    plain = sample_heun(denoise_gaussian, start, sigmas)
    assert torch.corrcoef(torch.stack([out.flatten(), plain.flatten()]))[0, 1] < 0.5


def test_no_churn_draws_nothing_and_changes_nothing():
    sigmas = karras_sigmas(8)
    plain = sample_heun(denoise_gaussian, noise(), sigmas)
    for churn in (
        make_churn(sigmas, lambda i: pytest.fail("drew noise"), 0),
        make_churn(sigmas, lambda i: pytest.fail("drew noise"), 10, S_min=100.0),
    ):
        assert torch.equal(sample_heun(denoise_gaussian, noise(), sigmas, churn), plain)


def test_denoiser_is_called_twice_a_step_but_the_last():
    calls = []

    def counting(x, sigma):
        assert x.dtype == torch.float64
        calls.append(float(sigma))
        return denoise_gaussian(x, sigma)

    sample_heun(counting, noise(), karras_sigmas(18))
    assert len(calls) == 35  # Karras et al. 2022, Table 2: NFE of 18 steps
    assert min(calls) > 0


def test_a_sample_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    config = UNetConfig(latent_channels=2, channels=16, multipliers=(1, 2), blocks=1, head_width=16)
    denoiser = EDM(UNet(config)).eval()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    sigmas = karras_sigmas(4)

    def sample(ks):
        def fresh(step):
            return normal(7, f"churn {step}", ks, (2, 8, 8))

        with torch.no_grad():
            churn = make_churn(sigmas, fresh, 2)
            return sample_heun(denoiser, normal(7, "start", ks, (2, 8, 8)), sigmas, churn)

    together = sample([0, 1, 2, 3, 4])
    assert torch.equal(sample([0, 1, 2, 3, 4]), together)
    torch.testing.assert_close(sample([3]), together[3:4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sample([4, 1]), together[[4, 1]], rtol=1e-5, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1
