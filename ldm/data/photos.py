"""The colour photographs in scikit-image's wheel: data that needs no download.

The right third of each photograph is held out: training reads the left two thirds, validation cuts
the right third into tiles that do not overlap. A part with a side shorter than R is enlarged
(Lanczos) just enough to hold one R×R window.
"""

import math
from functools import lru_cache
from itertools import product, zip_longest

import numpy as np

from ldm.data.sources import Split
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
    """Regions of the photographs: left two thirds ("train"), all of each ("all"), or tiles ("val").

    Tiles are R×R, of the right thirds: one of each photograph, then another of each, and so on.
    Their order is random and fixed, so that the first few show the photographs' middles as well as
    their corners. With labels, each photograph is a class.
    """

    def __init__(self, split: Split, resolution: int, labels: bool = False) -> None:
        self.classes: tuple[str, ...] = PHOTOGRAPHS if labels else ()
        self.split = split
        self.resolution = resolution
        self._regions: list[tuple[str, tuple[int, int] | None]] = [(p, None) for p in PHOTOGRAPHS]
        if split == "val":
            turns = zip_longest(*(_corners(photograph, resolution) for photograph in PHOTOGRAPHS))
            tiles = (zip(PHOTOGRAPHS, turn, strict=True) for turn in turns)
            self._regions = [tile for turn in tiles for tile in turn if tile[1] is not None]

    def __len__(self) -> int:
        return len(self._regions)

    def name(self, index: int) -> str:
        photograph, corner = self._regions[index]
        if corner is None:
            return f"photograph '{photograph}'"
        top, left = corner
        return f"photograph '{photograph}', tile at row {top}, column {left} of the right third"

    def load(self, index: int) -> np.ndarray:
        photograph, corner = self._regions[index]
        part = _part(photograph, self.split, self.resolution)
        if corner is None:
            return part
        top, left = corner
        return part[top : top + self.resolution, left : left + self.resolution]

    def label(self, index: int) -> int:
        return PHOTOGRAPHS.index(self._regions[index][0]) if self.classes else -1


def _corners(photograph: str, resolution: int) -> list[tuple[int, int]]:
    height, width = _part(photograph, "val", resolution).shape[:2]
    tops, lefts = (range(0, side - resolution + 1, resolution) for side in (height, width))
    corners = list(product(tops, lefts))
    order = generator(0, f"tiles of {photograph}", resolution).permutation(len(corners))
    return [corners[i] for i in order]


@lru_cache
def _part(photograph: str, split: Split, resolution: int) -> np.ndarray:
    """Part of a photograph (H, W, 3) uint8, read-only, with no side shorter than R."""
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
    # the stereo pair is (left view, right view, disparity)
    return image[0] if name.startswith("stereo") else image
