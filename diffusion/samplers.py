"""Samplers: functions that solve dx/dσ = (x − D(x; σ)) / σ along a schedule of noise levels.

This is the probability-flow ODE of Karras et al. 2022 (arXiv 2206.00364), Eq. 1 with σ(t) = t. At
σ = 0, x is a sample of the denoiser's data. Guidance and inpainting are closures that turn
denoisers into a denoiser for any sampler.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf, isfinite, sqrt
from typing import Literal

import torch
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

    sigmas = sigmas.cpu()
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
    over: Literal["sigma", "t"] = "sigma",
) -> Tensor:
    """Stochastic Heun sampler, Karras et al. 2022, Algorithm 2: of second order.

    Args:
        denoise: the denoiser; called twice a step, once in the last.
        noise: standard normal (B, C, H, W).
        sigmas: noise levels (N + 1,) in float64, falling, the last one 0; they are read on the CPU.
        churn: adds noise before a step.
        start: x at sigmas[0] instead of noise · sigmas[0], of noise's shape: an image plus noise
            edits the image (SDEdit, Meng et al. 2021, arXiv 2108.01073).
        callback: called after every step.
        over: the variable whose slopes at both ends of a step are averaged: "sigma" as in the
            paper, or "t", rectified flow's σ / (1 + σ), for x_t = x / (1 + σ). The latter needs no
            small steps at high σ, as t is at most 1.

    Returns:
        Samples (B, C, H, W) in float64.

    Raises:
        UsageError: start is not of noise's shape.
    """
    sigmas = sigmas.cpu()
    x = _first(noise, sigmas, start)  # (B, C, H, W)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x, sigma_hat = churn(x, sigma)  # lines 5-6: raise the noise
        denoised = denoise(x, sigma_hat).to(x)
        slope = (x - denoised) / sigma_hat  # line 7
        x_next = x + (sigma_next - sigma_hat) * slope  # line 8
        if sigma_next > 0:  # lines 9-11: second order
            denoised_next = denoise(x_next, sigma_next)
            slope_next = (x_next - denoised_next) / sigma_next
            if over == "sigma":
                x_next = x + (sigma_next - sigma_hat) * (slope + slope_next) / 2
            else:  # the same in x_t, whose slope dx_t/dt is (x − D)/σ − D
                change = (slope_next - denoised_next) - (slope - denoised)
                x_next = x_next + (sigma_next - sigma_hat) / (1 + sigma_hat) * change / 2
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
    sigmas = sigmas.cpu()
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
    sigmas = sigmas.cpu()
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
"""All take (denoise, noise, sigmas, start, callback); all but dpmpp-2m also churn, heun over."""


def _first(noise: Tensor, sigmas: Tensor, start: Tensor | None) -> Tensor:
    """x at sigmas[0], (B, C, H, W) in float64."""
    if start is None:
        return noise.double() * sigmas[0]
    if start.shape != noise.shape:
        raise UsageError(
            f"the start must be of the noise's shape {tuple(noise.shape)}, not {tuple(start.shape)}"
        )
    return start.double()


# ------------------------------------------------------------------ guidance and inpainting
def guide(
    strong: Denoise,
    weak: Denoise,
    scale: float,
    interval: tuple[float, float] = (0.0, inf),
    channels: int | None = None,
) -> Denoise:
    """Extrapolate from the answer of a weaker denoiser through that of a stronger one.

    Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): `weak` is the same network
    without the label. Autoguidance (Karras et al. 2024, arXiv 2406.02507): `weak` is a smaller or
    less trained network, with the same label.

    Args:
        strong: the denoiser to sample from.
        weak: the denoiser to move away from.
        scale: 1 is `strong` alone, above 1 guides, 0 is `weak` alone. (Ho & Salimans count from
            0: their w is scale − 1.)
        interval: guidance acts where low < σ ≤ high (Kynkäänniemi et al. 2024, arXiv 2404.07724);
            elsewhere, and at scale 1, only `strong` is evaluated.
        channels: guidance acts on the first so many channels, the others are `strong` alone; None:
            on all. (The code of DiT, SiT and LightningDiT guides three.)

    Returns:
        A denoiser: (x (B, C, H, W), σ ()) → (B, C, H, W).

    Raises:
        UsageError: the interval is empty or begins below 0, the scale is not finite, or there is
            no guided channel.
    """
    low, high = interval
    if not isfinite(scale):
        raise UsageError(f"guidance needs a finite scale, not {scale}: 1 changes nothing")
    if not 0 <= low < high:
        raise UsageError(
            f"guidance acts where low < σ ≤ high: 0 ≤ low < high must hold, not {low} and {high}"
        )

    if channels is not None and channels < 1:
        raise UsageError(f"guidance acts on 1 channel or more, not on {channels}")

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        if scale == 1 or not low < sigma <= high:
            return strong(x, sigma)
        away = weak(x, sigma)
        towards = strong(x, sigma)
        # Ho & Salimans 2022, Eq. 6, which is linear and so holds for D as for ε
        guided = away + scale * (towards - away)
        if channels is None:
            return guided
        return torch.cat([guided[:, :channels], towards[:, channels:]], dim=1)

    return denoise


def inpaint(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """Keep a part of the picture, and generate the rest to fit it.

    The known values replace the denoised ones. Samplers then take the known part along its own
    noise exactly to `known`, and the denoiser sees it at the right noise level in every step, much
    as in the imputation of Song et al. 2021 (arXiv 2011.13456), Appendix I.2. Only the denoiser's
    view of these noisy neighbours steers the rest. With much churn (`make_churn`) this approximates
    conditional sampling; without churn the rest follows the known part too little.

    Args:
        denoise: the denoiser for the rest.
        known: standardised latents to keep (B or 1, C, H, W); elsewhere any finite values.
        mask: (B or 1, 1 or C, H, W) in [0, 1] or bool: 1 where the picture is generated, 0 where
            it is known; values between blend the two.

    Returns:
        A denoiser of x (B, C, H, W), which raises a UsageError where x does not fit.

    Raises:
        UsageError: known or mask does not have four axes, they do not fit each other, or the mask
            is not in [0, 1].
    """
    shapes = f"known {tuple(known.shape)} and mask {tuple(mask.shape)}"
    held = tuple(map(max, known.shape, mask.shape))  # (B or 1, C, H, W)
    if not (known.ndim == mask.ndim == 4 and _fits(known.shape, held) and _fits(mask.shape, held)):
        raise UsageError(
            f"inpainting takes known (B, C, H, W) and a mask (B, 1, H, W) over it, not {shapes}"
        )
    if not ((mask >= 0) & (mask <= 1)).all():
        raise UsageError("an inpainting mask lies in [0, 1]: 1 where the picture is generated")

    def denoise_unknown(x: Tensor, sigma: Tensor) -> Tensor:
        if not _fits(held, x.shape):
            raise UsageError(f"inpainting holds {shapes}, which do not fit x {tuple(x.shape)}")
        unknown = mask.to(x)
        return unknown * denoise(x, sigma) + (1 - unknown) * known.to(x)

    return denoise_unknown


def _fits(shape: Sequence[int], into: Sequence[int]) -> bool:
    """Return whether `shape` broadcasts to the shape `into`."""
    return len(shape) == len(into) and all(
        size in (1, whole) for size, whole in zip(shape, into, strict=True)
    )
