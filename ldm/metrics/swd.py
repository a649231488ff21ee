"""Sliced Wasserstein distance between two sets of images (Karras et al. 2018).

Random 7×7 patches of every level of the Laplacian pyramid (Burt & Adelson 1983) are two clouds of
points. The distance is the mean, over random directions, of the one-dimensional Wasserstein
distance of their projections. The finest level compares edges and noise, the coarsest large
structures. It needs no weights.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from ldm.config import (
    Resolution,
    format_size,
    height_width,
    resolution_of,
    shorter_side,
    size_word,
)
from ldm.errors import LdmError
from ldm.images import to_float
from ldm.seeds import generator


def pyramid_resolutions(resolution: Resolution, smallest: int = 16) -> list[Resolution]:
    """List the sizes of the levels: halve both sides while they are even and ≥ 2 · `smallest`."""
    height, width = height_width(resolution)
    resolutions = [resolution]
    while height % 2 == width % 2 == 0 and min(height, width) // 2 >= smallest:
        height, width = height // 2, width // 2
        resolutions.append(resolution_of(height, width))
    return resolutions


def laplacian_pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """Split images (B, C, H, W) into `levels` bands (B, C, H/2^l, W/2^l), l = 0, 1, …

    The last band is the low-pass image. H and W must be divisible by 2^(levels − 1).
    """
    bands = []
    for _ in range(levels - 1):
        coarse = shrink(images)
        # Burt & Adelson 1983, Equation 3
        bands.append(images - expand(coarse))
        images = coarse
    return [*bands, images]


def shrink(images: Tensor) -> Tensor:
    """Apply the low-pass and keep every second pixel: (B, C, H, W) → (B, C, H/2, W/2)."""
    if images.shape[-1] % 2 or images.shape[-2] % 2:
        raise ValueError(f"cannot halve {images.shape[-2]}×{images.shape[-1]}: an edge is odd")
    return _halve_rows(_halve_rows(images).mT).mT


def expand(images: Tensor) -> Tensor:
    """Interpolate between the pixels: (B, C, H, W) → (B, C, 2H, 2W)."""
    return _double_rows(_double_rows(images).mT).mT


# The low-pass is the binomial (1, 4, 6, 4, 1)/16, mirrored at the edges. It is written out because
# a convolution on a GPU would round to TF32.
def _halve_rows(images: Tensor) -> Tensor:
    width = images.shape[-1]
    padded = F.pad(images, (2, 2, 0, 0), mode="reflect")
    a, b, c, d, e = (padded[..., k : k + width : 2] for k in range(5))
    return (a + e + 4 * (b + d) + 6 * c) / 16


def _double_rows(images: Tensor) -> Tensor:
    # The low-pass of the pixels with zeros between, times 2: three of its weights fall on pixels at
    # old positions, two at new ones. Mirroring about the last zero repeats the last pixel.
    padded = F.pad(images, (1, 0, 0, 0), mode="reflect")
    padded = F.pad(padded, (0, 1, 0, 0), mode="replicate")
    left, middle, right = padded[..., :-2], images, padded[..., 2:]
    old, new = (left + 6 * middle + right) / 8, (middle + right) / 2
    return torch.stack([old, new], dim=-1).flatten(-2)


Patches = NDArray[np.float16]

PATCH = 7  # pixels
SCALE = 1e3  # the paper's tables show the distance ×10³
DIRECTIONS_AT_ONCE = 16  # bounds the memory of sorting all points along directions


class PatchDescriptors:
    """Patches of the images of a set.

    Their positions in image k depend on (seed, k) alone: batches and processes do not matter.

    Args:
        resolution: size of the images in pixels, at least 7.
        patches: number per image and level, 128 in the paper.
    """

    def __init__(self, resolution: Resolution, patches: int = 128, seed: int = 0) -> None:
        if shorter_side(resolution) < PATCH:
            raise LdmError(
                f"the sliced Wasserstein distance needs images of {PATCH}×{PATCH} pixels or more, "
                f"not {format_size(resolution)}"
            )
        self.resolutions = pyramid_resolutions(resolution)
        self.patches = patches
        self.seed = seed
        self._images: dict[int, tuple[Patches, ...]] = {}  # by number; (P, C, 49) of each level

    @property
    def count(self) -> int:
        """Number of images seen."""
        return len(self._images)

    def update(self, images: Tensor, ks: Tensor | Sequence[int] | None = None) -> None:
        """Add images (B, C, H, W), uint8 or floats in [−1, 1].

        Args:
            ks: numbers of the images, each once; by default they continue from `count`.
        """
        sides = height_width(self.resolutions[0])
        if images.ndim != 4 or images.shape[2:] != sides:
            wanted = ", ".join(map(str, sides))
            raise ValueError(f"images must be (B, C, {wanted}), not {tuple(images.shape)}")
        given = range(self.count, self.count + len(images)) if ks is None else ks
        numbers = [int(k) for k in given]
        if len(numbers) != len(images):
            raise ValueError(f"{len(images)} images need as many numbers, not {len(numbers)}")
        if not len(images):
            return
        draws = [generator(self.seed, "swd patches", k) for k in numbers]
        images = to_float(images) if images.dtype == torch.uint8 else images.float()
        levels = []
        for band in laplacian_pyramid(images, len(self.resolutions)):
            places = [side - PATCH + 1 for side in band.shape[-2:]]
            # of one number, for squares, as earlier versions drew them
            most = places[0] if places[0] == places[1] else places
            size = (self.patches, 2)
            corners = np.stack([draw.integers(most, size=size) for draw in draws])
            # half precision: 6 GB instead of 12 for the paper's 16,384 images at 256²; its
            # rounding, 5e-4 of a value, is the same for both sets
            cut = cut_patches(band, torch.from_numpy(corners)).half().cpu()
            levels.append(cut.contiguous().numpy())  # sums depend on the layout
        self._add(zip(numbers, zip(*levels, strict=True), strict=True))

    def merge(self, other: "PatchDescriptors") -> None:
        """Add the patches that another process has cut from the same set."""
        ours, theirs = ((side.resolutions, side.patches, side.seed) for side in (self, other))
        if ours != theirs:
            raise ValueError("descriptors of other resolutions, patch counts or seeds do not merge")
        self._add(other._images.items())

    def level(self, index: int, images: int) -> Tensor:
        """Return the patches (images · P, C, 49) of the first `images` images by number."""
        first = sorted(self._images)[:images]
        return torch.from_numpy(np.concatenate([self._images[k][index] for k in first]))

    def _add(self, images: Iterable[tuple[int, tuple[Patches, ...]]]) -> None:
        for k, patches in images:
            if k in self._images:
                raise ValueError(f"image {k} has come before: number each image once")
            self._images[k] = patches


def sliced_wasserstein(
    images_a: Tensor | Iterable[Tensor],
    images_b: Tensor | Iterable[Tensor],
    seed: int = 0,
    patches: int = 128,
    projections: int = 128,
    repeats: int = 4,
) -> dict[str, float]:
    """Distance between two sets of images at every level of their Laplacian pyramids, ×10³.

    The defaults are those of Karras et al. 2018, Section 5, for 16,384 images in each set; for
    fewer the distance of equal distributions is larger. Only as many images as the smaller set has
    are used of both.

    Args:
        images_a, images_b: (N, C, H, W), or iterables of such batches; uint8, or floats in
            [−1, 1].
        patches: number per image and level.
        projections, repeats: `repeats` draws of `projections` random directions.

    Returns:
        The distance at each level by its resolution, as in {"32": …, "16": …} or {"48x32": …}, and
        their "mean".

    Raises:
        LdmError: a set is empty, or its images are smaller than 7×7 pixels.
    """
    sides = []
    # as published, each set's patches are drawn apart: in the same places, an image and its
    # reconstruction would show the same content
    for own_seed, images in enumerate((images_a, images_b), start=seed):
        side = None
        for batch in [images] if isinstance(images, Tensor) else images:
            side = side or PatchDescriptors(resolution_of(*batch.shape[-2:]), patches, own_seed)
            side.update(batch)
        if side is None:
            raise LdmError("the sliced Wasserstein distance of no images: give both sets some")
        sides.append(side)
    return compare_descriptors(sides[0], sides[1], seed, projections, repeats)


def compare_descriptors(
    a: PatchDescriptors,
    b: PatchDescriptors,
    seed: int = 0,
    projections: int = 128,
    repeats: int = 4,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Compute `sliced_wasserstein` of two sets of patches on `device`."""
    if a.resolutions != b.resolutions or a.patches != b.patches:
        raise ValueError("descriptors of other resolutions or patch counts do not compare")
    count = min(a.count, b.count)
    if not count:
        raise LdmError("the sliced Wasserstein distance of no images: give both sets some")
    levels = {}
    for index, resolution in enumerate(a.resolutions):
        points_a = normalise_colours(a.level(index, count).to(device))  # (N, 49·C)
        points_b = normalise_colours(b.level(index, count).to(device))
        distances = [
            sliced_distance(
                points_a, points_b, unit_directions(seed, repeat, projections, points_a.shape[1])
            )
            for repeat in range(repeats)
        ]
        levels[size_word(resolution)] = SCALE * sum(distances) / repeats
    return levels | {"mean": sum(levels.values()) / len(levels)}


def cut_patches(band: Tensor, corners: Tensor) -> Tensor:
    """Cut patches from (B, C, r, r) at corners (B, P, 2) → (B, P, C, 49)."""
    rows = corners[:, :, 0, None, None] + torch.arange(PATCH)[:, None]  # (B, P, 7, 1)
    columns = corners[:, :, 1, None, None] + torch.arange(PATCH)  # (B, P, 1, 7)
    batch = torch.arange(len(band))[:, None, None, None]
    cut = band.permute(0, 2, 3, 1)[batch, rows, columns]  # (B, P, 7, 7, C)
    return rearrange(cut, "b p h w c -> b p c (h w)")


def normalise_colours(patches: Tensor) -> Tensor:
    """Normalise each colour to mean 0 and deviation 1: (N, C, 49) → (N, 49·C) float32."""
    patches = patches.float()
    mean = patches.mean((0, 2), keepdim=True)
    deviation = patches.std((0, 2), keepdim=True, correction=0)
    # for a colour without detail: 1e-4 is 1/80 of an 8-bit level
    return ((patches - mean) / deviation.clamp_min(1e-4)).flatten(1)


def unit_directions(seed: int, repeat: int, projections: int, size: int = 3 * PATCH**2) -> Tensor:
    """Draw unit vectors (size, projections), uniform on the sphere."""
    draw = generator(seed, "swd directions", repeat)
    directions = draw.standard_normal((size, projections))
    directions /= np.linalg.norm(directions, axis=0)
    return torch.from_numpy(directions).float()


def sliced_distance(points_a: Tensor, points_b: Tensor, directions: Tensor) -> float:
    """Mean over directions (D, K) of the W₁ distance of the projected points, both (N, D)."""
    total = 0.0
    for some in directions.to(points_a.device).split(DIRECTIONS_AT_ONCE, dim=1):
        # Optimal transport between equally many points on a line keeps their order.
        sorted_a, sorted_b = (sort_rows((points @ some).mT) for points in (points_a, points_b))
        total += (sorted_a - sorted_b).abs().mean(1, dtype=torch.float64).sum().item()  # (k, N)
    return total / directions.shape[1]


def sort_rows(values: Tensor) -> Tensor:
    """Sort each row (k, N); on a CPU by NumPy, which is four times as fast."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=1))
    return values.sort(dim=1).values
