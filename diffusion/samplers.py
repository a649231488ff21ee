"""Samplers are functions, schedules are tensors: Karras et al. 2022 (arXiv 2206.00364)."""

from collections.abc import Callable
from itertools import pairwise
from math import inf, sqrt

import torch
from torch import Tensor

from ldm.errors import UsageError

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W) in float64, σ ()) → D(x; σ) of the same shape; an `EDM` is one."""

Churn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, σ) → (x̂, σ̂): the same images at a noise level σ̂ ≥ σ."""


def karras_sigmas(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """Noise levels for `steps` sampling steps: float64 (steps + 1,), falling, ending in 0.

    Raises:
        UsageError: fewer than one step, or not 0 < sigma_min < sigma_max.
    """
    if steps < 1:
        raise UsageError(f"sampling takes at least 1 step, not {steps}: raise steps")
    if not 0 < sigma_min < sigma_max:
        raise UsageError(
            f"noise must fall from sigma_max to sigma_min > 0, not from {sigma_max} to {sigma_min}"
        )
    # Eq. 5; a single step goes from sigma_max straight to 0
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def no_churn(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Leave the noise as it is: the deterministic sampler."""
    return x, sigma


def make_churn(
    sigmas: Tensor,
    draw: Callable[[int], Tensor],
    S_churn: float,
    S_min: float = 0.0,
    S_max: float = inf,
    S_noise: float = 1.0,
) -> Churn:
    """Fresh noise before every step whose σ lies in [S_min, S_max].

    Args:
        sigmas: the schedule that is sampled with, (N + 1,).
        draw: step i in 0 … N − 1 → standard normal noise of x's shape, so that a sample's noise
            can be a function of its own seed and the step.
        S_churn: how much noise, over all N steps; 0 adds none.
        S_noise: standard deviation of the fresh noise, a little above 1 against lost detail.
    """

    # Algorithm 2: γ_i, where it is not 0
    gamma = min(S_churn / (len(sigmas) - 1), sqrt(2) - 1)

    def churn(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if gamma == 0 or not S_min <= sigma <= S_max:
            return x, sigma
        step = int((sigmas > sigma).sum())
        sigma_hat = sigma + gamma * sigma  # line 5
        fresh = S_noise * draw(step).to(x)  # (B, C, H, W)
        return x + (sigma_hat**2 - sigma**2).sqrt() * fresh, sigma_hat  # line 6

    return churn


def sample_heun(denoise: Denoise, noise: Tensor, sigmas: Tensor, churn: Churn = no_churn) -> Tensor:
    """Stochastic Heun sampler, Karras et al. 2022, Algorithm 2.

    Args:
        denoise: the denoiser; called twice a step, once in the last.
        noise: standard normal (B, C, H, W).
        sigmas: noise levels (N + 1,) in float64, falling, the last one 0; best left on the CPU.
        churn: what raises the noise before a step.

    Returns:
        Samples (B, C, H, W) in float64.
    """
    x = noise.double() * sigmas[0]  # (B, C, H, W)
    for sigma, sigma_next in pairwise(sigmas):
        x, sigma_hat = churn(x, sigma)  # lines 5-6: raise the noise
        slope = (x - denoise(x, sigma_hat)) / sigma_hat  # line 7
        x_next = x + (sigma_next - sigma_hat) * slope  # line 8
        if sigma_next > 0:  # lines 9-11: second order
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma_hat) * (slope + slope_next) / 2
        x = x_next
    return x
