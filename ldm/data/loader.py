"""Which image is the k-th of a run: a new permutation every epoch, known without looking back.

Corrupt images: each named once and skipped; too many of them stop the job.

How worker processes start, and what they do about signals.

They start by forkserver (spawn where there is none), never by fork: a training process has threads,
and a lock that one of them holds at a fork stays locked in the child for good. A script that uses
workers therefore needs the usual `if __name__ == "__main__":`.

One training or evaluation image by its number: which one it is, and how it is cut.

In a run there is no state: which image is the k-th, its crop and its flip are functions of
(seed, k) alone.

Batches of uint8 images for training and for evaluation, loaded here or by worker processes.

The same images come whatever the batch size, the workers and the processes, and resuming is
starting at another k.

A few images of a source, to look at.
"""

import logging
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.data.dataset import DataConfig
from ldm.data.photos import PhotoSource, PhotoTiles
from ldm.data.sources import Source, label_of, load_at_least
from ldm.data.transforms import CorruptImage, center_crop, mirror, random_crop
from ldm.errors import LdmError, UsageError
from ldm.seeds import generator


def image_index(seed: int, count: int, k: int) -> int:
    """Index in a source of `count` images of the run's k-th image, a function of (seed, k) alone.

    Epoch k // count visits every image once, in an order of its own.
    """
    epoch, position = divmod(k, count)
    return int(_permutation(seed, count, epoch)[position])


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(seed: int, count: int, epoch: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(count)


TOLERATED = 0.01
"""Share of a source's images that may be corrupt before a job stops."""

Faults = Mapping[str, str]
"""Name of each corrupt image → the reason."""

log = logging.getLogger("ldm")


class FaultCount:
    """The distinct corrupt images one process has met among the `total` of a source."""

    def __init__(self, total: int):
        self.total = total
        self.found: dict[str, str] = {}

    def add(self, faults: Faults) -> None:
        """Log each new one as a warning.

        Raises:
            LdmError: they are more than 1 % of the source now.
        """
        for name, reason in faults.items():
            if name not in self.found:
                self.found[name] = reason
                log.warning("skipped a corrupt image: %s (%s)", name, reason)
        stop_if_too_many(self.found, self.total)


def stop_if_too_many(faults: Faults, total: int) -> None:
    """Raise an LdmError naming the first ten where faults exceed 1 % of `total` images."""
    if len(faults) <= TOLERATED * total:
        return
    names = list(faults)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    raise LdmError(
        f"{len(names)} of {total} images are corrupt, more than {TOLERATED:.0%}: "
        f"{', '.join(names[:10])}{more}; repair or remove them"
    )


def start_method() -> str:
    """`forkserver`, with a server that imports torch once for all workers, or else `spawn`."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(["ldm.data.loader"])
    return "forkserver"


def leave_signals_to_parent() -> None:
    """Ignore SIGINT and SIGTERM in this process.

    Ctrl-C and a cluster's warning reach all processes of a job: the parent decides what they mean.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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


class Batch(NamedTuple):
    """Images, which they are, and of which class."""

    images: Tensor
    """uint8 (b, 3, R, R), channels last in memory."""

    k: Tensor
    """int64 (b,): the number of each image in the run, or its index in the source."""

    labels: Tensor
    """int64 (b,): the class of each image, its place in the source's `classes`; −1 for none."""


def batches(
    source: Source,
    config: DataConfig,
    resolution: int,
    seed: int,
    start: int,
    stop: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Images k = start … stop−1 of a training run, in batches of R×R crops.

    A corrupt image is named in a warning and replaced by the next good one of the source, which
    brings its own label. Each process counts the corrupt images it meets itself, anew in each call.

    Args:
        resolution: side R of the crops, in pixels.
        start, stop: numbers of images; an incomplete last batch is left out.
        batch_size: images over all processes; each gets a contiguous 1/world of every batch.

    Raises:
        UsageError: the batch does not divide over the processes.
        LdmError: (while iterating) more than 1 % of the source is corrupt, an image is smaller than
            the crop, or a worker was killed.
    """
    share = _share(batch_size, world)
    shuffled = TrainingImages(
        source=source,
        resolution=resolution,
        seed=seed,
        at_random=config.crop == "random" or isinstance(source, PhotoSource),
        flip=config.flip,
    )
    firsts = range(start + rank * share, stop - batch_size + rank * share + 1, batch_size)
    numbers = (range(first, first + share) for first in firsts)
    return _load(shuffled, numbers, config.workers)


def evaluation_batches(
    source: Source,
    resolution: int,
    batch_size: int,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    faults: FaultCount | None = None,
) -> Iterator[Batch]:
    """Every image of a source once over all processes, its centre cut out, never mirrored.

    A corrupt image is named in a warning and left out; `k` tells which are there. The last batch
    may be short, and a process may have one batch less than another.

    Args:
        resolution: side R of the images, in pixels.
        batch_size: images over all processes; each gets a contiguous 1/world of every batch.
        limit: only the first so many images of the source.
        workers: loader processes; 0 loads in this one, as the built-in photographs always do.
        faults: counts the corrupt images of several passes over parts of one source as one.

    Raises:
        UsageError, LdmError: as `batches`.
    """
    share = _share(batch_size, world)
    count = len(source) if limit is None else min(limit, len(source))
    firsts = range(rank * share, count, batch_size)
    numbers = (range(first, min(first + share, count)) for first in firsts)
    return _load(EvaluationImages(source, resolution), numbers, workers, faults)


# ------------------------------------------------------------------------------ torch's loader
Loaded = tuple[Batch, dict[str, str]]


@dataclass(frozen=True)
class _BatchDataset:
    """What a DataLoader asks for whole batches of numbers."""

    images: NumberedImages

    def __getitems__(self, ks: Sequence[int]) -> Loaded | LdmError:
        faults: dict[str, str] = {}
        try:
            loaded = {k: self.images.load(k, faults) for k in ks}
        except LdmError as error:
            return error  # raised, it would reach the caller wrapped in a worker's traceback
        good = {k: sample for k, sample in loaded.items() if sample is not None}
        side = self.images.resolution
        empty = np.empty((0, side, side, 3), np.uint8)
        pixels = np.stack([sample.pixels for sample in good.values()]) if good else empty
        pixels = rearrange(torch.from_numpy(pixels), "b h w c -> b c h w")
        ks, labels = list(good), [sample.label for sample in good.values()]
        return Batch(pixels, *(torch.tensor(n, dtype=torch.int64) for n in (ks, labels))), faults


def _load(
    images: NumberedImages,
    numbers: Iterable[range],
    workers: int,
    counted: FaultCount | None = None,
) -> Iterator[Batch]:
    if isinstance(images.source, PhotoSource | PhotoTiles):
        workers = 0  # they are in memory: handing them over would cost more than cutting them
    counted = counted or FaultCount(len(images.source))
    try:
        for loaded in _data_loader(_BatchDataset(images), numbers, workers):
            if isinstance(loaded, LdmError):
                raise loaded
            batch, faults = loaded
            counted.add(faults)
            if len(batch.k):
                yield batch
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise LdmError(
            "a loader worker was killed, most often for want of memory: lower data.workers; or it "
            'never began, in a script that lacks `if __name__ == "__main__":`'
        ) from error


def _data_loader(dataset: _BatchDataset, numbers: Iterable[range], workers: int) -> DataLoader:
    workers = min(workers, os.cpu_count() or 1)  # more would wait for each other
    return DataLoader(
        dataset,
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=start_method() if workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else it draws from the global one, to seed the workers
    )


def _start_worker(worker: int) -> None:
    leave_signals_to_parent()


def _as_it_is(loaded: Loaded | LdmError) -> Loaded | LdmError:
    return loaded


def _share(batch_size: int, world: int) -> int:
    if batch_size % world:
        raise UsageError(f"batch_size={batch_size} does not divide over {world} processes")
    return batch_size // world


def sheet_images(source: Source, resolution: int, count: int) -> Tensor:
    """The first good images of a source, their centres cut out: uint8 (n, 3, R, R), n ≤ `count`.

    Args:
        resolution: side R of the images, in pixels.

    Raises:
        LdmError: no image can be read, or one that was read is smaller than R.
    """
    images, faults = EvaluationImages(source, resolution), {}
    loaded = (images.load(k, faults) for k in range(len(source)))
    chosen = list(islice((sample.pixels for sample in loaded if sample is not None), count))
    if not chosen:
        name, reason = next(iter(faults.items()))
        raise LdmError(f"no image can be read, not even {name} ({reason}): repair or replace them")
    return rearrange(torch.from_numpy(np.stack(chosen)), "b h w c -> b c h w")
