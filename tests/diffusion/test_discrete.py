"""The discrete-time denoiser, one trajectory of DDIM's, and the schedules behind noise tables."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from diffusion.discrete import DiscreteConfig, DiscreteDenoiser, find_schedule, log_sigmas
from diffusion.unet import UNet, UNetConfig
from ldm.config import validate
from ldm.errors import LdmError, UsageError

MEAN, STD = 0.3, 0.7  # of the Gaussian data below


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alpha_bar_of(t, config):
    """ᾱ_t at whole t, a product in Python's own float64."""
    product, last = 1.0, config.timesteps - 1
    for step in range(int(t) + 1):
        if config.schedule == "linear":
            beta = config.beta_start + (config.beta_end - config.beta_start) * step / last
        else:
            start, end = math.sqrt(config.beta_start), math.sqrt(config.beta_end)
            beta = (start + (end - start) * step / last) ** 2
        product *= 1 - beta
    return product


class GaussianNetwork(nn.Module):
    """The best ε or v for data N(MEAN, STD²), at the time steps it is told: no parameters."""

    def __init__(self, config):
        super().__init__()
        self.config, self.times = config, []

    def forward(self, x, time):
        self.times.append(time)
        alpha_bars = [alpha_bar_of(t.round(), self.config) for t in time]
        alpha_bar = torch.tensor(alpha_bars, dtype=torch.float64).view(-1, 1, 1, 1)
        variance = alpha_bar * STD**2 + 1 - alpha_bar  # of x_t
        # E[ε | x_t] and E[x₀ | x_t] of jointly Gaussian variables
        epsilon = (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * MEAN) / variance
        x0 = MEAN + alpha_bar.sqrt() * STD**2 * (x - alpha_bar.sqrt() * MEAN) / variance
        if self.config.prediction == "epsilon":
            return epsilon
        return alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x0


BOTH = pytest.mark.parametrize("prediction", ["epsilon", "v"])
SCHEDULES = pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])


@SCHEDULES
def test_noise_levels_are_those_of_diffusers_scheduler(schedule):
    from diffusers import EulerDiscreteScheduler

    config = DiscreteConfig(schedule=schedule)
    theirs = EulerDiscreteScheduler(
        beta_start=config.beta_start, beta_end=config.beta_end, beta_schedule=schedule
    )
    sigmas = ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod).sqrt()
    torch.testing.assert_close(log_sigmas(config).exp().float(), sigmas, rtol=1e-4, atol=0)


@SCHEDULES
@pytest.mark.parametrize("t", [0, 1, 500, 999])
def test_noise_levels_are_those_of_the_products(schedule, t):
    config = DiscreteConfig(schedule=schedule)
    alpha_bar = alpha_bar_of(t, config)
    expected = math.log(math.sqrt((1 - alpha_bar) / alpha_bar))
    assert log_sigmas(config)[t].item() == pytest.approx(expected, abs=1e-9)


def test_default_noise_levels_are_those_of_latent_diffusion():
    denoiser = DiscreteDenoiser(nn.Identity())
    assert denoiser.sigma_min == pytest.approx(math.sqrt(0.0015 / 0.9985), rel=1e-9)
    # √β rises evenly from a to b, so Σβ ≈ T (a² + ab + b²) / 3, and Σβ² ≈ T (a⁴ + … + b⁴) / 5
    a, b = math.sqrt(0.0015), math.sqrt(0.0195)
    first = 1000 * (a**2 + a * b + b**2) / 3
    second = 1000 * sum(a**k * b ** (4 - k) for k in range(5)) / 5
    # σ² ≈ 1 / ᾱ, and −ln ᾱ ≈ Σ (β + β²/2)
    assert denoiser.sigma_max == pytest.approx(math.exp((first + second / 2) / 2), rel=5e-3)
    assert denoiser.sigma_data == 1


@BOTH
@SCHEDULES
def test_of_gaussian_data_the_denoiser_is_the_posterior_mean(prediction, schedule):
    config = DiscreteConfig(prediction=prediction, schedule=schedule)
    denoiser = DiscreteDenoiser(GaussianNetwork(config), config)
    sigma = log_sigmas(config)[[0, 10, 400, 999]].exp()
    s = sigma.view(-1, 1, 1, 1)
    x = MEAN + torch.hypot(s, torch.tensor(STD)) * normal(4, 2, 3, 3)
    # E[x₀ | x₀ + σ n] of N(MEAN, STD²)
    expected = (STD**2 * x + s**2 * MEAN) / (STD**2 + s**2)
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-9, atol=1e-9)
    (times,) = denoiser.network.times
    torch.testing.assert_close(times, torch.tensor([0, 10, 400, 999]).double(), rtol=0, atol=1e-7)


@BOTH
def test_a_trajectory_of_ddim_is_eulers(prediction):
    from diffusers import DDIMScheduler

    config = DiscreteConfig(prediction=prediction)
    theirs = DDIMScheduler(
        beta_start=config.beta_start, beta_end=config.beta_end, beta_schedule="scaled_linear",
        clip_sample=False, prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction],
    )  # fmt: skip
    theirs.set_timesteps(20)
    network = GaussianNetwork(config)
    x_t = normal(3, 2, 4, 4)
    sigmas = [log_sigmas(config)[t].exp().item() for t in theirs.timesteps.tolist()] + [0.0]

    x = x_t * math.sqrt(sigmas[0] ** 2 + 1)  # x_t / √ᾱ
    for t in theirs.timesteps:
        x_t = theirs.step(network(x_t, t.expand(3)), t, x_t).prev_sample
    denoiser = DiscreteDenoiser(network, config)
    for sigma, following in pairwise(sigmas):
        # Karras et al. 2022, Algorithm 1, lines 4 and 5
        x = x + (following - sigma) * (x - denoiser(x, sigma)) / sigma
    torch.testing.assert_close(x, x_t, rtol=1e-4, atol=1e-4)  # their table is float32
    assert x.std() == pytest.approx(STD, rel=0.2)


def test_time_is_interpolated_between_levels_and_clamped_beyond():
    denoiser = DiscreteDenoiser(nn.Identity())
    table = denoiser.log_sigmas
    between = (0.75 * table[7] + 0.25 * table[8]).exp()
    sigma = torch.stack([between, table[0].exp() / 2, table[-1].exp() * 2, torch.tensor(0.0)])
    expected = torch.tensor([7.25, 0, 999, 0]).double()
    torch.testing.assert_close(denoiser.time_of(sigma), expected, rtol=0, atol=1e-9)
    # a float32 σ finds its step to a ten-thousandth
    steps = denoiser.time_of(table.exp().float())
    torch.testing.assert_close(steps, torch.arange(1000.0).double(), rtol=0, atol=1e-4)


class Spy(nn.Module):
    """Notes what it is told; its one parameter says its dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, x, time, **told):
        self.told = {"x": x, "time": time, **told}
        return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_network_runs_in_its_own_dtype_with_time_in_float32(dtype):
    denoiser = DiscreteDenoiser(Spy(torch.float32)).to(dtype)
    sigma = denoiser.log_sigmas[999].exp()
    for given, answer in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        denoised = denoiser(normal(2, 1, 2, 2).to(given), sigma)
        assert denoised.dtype == (answer if dtype != torch.float64 else torch.float64)
        told = denoiser.network.told
        assert told["x"].dtype == dtype
        assert told["time"].tolist() == pytest.approx([999, 999], abs=1e-3)
    assert denoiser.log_sigmas.dtype == torch.float64
    assert not list(denoiser.buffers())


def test_network_gets_only_the_given_conditions():
    denoiser, x = DiscreteDenoiser(Spy(torch.float32)), normal(2, 1, 2, 2)
    denoiser(x, 1.0)
    assert set(denoiser.network.told) == {"x", "time"}
    labels, augment = torch.tensor([1, -1]), torch.ones(2, 9)
    denoiser(x, torch.tensor([1.0, 2.0]), labels, augment)
    assert denoiser.network.told["labels"] is labels
    assert denoiser.network.told["augment"] is augment


def test_it_takes_the_unet():
    config = UNetConfig(channels=16, multipliers=(1,), blocks=1, head_width=16, classes=3)
    denoiser, x = DiscreteDenoiser(UNet(config)), normal(2, 4, 4, 4).float()
    # an untrained network says that there is no noise
    assert torch.equal(denoiser(x, 2.0, labels=torch.tensor([0, -1])), x)


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"timesteps": 1}, "'timesteps'"),
        ({"beta_end": 0.0015}, "'beta_end'.*above beta_start, 0.0015"),
        ({"beta_end": 1}, "'beta_end'"),
        ({"schedule": "sqrt"}, "'schedule'"),
    ],
)
def test_impossible_noise_levels_are_refused(tree, message):
    with pytest.raises(UsageError, match=message):
        validate(DiscreteConfig, tree)


# ------------------------------------------------------------------- schedules behind tables
SPACED = {
    # CompVis' "linear", diffusers' "scaled_linear"; CompVis' "sqrt_linear", diffusers' "linear"
    "scaled_linear": lambda a, b, n: torch.linspace(a**0.5, b**0.5, n, dtype=torch.float64) ** 2,
    "linear": lambda a, b, n: torch.linspace(a, b, n, dtype=torch.float64),
}
ENDS = [(1000, 0.0015, 0.0195), (1000, 0.00085, 0.012), (1000, 0.0001, 0.02), (20, 0.0123456, 0.5)]


def tables(schedule, steps, first, last, dtype=torch.float32):
    betas = SPACED[schedule](first, last, steps)
    return betas.to(dtype), (1 - betas).cumprod(0).to(dtype)


@pytest.mark.parametrize("schedule", list(SPACED))
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("given", ["both", "betas", "alpha_bars"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_schedule_of_a_table_is_found(schedule, ends, given, dtype):
    betas, alpha_bars = tables(schedule, *ends, dtype)
    found = find_schedule(
        betas if given != "alpha_bars" else None, alpha_bars if given != "betas" else None
    )
    assert (found.schedule, found.timesteps) == (schedule, ends[0])
    # the odd one has more digits than a table of ᾱ in float32 can tell
    near = 1e-5 if len(str(ends[1])) < 8 else 2e-4
    assert found.beta_start == pytest.approx(ends[1], rel=near)
    assert found.beta_end == pytest.approx(ends[2], rel=1e-9)
    if len(str(ends[1])) < 8:
        assert (found.beta_start, found.beta_end) == ends[1:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("schedule", list(SPACED))
def test_a_table_in_half_precision_is_of_the_schedule_it_was_rounded_from(schedule, dtype):
    betas, alpha_bars = tables(schedule, 1000, 0.0015, 0.0195, dtype)
    found = find_schedule(betas, alpha_bars)
    expected = {"schedule": schedule, "beta_start": 0.0015, "beta_end": 0.0195}
    assert found == DiscreteConfig(**expected)


def cosine(steps):
    # Nichol & Dhariwal 2021, Equation 17
    bar = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    return torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(bar)])


def changed(table, place, factor):
    table = table.clone()
    table[place] *= factor
    return table


BETAS, ALPHA_BARS = tables("scaled_linear", 1000, 0.0015, 0.0195)
OTHER = "its 1000 noise levels, β from 0.0015 to 0.0195, are evenly spaced neither"


@pytest.mark.parametrize(
    ("betas", "alpha_bars", "message"),
    [
        (cosine(1000), None, "are evenly spaced neither in √β (scaled_linear) nor"),
        (changed(BETAS, 500, 1.001), None, OTHER),
        (None, changed(ALPHA_BARS, 500, 0.999), "are evenly spaced neither"),
        (BETAS, changed(ALPHA_BARS, -1, 0.0), OTHER),  # rescaled to have no signal at the end
        (BETAS, tables("linear", 1000, 0.0015, 0.0195)[1], OTHER),
        (BETAS, ALPHA_BARS[:-1], OTHER),
        (changed(BETAS, 0, math.nan), None, "β from nan to 0.0195"),
        (BETAS.flip(0), None, "β from 0.0195 to 0.0015"),
        (torch.zeros(1000), None, "β from 0 to 0"),
        (BETAS[:1], None, "are not a table of at least two numbers"),
        (BETAS[None], None, "are not a table"),
        (torch.arange(1000), None, "are not a table"),
        (BETAS, torch.tensor(0.5), "are not a table"),
    ],
)
def test_tables_of_other_schedules_are_refused(betas, alpha_bars, message):
    with pytest.raises(LdmError) as caught:
        find_schedule(betas, alpha_bars)
    assert message in str(caught.value) and "\n" not in str(caught.value)
