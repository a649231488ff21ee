"""Non-leaking augmentation: Karras et al. 2022 (arXiv 2206.00364), Appendix F.2.

Random flips, scaling, rotation, stretching and translation of each image. The network also reads
the nine numbers that describe them: it learns the data under every augmentation, and with nine
zeros it samples the data without any.
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
from ldm.device import to_device
from ldm.errors import LdmError

AUGMENT_PARAMETERS = 9
"""Numbers that describe an augmentation: the columns of `draw_augmentation`."""

# Table 6's constants A_scale = 2^0.2, A_aniso = 2^0.2 and A_trans = 1/8: the fixed units of the
# columns, so that the columns alone determine an augmentation.
SCALE_OCTAVES = 0.2
ANISOTROPY_OCTAVES = 0.2
TRANSLATION_SIDES = 0.125
AXIS_PROBABILITY = 0.5  # of a stretch along an axis at random; the others are horizontal

# The middle of eight equidistant samples by the polynomial through them, from the inner pair out.
# Together with the samples it is the low-pass of the wavelet sym4 convolved with its mirror image:
# the paper's kind of filter, made symmetric, so that it does not shift the image.
MIDPOINT = tuple(weight / 2048 for weight in (1225, -245, 49, -5))

# Pixels resampled at once: a core's cache; about a gigabyte of a GPU's memory.
PIXELS_CPU = 2**14
PIXELS_GPU = 2**22

Fraction = Annotated[float, Field(ge=0, le=1)]


class AugmentConfig(Config):
    """Geometric augmentation of the images, an input of the network, at the paper's strengths.

    The paper enables each transform but the mirror image with 12 % (CIFAR-10) or 15 % (FFHQ,
    AFHQv2). It replaces a flip in the data, which would leak.
    """

    probability: Fraction = 0.0
    """Independent probability of each transform for an image (A_prob; 0.15 on FFHQ); 0: none."""
    x_flip: Fraction = 0.5
    """Probability of a mirror image, independent of `probability` unless that is 0."""
    y_flip: Fraction = 0.5
    """Probability of an upside-down image where this transform is enabled; 0: none."""
    scale: Fraction = SCALE_OCTAVES
    """Standard deviation of log2 of the zoom, in octaves; 0: no scaling."""
    rotation: Fraction = 1.0
    """Largest angle to either side, as a fraction of half a turn; 0: no rotation."""
    anisotropy: Fraction = ANISOTROPY_OCTAVES
    """Standard deviation of log2 of the stretch along an axis, in octaves; 0: none. Half of the
    axes are horizontal."""
    translation: Fraction = TRANSLATION_SIDES
    """Standard deviation of the shift along each axis, as a fraction of the side; 0: none."""


def draw_augmentation(seed: int, ks: Iterable[int], config: AugmentConfig) -> Tensor:
    """Draw augmentations (len(ks), 9) of images ks: float32, row i a function of (seed, ks[i]).

    The columns, and their values where a transform is enabled (Table 6, "Conditioning"):

    | 0 | x-flip | 1: mirrored |
    | 1 | y-flip | 1: upside down |
    | 2 | scaling | log2 of the zoom / 0.2 |
    | 3, 4 | rotation | cos − 1 and sin of the angle, anticlockwise |
    | 5, 6 | anisotropy | log2 of the stretch / 0.2, times cos and sin of its axis, clockwise |
    | 7, 8 | translation | shift to the right / (W/8), shift downwards / (H/8) |

    At the default strengths a₂ and a₅ … a₇ are standard normal where enabled. The x-flip is always
    enabled, which mirrors every second image. All columns are 0 if `probability` is 0.

    As in the paper's code, half of the axes are horizontal (a₄ = 0), which its Table 6 omits; the
    others point anywhere. A negative a₅ shrinks along the axis, and so stretches across it. There
    the code leaves some vectors ambiguous: (a₅ cos a₄, a₅ sin a₄) may belong to either sign of a₅.
    Here a vector off the horizontal always means a stretch along itself: vectors and transforms
    have the code's distributions, and a vector determines its transform.
    """
    ks = list(ks)
    if config.probability == 0:
        return torch.zeros(len(ks), AUGMENT_PARAMETERS)
    u = seeds.uniform(seed, "augment-uniform", ks, (10,)).double()
    n = seeds.normal(seed, "augment-normal", ks, (4,)).double()
    chosen = u[:, :5] < config.probability  # y-flip, scaling, rotation, anisotropy, translation
    turn, axis = ((2 * u[:, 5:7] - 1) * math.pi).unbind(1)  # a3, a4 ~ U(−π, π)
    turn = turn * config.rotation * chosen[:, 2]
    axis = axis * (u[:, 9] < AXIS_PROBABILITY)
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
    """The transforms of augmentations (B, 9): homogeneous matrices (B, 3, 3) in float64.

    They map (x, y, 1) of the original, in pixels to the right of the image's centre and below it,
    to the augmented image.
    """
    flip_x, flip_y, scale, cos, sin, along, across, right, down = parameters.double().unbind(1)
    turn = torch.atan2(sin, 1 + cos)
    # a horizontal axis has a signed stretch, any other one along itself
    is_level = across == 0
    axis = torch.atan2(across, along).masked_fill(is_level, 0)
    stretch = 2 ** (ANISOTROPY_OCTAVES * torch.where(is_level, along, torch.hypot(along, across)))
    # Table 6, from top to bottom: each is applied to the result of those above it
    matrix = _scale(1 - 2 * flip_x, 1 - 2 * flip_y)
    zoom = 2 ** (SCALE_OCTAVES * scale)
    matrix = _scale(zoom, zoom) @ matrix
    matrix = _rotate(-turn) @ matrix
    matrix = _rotate(axis) @ _scale(stretch, 1 / stretch) @ _rotate(-axis) @ matrix
    matrix[:, 0, 2] = TRANSLATION_SIDES * width * right
    matrix[:, 1, 2] = TRANSLATION_SIDES * height * down
    return matrix


def augment(images: Tensor, parameters: Tensor) -> Tensor:
    """Apply the augmentations (B, 9) of `draw_augmentation` to images (B, C, H, W) in [−1, 1].

    Each result depends only on its own image and row. Zeros and flips copy pixels; all else
    resamples, and clamps the overshoot at edges to [−1, 1]. Pixels outside an image are its
    reflections. Dtype and memory layout are kept; the arithmetic is at least float32, without a
    matrix product that autocast or TF32 would lower. Without a change the result is the same
    tensor. Keep the parameters on the CPU: a GPU then does not wait for them.
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
            mirrored = to_device(mirrored, images.device)
            out = torch.where(mirrored.view(-1, 1, 1, 1), out.flip(dim), out)
    rows = parameters[:, 2:].any(dim=1).nonzero().flatten()
    if len(rows):
        matrix = augmentation_matrix(parameters[rows], *images.shape[-2:])
        out = out.clone() if out is images else out
        pixels = PIXELS_CPU if images.device.type == "cpu" else PIXELS_GPU
        at_once = max(1, pixels // images[0, 0].numel())
        rows = to_device(rows, images.device)
        for part, moves in zip(rows.split(at_once), matrix.split(at_once), strict=True):
            out[part] = _resample(images[part], moves).to(images.dtype)
    return out


# ------------------------------------------------------------------------------ resampling
def _low_pass() -> list[float]:
    """Half of a symmetric filter, from its middle, with which `_halve` inverts `_double` exactly.

    It is 3p − 2 p∗p, with p the low-pass of `_double`, of sum 1. At every frequency p and its alias
    sum to 1, and so do p (3p − 2p²) and its alias: `_halve` returns the image.
    """
    half = [0.0] * (2 * len(MIDPOINT))
    half[0], half[1::2] = 0.5, [weight / 2 for weight in MIDPOINT]
    p = np.array([*half[:0:-1], *half])
    low_pass = 3 * np.pad(p, len(half) - 1) - 2 * np.convolve(p, p)
    return low_pass[len(p) - 1 :].tolist()


LOW_PASS = _low_pass()
MARGIN = len(LOW_PASS) - 1


def _resample(images: Tensor, matrix: Tensor) -> Tensor:
    """Transform each image (B, C, H, W) by its matrix (B, 3, 3), at twice the resolution."""
    height, width = images.shape[-2:]
    if min(height, width) < len(MIDPOINT):
        raise LdmError(
            f"images of {width}×{height} are too small to augment: "
            f"both sides must be at least {len(MIDPOINT)}"
        )
    dtype = torch.promote_types(images.dtype, torch.float32)
    # the origin of every point of the fine grid, which has a margin for the low-pass
    inverse = to_device(torch.linalg.inv(matrix).to(dtype), images.device)
    inverse = inverse.unsqueeze(-1).unsqueeze(-1)
    x, y = (
        torch.arange(1 - side - MARGIN, side + MARGIN, device=images.device, dtype=dtype) / 2
        for side in (width, height)
    )
    source_x = inverse[:, 0, 0] * x + inverse[:, 0, 1] * y[:, None] + inverse[:, 0, 2]
    source_y = inverse[:, 1, 0] * x + inverse[:, 1, 1] * y[:, None] + inverse[:, 1, 2]
    # in units of half the image: −1 and 1 are the centres of the outermost pixels
    grid = torch.stack((source_x * (2 / (width - 1)), source_y * (2 / (height - 1))), dim=-1)
    fine = _double(_double(images.to(dtype).contiguous()).mT).mT
    moved = F.grid_sample(fine, grid, padding_mode="reflection", align_corners=True)
    return _halve(_halve(moved).mT.contiguous()).mT.clamp(-1, 1)


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


def _halve(x: Tensor) -> Tensor:
    """Low-pass, then every second row: (…, 2H − 1 + 2 MARGIN, W) → (…, H, W)."""
    span = x.shape[-2] - 2 * MARGIN  # 2H − 1
    out = x[..., MARGIN : MARGIN + span : 2, :] * LOW_PASS[0]
    for k, weight in enumerate(LOW_PASS[1:], start=1):
        for start in (MARGIN - k, MARGIN + k):
            out.add_(x[..., start : start + span : 2, :], alpha=weight)
    return out


def _scale(x: Tensor, y: Tensor) -> Tensor:
    """Scale2D: (B,), (B,) → (B, 3, 3)."""
    return torch.diag_embed(torch.stack((x, y, torch.ones_like(x)), dim=-1))


def _rotate(angle: Tensor) -> Tensor:
    """Rotate2D: (B,) → (B, 3, 3). With y downwards a positive angle turns clockwise."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    entries = torch.stack((cos, -sin, zero, sin, cos, zero, zero, zero, one), dim=-1)
    return entries.unflatten(-1, (3, 3))
