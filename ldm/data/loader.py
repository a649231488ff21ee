"""Batches of uint8 images for training and for evaluation, loaded here or by worker processes.

The same images come whatever the batch size, the workers and the processes, and resuming is
starting at another k.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader

from ldm.data.dataset import DataConfig
from ldm.data.faults import FaultCount
from ldm.data.photos import PhotoSource, PhotoTiles
from ldm.data.samples import EvaluationImages, NumberedImages, TrainingImages
from ldm.data.source import Source
from ldm.data.workers import leave_signals_to_parent, start_method
from ldm.errors import LdmError, UsageError


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
