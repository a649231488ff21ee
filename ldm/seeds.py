"""Random numbers that belong to samples: every draw is a function of (seed, purpose, k) alone.

They key a counter-based generator (Philox), so that image k gets the same crop and the same noise
for any batch size, worker, process and point of resume.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b

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


def torch_seed(seed: int, purpose: str, k: int) -> int:
    """Draw a 63-bit seed for torch's own generators, which dropout uses."""
    return int(generator(seed, purpose, k).integers(2**63))


@lru_cache(maxsize=256)
def _stream(seed: int, purpose: str) -> int:
    digest = blake2b(f"{purpose}\0{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
