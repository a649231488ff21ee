"""Random numbers that belong to samples: every draw is a function of (seed, purpose, k) alone.

They key a counter-based generator (Philox), so that image k gets the same crop and the same noise
for any batch size, worker, process and point of resume.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch

WORD = 2**64 - 1


def generator(seed: int, purpose: str, k: int) -> np.random.Generator:
    """Create the generator of sample `k` for one purpose ("crop", "noise", "sigma" …)."""
    key = np.array([_stream(seed, purpose), k], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def normal(seed: int, purpose: str, ks: Iterable[int], shape: Sequence[int]) -> torch.Tensor:
    """Draw normal noise (len(ks), *shape), float32; row i depends on (seed, ks[i]) alone."""
    rows = [
        generator(seed, purpose, int(k)).standard_normal(tuple(shape), dtype=np.float32) for k in ks
    ]
    return torch.from_numpy(np.stack(rows))


def uniform(seed: int, purpose: str, ks: Iterable[int], shape: Sequence[int]) -> torch.Tensor:
    """Draw from [0, 1), (len(ks), *shape), float32; row i depends on (seed, ks[i]) alone."""
    rows = [generator(seed, purpose, int(k)).random(tuple(shape), dtype=np.float32) for k in ks]
    return torch.from_numpy(np.stack(rows))


LISTED = 2**20
"""Samples up to which each process keeps a whole order, of 8 MB; beyond, elements are computed."""


def shuffled(seed: int, k: int, count: int) -> int:
    """Return the k-th sample of `count` in random order, anew in each epoch k div count."""
    epoch, position = divmod(k, count)
    if count > LISTED:
        return permuted(seed, "order", epoch, position, count)
    return int(_permutation(seed, count, epoch)[position])


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(seed: int, count: int, epoch: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(count)


def permuted(seed: int, purpose: str, k: int, index: int, count: int) -> int:
    """Return element `index` of a random permutation of 0 … count−1, without making the others.

    A Feistel network on the bits of the index, keyed by (seed, purpose, k): Luby & Rackoff 1988;
    results of `count` or more are permuted again, Black & Rogaway 2002, Section 3.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)  # two halves of so many bits
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in _round_keys(seed, purpose, k):
            left, right = right, left ^ (_mixed(right + key) & mask)
        index = left << half | right
        if index < count:
            return index


@lru_cache(maxsize=4096)  # of as many streams
def _round_keys(seed: int, purpose: str, k: int) -> tuple[int, ...]:
    return tuple(generator(seed, purpose, k).integers(2**63, size=6).tolist())


def _mixed(number: int) -> int:
    """64 bits that each depend on all of a number's: SplitMix64 (Steele et al. 2014)."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & WORD
    number = (number ^ number >> 27) * 0x94D049BB133111EB & WORD
    return number ^ number >> 31


class Window(NamedTuple):
    """A part of the random order: images of a few shards, which are shuffled together."""

    first: int
    """Number of its first image in the epoch's line of all images; and of all epochs before."""
    shards: list[int]
    next: int
    """Image k of the run with which the next window of the same stream begins."""


class _Place(NamedTuple):
    epoch: int
    shards: np.ndarray  # in this epoch's order
    starts: np.ndarray  # of each in the line of all images, and the end
    line: int  # the place of an image there, if windows were not shuffled
    low: int
    high: int  # its window, [low, high)


class Order:
    """The order of a training run over shards: image k of it, a function of (seed, k) alone.

    In each epoch the shards are shuffled and their images lined up; the line is cut into `streams`
    of equal length, which are read side by side: image p of the epoch is element p div V of stream
    p mod V. In a stream, the images of each `window` shards that follow each other are shuffled.

    So with R processes that take every R-th image, each reads its own streams, one window after the
    other, and any number of processes can resume at any image.

    Args:
        counts: images of each shard.
    """

    def __init__(self, counts: np.ndarray, streams: int, window: int) -> None:
        self._counts, self._window, self._count = counts, window, int(counts.sum())
        self._streams = min(streams, self._count)
        self._epochs: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def find(self, seed: int, k: int) -> tuple[int, int]:
        """Return the shard of image k, and its number there."""
        epoch, shards, starts, line, low, high = self._locate(seed, k)
        place = epoch * self._count + low  # of the window, in all epochs
        line = low + permuted(seed, "window", place, line - low, high - low)
        shard = int(np.searchsorted(starts, line, "right")) - 1
        return int(shards[shard]), line - int(starts[shard])

    def window(self, seed: int, k: int) -> Window:
        """Return the window with image k."""
        epoch, shards, starts, line, low, high = self._locate(seed, k)
        first, last = np.searchsorted(starts, (low, high - 1), "right") - 1
        following = k + self._streams * (high - line)
        if following >= (epoch + 1) * self._count:  # it was the last of its stream
            following = (epoch + 1) * self._count + (k - epoch * self._count) % self._streams
        own = shards[first : last + 1]
        return Window(epoch * self._count + low, own[self._counts[own] > 0].tolist(), following)

    def _locate(self, seed: int, k: int) -> _Place:
        epoch, position = divmod(k, self._count)
        element, stream = divmod(position, self._streams)
        length, longer = divmod(self._count, self._streams)
        start = stream * length + min(stream, longer)  # the first streams have one image more
        stop = start + length + (stream < longer)
        shards, starts = self._shuffled(seed, epoch)
        line = start + element
        first, own = np.searchsorted(starts, (start, line), "right") - 1
        low = int(first + (own - first) // self._window * self._window)
        high = min(low + self._window, len(shards))
        within = max(start, int(starts[low])), min(stop, int(starts[high]))
        return _Place(epoch, shards, starts, line, *within)

    def _shuffled(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if (seed, epoch) not in self._epochs:
            shards = generator(seed, "shards", epoch).permutation(len(self._counts))
            starts = np.concatenate([[0], np.cumsum(self._counts[shards], dtype=np.int64)])
            self._epochs[seed, epoch] = shards, starts
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[seed, epoch]


def torch_seed(seed: int, purpose: str, k: int) -> int:
    """Draw a 63-bit seed for torch's own generators, which dropout uses."""
    return int(generator(seed, purpose, k).integers(2**63))


@lru_cache(maxsize=256)
def _stream(seed: int, purpose: str) -> int:
    digest = blake2b(f"{purpose}\0{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
