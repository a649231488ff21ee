"""The split of a data set into training images and images held out for validation.

The last images by name are held out. Labelled images are sorted by class, so these would be whole
classes: of labelled images, every n-th is held out instead.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ldm.data.sources import Source
from ldm.errors import UsageError

Split = Literal["train", "val", "all"]
Indices = range | np.ndarray

# FFHQ and CelebA-HQ as split by Rombach et al. 2022: 60,000 + 10,000 and 25,000 + 5,000
USUAL_HELD_OUT = {70_000: 10_000, 30_000: 5_000}


def held_out_count(count: int, requested: int | None) -> int:
    """Number of images held out of `count`: as requested, else the default.

    The default is the usual split of FFHQ (70,000 images) and CelebA-HQ (30,000), else one image in
    twenty, at least 1 and at most 10,000.
    """
    usual = USUAL_HELD_OUT.get(count, min(max(count // 20, 1), 10_000))
    held_out = usual if requested is None else requested
    if held_out >= count:
        raise UsageError(
            f"holding out {held_out} of {count} images leaves none to train on: "
            "lower held_out (0 holds out none)"
        )
    return held_out


def split_indices(count: int, held_out: int, evenly: bool) -> tuple[Indices, Indices]:
    """Ascending indices of the training images and of the held-out images among `count`.

    Args:
        evenly: hold out the last of each of `held_out` runs of equal length (to one image), else
            the last of all.
    """
    if not evenly:
        return range(count - held_out), range(count - held_out, count)
    ends = np.arange(1, held_out + 1) * count // held_out - 1
    return np.delete(np.arange(count), ends), ends


@dataclass(frozen=True)
class Part:
    """The images `indices` of a source, as a source with the same classes."""

    whole: Source
    indices: Indices

    @property
    def classes(self) -> tuple[str, ...]:
        return self.whole.classes

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.whole.name(self.indices[index])

    def load(self, index: int) -> np.ndarray:
        return self.whole.load(self.indices[index])

    def label(self, index: int) -> int:
        return self.whole.label(self.indices[index])


def take_split(source: Source, split: Split, held_out: int | None, evenly: bool = False) -> Source:
    """Select the training images, the held-out images, or all images of a source.

    Args:
        held_out: number of images held out; None: the default of `held_out_count`.
        evenly: as in `split_indices`.
    """
    if split == "all":
        return source
    train, val = split_indices(len(source), held_out_count(len(source), held_out), evenly)
    if split == "val" and not len(val):
        raise UsageError("no images are held out for validation: set data.held_out to 1 or more")
    return Part(source, train if split == "train" else val)
