"""Samplers: functions that solve dx/dσ = (x − D(x; σ)) / σ along a schedule of noise levels.

This is the probability-flow ODE of Karras et al. 2022 (arXiv 2206.00364), Eq. 1 with σ(t) = t. At
σ = 0, x is a sample of the denoiser's data.
"""

from collections.abc import Callable
from itertools import pairwise
from math import inf, isfinite, sqrt

from torch import Tensor

from ldm.errors import UsageError

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W) in float64, σ ()) → D(x; σ) of the same shape; an `EDM` is one."""

Churn = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, σ) → (x̂, σ̂): the same images at a noise level σ̂ ≥ σ."""

Callback = Callable[[int, Tensor, Tensor], None]
"""(step, x, denoised), called after each step 0 … N − 1: the state x at sigmas[step + 1], and the
denoised state at the start of the step; both (B, C, H, W), read-only."""


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
    sigma_max: float = inf,
) -> Churn:
    """Make a `Churn` that adds fresh noise before every step whose σ lies in [S_min, S_max].

    Args:
        sigmas: the whole schedule, (N + 1,), also if sampling starts in the middle of it.
        draw: step i in 0 … N − 1 → standard normal noise of x's shape; a function of the sample's
            seed and the step.
        S_churn: amount of noise over all N steps; 0 adds none.
        S_noise: standard deviation of the fresh noise; slightly above 1 counters loss of detail.
        sigma_max: upper limit of σ̂, the highest noise level of the denoiser. (Algorithm 2 has no
            such limit: its denoisers take any σ, one of discrete time does not.)

    Raises:
        UsageError: S_churn is below 0, S_min above S_max, S_noise not finite or below 0, or one of
            them NaN.
    """
    if not (S_churn >= 0 and S_min <= S_max and S_noise >= 0 and isfinite(S_noise)):
        raise UsageError(
            "churn needs S_churn ≥ 0, S_min ≤ S_max and a finite S_noise ≥ 0, "
            f"not {S_churn}, {S_min}, {S_max}, {S_noise}"
        )

    # Algorithm 2: γ_i, where it is not 0
    gamma = min(S_churn / (len(sigmas) - 1), sqrt(2) - 1)

    def churn(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if gamma == 0 or not S_min <= sigma <= S_max:
            return x, sigma
        step = int((sigmas > sigma).sum())
        sigma_hat = (sigma + gamma * sigma).clamp(max=sigma_max)  # line 5
        if sigma_hat <= sigma:
            return x, sigma
        fresh = S_noise * draw(step).to(x)  # (B, C, H, W)
        return x + (sigma_hat**2 - sigma**2).sqrt() * fresh, sigma_hat  # line 6

    return churn


def sample_heun(
    denoise: Denoise,
    noise: Tensor,
    sigmas: Tensor,
    churn: Churn = no_churn,
    start: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Stochastic Heun sampler, Karras et al. 2022, Algorithm 2: of second order.

    Args:
        denoise: the denoiser; called twice a step, once in the last.
        noise: standard normal (B, C, H, W).
        sigmas: noise levels (N + 1,) in float64, falling, the last one 0; best left on the CPU.
        churn: adds noise before a step.
        start: x at sigmas[0] instead of noise · sigmas[0], of noise's shape: an image plus noise
            edits the image (SDEdit, Meng et al. 2021, arXiv 2108.01073).
        callback: called after every step.

    Returns:
        Samples (B, C, H, W) in float64.

    Raises:
        UsageError: start is not of noise's shape.
    """
    x = _first(noise, sigmas, start)  # (B, C, H, W)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma_hat = churn(x, sigma)  # lines 5-6: raise the noise
        denoised = denoise(x, sigma_hat).to(x)
        slope = (x - denoised) / sigma_hat  # line 7
        x_next = x + (sigma_next - sigma_hat) * slope  # line 8
        if sigma_next > 0:  # lines 9-11: second order
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (sigma_next - sigma_hat) * (slope + slope_next) / 2
        else:
            x_next = denoised  # line 8 without its rounding
        x = x_next
        if callback:
            callback(step, x, denoised)
    return x


def sample_euler(
    denoise: Denoise,
    noise: Tensor,
    sigmas: Tensor,
    churn: Churn = no_churn,
    start: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler sampler: Algorithm 2 without lines 9-11, of first order; DDIM without churn.

    Song et al. 2020 (arXiv 2010.02502), Eq. 13, is this step: their x / √α is this x. Arguments,
    result and errors are those of `sample_heun`; the denoiser is called once a step.
    """
    x = _first(noise, sigmas, start)  # (B, C, H, W)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma_hat = churn(x, sigma)
        denoised = denoise(x, sigma_hat).to(x)
        # lines 7-8, as an interpolation towards D: exactly D at σ_next = 0
        x = denoised + sigma_next / sigma_hat * (x - denoised)
        if callback:
            callback(step, x, denoised)
    return x


def sample_dpmpp_2m(
    denoise: Denoise,
    noise: Tensor,
    sigmas: Tensor,
    start: Tensor | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), Algorithm 2: of second order.

    The denoiser is called once a step, and its answer in the step before is used again: second
    order at Euler's cost. It takes no churn: the answer in the step before would not hold for x
    with fresh noise. The first step, and the last if it ends in σ = 0, are of first order.
    Arguments, result and errors are those of `sample_heun`.
    """
    x = _first(noise, sigmas, start)  # (B, C, H, W)
    before: Tensor | None = None
    h_before = sigmas.new_zeros(())
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma).to(x)
        h = (sigma / sigma_next).log()  # of λ = −ln σ, as α = 1; infinite where σ_next = 0
        target = denoised
        if before is not None and sigma_next > 0:
            # Algorithm 2: D_i = (1 + 1/2r) D − 1/2r D_before, r = h_before / h
            target = denoised + h / (2 * h_before) * (denoised - before)
        # Algorithm 2: x_i = e^−h x + (1 − e^−h) D_i, e^−h = σ_next / σ
        x = target + sigma_next / sigma * (x - target)
        before, h_before = denoised, h
        if callback:
            callback(step, x, denoised)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "heun": sample_heun,
    "euler": sample_euler,
    "dpmpp-2m": sample_dpmpp_2m,
}
"""All take (denoise, noise, sigmas, start, callback); all but dpmpp-2m also churn."""


def _first(noise: Tensor, sigmas: Tensor, start: Tensor | None) -> Tensor:
    """x at sigmas[0], (B, C, H, W) in float64."""
    if start is None:
        return noise.double() * sigmas[0]
    if start.shape != noise.shape:
        raise UsageError(
            f"the start must be of the noise's shape {tuple(noise.shape)}, not {tuple(start.shape)}"
        )
    return start.double()
