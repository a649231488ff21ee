"""Batches of uint8 images for training and evaluation, loaded here or by worker processes.

The images are the same whatever the batch size, the workers and the processes: in a training run,
image k, its crop and its flip are functions of (seed, k) alone, so resuming means starting at
another k.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ldm.config import Resolution, height_width
from ldm.data.dataset import DataConfig
from ldm.data.photos import PhotoSource
from ldm.data.sources import Source
from ldm.data.transforms import SMALL, CorruptImage, center_crop, random_crop
from ldm.data.workers import load_in_workers
from ldm.errors import LdmError, UsageError, listed
from ldm.seeds import generator, permuted

TOLERATED = 0.01
"""Share of a source's images that may be corrupt before a job stops."""

LISTED = 2**20
"""Images up to which each process keeps a whole order, of 8 MB; beyond, elements are computed."""
MOST_SKIPPED = 10_000
"""Images in a row that may be too small."""

FEWER_WORKERS = "lower data.workers"

log = logging.getLogger("ldm")


class Batch(NamedTuple):
    """Images with their numbers and classes."""

    images: Tensor
    """uint8 (b, 3, H, W), channels last in memory."""
    k: Tensor
    """int64 (b,): the number of each image in the run, or its index in the source."""
    labels: Tensor
    """int64 (b,): the class of each image, as an index into the source's `classes`; −1 for none."""
    drawn: Any = None
    """Random numbers for these images, from the `draw` of `batches`."""


# --------------------------------------------------------------------------- corrupt images
class FaultCount:
    """The distinct corrupt images that one process met among the `total` of a source."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.found: dict[str, str] = {}
        self._small: set[str] = set()

    def add(self, faults: Mapping[str, str]) -> None:
        """Log the new ones, given by name with the reason; raise LdmError if there are too many.

        Images that are too small are counted by themselves, and logged at 1, 10, 100, …
        """
        for name, reason in faults.items():
            if reason.startswith(SMALL) and name not in self._small:
                self._small.add(name)
                count = len(self._small)
                if count == 10 ** (len(str(count)) - 1):
                    log.warning("skipped small images: %s so far, %s (%s)", count, name, reason)
            elif name not in self.found and name not in self._small:
                self.found[name] = reason
                log.warning("skipped a corrupt image: %s (%s)", name, reason)
        stop_if_too_many(self.found, self.total)


def stop_if_too_many(faults: Mapping[str, str], total: int) -> None:
    """Raise an LdmError that names the first ten if more than 1 % of `total` are corrupt."""
    corrupt = [name for name, reason in faults.items() if not reason.startswith(SMALL)]
    if len(corrupt) <= TOLERATED * total:
        return
    raise LdmError(
        f"{len(corrupt)} of {total} images are corrupt, more than {TOLERATED:.0%}: "
        f"{listed(corrupt, 10)} ({faults[corrupt[0]]}); repair or remove them"
    )


# --------------------------------------------------------------------------------- one image
def image_index(seed: int, count: int, k: int) -> int:
    """Index in a source of `count` images of the run's k-th image, a function of (seed, k) alone.

    Each epoch k // count visits every image once, in a new order.
    """
    epoch, position = divmod(k, count)
    if count > LISTED:
        return permuted(seed, "order", epoch, position, count)
    return int(_permutation(seed, count, epoch)[position])


def image_name(source: Source, seed: int, k: int) -> str:
    """Name the run's k-th image; if it is corrupt, the next good one was taken instead."""
    return source.name(image_index(seed, len(source), k))


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(seed: int, count: int, epoch: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(count)


Image = tuple[np.ndarray, int]  # (H, W, 3) uint8, and its class
Faults = dict[str, str]  # names of corrupt images → the reasons
Draw = Callable[[Sequence[int]], Any]  # the ks of a batch → its random numbers; can be pickled


def _training_image(
    source: Source, resolution: Resolution, seed: int, at_random: bool, flip: bool, k: int,
    faults: Faults,
) -> Image:  # fmt: skip
    """Load image k of a training run; the next good one replaces a corrupt image."""
    index, skipped = image_index(seed, len(source), k), 0
    while (image := _whole_image(source, resolution, index, faults)) is None:
        stop_if_too_many(faults, len(source))
        index, skipped = (index + 1) % len(source), skipped + 1
        if skipped == min(len(source), MOST_SKIPPED):
            name, reason = next(reversed(faults.items()))
            raise LdmError(
                f"{skipped:,} images in a row were skipped, the last {name} ({reason}): lower the "
                "resolution, or set data.small=enlarge"
            )
    if at_random:
        image = random_crop(image, resolution, generator(seed, "crop", k))
    else:
        image = center_crop(image, resolution)
    mirrored = flip and generator(seed, "flip", k).integers(2)
    return image[:, ::-1] if mirrored else image, source.label(index)


def _evaluation_image(
    source: Source, resolution: Resolution, index: int, faults: Faults
) -> Image | None:
    """Load the centre of an image; None if it is corrupt."""
    image = _whole_image(source, resolution, index, faults)
    return None if image is None else (center_crop(image, resolution), source.label(index))


def _whole_image(
    source: Source, resolution: Resolution, index: int, faults: Faults
) -> np.ndarray | None:
    try:
        return source.load_at_least(index, resolution)
    except CorruptImage as error:
        faults[source.name(index)] = str(error)
        return None


# ------------------------------------------------------------------------------------ batches
def batches(
    source: Source,
    config: DataConfig,
    resolution: Resolution,
    seed: int,
    start: int,
    stop: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    draw: Draw | None = None,
) -> Iterator[Batch]:
    """Load images k = start … stop−1 of a training run, in batches of crops of a resolution.

    A corrupt image is named in a warning, and replaced by the next good one of the source with its
    label. Each process counts its own corrupt images, from 0 in each call. An incomplete last batch
    is left out.

    Args:
        batch_size: images over all processes; each gets a contiguous 1/world of every batch.
        draw: draws a batch's random numbers, given its images' k, where the images are loaded.
    """
    at_random = config.crop == "random" or isinstance(source, PhotoSource)
    load = partial(_training_image, source, resolution, seed, at_random, config.flip)
    numbers = whole_shares(start, stop, batch_size, rank, world)
    return _load(source, resolution, load, numbers, config.workers, draw=draw)


def evaluation_batches(
    source: Source,
    resolution: Resolution,
    batch_size: int,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    faults: FaultCount | None = None,
) -> Iterator[Batch]:
    """Load the centre crop of every image of a source once over all processes, never mirrored.

    A corrupt image is named in a warning and left out, so `k` may have gaps. The last batch may be
    short, and a process may have one batch fewer than another.

    Args:
        batch_size: images over all processes; each gets a contiguous 1/world of every batch.
        limit: number of the source's first images to load; None: all.
        workers: loader processes; 0 loads in this one, as the built-in photographs always do.
        faults: counts the corrupt images of several passes over parts of one source together.
    """
    count = len(source) if limit is None else min(limit, len(source))
    numbers = _shares(0, count, batch_size, rank, world)
    load = partial(_evaluation_image, source, resolution)
    return _load(source, resolution, load, numbers, workers, faults)


def sheet_images(source: Source, resolution: Resolution, count: int) -> Tensor:
    """Load the centres of the first good images of a source: uint8 (n, 3, H, W), n ≤ `count`."""
    faults: Faults = {}
    loaded = (_evaluation_image(source, resolution, k, faults) for k in range(len(source)))
    chosen = list(islice((image[0] for image in loaded if image is not None), count))
    if not chosen:
        name, reason = next(iter(faults.items()))
        raise LdmError(f"no image can be read, not even {name} ({reason}): repair or replace them")
    return _stack(chosen, resolution)


def whole_shares(start: int, stop: int, batch_size: int, rank: int, world: int) -> Iterator[range]:
    """Return the numbers of a process's images in each batch but an incomplete last one."""
    return _shares(start, stop - (stop - start) % batch_size, batch_size, rank, world)


def _shares(start: int, stop: int, batch_size: int, rank: int, world: int) -> Iterator[range]:
    """Return the numbers of a process's images in each batch."""
    if batch_size % world:
        raise UsageError(f"batch_size={batch_size} does not divide over {world} processes")
    share = batch_size // world
    firsts = range(start + rank * share, stop, batch_size)
    return (range(first, min(first + share, stop)) for first in firsts)


def _load(
    source: Source,
    resolution: Resolution,
    load: Callable[[int, Faults], Image | None],
    numbers: Iterable[range],
    workers: int,
    counted: FaultCount | None = None,
    draw: Draw | None = None,
) -> Iterator[Batch]:
    if isinstance(source, PhotoSource):
        workers = 0  # they are in memory: moving them would cost more than cropping them
    counted = counted or FaultCount(len(source))
    work, pin = partial(_batch, resolution, load, draw), torch.cuda.is_available()
    for batch, faults in load_in_workers(work, numbers, workers, FEWER_WORKERS, pin):
        counted.add(faults)
        if len(batch.k):
            yield batch


def _batch(
    resolution: Resolution, load: Callable[[int, Faults], Image | None], draw: Draw | None,
    ks: range,
) -> tuple[Batch, Faults]:  # fmt: skip
    faults: Faults = {}
    loaded = {k: image for k in ks if (image := load(k, faults)) is not None}
    images = _stack([image for image, _ in loaded.values()], resolution)
    labels = torch.tensor([label for _, label in loaded.values()], dtype=torch.int64)
    drawn = None if draw is None else draw(list(loaded))
    return Batch(images, torch.tensor(list(loaded), dtype=torch.int64), labels, drawn), faults


def _stack(images: Sequence[np.ndarray], resolution: Resolution) -> Tensor:
    none = np.empty((0, *height_width(resolution), 3), np.uint8)
    stacked = np.stack(images) if images else none
    return rearrange(torch.from_numpy(stacked), "b h w c -> b c h w")
