"""Schedules against the papers' equations in plain loops, and against diffusers."""

import math

import pytest
import torch

from diffusion.schedules import (
    SCHEDULES,
    cosine_sigmas,
    flow_sigmas,
    karras_sigmas,
    linear_sigmas,
)
from ldm.errors import UsageError

names = pytest.mark.parametrize("name", SCHEDULES)


@pytest.mark.parametrize("steps", [2, 18, 40])
def test_karras_is_equation_5(steps):
    expected = [
        (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        for i in range(steps)
    ]
    assert karras_sigmas(steps).tolist() == pytest.approx([*expected, 0.0], rel=1e-12)


def test_karras_of_rho_1_is_linear():
    assert karras_sigmas(5, 1.0, 5.0, rho=1).tolist() == pytest.approx([5, 4, 3, 2, 1, 0])


def test_karras_is_diffusers():
    from diffusers import EDMEulerScheduler

    scheduler = EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, rho=5.0)
    scheduler.set_timesteps(12)
    ours = karras_sigmas(12, 0.01, 50.0, rho=5.0)
    assert ours.tolist() == pytest.approx(scheduler.sigmas.tolist(), rel=1e-5)


def test_cosine_is_evenly_spaced_in_the_angle():
    first, last = math.atan(80), math.atan(0.002)
    expected = [math.tan(first + i / 8 * (last - first)) for i in range(9)]
    assert cosine_sigmas(9).tolist() == pytest.approx([*expected, 0.0], rel=1e-12)


def test_cosine_is_iddpms_alpha_bar():
    """Nichol & Dhariwal 2021, Eq. 17 with s = 0: ᾱ(t) = cos²(πt/2), and σ² = (1 − ᾱ)/ᾱ."""
    times = [0.9, 0.7, 0.5, 0.3, 0.1]
    bars = [math.cos(math.pi / 2 * t) ** 2 for t in times]
    expected = [math.sqrt((1 - bar) / bar) for bar in bars]
    ours = cosine_sigmas(5, expected[-1], expected[0])
    assert ours.tolist() == pytest.approx([*expected, 0.0], rel=1e-12)


def test_linear_is_evenly_spaced_in_the_time_of_a_linear_beta():
    """Karras et al. 2022, Table 1, "VP": σ(t)² + 1 = exp ∫β, β = β_min + β_d t."""
    times = [0.9, 0.7, 0.5, 0.3, 0.1]
    expected = [math.sqrt(math.exp(19.9 / 2 * t * t + 0.1 * t) - 1) for t in times]
    ours = linear_sigmas(5, expected[-1], expected[0])
    assert ours.tolist() == pytest.approx([*expected, 0.0], rel=1e-12)


def test_linear_is_ddpms_schedule_in_the_limit_of_many_steps():
    """DDPM's 1000 β from 1e-4 to 0.02 are β(t) / 1000 at t = i / 1000."""
    from diffusers import DDPMScheduler

    bars = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear").alphas_cumprod.double()
    theirs = ((1 - bars) / bars).sqrt()[[899, 699, 499, 299, 99]]  # t = 0.9, 0.7 …
    ours = linear_sigmas(5, theirs[-1].item(), theirs[0].item())
    assert ours[:-1].tolist() == pytest.approx(theirs.tolist(), rel=0.01)


@names
@pytest.mark.parametrize("steps", [2, 3, 50, 1000])
@pytest.mark.parametrize("ends", [(0.002, 80.0), (0.03, 14.6), (1e-4, 5e3)])
def test_falls_from_end_to_end_and_then_to_0(name, steps, ends):
    sigmas = SCHEDULES[name](steps, *ends)
    assert sigmas.dtype == torch.float64
    assert sigmas.shape == (steps + 1,)
    assert (sigmas.diff() < 0).all()
    assert (sigmas[-2].item(), sigmas[0].item()) == ends, "the ends must be exact"
    assert sigmas[-1] == 0


@names
def test_a_single_step_goes_straight_to_0(name):
    assert SCHEDULES[name](1, 0.01, 50.0).tolist() == [50.0, 0.0]


@names
def test_no_steps_are_refused(name):
    with pytest.raises(UsageError, match="at least 1 step, not 0"):
        SCHEDULES[name](0)


@names
@pytest.mark.parametrize(
    "low, high", [(0.0, 80.0), (2.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (1.0, math.inf), (math.nan, 1)]
)
def test_a_range_that_does_not_fall_is_refused(name, low, high):
    with pytest.raises(UsageError, match="must fall from sigma_max to sigma_min"):
        SCHEDULES[name](4, low, high)


@names
def test_more_steps_than_float64_can_tell_apart_are_refused(name):
    high = 1 + 8 * torch.finfo(torch.float64).eps
    with pytest.raises(UsageError, match=r"30 steps from .* are too many") as refused:
        SCHEDULES[name](30, 1.0, high)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("rho", [0, -1.0, math.nan])
def test_a_rho_that_is_not_positive_is_refused(rho):
    with pytest.raises(UsageError, match="rho must be above 0"):
        karras_sigmas(4, rho=rho)


# ------------------------------------------------------------------------------ rectified flow
def test_flow_is_evenly_spaced_in_t_down_to_0():
    sigmas = flow_sigmas(4)
    times = (sigmas / (1 + sigmas)).tolist()
    assert times == pytest.approx([1, 0.75, 0.5, 0.25, 0], abs=1e-6) and times[0] < 1
    assert flow_sigmas(1).tolist() == [1e7, 0]
    # with a σ_min, as the other schedules: evenly to it, and then 0
    assert flow_sigmas(3, 1 / 3, 3.0).tolist() == pytest.approx([3, 1, 1 / 3, 0])


@pytest.mark.parametrize("steps", [1, 2, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.3])
def test_flow_is_diffusers(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])  # their σ is t
    ours = flow_sigmas(steps, shift=shift)
    times = ours / (1 + ours)
    assert times.tolist() == pytest.approx(scheduler.sigmas.tolist(), abs=2e-6)


@pytest.mark.parametrize("shift", [0, -1.0, math.inf, math.nan])
def test_a_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(UsageError, match="shift must be above 0 and finite"):
        flow_sigmas(4, shift=shift)
