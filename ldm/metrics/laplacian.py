"""The Laplacian pyramid (Burt & Adelson 1983): an image as one band of detail per octave."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pyramid_resolutions(resolution: int, smallest: int = 16) -> list[int]:
    """Edges of the levels: `resolution`, halved while it is even and stays at least `smallest`."""
    resolutions = [resolution]
    while resolutions[-1] % 2 == 0 and resolutions[-1] // 2 >= smallest:
        resolutions.append(resolutions[-1] // 2)
    return resolutions


def laplacian_pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """Detail at every resolution but the last, and the last one's low-pass image.

    Args:
        images: (B, C, H, W) floats; H and W divisible by 2^(levels − 1).

    Returns:
        `levels` tensors, (B, C, H/2^l, W/2^l) for l = 0, 1, …
    """
    bands = []
    for _ in range(levels - 1):
        coarse = shrink(images)
        # Burt & Adelson 1983, Equation 3: what the coarser level does not predict
        bands.append(images - expand(coarse))
        images = coarse
    return [*bands, images]


def shrink(images: Tensor) -> Tensor:
    """Low-pass and keep every second pixel: (B, C, H, W) → (B, C, H/2, W/2)."""
    if images.shape[-1] % 2 or images.shape[-2] % 2:
        raise ValueError(f"cannot halve {images.shape[-2]}×{images.shape[-1]}: an edge is odd")
    return _halve_rows(_halve_rows(images).mT).mT


def expand(images: Tensor) -> Tensor:
    """Interpolate between the pixels: (B, C, H, W) → (B, C, 2H, 2W)."""
    return _double_rows(_double_rows(images).mT).mT


# The low-pass is the binomial (1, 4, 6, 4, 1)/16, mirrored at the edges. Written out and not as a
# convolution: on a GPU that would round to TF32.
def _halve_rows(images: Tensor) -> Tensor:
    width = images.shape[-1]
    padded = F.pad(images, (2, 2, 0, 0), mode="reflect")
    a, b, c, d, e = (padded[..., k : k + width : 2] for k in range(5))
    return (a + e + 4 * (b + d) + 6 * c) / 16


def _double_rows(images: Tensor) -> Tensor:
    # The low-pass of the pixels with zeros between, times 2: three of its weights meet pixels at
    # the old places, two at the new ones. Mirroring about a last zero repeats the last pixel.
    padded = F.pad(images, (1, 0, 0, 0), mode="reflect")
    padded = F.pad(padded, (0, 1, 0, 0), mode="replicate")
    left, middle, right = padded[..., :-2], images, padded[..., 2:]
    old, new = (left + 6 * middle + right) / 8, (middle + right) / 2
    return torch.stack([old, new], dim=-1).flatten(-2)
