"""Guidance and inpainting: closures that turn denoisers into a denoiser for any sampler."""

from collections.abc import Sequence
from math import inf, isfinite

from torch import Tensor

from diffusion.samplers import Denoise
from ldm.errors import UsageError


def guide(
    strong: Denoise, weak: Denoise, scale: float, interval: tuple[float, float] = (0.0, inf)
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

    Returns:
        A denoiser: (x (B, C, H, W), σ ()) → (B, C, H, W).

    Raises:
        UsageError: the interval is empty or begins below 0, or the scale is not finite.
    """
    low, high = interval
    if not isfinite(scale):
        raise UsageError(f"guidance needs a finite scale, not {scale}: 1 changes nothing")
    if not 0 <= low < high:
        raise UsageError(
            f"guidance acts where low < σ ≤ high: 0 ≤ low < high must hold, not {low} and {high}"
        )

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        if scale == 1 or not low < sigma <= high:
            return strong(x, sigma)
        away = weak(x, sigma)
        # Ho & Salimans 2022, Eq. 6, which is linear and so holds for D as for ε
        return away + scale * (strong(x, sigma) - away)

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
