"""The Haar wavelet transform, one level in each direction, by slices and sums.

Four strided slices and eight additions: exact in float32, untouched by autocast, and
differentiable. The bands are orthonormal, so energy is kept.
"""

import torch
from torch import Tensor

from ldm.errors import LdmError

SubBands = tuple[Tensor, Tensor, Tensor, Tensor]


def haar_dwt(images: Tensor) -> SubBands:
    """(B, C, H, W) → sub-bands (LL, H, V, D), each (B, C, H/2, W/2), in float32 or float64.

    LL is the low-pass image; H, V and D hold its horizontal, vertical and diagonal edges
    (Sadat et al. 2024, Section 3).

    Raises:
        LdmError: a side is odd.
    """
    height, width = images.shape[-2:]
    if height % 2 or width % 2:
        raise LdmError(
            f"the Haar transform halves both sides, and {height}×{width} has an odd one: "
            "crop or resize to even sides"
        )
    x = images if images.dtype == torch.float64 else images.float()
    # every 2×2 block is [[a, b], [c, d]]
    a, b = x[..., 0::2, 0::2], x[..., 0::2, 1::2]
    c, d = x[..., 1::2, 0::2], x[..., 1::2, 1::2]
    top, bottom, top_edge, bottom_edge = a + b, c + d, a - b, c - d
    low, horizontal = (top + bottom) / 2, (top - bottom) / 2
    vertical, diagonal = (top_edge + bottom_edge) / 2, (top_edge - bottom_edge) / 2
    return low, horizontal, vertical, diagonal


def haar_idwt(sub_bands: SubBands) -> Tensor:
    """(LL, H, V, D), each (B, C, h, w) → (B, C, 2h, 2w): the inverse of `haar_dwt`."""
    low, horizontal, vertical, diagonal = (
        band if band.dtype == torch.float64 else band.float() for band in sub_bands
    )
    top, bottom = low + horizontal, low - horizontal
    top_edge, bottom_edge = vertical + diagonal, vertical - diagonal
    *rest, height, width = low.shape
    x = low.new_empty(*rest, 2 * height, 2 * width)
    x[..., 0::2, 0::2], x[..., 0::2, 1::2] = (top + top_edge) / 2, (top - top_edge) / 2
    x[..., 1::2, 0::2], x[..., 1::2, 1::2] = (bottom + bottom_edge) / 2, (bottom - bottom_edge) / 2
    return x
