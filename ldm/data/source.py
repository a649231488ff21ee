"""What a data set is to the rest of the toolkit: images that have a number and a name."""

from typing import Protocol

import numpy as np

from ldm.errors import LdmError


class Source(Protocol):
    """Whole images, numbered: one split of a data set. It pickles, so that workers can have it."""

    def __len__(self) -> int:
        """Number of images."""

    def name(self, index: int) -> str:
        """The path of an image, for messages."""

    def load(self, index: int) -> np.ndarray:
        """An image as RGB uint8 (H, W, 3).

        Raises:
            ldm.data.decode.CorruptImage: it cannot be read.
        """


def load_at_least(source: Source, index: int, side: int) -> np.ndarray:
    """An image of a source, (H, W, 3) uint8, both sides at least `side` pixels.

    Raises:
        CorruptImage: it cannot be read.
        LdmError: it is smaller; nothing is ever enlarged.
    """
    image = source.load(index)
    height, width = image.shape[:2]
    if min(height, width) < side:
        raise LdmError(
            f"{source.name(index)} is {width}×{height}, smaller than the {side}×{side} asked for: "
            "lower the resolution, or remove the image"
        )
    return image
