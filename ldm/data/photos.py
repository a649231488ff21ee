"""The photographs inside scikit-image, as data that needs no download."""

import math
from functools import lru_cache
from itertools import product, zip_longest

import numpy as np

from ldm.config import Resolution, height_width
from ldm.data.sources import Source, Split
from ldm.data.transforms import fit_channels, resize
from ldm.seeds import generator

PHOTOGRAPHS = (
    "astronaut",
    "coffee",
    "chelsea",
    "rocket",
    "hubble_deep_field",
    "retina",
    "immunohistochemistry",
    "stereo_motorcycle",
)
"""The colour photographs in scikit-image's wheel: data that needs no download."""


class PhotoSource(Source):
    """Regions of the photographs: left two thirds ("train"), all of each ("all"), or tiles ("val").

    Tiles have the resolution's size and do not overlap, of the right thirds: one of each
    photograph, then another of each, and so on. Their order is random and fixed, so that the first
    few show the photographs' middles as well as their corners. With labels, each photograph is a
    class.

    A part with a side shorter than the resolution's is enlarged (Lanczos) just enough to hold one
    window of it.
    """

    def __init__(self, split: Split, resolution: Resolution, labels: bool = False) -> None:
        self.split, self.resolution = split, resolution
        corners = (_corners(p, resolution) if split == "val" else [(0, 0)] for p in PHOTOGRAPHS)
        turns = (zip(PHOTOGRAPHS, turn, strict=True) for turn in zip_longest(*corners))
        self._regions = [region for turn in turns for region in turn if region[1] is not None]
        if labels:
            self.classes = PHOTOGRAPHS
            self._labels = np.array([PHOTOGRAPHS.index(name) for name, _ in self._regions])

    def __len__(self) -> int:
        return len(self._regions)

    def name(self, index: int) -> str:
        photograph, (top, left) = self._regions[index]
        tile = f", tile at row {top}, column {left} of the right third"
        return f"photograph '{photograph}'{tile if self.split == 'val' else ''}"

    def load(self, index: int) -> np.ndarray:
        photograph, (top, left) = self._regions[index]
        part = _part(photograph, self.split, self.resolution)
        height, width = height_width(self.resolution)
        tile = part[top : top + height, left : left + width]
        return fit_channels(tile if self.split == "val" else part, self.channels)


def _corners(photograph: str, resolution: Resolution) -> list[tuple[int, int]]:
    sides, tile = _part(photograph, "val", resolution).shape[:2], height_width(resolution)
    tops, lefts = (range(0, a - b + 1, b) for a, b in zip(sides, tile, strict=True))
    corners = list(product(tops, lefts))
    order = generator(0, f"tiles of {photograph}", tile[0]).permutation(len(corners))
    return [corners[i] for i in order]


@lru_cache
def _part(photograph: str, split: Split, resolution: Resolution) -> np.ndarray:
    """Part of a photograph (H, W, 3) uint8, read-only, no side shorter than the resolution's."""
    image = _photograph(photograph)
    cut = image.shape[1] - image.shape[1] // 3
    part = {"train": image[:, :cut], "val": image[:, cut:], "all": image}[split]
    (height, width), (tall, wide) = part.shape[:2], height_width(resolution)
    scale = max(tall / height, wide / width)
    if scale > 1:
        part = resize(part, math.ceil(height * scale), math.ceil(width * scale))
    part.flags.writeable = False
    return part


@lru_cache
def _photograph(name: str) -> np.ndarray:
    from skimage import data

    image = getattr(data, name)()
    # the stereo pair is (left view, right view, disparity)
    return image[0] if name.startswith("stereo") else image
