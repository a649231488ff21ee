"""Random numbers that belong to samples: every draw is a function of (seed, purpose, k) alone.

A counter-based generator (Philox) is keyed by the three, so that image k sees the same crop and
the same noise whatever the batch size, the worker, the process, or the moment of a resume.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch


def generator(seed: int, purpose: str, k: int) -> np.random.Generator:
    """The generator of sample `k` for one purpose ("crop", "noise", "sigma" …)."""
    key = np.array([_stream(seed, purpose), k], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def normal(seed: int, purpose: str, ks: Iterable[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise (len(ks), *shape) in float32; row i depends on (seed, ks[i]) alone."""
    rows = [
        generator(seed, purpose, int(k)).standard_normal(tuple(shape), dtype=np.float32) for k in ks
    ]
    return torch.from_numpy(np.stack(rows))


def uniform(seed: int, purpose: str, ks: Iterable[int], shape: Sequence[int]) -> torch.Tensor:
    """Numbers (len(ks), *shape) in [0, 1), float32; row i depends on (seed, ks[i]) alone."""
    rows = [generator(seed, purpose, int(k)).random(tuple(shape), dtype=np.float32) for k in ks]
    return torch.from_numpy(np.stack(rows))


def torch_seed(seed: int, purpose: str, k: int) -> int:
    """A 63-bit seed for torch's own generators, where one is unavoidable (dropout)."""
    return int(generator(seed, purpose, k).integers(2**63))


@lru_cache(maxsize=256)
def _stream(seed: int, purpose: str) -> int:
    digest = blake2b(f"{purpose}\0{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
