"""What a data set is to the rest of the toolkit: images that have a number, a name, a class."""

from typing import Protocol

import numpy as np

from ldm.errors import LdmError


class Source(Protocol):
    """Whole images, numbered: one split of a data set. It pickles, so that workers can have it.

    A source without classes may leave out `classes` and `label`: they are read by `label_of`.
    """

    classes: tuple[str, ...]
    """Names of the classes; () where labels were not asked for."""

    def __len__(self) -> int:
        """Number of images."""

    def name(self, index: int) -> str:
        """The path of an image, for messages."""

    def load(self, index: int) -> np.ndarray:
        """An image as RGB uint8 (H, W, 3).

        Raises:
            ldm.data.decode.CorruptImage: it cannot be read.
        """

    def label(self, index: int) -> int:
        """The class of an image: a place in `classes`, or −1 for none."""


def label_of(source: Source, index: int) -> int:
    """The class of an image of any source, −1 where it has none."""
    return source.label(index) if getattr(source, "classes", ()) else -1


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
