"""Rectified flow: its denoiser, loss and noise levels against their definitions in t."""

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats
from torch import nn

from diffusion import (
    SAMPLERS,
    SCHEDULES,
    DenoisingLoss,
    FlowConfig,
    FlowDenoiser,
    denoising_loss,
    flow_sigmas,
    sample_euler,
    sample_heun,
    sample_sigma,
)
from diffusion.edm import Uncertainty
from ldm.config import validate
from ldm.errors import UsageError
from tests.diffusion import known_answers

MEAN, STD = 0.3, 0.7  # of the Gaussian data below
CONVENTIONS = pytest.mark.parametrize(
    "config",
    [FlowConfig(), FlowConfig(time_scale=1, reversed=True)],
    ids=["ours", "SiT's"],
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spread(t):
    return t.view(-1, 1, 1, 1)


class Velocity(nn.Module):
    """A network that answers a velocity v(x_t, t), in the convention of a config."""

    def __init__(self, velocity, config):
        super().__init__()
        self.velocity, self.config = velocity, config

    def forward(self, x_t, time):
        t = time / self.config.time_scale
        if self.config.reversed:
            return -self.velocity(x_t, 1 - t)
        return self.velocity(x_t, t)


def gaussian_velocity(x_t, t):
    """E[ε − x₀ | x_t] of data N(MEAN, STD²): all are jointly Gaussian."""
    t = spread(t)
    variance = (1 - t) ** 2 * STD**2 + t**2
    off = x_t - (1 - t) * MEAN
    return t / variance * off - (MEAN + (1 - t) * STD**2 / variance * off)


def curved_velocity(x_t, t):
    """One without a meaning, which is neither linear nor exact for any data."""
    return torch.sin(3 * x_t + 2 * spread(t)) - 0.5 * x_t * spread(t).square()


# ------------------------------------------------------------------------------ the denoiser
@CONVENTIONS
def test_of_gaussian_data_the_denoiser_is_the_posterior_mean(config):
    denoiser = FlowDenoiser(Velocity(gaussian_velocity, config), config).double()
    sigma = torch.logspace(-5, 7, 13, dtype=torch.float64)
    x = MEAN + torch.hypot(spread(sigma), torch.tensor(STD)) * normal(13, 2, 3, 3)
    expected = known_answers.gaussian(MEAN, STD)(x, sigma)
    # c_noise is float32 at least, and here the network has no parameter to tell float64 by
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-5, atol=1e-5)


@CONVENTIONS
def test_network_gets_x_t_and_its_time(config):
    seen = []

    def velocity(x_t, t):
        seen.append((x_t, t))
        return torch.zeros_like(x_t)

    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x_t = normal(3, 1, 2, 2)
    out = FlowDenoiser(Velocity(velocity, config), config)(x_t / spread(1 - t), t / (1 - t))
    torch.testing.assert_close(seen[0], (x_t, t))
    torch.testing.assert_close(out, x_t)  # x₀ = x_t − t · 0


def test_float32_is_enough_from_end_to_end():
    config = FlowConfig()
    denoiser = FlowDenoiser(Velocity(curved_velocity, config), config)
    sigma = torch.tensor([denoiser.sigma_min, 1e-3, 1.0, 1e3, denoiser.sigma_max]).double()
    x = normal(5, 1, 4, 4) + spread(sigma) * normal(5, 1, 4, 4, seed=1)
    exact = denoiser(x, sigma)
    torch.testing.assert_close(
        denoiser(x.float(), sigma.float()).double(), exact, rtol=0, atol=2e-6
    )


# ------------------------------------------------------------------------------------ the loss
@CONVENTIONS
def test_loss_is_the_squared_error_of_the_velocity(config):
    x0, noise = normal(5, 2, 3, 3), normal(5, 2, 3, 3, seed=1)
    t = torch.tensor([1e-3, 0.2, 0.5, 0.8, 0.999], dtype=torch.float64)
    x_t = spread(1 - t) * x0 + spread(t) * noise
    naive = (curved_velocity(x_t, t) - (noise - x0)).square().mean(dim=(1, 2, 3))
    denoiser = FlowDenoiser(Velocity(curved_velocity, config), config)
    loss = denoising_loss(denoiser, x0, t / (1 - t), noise)
    torch.testing.assert_close(loss, naive, rtol=1e-4, atol=0)
    # and in float32, in which ‖D − x₀‖² is as small as t²
    single = denoising_loss(denoiser, x0.float(), (t / (1 - t)).float(), noise.float())
    torch.testing.assert_close(single.double(), naive, rtol=1e-3, atol=0)


@pytest.mark.parametrize("is_reversed", [False, True])
def test_the_loss_of_the_direction_is_that_of_the_velocities(is_reversed):
    plain, weighted = (FlowConfig(reversed=is_reversed, direction=w) for w in (0, 0.7))
    x0, noise = normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1)
    t = torch.tensor([0.01, 0.3, 0.6, 0.99], dtype=torch.float64)
    found, target = curved_velocity(spread(1 - t) * x0 + spread(t) * noise, t), noise - x0
    cosine = (found * target).sum(1) / (found.norm(dim=1) * target.norm(dim=1))
    without, loss = (
        denoising_loss(FlowDenoiser(Velocity(curved_velocity, c), c), x0, t / (1 - t), noise)
        for c in (plain, weighted)
    )
    torch.testing.assert_close(loss - without, 0.7 * (1 - cosine).mean(dim=(1, 2)))


def test_loss_resolves_the_lowest_noise_level_in_float32():
    denoiser = FlowDenoiser(Velocity(curved_velocity, FlowConfig()))
    z, noise = normal(64, 4, 8, 8), normal(64, 4, 8, 8, seed=1)
    sigma = torch.full((64,), denoiser.sigma_min, dtype=torch.float64)
    exact = denoising_loss(denoiser, z, sigma, noise).mean()
    single = denoising_loss(denoiser, z.float(), sigma.float(), noise.float()).mean()
    assert single.item() == pytest.approx(exact.item(), rel=5e-3)


def test_learned_uncertainty_weighs_the_loss_of_a_flow():
    torch.manual_seed(0)
    denoiser, uncertainty = FlowDenoiser(Velocity(curved_velocity, FlowConfig())), Uncertainty(16)
    sigma = torch.tensor([denoiser.sigma_min, 1.0, denoiser.sigma_max])
    batch = normal(3, 1, 2, 2).float(), sigma, normal(3, 1, 2, 2, seed=1).float()
    minimised, shown = DenoisingLoss(denoiser, uncertainty)(*batch)
    u = uncertainty(sigma.log() / 4)
    torch.testing.assert_close(minimised, shown / u.exp() + u)
    assert minimised.isfinite().all()


def test_training_on_gaussian_data_finds_the_exact_velocity():
    """The exact one is a(t) x_t + b(t): the network learns a and b, polynomials here."""

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 2))

        def forward(self, x_t, time):
            angles = (2 * time / 1000 - 1).clamp(-1, 1).acos()
            chebyshev = (torch.arange(6) * angles[:, None]).cos()  # (B, 6)
            a, b = (chebyshev @ self.weight).unbind(1)
            return spread(a) * x_t + spread(b)

    denoiser = FlowDenoiser(Line())
    z, noise, draws = normal(3, 40_000, 1, 1, 1, dtype=torch.float32)
    sigma = sample_sigma(draws.flatten(), FlowConfig())
    optimizer = torch.optim.LBFGS(denoiser.parameters(), max_iter=25, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = denoising_loss(denoiser, MEAN + STD * z, sigma, noise).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    t = torch.linspace(0.1, 0.9, 17)
    x_t = (1 - spread(t)) * MEAN + torch.linspace(-1, 1, 9).view(1, 1, 1, 9)
    with torch.no_grad():
        learned = denoiser.network(x_t, 1000 * t)
    exact = gaussian_velocity(x_t, t)
    assert (learned - exact).abs().max() < 0.1 < 0.1 * exact.abs().max()


# ---------------------------------------------------------------------------- the noise levels
LOGISTIC = [(0.0, 1.0), (-0.5, 1.4)]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("law", ["uniform", *LOGISTIC])
def test_times_are_drawn_by_their_law(law, shift):
    if law == "uniform":
        tree, cdf = {"distribution": law}, stats.uniform.cdf
    else:
        tree = {"noise_mean": law[0], "noise_std": law[1]}

        def cdf(t):
            return stats.norm.cdf(stats.logistic.ppf(t), *law)

    sigma = sample_sigma(normal(20_000), validate(FlowConfig, tree | {"shift": shift}))
    t = sigma / (1 + sigma)
    assert ((t > 0) & (t < 1)).all()
    # Esser et al. 2024, Eq. 23, solved for the time before the shift
    before = t / (shift - (shift - 1) * t)
    assert stats.kstest(before.numpy(), cdf).pvalue > 0.01
    if shift != 1:
        assert stats.kstest(t.numpy(), cdf).pvalue < 1e-6


def test_a_draw_stays_the_same_quantile():
    draws = torch.tensor([-1.0, 0.0, 2.0])
    sigma = sample_sigma(draws, FlowConfig(noise_mean=-0.4, noise_std=1.5, shift=2))
    assert sigma.log().tolist() == pytest.approx([x + math.log(2) for x in (-1.9, -0.4, 2.6)])
    uniform = sample_sigma(draws.double(), FlowConfig(distribution="uniform"))
    expected = stats.norm.cdf(draws.numpy())
    assert (uniform / (1 + uniform)).tolist() == pytest.approx(expected.tolist(), rel=1e-9)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [1e-30, 1.0, 1e30])
def test_extreme_draws_stay_inside_the_ends(distribution, shift):
    config = FlowConfig(distribution=distribution, shift=shift)
    sigma = sample_sigma(torch.tensor([-40.0, -6.0, 0.0, 6.0, 40.0]), config)
    t = sigma / (1 + sigma)  # in float32
    assert sigma.isfinite().all() and ((t > 0) & (t < 1)).all()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"distribution": "uniform", "noise_mean": 0.5}, "'noise_mean': has no effect with"),
        ({"distribution": "uniform", "noise_std": 2}, "'noise_std': has no effect with"),
        ({"distribution": "cosine"}, "'distribution'"),
        ({"noise_mean": math.inf}, "'noise_mean'"),
        ({"noise_std": 0}, "'noise_std'"),
        ({"noise_std": math.inf}, "'noise_std'"),
        ({"shift": 0}, "'shift'"),
        ({"shift": math.inf}, "'shift'"),
        ({"time_scale": -1}, "'time_scale'"),
        ({"sigma_data": 0.5}, "'sigma_data'"),
    ],
)
def test_impossible_settings_are_refused(tree, message):
    with pytest.raises(UsageError, match=message) as refused:
        validate(FlowConfig, tree)
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------------------------- sampling
def naive(velocity, noise, times, heun=False):
    """The ODE dx_t/dt = v from t = times[0] to 0, in x_t itself."""
    x_t = noise
    for t, following in pairwise(times.tolist()):
        t, following = (torch.full((len(noise),), u, dtype=torch.float64) for u in (t, following))
        v = velocity(x_t, t)
        x_next = x_t + spread(following - t) * v
        if heun and following[0] > 0:
            x_next = x_t + spread(following - t) * (v + velocity(x_next, following)) / 2
        x_t = x_next
    return x_t


class Exact(FlowDenoiser):
    """A denoiser whose network gets its time in float64."""

    def forward(self, x, sigma):
        t = (sigma / (1 + sigma)).expand(len(x))
        return x / (1 + sigma) - spread(t) * curved_velocity(x / (1 + sigma), t)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.3])
@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_steps_in_sigma_are_those_in_t(name, steps, shift):
    denoiser, noise = Exact(nn.Identity(), FlowConfig(shift=shift)), normal(3, 2, 4, 4)
    sigmas = flow_sigmas(steps, **denoiser.schedule_options("flow"))
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = shift * times / (1 + (shift - 1) * times)
    out = SAMPLERS[name](denoiser, noise, sigmas, **denoiser.sampler_options(name))
    # from pure noise at t = 1, and from where the schedule begins
    expected = naive(curved_velocity, noise, times, heun=name == "heun")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    times = sigmas / (1 + sigmas)
    expected = naive(curved_velocity, times[0] * noise, times, heun=name == "heun")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10 if name == "euler" else 1e-7)


MIXTURE = known_answers.mixture(
    torch.tensor([[-1.0, 0.0], [0.8, 0.6], [0.5, -0.9]]).double().view(3, 2, 1, 1),
    torch.tensor([0.5, 0.4, 0.6]).double(),
    torch.tensor([0.5, 0.3, 0.2]).double(),
)


@pytest.fixture(scope="module")
def exact():
    """The samples of MIXTURE's own ODE."""
    return sample_heun(MIXTURE, normal(20, 2, 1, 1), SCHEDULES["karras"](1000, 1e-4, 1e4))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_converge_to_one_sample_on_every_schedule(name, schedule, exact):
    denoiser, noise = FlowDenoiser(nn.Identity()), normal(20, 2, 1, 1)
    options, errors = denoiser.schedule_options(schedule), []
    for steps in (20, 60, 180):
        sigmas = SCHEDULES[schedule](steps, **options)
        out = SAMPLERS[name](MIXTURE, noise, sigmas, **denoiser.sampler_options(name))
        errors.append((out - exact).abs().max().item())
    # the other schedules begin at σ = 160, where the data still shift the noise by 1/160
    assert errors[2] < (0.03 if name == "euler" else 0.01), errors
    assert errors[2] < errors[1] < errors[0] or errors[1] < 0.01, errors


def test_few_steps_of_heun_from_pure_noise_are_good_in_t_alone(exact):
    noise = normal(20, 2, 1, 1)

    def error(**options):
        return (sample_heun(MIXTURE, noise, flow_sigmas(18), **options) - exact).abs().max()

    euler = (sample_euler(MIXTURE, noise, flow_sigmas(18)) - exact).abs().max()
    assert error(over="t") < euler / 2
    assert error() > 100
