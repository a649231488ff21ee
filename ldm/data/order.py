"""Which image is the k-th of a run: a new permutation every epoch, known without looking back."""

from functools import lru_cache

import numpy as np

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
