"""Augmentation that does not leak into the samples: Karras et al. 2022 (arXiv 2206.00364), F.2.

Flips, scaling, rotation, stretching and translation of the pixels, drawn for each image. The nine
numbers drawn are given to the network besides the noise level: it learns the data under every
augmentation, and samples given nine zeros are of the data as they are.
"""

import math
from collections.abc import Iterable
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ldm import seeds
from ldm.config import Config
from ldm.errors import LdmError

AUGMENT_PARAMETERS = 9
"""Numbers that describe an augmentation: the columns of `draw_augmentation`."""

# Table 6's constants A_scale = 2^0.2, A_aniso = 2^0.2 and A_trans = 1/8. They are the units of the
# columns, and stay fixed, so that the columns alone say what was done to an image.
SCALE_OCTAVES = 0.2
ANISOTROPY_OCTAVES = 0.2
TRANSLATION_SIDES = 0.125

# The middle of eight equidistant samples by the polynomial through them, from the inner pair out.
# With the samples themselves it is the low-pass of the wavelet sym4 convolved with its mirror
# image: the paper's kind of filter, made symmetric, so that it shifts nothing.
MIDPOINT = tuple(weight / 2048 for weight in (1225, -245, 49, -5))

# Pixels resampled at once: what a core's cache holds; a gigabyte or so of a GPU's memory.
PIXELS_CPU = 2**14
PIXELS_GPU = 2**22

Fraction = Annotated[float, Field(ge=0, le=1)]


class AugmentConfig(Config):
    """Geometric augmentation of the images, known to the network; the paper's strengths.

    The paper enables each transform but the mirror image with 12 % (CIFAR-10) or 15 % (FFHQ,
    AFHQv2). It takes the place of a flip in the data, which would leak.
    """

    probability: Fraction = 0.0
    """Probability of each transform, on its own, for an image (A_prob; 0.15 on FFHQ); 0: none."""
    x_flip: Fraction = 0.5
    """Probability of a mirror image; does not depend on `probability`, unless that is 0."""
    y_flip: Fraction = 0.5
    """Share of the images chosen for it that are turned upside down; 0: none."""
    scale: Fraction = SCALE_OCTAVES
    """Standard deviation of log2 of the zoom, in octaves; 0: no scaling."""
    rotation: Fraction = 1.0
    """Largest angle to either side, as a fraction of half a turn; 0: no rotation."""
    anisotropy: Fraction = ANISOTROPY_OCTAVES
    """Standard deviation of log2 of the stretch along a random axis, in octaves; 0: none."""
    translation: Fraction = TRANSLATION_SIDES
    """Standard deviation of the shift along each axis, as a fraction of the side; 0: none."""


def draw_augmentation(
    seed: int, ks: Iterable[int], config: AugmentConfig, purpose: str = "augment"
) -> Tensor:
    """The augmentations (len(ks), 9) of images ks: float32, row i a function of (seed, ks[i]).

    The columns, and what they are where they are not 0 (Table 6, "Conditioning"):

    | 0 | x-flip | 1: mirrored |
    | 1 | y-flip | 1: upside down |
    | 2 | scaling | log2 of the zoom / 0.2 |
    | 3, 4 | rotation | cos − 1 and sin of the angle, anticlockwise |
    | 5, 6 | anisotropy | log2 of the stretch / 0.2, times cos and sin of its axis, clockwise |
    | 7, 8 | translation | shift to the right / (W/8), shift downwards / (H/8) |

    At the default strengths a₂ and a₅ … a₇ are standard normal where enabled. The x-flip is always
    enabled, which is a mirror image every second time. All is 0 where `probability` is 0.

    In the paper (a₅ cos a₄, a₅ sin a₄) stands for a stretch along its own direction or, where
    a₅ < 0, across it. Here it is always along: both vectors and transforms are distributed as
    there, and the one says the other.
    """
    ks = list(ks)
    if config.probability == 0:
        return torch.zeros(len(ks), AUGMENT_PARAMETERS)
    u = seeds.uniform(seed, f"{purpose}-uniform", ks, (9,)).double()
    n = seeds.normal(seed, f"{purpose}-normal", ks, (4,)).double()
    chosen = u[:, :5] < config.probability  # y-flip, scaling, rotation, anisotropy, translation
    turn, axis = ((2 * u[:, 5:7] - 1) * math.pi).unbind(1)  # a3, a4 ~ U(−π, π)
    turn = turn * config.rotation * chosen[:, 2]
    stretch = n[:, 1] * chosen[:, 3] * config.anisotropy / ANISOTROPY_OCTAVES
    shift = n[:, 2:] * chosen[:, 4:] * config.translation / TRANSLATION_SIDES
    columns = (
        u[:, 7] < config.x_flip,
        (u[:, 8] < config.y_flip) & chosen[:, 0],
        n[:, 0] * chosen[:, 1] * config.scale / SCALE_OCTAVES,
        turn.cos() - 1,
        turn.sin(),
        stretch * axis.cos(),
        stretch * axis.sin(),
        *shift.unbind(1),
    )
    return torch.stack([column.float() for column in columns], dim=1)


def augmentation_matrix(parameters: Tensor, height: int, width: int) -> Tensor:
    """Where an augmentation moves the pixels: (B, 9) → homogeneous matrices (B, 3, 3) in float64.

    They map the original's (x, y, 1), in pixels to the right of the image's centre and below it,
    to the augmented image's.
    """
    flip_x, flip_y, scale, cos, sin, along, across, right, down = parameters.double().unbind(1)
    turn, axis = torch.atan2(sin, 1 + cos), torch.atan2(across, along)
    stretch = 2 ** (ANISOTROPY_OCTAVES * torch.hypot(along, across))
    # Table 6, from top to bottom: each is applied to what those above it have made
    matrix = _scale(1 - 2 * flip_x, 1 - 2 * flip_y)
    zoom = 2 ** (SCALE_OCTAVES * scale)
    matrix = _scale(zoom, zoom) @ matrix
    matrix = _rotate(-turn) @ matrix
    matrix = _rotate(axis) @ _scale(stretch, 1 / stretch) @ _rotate(-axis) @ matrix
    matrix[:, 0, 2] = TRANSLATION_SIDES * width * right
    matrix[:, 1, 2] = TRANSLATION_SIDES * height * down
    return matrix


def augment(images: Tensor, parameters: Tensor) -> Tensor:
    """Images (B, C, H, W) in [−1, 1] under the augmentations (B, 9) of `draw_augmentation`.

    Each result is a function of its own image and row. Rows of zeros and flips copy the pixels;
    the others are resampled, and clamped to [−1, 1] as that overshoots at edges. What lies outside
    an image is its reflection, as often as needed. Dtype and memory layout are kept, the
    arithmetic is in float32 at least: it has no product of matrices that autocast or TF32 would
    lower. Where nothing changes it is the same tensor. Parameters may stay on the CPU, which
    spares a GPU the wait for them.

    Raises:
        LdmError: not one row an image, or an image to be resampled has a side under 4 pixels.
    """
    if parameters.shape != (len(images), AUGMENT_PARAMETERS):
        raise LdmError(
            f"augmentations of shape {tuple(parameters.shape)} for {len(images)} images: "
            f"they must be ({len(images)}, {AUGMENT_PARAMETERS})"
        )
    out = images
    for column, dim in ((0, 3), (1, 2)):
        mirrored = parameters[:, column] != 0
        if mirrored.any():
            out = torch.where(mirrored.to(images.device).view(-1, 1, 1, 1), out.flip(dim), out)
    rows = parameters[:, 2:].any(dim=1).nonzero().flatten()
    if len(rows):
        matrix = augmentation_matrix(parameters[rows], *images.shape[-2:])
        out = out.clone() if out is images else out
        pixels = PIXELS_CPU if images.device.type == "cpu" else PIXELS_GPU
        at_once = max(1, pixels // images[0, 0].numel())
        for part, moves in zip(
            rows.to(images.device).split(at_once), matrix.split(at_once), strict=True
        ):
            out[part] = _resample(images[part], moves).to(images.dtype)
    return out


# ------------------------------------------------------------------------------ resampling
def _resample(images: Tensor, matrix: Tensor) -> Tensor:
    """Draw each image (B, C, H, W) where its matrix (B, 3, 3) moves it, on twice the resolution."""
    height, width = images.shape[-2:]
    if min(height, width) < len(MIDPOINT):
        raise LdmError(
            f"images of {width}×{height} are too small to augment: "
            f"both sides must be at least {len(MIDPOINT)}"
        )
    dtype = torch.promote_types(images.dtype, torch.float32)
    taps = _low_pass()
    # for every point of the fine grid, with a margin for the low-pass: where it came from
    inverse = torch.linalg.inv(matrix).to(images.device, dtype).unsqueeze(-1).unsqueeze(-1)
    y = _fine_positions(height, len(taps) - 1, inverse).view(-1, 1)
    x = _fine_positions(width, len(taps) - 1, inverse)
    source_x = inverse[:, 0, 0] * x + inverse[:, 0, 1] * y + inverse[:, 0, 2]
    source_y = inverse[:, 1, 0] * x + inverse[:, 1, 1] * y + inverse[:, 1, 2]
    # in units of half the image: −1 and 1 are the centres of the outermost pixels
    grid = torch.stack((source_x * (2 / (width - 1)), source_y * (2 / (height - 1))), dim=-1)
    fine = _double(_double(images.to(dtype).contiguous()).mT).mT
    moved = F.grid_sample(fine, grid, padding_mode="reflection", align_corners=True)
    return _halve(_halve(moved, taps).mT.contiguous(), taps).mT.clamp(-1, 1)


def _fine_positions(side: int, margin: int, like: Tensor) -> Tensor:
    """Positions of the fine grid's points, two a pixel, in pixels from the image's centre."""
    steps = torch.arange(1 - side - margin, side + margin, device=like.device, dtype=like.dtype)
    return steps / 2


def _double(x: Tensor) -> Tensor:
    """Insert rows between the rows: (…, H, W) → (…, 2H − 1, W), reflected at the borders."""
    height, reach = x.shape[-2], len(MIDPOINT)
    padded = F.pad(x, (0, 0, reach - 1, reach - 1), mode="reflect")
    between = torch.zeros_like(x[..., 1:, :])
    for k, weight in enumerate(MIDPOINT):
        for start in (reach - 1 - k, reach + k):
            between.add_(padded[..., start : start + height - 1, :], alpha=weight)
    fine = x.new_empty(*x.shape[:-2], 2 * height - 1, x.shape[-1])
    fine[..., 0::2, :], fine[..., 1::2, :] = x, between
    return fine


def _halve(x: Tensor, taps: list[float]) -> Tensor:
    """Low-pass, then every second row: (…, 2H − 1 + 2 margins, W) → (…, H, W)."""
    margin = len(taps) - 1
    span = x.shape[-2] - 2 * margin  # 2H − 1
    out = x[..., margin : margin + span : 2, :] * taps[0]
    for k, weight in enumerate(taps[1:], start=1):
        for start in (margin - k, margin + k):
            out.add_(x[..., start : start + span : 2, :], alpha=weight)
    return out


def _low_pass() -> list[float]:
    """Half of a symmetric filter, from its middle, with which `_halve` undoes `_double` exactly.

    With p the low-pass of `_double`, of sum 1, it is 3p − 2 p∗p. At every frequency p and its
    alias sum to 1, so that p (3p − 2p²) and its alias do too: what comes back is the image.
    """
    half = [0.0] * (2 * len(MIDPOINT))
    half[0], half[1::2] = 0.5, [weight / 2 for weight in MIDPOINT]
    p = np.array([*half[:0:-1], *half])
    low_pass = 3 * np.pad(p, len(half) - 1) - 2 * np.convolve(p, p)
    return low_pass[len(p) - 1 :].tolist()


def _scale(x: Tensor, y: Tensor) -> Tensor:
    """Scale2D: (B,), (B,) → (B, 3, 3)."""
    return torch.diag_embed(torch.stack((x, y, torch.ones_like(x)), dim=-1))


def _rotate(angle: Tensor) -> Tensor:
    """Rotate2D: (B,) → (B, 3, 3). With y downwards a positive angle turns clockwise."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    entries = torch.stack((cos, -sin, zero, sin, cos, zero, zero, zero, one), dim=-1)
    return entries.unflatten(-1, (3, 3))
