"""Noise schedules: tensors of the noise levels σ that a sampler visits, decreasing to 0.

A schedule is a function σ(t), sampled evenly in t between σ_max and σ_min; all end with a step from
σ_min to 0.
"""

from collections.abc import Callable
from math import inf, pi

import torch
from torch import Tensor

from ldm.errors import UsageError

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
"""Karras et al. 2022 (arXiv 2206.00364), Table 1: the range of σ, for σ_data = 0.5."""

FLOW_SIGMA_MAX = 1e7
"""σ of a rectified flow's pure noise: t = 1 − 1e-7, which is below 1 in float32, too."""

BETA_D, BETA_MIN = 19.9, 0.1
"""Karras et al. 2022, Table 1, column "VP": rise and start of DDPM's linear β."""


def karras_sigmas(
    steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = 7.0
) -> Tensor:
    """Noise levels evenly spaced in σ^(1/ρ), Karras et al. 2022, Eq. 5.

    Args:
        steps: number of steps of the sampler, at least 1; a single one goes from sigma_max to 0.
        sigma_min: the last noise level above 0.
        sigma_max: the first noise level.
        rho: above 0; 1 spaces σ evenly, a larger value shortens the steps near sigma_min.

    Returns:
        float64 (steps + 1,), strictly falling from sigma_max to sigma_min and then 0, on the CPU.

    Raises:
        UsageError: fewer than one step, not 0 < sigma_min < sigma_max < ∞, rho not above 0, or so
            many steps that neighbouring levels are equal in float64.
    """
    if not rho > 0:
        raise UsageError(f"the schedule's rho must be above 0, not {rho}: the paper takes 7")
    # Eq. 5: t = σ^(1/ρ)
    return _evenly(steps, sigma_min, sigma_max, lambda s: s ** (1 / rho), lambda t: t**rho)


def cosine_sigmas(steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX) -> Tensor:
    """Noise levels of iDDPM's cosine schedule: σ = tan(πt/2), evenly spaced in t.

    Nichol & Dhariwal 2021 (arXiv 2102.09672), Eq. 17, with offset s = 0 and in continuous time.
    Arguments, result and errors are those of `karras_sigmas`, without rho.
    """
    # Eq. 17: ᾱ = cos²(πt/2), and σ² = (1 − ᾱ) / ᾱ
    return _evenly(
        steps, sigma_min, sigma_max, lambda s: s.atan() * 2 / pi, lambda t: (t * pi / 2).tan()
    )


def linear_sigmas(steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX) -> Tensor:
    """Noise levels of DDPM's linear β in continuous time ("VP"), evenly spaced in t.

    Karras et al. 2022, Table 1, column "VP", with its β_d = 19.9 and β_min = 0.1; σ_max = 80 is
    t = 0.93. Arguments, result and errors are those of `karras_sigmas`, without rho.
    """

    # Table 1, σ(t) = √(exp(½ β_d t² + β_min t) − 1), solved for t
    def time(sigma: Tensor) -> Tensor:
        exponent = sigma.square().log1p()
        # the root of a quadratic, written so that a small exponent does not cancel
        return 2 * exponent / (BETA_MIN + (BETA_MIN**2 + 2 * BETA_D * exponent).sqrt())

    def level(t: Tensor) -> Tensor:
        return (BETA_D / 2 * t.square() + BETA_MIN * t).expm1().sqrt()

    return _evenly(steps, sigma_min, sigma_max, time, level)


def flow_sigmas(
    steps: int,
    sigma_min: float | None = None,
    sigma_max: float = FLOW_SIGMA_MAX,
    shift: float = 1.0,
) -> Tensor:
    """Noise levels of rectified flow: σ = s t / (1 − t), evenly spaced in t.

    Esser et al. 2024 (arXiv 2403.03206), Eq. 23: it shifts t to s t / (1 + (s − 1) t).

    Args:
        steps, sigma_max: see `karras_sigmas`.
        sigma_min: the last noise level above 0; None: all steps in t are alike, the last one too.
        shift: s, above 0; above 1 more of the steps are at high noise levels.

    Returns:
        As `karras_sigmas`.

    Raises:
        UsageError: as `karras_sigmas`, or a shift that is not above 0 and finite.
    """
    if not 0 < shift < inf:
        raise UsageError(f"the schedule's shift must be above 0 and finite, not {shift}")
    if sigma_min is None:
        last = sigma_max / (shift + sigma_max) / max(steps, 2)  # a single step has no other level
        sigma_min = shift * last / (1 - last)
    return _evenly(
        steps, sigma_min, sigma_max, lambda s: s / (shift + s), lambda t: shift * t / (1 - t)
    )


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "karras": karras_sigmas,
    "cosine": cosine_sigmas,
    "linear": linear_sigmas,
    "flow": flow_sigmas,
}
"""All take (steps, sigma_min, sigma_max); karras_sigmas also rho, flow_sigmas shift."""


def _evenly(
    steps: int,
    sigma_min: float,
    sigma_max: float,
    time: Callable[[Tensor], Tensor],
    level: Callable[[Tensor], Tensor],
) -> Tensor:
    """`steps` noise levels evenly spaced in time(σ), whose inverse is `level`, and then 0."""
    if steps < 1:
        raise UsageError(f"sampling takes at least 1 step, not {steps}: raise steps")
    if not 0 < sigma_min < sigma_max < inf:
        raise UsageError(
            f"noise must fall from sigma_max to sigma_min > 0, not from {sigma_max} to {sigma_min}"
        )
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    first, last = time(torch.tensor([sigma_max, sigma_min], dtype=torch.float64))
    sigmas = level(first + ramp * (last - first))
    # exactly the given ends: a denoiser may refuse a σ one rounding outside them
    sigmas[-1] = sigma_min
    sigmas[0] = sigma_max
    sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
    if not (sigmas.diff() < 0).all():
        raise UsageError(
            f"{steps} steps from {sigma_max} to {sigma_min} are too many to tell neighbouring "
            "noise levels apart in float64: lower steps or widen the range"
        )
    return sigmas
