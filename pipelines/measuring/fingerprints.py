"""Which images two sets share, by their content: images that are equal to the last bit.

A model that copies its training images, or two splits with an image in common, make every
comparison look better than it is.
"""

from hashlib import sha256

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Prints = NDArray[np.uint64]

SIZE = 8  # bytes: among 50,000 images and 70,000, two unlike ones agree once in 5·10⁹ comparisons


class Fingerprints:
    """A number of 64 bits for every image of a stream, by which it is known again.

    It is of the pixels as they are compared, cropped and resized, whatever file they came from.
    Memory grows with the images, by some 150 bytes each.
    """

    def __init__(self) -> None:
        self._found: dict[int, int] = {}

    def add(self, images: Tensor, ks: Tensor) -> None:
        """Take in images (B, 3, R, R) uint8 with their numbers (B,)."""
        # in one layout, for the same pixels may lie in memory either way
        pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        for k, image in zip(ks.tolist(), pixels, strict=True):
            self._found[k] = int.from_bytes(sha256(image.data).digest()[:SIZE], "little")

    def merge(self, other: "Fingerprints") -> None:
        """Take in what another process has seen of the same set."""
        self._found |= other._found

    def in_order(self) -> Prints:
        """(n,), in the order of the images' numbers."""
        return np.array([self._found[k] for k in sorted(self._found)], np.uint64)


def identify_set(prints: Prints) -> str:
    """SHA-256 of a whole set: equal where two hold the same images in the same order."""
    return sha256(prints.astype("<u8").tobytes()).hexdigest()


def find_shared(prints: Prints, others: Prints) -> list[int]:
    """The places, rising, of the images of a set that are in another one."""
    return np.flatnonzero(np.isin(prints, others)).tolist()
