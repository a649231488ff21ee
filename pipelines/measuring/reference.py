"""The images that samples are compared with: one split of a data set."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ldm.config import to_tree
from ldm.data import Batch, DataConfig, batches, evaluation_batches, open_source
from ldm.data.dataset import PHOTOS
from ldm.data.faults import FaultCount
from ldm.data.identity import content_identity
from ldm.data.split import Part, Split
from ldm.errors import LdmError
from pipelines.measuring.preparation import preparation, resize_filter
from pipelines.measuring.survey import SEED

NOT_ENLARGED = "nothing is enlarged to be compared"


class ImageReference:
    """Images of one split, cut at their centres to a resolution, never mirrored.

    Of the built-in photographs, which are eight and large, it is random crops, as many as there are
    samples (of their split val: its tiles).

    Args:
        samples: how many there are.
        limit: only the first so many images.

    Attributes:
        what: what they are, in words.
        prepared: how `ldm data prepare` made them (size, filter, crop, source), where it did.
        filter: what brings, or brought, them down to the resolution, where that is known.

    Raises:
        LdmError: there is no such data; it was prepared at another size, or its images are smaller
            than the samples; or there are not two.
        UsageError: the data has no such split.
    """

    def __init__(
        self,
        config: DataConfig,
        split: Split,
        resolution: int,
        samples: int,
        limit: int | None = None,
    ) -> None:
        self.config, self.split, self.resolution = config, split, resolution
        self.prepared = preparation(config)
        self._check_prepared()
        self.source = open_source(config, split, resolution)
        if config.source != PHOTOS:
            everyone = np.arange(len(self.source))
            self.source = _LargeEnough(self.source, everyone, resolution)
        centred = config.model_copy(update={"crop": "center"})
        self.filter = resize_filter(centred, self.source, resolution)
        self.is_crops = config.source == PHOTOS and split != "val"
        if self.is_crops:
            self._count = samples
            self.what = f"photos, {split}: {samples} random crops, seed {SEED}"
            return
        self._count = min(len(self.source), limit or len(self.source))
        brought = f", brought down by {self.filter}" if self.filter else ""
        self.what = f"{config.source}, {split}: {self._count} images, centre-cropped{brought}"
        if self._count < 2:
            raise LdmError(
                f"{self.what}: a covariance needs two images or more, give another --data"
            )

    def __len__(self) -> int:
        return self._count

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Every image once over all processes.

        Raises:
            LdmError: (while iterating) more than 1 % are corrupt, or one is too small.
        """
        if not self.is_crops:
            faults = FaultCount(self._count)
            yield from evaluation_batches(
                self.source, self.resolution, batch_size, self._count, rank, world, workers, faults
            )
            return
        unmirrored = self.config.model_copy(update={"flip": False})
        stop = -(-self._count // batch_size) * batch_size  # whole batches; the last is cut
        for batch in batches(
            self.source, unmirrored, self.resolution, SEED, 0, stop, batch_size, rank, world
        ):
            wanted = batch.k < self._count
            if wanted.any():  # of the last batch a process may have none
                yield Batch(*(part[wanted] for part in batch))

    def _check_prepared(self) -> None:
        size = self.prepared["size"] if self.prepared else self.resolution
        if size != self.resolution:
            why = "resizing twice changes every number" if size > self.resolution else NOT_ENLARGED
            raise LdmError(
                f"{self.config.source} was prepared at {size}×{size} and the samples are "
                f"{self.resolution}×{self.resolution}: {why}; prepare the data with --size "
                f"{self.resolution}"
            )

    def part(self, indices: Tensor) -> "ReferencePart":
        """Some of the images, numbered anew; not of crops, which are in no source."""
        return ReferencePart(self, indices)

    def content(self) -> str:
        """SHA-256 over the content of every file with an image of this set, in order, and over
        which of their images it is.

        Names of files and dates are not in it: a data set that was moved or copied is the same, one
        with a changed byte is another. What it costs is to read all files.

        Raises:
            LdmError: a file cannot be read, or is not there any more.
        """
        return content_identity(self.source, self._count)

    def about(self) -> dict[str, Any]:
        """What a result says of them."""
        return {
            "what": self.what,
            "split": self.split,
            "count": len(self),
            "data": to_tree(self.config),
            "prepared": self.prepared,
            "filter": self.filter,
        }


@dataclass(frozen=True)
class _LargeEnough(Part):
    """Images of which none may be smaller than the samples, whose edge is `side` pixels."""

    side: int

    def load(self, index: int) -> np.ndarray:
        image = super().load(index)
        height, width = image.shape[:2]
        if min(height, width) < self.side:
            raise LdmError(
                f"{self.name(index)} is {width}×{height}, smaller than the samples, which are "
                f"{self.side}×{self.side}: {NOT_ENLARGED}; give --data of images as large, or take "
                "the small ones out"
            )
        return image


class ReferencePart:
    """Some images of a reference, as a set of their own."""

    def __init__(self, whole: ImageReference, indices: Tensor) -> None:
        self.what, self.resolution = whole.what, whole.resolution
        self._source = Part(whole.source, indices.numpy())
        self._of = len(whole)

    def __len__(self) -> int:
        return len(self._source)

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """As of the whole, of whose images 1 % may be corrupt, though it were many of these."""
        faults = FaultCount(self._of)
        return evaluation_batches(
            self._source, self.resolution, batch_size, None, rank, world, workers, faults
        )
