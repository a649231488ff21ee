"""The Laplacian pyramid (Burt & Adelson 1983): an image as one band of detail per octave.

Sliced Wasserstein distance between two sets of images, band by band (Karras et al. 2018).

Random 7×7 patches of every level of the Laplacian pyramid are two clouds of points; the distance is
the mean, over random directions, of the one-dimensional Wasserstein distance of their projections.
The finest level compares edges and noise, the coarsest large structures. It needs no weights.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ldm.errors import LdmError
from ldm.images import to_float
from ldm.seeds import generator


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


PATCH = 7  # pixels
SCALE = 1e3  # the paper's tables show the distance ×10³
DIRECTIONS_AT_ONCE = 16  # bounds the memory: all points are sorted along so many directions at once


class PatchDescriptors:
    """Patches of a stream of images: all that the distance needs to know of a set.

    Image k gives the same places in every set, so that equal sets are at distance 0; places and
    order are functions of (seed, k) alone, whatever the batches and the processes.

    Args:
        resolution: edge of the images, pixels; 7 or more.
        patches: per image and level; the paper's 128.
    """

    def __init__(self, resolution: int, patches: int = 128, seed: int = 0) -> None:
        if resolution < PATCH:
            raise LdmError(
                f"the sliced Wasserstein distance needs images of {PATCH}×{PATCH} pixels or more, "
                f"not {resolution}×{resolution}"
            )
        self.resolutions = pyramid_resolutions(resolution)
        self.patches = patches
        self.seed = seed
        self._ks: dict[int, None] = {}  # the images' numbers, in the order in which they came
        self._levels: list[list[Tensor]] = [[] for _ in self.resolutions]  # each (B · P, 3, 49)

    @property
    def count(self) -> int:
        """Images seen."""
        return len(self._ks)

    def update(self, images: Tensor, ks: Tensor | Sequence[int] | None = None) -> None:
        """Take in images (B, 3, R, R), uint8, or floats in [−1, 1].

        Args:
            ks: the images' numbers, each once; by default they go on from `count`.

        Raises:
            ValueError: images of another size, or a number that has come before.
        """
        resolution = self.resolutions[0]
        if images.ndim != 4 or images.shape[1:] != (3, resolution, resolution):
            raise ValueError(
                f"images must be (B, 3, {resolution}, {resolution}), not {tuple(images.shape)}"
            )
        numbers = range(self.count, self.count + len(images)) if ks is None else ks
        numbers = [int(k) for k in numbers]
        if len(numbers) != len(images):
            raise ValueError(f"{len(images)} images need as many numbers, not {len(numbers)}")
        self._add_numbers(numbers)
        if not len(images):
            return
        draws = [generator(self.seed, "swd patches", k) for k in numbers]
        images = to_float(images) if images.dtype == torch.uint8 else images.float()
        pyramid = laplacian_pyramid(images, len(self.resolutions))
        for band, level in zip(pyramid, self._levels, strict=True):
            places, size = band.shape[-1] - PATCH + 1, (self.patches, 2)
            corners = np.stack([draw.integers(places, size=size) for draw in draws])
            # half precision: 6 GB instead of 12 for the paper's 16,384 images at 256², and its
            # rounding, 5e-4 of a value, is even on both sides
            level.append(cut_patches(band, torch.from_numpy(corners)).half().cpu())

    def merge(self, other: "PatchDescriptors") -> None:
        """Take in what another process has seen of the same set.

        Raises:
            ValueError: the other is not of the same resolution, patches and seed, or both have
                seen an image.
        """
        ours, theirs = ((side.resolutions, side.patches, side.seed) for side in (self, other))
        if ours != theirs:
            raise ValueError("descriptors of other resolutions, patch counts or seeds do not merge")
        self._add_numbers(other._ks)
        for level, batches in zip(self._levels, other._levels, strict=True):
            level.extend(batches)

    def level(self, index: int, images: int) -> Tensor:
        """The patches of the `images` images of lowest number, by number: (images · P, 3, 49)."""
        # each batch to its place: sorting afterwards would hold a level, 0.6 GB, once more
        rank = torch.tensor(list(self._ks), dtype=torch.long).argsort().argsort()
        level = torch.empty(min(images, self.count), self.patches, 3, PATCH**2, dtype=torch.half)
        start = 0
        for batch in self._levels[index]:
            patches = batch.unflatten(0, (-1, self.patches))
            places = rank[start : start + len(patches)]
            wanted = places < len(level)
            level[places[wanted]] = patches[wanted]
            start += len(patches)
        return level.flatten(0, 1)

    def _add_numbers(self, numbers: Iterable[int]) -> None:
        for k in numbers:
            if k in self._ks:
                raise ValueError(f"image {k} has come before: number each image once")
            self._ks[k] = None


def sliced_wasserstein(
    images_a: Tensor | Iterable[Tensor],
    images_b: Tensor | Iterable[Tensor],
    seed: int = 0,
    patches: int = 128,
    projections: int = 128,
    repeats: int = 4,
) -> dict[str, float]:
    """Distance between two sets of images at every level of their Laplacian pyramids, ×10³.

    The defaults are the paper's (Karras et al. 2018, Section 5), which takes 16,384 images of
    each; with fewer the distance of two equal distributions is further from 0. The larger set is
    cut to the first images that the smaller has, for both need equally many points.

    Args:
        images_a, images_b: (N, 3, R, R), or iterables of such batches; uint8, or floats in
            [−1, 1].
        patches: per image and level.
        projections, repeats: `repeats` draws of `projections` random directions.

    Returns:
        The distance at each level by its resolution, as in {"32": …, "16": …}, and their "mean".
        0 for equal sets, lower is closer.

    Raises:
        LdmError: a set is empty, or smaller than 7×7 pixels.
    """
    sides = []
    for images in (images_a, images_b):
        batches = iter([images] if isinstance(images, Tensor) else images)
        first = next(batches, None)
        if first is None or not len(first):
            raise LdmError("the sliced Wasserstein distance of no images: give both sets some")
        side = PatchDescriptors(first.shape[-1], patches, seed)
        side.update(first)
        for batch in batches:
            side.update(batch)
        sides.append(side)
    return compare_descriptors(*sides, seed=seed, projections=projections, repeats=repeats)


def compare_descriptors(
    a: PatchDescriptors,
    b: PatchDescriptors,
    seed: int = 0,
    projections: int = 128,
    repeats: int = 4,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """`sliced_wasserstein` of two sets already cut into patches, computed on `device`."""
    if a.resolutions != b.resolutions or a.patches != b.patches:
        raise ValueError("descriptors of other resolutions or patch counts do not compare")
    count = min(a.count, b.count)
    if not count:
        raise LdmError("the sliced Wasserstein distance of no images: give both sets some")
    levels = {}
    for index, resolution in enumerate(a.resolutions):
        points_a = normalise_colours(a.level(index, count).to(device))  # (N, 147)
        points_b = normalise_colours(b.level(index, count).to(device))
        distances = [
            sliced_distance(points_a, points_b, unit_directions(seed, repeat, projections))
            for repeat in range(repeats)
        ]
        levels[str(resolution)] = SCALE * sum(distances) / repeats
    return levels | {"mean": sum(levels.values()) / len(levels)}


def cut_patches(band: Tensor, corners: Tensor) -> Tensor:
    """Patches of (B, 3, r, r) at corners (B, P, 2) → (B · P, 3, 49)."""
    rows = corners[:, :, 0, None, None] + torch.arange(PATCH)[:, None]  # (B, P, 7, 1)
    columns = corners[:, :, 1, None, None] + torch.arange(PATCH)  # (B, P, 1, 7)
    batch = torch.arange(len(band))[:, None, None, None]
    cut = band.permute(0, 2, 3, 1)[batch, rows, columns]  # (B, P, 7, 7, 3)
    return rearrange(cut, "b p h w c -> (b p) c (h w)")


def normalise_colours(patches: Tensor) -> Tensor:
    """Each colour of a set to mean 0 and deviation 1 (N, 3, 49) → (N, 147) float32."""
    patches = patches.float()
    mean = patches.mean((0, 2), keepdim=True)
    deviation = patches.std((0, 2), keepdim=True, correction=0)
    # a colour without detail stays flat: 1e-4 is an eightieth of an 8-bit level
    return ((patches - mean) / deviation.clamp_min(1e-4)).flatten(1)


def unit_directions(seed: int, repeat: int, projections: int) -> Tensor:
    """Random unit vectors (147, projections), evenly spread over the sphere."""
    draw = generator(seed, "swd directions", repeat)
    directions = draw.standard_normal((3 * PATCH**2, projections))
    directions /= np.linalg.norm(directions, axis=0)
    return torch.from_numpy(directions).float()


def sliced_distance(points_a: Tensor, points_b: Tensor, directions: Tensor) -> float:
    """Mean over directions (D, K) of the W₁ distance of the projected points, both (N, D)."""
    total = 0.0
    for some in directions.to(points_a.device).split(DIRECTIONS_AT_ONCE, dim=1):
        # Between equally many points on a line the best transport keeps their order.
        sorted_a, sorted_b = (sort_rows((points @ some).mT) for points in (points_a, points_b))
        total += (sorted_a - sorted_b).abs().mean(1, dtype=torch.float64).sum().item()  # (k, N)
    return total / directions.shape[1]


def sort_rows(values: Tensor) -> Tensor:
    """Each row ascending (k, N); on a CPU by NumPy, which is four times as fast."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=1))
    return values.sort(dim=1).values
