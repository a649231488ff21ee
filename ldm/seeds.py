"""Random numbers that belong to samples: every draw is a function of (seed, purpose, k) alone.

They key a counter-based generator (Philox), so that image k gets the same crop and the same noise
for any batch size, worker, process and point of resume.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import torch


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


def torch_seed(seed: int, purpose: str, k: int) -> int:
    """Draw a 63-bit seed for torch's own generators, which dropout uses."""
    return int(generator(seed, purpose, k).integers(2**63))


@lru_cache(maxsize=256)
def _stream(seed: int, purpose: str) -> int:
    digest = blake2b(f"{purpose}\0{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
