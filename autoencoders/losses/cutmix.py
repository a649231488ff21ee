"""CutMix consistency of a discriminator that judges pixels (Schönfeld et al. 2020, Section 3.2).

A mixture of a real and a reconstructed image must be judged as the mixture of its judgements.
"""

import torch
from torch import Tensor

from autoencoders.discriminators.judgement import Judgement


def cutmix_consistency(mixed: Judgement, real: Judgement, fake: Judgement, mask: Tensor) -> Tensor:
    """Mean squared difference of what is said of the mixture's pixels and the mixture of what is.

    Args:
        mixed: judgement of `torch.where(mask, images, recon)`; its first head is of every pixel.
        real, fake: of the images and of their reconstructions.
        mask: bool (B, 1, H, W), true where the mixture is real.
    """
    pixels, of_real, of_fake = (judgement[0].float() for judgement in (mixed, real, fake))
    assert pixels.shape == mask.shape, "CutMix needs a logit for every pixel: the U-Net"
    # Schönfeld et al. 2020, Section 3.2: ‖D_dec(mix(x, x̂, M)) − mix(D_dec(x), D_dec(x̂), M)‖²
    return (pixels - torch.where(mask, of_real, of_fake)).square().mean()


def cutmix_masks(uniforms: Tensor, height: int, width: int) -> Tensor:
    """Boxes anywhere in images of the same proportions: (B, 3) → bool (B, 1, height, width).

    Args:
        uniforms: in [0, 1), of each image's own: λ, where the box starts from the top, from the
            left. The box covers 1 − λ of the image; it is never cut off, so to the nearest pixel.
    """
    # Yun et al. 2019 (arXiv 1905.04899), Equation 2: sides √(1 − λ), λ ~ Beta(1, 1), uniform
    share = (1 - uniforms[:, 0]).sqrt()
    rows, columns = (
        _interval(share, start, side)
        for start, side in zip(uniforms[:, 1:].unbind(1), (height, width), strict=True)
    )
    return (rows[:, :, None] & columns[:, None, :])[:, None]  # (B, H, 1) & (B, 1, W)


def _interval(share: Tensor, start: Tensor, side: int) -> Tensor:
    """`share` of the pixels of a side, in a row from a random one: (B,), (B,) → bool (B, side)."""
    length = (share * side).round()
    first = (start * (side - length + 1)).floor()[:, None]
    pixels = torch.arange(side, device=share.device)
    return (pixels >= first) & (pixels < first + length[:, None])
