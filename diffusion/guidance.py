"""Guidance is a closure: denoisers in, a denoiser out, which any sampler takes as it is."""

from collections.abc import Sequence
from math import inf, isfinite

from torch import Tensor

from diffusion.samplers import Denoise
from ldm.errors import UsageError


def guide(
    strong: Denoise, weak: Denoise, scale: float, interval: tuple[float, float] = (0.0, inf)
) -> Denoise:
    """Push what a good denoiser says away from what a worse one says of the same x.

    Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): `weak` is the same network
    without the label. Autoguidance (Karras et al. 2024, arXiv 2406.02507): `weak` is a smaller or
    less trained network, given the same label.

    Args:
        strong: the denoiser whose samples are wanted.
        weak: the denoiser to move away from.
        scale: 1 is `strong` alone, above 1 guides, 0 is `weak` alone. (Ho & Salimans count from
            0: their w is scale − 1.)
        interval: guidance acts where low < σ ≤ high (Kynkäänniemi et al. 2024, arXiv 2404.07724);
            elsewhere, and at scale 1, `strong` answers alone and `weak` is not evaluated.

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
    """Hold a part of the picture fast, and let the rest be made to fit it.

    Where the answer is known, the denoised value is that answer: samplers then carry those places
    down their own noise, exactly to `known`, and the denoiser sees them at the right noise level
    all the way, much as in the imputation of Song et al. 2021 (arXiv 2011.13456), Appendix I.2.
    The rest is steered only by what the denoiser makes of these neighbours under noise. That comes
    near sampling under the condition with much churn (`make_churn`); without, it follows the known
    part too little.

    Args:
        denoise: the denoiser to ask for the rest.
        known: what to keep, standardised latents (B or 1, C, H, W); elsewhere its values matter
            not, but must be finite.
        mask: (B or 1, 1 or C, H, W) in [0, 1] or bool: 1 where the picture is to be made, 0 where
            it is known; values between blend the two.

    Returns:
        A denoiser of x (B, C, H, W), which raises a UsageError where x does not fit.

    Raises:
        UsageError: known or mask is not of four axes, they do not fit each other, or the mask
            leaves [0, 1].
    """
    shapes = f"known {tuple(known.shape)} and mask {tuple(mask.shape)}"
    held = tuple(map(max, known.shape, mask.shape))  # (B or 1, C, H, W)
    if not (known.ndim == mask.ndim == 4 and _fits(known.shape, held) and _fits(mask.shape, held)):
        raise UsageError(
            f"inpainting takes known (B, C, H, W) and a mask (B, 1, H, W) over it, not {shapes}"
        )
    if not ((mask >= 0) & (mask <= 1)).all():
        raise UsageError("an inpainting mask lies in [0, 1]: 1 where the picture is to be made")

    def denoise_unknown(x: Tensor, sigma: Tensor) -> Tensor:
        if not _fits(held, x.shape):
            raise UsageError(f"inpainting holds {shapes}, which do not fit x {tuple(x.shape)}")
        made = mask.to(x)
        return made * denoise(x, sigma) + (1 - made) * known.to(x)

    return denoise_unknown


def _fits(shape: Sequence[int], into: Sequence[int]) -> bool:
    """Whether a tensor of `shape` can be laid over one of shape `into`, which keeps its own."""
    return len(shape) == len(into) and all(
        size in (1, whole) for size, whole in zip(shape, into, strict=True)
    )
