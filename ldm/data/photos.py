"""The colour photographs inside scikit-image's wheel: data that is always there, no download.

The right third of each photograph is held out: training sees only the left two thirds, validation
cuts the right third into tiles that do not overlap. A part smaller than R in either direction is
enlarged (Lanczos) just enough to hold one R×R window.
"""

import math
from functools import lru_cache

import numpy as np

from ldm.data.split import Split
from ldm.data.transforms import resize
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


class PhotoSource:
    """The left two thirds ("train") of the eight photographs, or the whole of them ("all").

    Args:
        labels: each photograph is a class of its own.
    """

    def __init__(self, split: Split, resolution: int, labels: bool = False):
        self.classes = PHOTOGRAPHS if labels else ()
        self.split = split
        self.resolution = resolution

    def __len__(self) -> int:
        return len(PHOTOGRAPHS)

    def name(self, index: int) -> str:
        return f"photograph '{PHOTOGRAPHS[index]}'"

    def load(self, index: int) -> np.ndarray:
        return _part(PHOTOGRAPHS[index], self.split, self.resolution)

    def label(self, index: int) -> int:
        return index if self.classes else -1


class PhotoTiles:
    """R×R tiles of the right thirds: one of each photograph, then another of each, and so on.

    Which comes when is drawn once and for all, so that the first few show the photographs' middles
    as well as their corners.

    Args:
        labels: each photograph is a class of its own.
    """

    def __init__(self, resolution: int, labels: bool = False):
        self.classes = PHOTOGRAPHS if labels else ()
        self.resolution = resolution
        corners = [_corners(photograph, resolution) for photograph in PHOTOGRAPHS]
        self._tiles = [
            (photograph, *corners_of_one[turn])
            for turn in range(max(map(len, corners)))
            for photograph, corners_of_one in zip(PHOTOGRAPHS, corners, strict=True)
            if turn < len(corners_of_one)
        ]

    def __len__(self) -> int:
        return len(self._tiles)

    def name(self, index: int) -> str:
        photograph, top, left = self._tiles[index]
        return f"photograph '{photograph}', tile at row {top}, column {left} of the right third"

    def load(self, index: int) -> np.ndarray:
        photograph, top, left = self._tiles[index]
        held_out = _part(photograph, "val", self.resolution)
        return held_out[top : top + self.resolution, left : left + self.resolution]

    def label(self, index: int) -> int:
        return self.classes.index(self._tiles[index][0]) if self.classes else -1


def open_photos(split: Split, resolution: int, labels: bool = False) -> PhotoSource | PhotoTiles:
    """The built-in photographs: eight regions for "train" and "all", tiles for "val"."""
    if split == "val":
        return PhotoTiles(resolution, labels)
    return PhotoSource(split, resolution, labels)


def _corners(photograph: str, resolution: int) -> list[tuple[int, int]]:
    height, width = _part(photograph, "val", resolution).shape[:2]
    corners = [
        (top, left)
        for top in range(0, height - resolution + 1, resolution)
        for left in range(0, width - resolution + 1, resolution)
    ]
    order = generator(0, f"tiles of {photograph}", resolution).permutation(len(corners))
    return [corners[i] for i in order]


@lru_cache
def _part(photograph: str, split: Split, resolution: int) -> np.ndarray:
    """One part of a photograph, (H, W, 3) uint8, read-only, no side shorter than R."""
    image = _photograph(photograph)
    cut = image.shape[1] - image.shape[1] // 3
    part = {"train": image[:, :cut], "val": image[:, cut:], "all": image}[split]
    height, width = part.shape[:2]
    scale = resolution / min(height, width)
    if scale > 1:
        part = resize(part, math.ceil(height * scale), math.ceil(width * scale))
    part.flags.writeable = False
    return part


@lru_cache
def _photograph(name: str) -> np.ndarray:
    from skimage import data

    image = getattr(data, name)()
    # the stereo pair comes as (left view, right view, disparity)
    return image[0] if name.startswith("stereo") else image
