"""Masks for inpainting: what lies under them is filled in, and their shadow on the latents."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def fill_hidden(images: Tensor, mask: Tensor) -> Tensor:
    """Images with what the mask hides replaced by the mean of the known pixels about it.

    An encoder looks beyond the patch of a latent: what is hidden must not reach it, nor an edge
    that is not in the picture. The mean is over the known pixels of a square of 2, 4, 8 … pixels,
    the smallest that holds any; grey where nothing is known. (After the pull-push of Gortler et al.
    1996, which blends the squares where this takes one.)

    Args:
        images: (B, 3, H, W) in [−1, 1].
        mask: (B, 1, H, W), 1 where hidden, 0 where known.
    """
    known = 1 - mask
    return _means(images * known, known)


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    """Means (B, 3, H, W) of squares of which there are sums, and counts (B, 1, H, W) of what is in
    them; of an empty one, that of the smallest of the squares about it that is not."""
    mean = sums / counts.clamp_min(1)
    if max(counts.shape[2:]) == 1 or (counts > 0).all():
        return mean
    larger = [F.avg_pool2d(part, 2, ceil_mode=True, divisor_override=1) for part in (sums, counts)]
    wide = F.interpolate(_means(*larger), scale_factor=2, mode="nearest")
    return torch.where(counts > 0, mean, wide[..., : counts.shape[2], : counts.shape[3]])


def latent_mask(mask: Tensor, sides: Sequence[int]) -> Tensor:
    """(B, 1, H, W) of pixels → (B, 1, h, w): 1 where any pixel of a latent's patch is 1.

    Args:
        sides: (h, w), which divide (H, W).
    """
    return F.adaptive_max_pool2d(mask, tuple(sides))
