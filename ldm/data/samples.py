"""One training or evaluation image by its number: which one it is, and how it is cut.

In a run there is no state: which image is the k-th, its crop and its flip are functions of
(seed, k) alone.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from ldm.data.decode import CorruptImage
from ldm.data.faults import stop_if_too_many
from ldm.data.order import image_index
from ldm.data.source import Source, label_of, load_at_least
from ldm.data.transforms import center_crop, mirror, random_crop
from ldm.seeds import generator


class Sample(NamedTuple):
    """An image ready for use, and its class."""

    pixels: np.ndarray
    """uint8 (R, R, 3)."""

    label: int
    """Its place in the source's `classes`, −1 for none."""


class NumberedImages(Protocol):
    """Images cut and ready, by their number in a run or a pass."""

    @property
    def source(self) -> Source:
        """The images they are cut from."""

    @property
    def resolution(self) -> int:
        """Side R of the images, in pixels."""

    def load(self, k: int, faults: dict[str, str]) -> Sample | None:
        """Image k, or None; corrupt images met on the way go into `faults`."""


@dataclass(frozen=True)
class TrainingImages:
    """The stream of a training run: image k, its crop and its flip depend on (seed, k) alone."""

    source: Source
    resolution: int
    seed: int
    at_random: bool
    flip: bool

    def load(self, k: int, faults: dict[str, str]) -> Sample:
        count = len(self.source)
        index = image_index(self.seed, count, k)
        while (image := _read(self.source, index, self.resolution, faults)) is None:
            stop_if_too_many(faults, count)
            index = (index + 1) % count
        if self.at_random:
            image = random_crop(image, self.resolution, generator(self.seed, "crop", k))
        else:
            image = center_crop(image, self.resolution)
        mirrored = self.flip and generator(self.seed, "flip", k).integers(2)
        return Sample(mirror(image) if mirrored else image, label_of(self.source, index))


@dataclass(frozen=True)
class EvaluationImages:
    """Image k of a source, its centre cut out."""

    source: Source
    resolution: int

    def load(self, k: int, faults: dict[str, str]) -> Sample | None:
        image = _read(self.source, k, self.resolution, faults)
        if image is None:
            return None
        return Sample(center_crop(image, self.resolution), label_of(self.source, k))


def _read(source: Source, index: int, side: int, faults: dict[str, str]) -> np.ndarray | None:
    """An image of a source, or None where it is corrupt, which is noted in `faults`."""
    try:
        return load_at_least(source, index, side)
    except CorruptImage as error:
        faults[source.name(index)] = str(error)
        return None
