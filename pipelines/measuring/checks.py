"""Which comparisons of samples with a reference mean nothing, or less than they seem to.

Each doubt is a line that says what is wrong, why it matters and what to do. A measurement that has
one is refused; told to go on, it is made, and carries them.

Whether images that are measured as held out were trained on: the content of both, compared.

Two images are the same where their pixels are, once both are cut as they would be measured: a copy
under another name, in another container or another lossless format is found, one that was
compressed anew is not.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from ldm.data import DataConfig, Source, evaluation_batches, holds_out
from ldm.data.dataset import PHOTOS
from ldm.data.split import Part, Split
from ldm.data.transforms import NOT_RESIZED
from ldm.distributed import fail_together
from ldm.errors import LdmError
from ldm.metrics.inception import Extractor
from ldm.seeds import generator
from pipelines.measuring.preparation import (
    compressed_image,
    learnt_from_windows,
    read_preparation,
    training_filter,
)
from pipelines.measuring.reference import ImageReference, StatisticsReference
from pipelines.measuring.statistics import Fingerprints, Prints, find_shared

Reference = ImageReference | StatisticsReference


class Samples(Protocol):
    """What is measured: a `SampleFolder`, or `ModelSamples`."""

    path: Path
    made_with: dict[str, Any] | None
    resolution: int

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...


def check_size(samples: Samples, reference: Reference) -> None:
    """Refuse sizes that cannot be compared.

    Raises:
        LdmError: the reference's is another than the samples'.
    """
    ours, theirs = samples.resolution, reference.resolution
    if ours != theirs:
        raise LdmError(
            f"{reference.what} are {theirs}×{theirs} and the samples {ours}×{ours}: FID between "
            "sizes measures the resizing; give a reference of the samples' size"
        )


def find_doubts(
    samples: Samples,
    reference: Reference,
    trained_on: DataConfig | None,
    extractor: Extractor | None,
    asked: Split | None,
) -> Iterator[str]:
    """What can be said against a comparison before it is made.

    Args:
        trained_on: the data that the samples' model learnt from, where that is known.
        extractor: None where there are no features.
        asked: the split, where a person has named it.
    """
    yield from _too_few(samples, reference, extractor)
    yield from _training_split(reference, trained_on, asked)
    yield from _filters(samples, reference, trained_on)
    yield from _windows(samples, reference, trained_on)
    if isinstance(reference, ImageReference):
        name = compressed_image(reference.source, reference.resolution)
        if name is not None:
            yield (
                f"{name} is compressed, as it is compared, and samples are not: FID between JPEG "
                "and PNG measures the compression; give a reference of the uncompressed images"
            )


def find_copies(samples: Samples, made: Prints, real: Prints | None) -> Iterator[str]:
    """What can be said once both sides were seen: samples that are images of the reference.

    Args:
        real: None where the reference's images are not known.
    """
    copies = [] if real is None else find_shared(made, real)
    if copies:
        yield (
            f"{len(copies):,} of {len(samples):,} samples ({samples.name(copies[0])}, for one) are "
            "images of the reference, bit for bit: a set is near itself and that says nothing of "
            "a model; take the copies out, or compare with images that the samples do not hold"
        )


def _too_few(samples: Samples, reference: Reference, extractor: Extractor | None) -> Iterator[str]:
    if extractor is None:
        return
    ours, theirs = len(samples), len(reference)
    if min(ours, theirs) < extractor.dim:
        yield (
            f"FID over {ours:,} samples and {theirs:,} images is biased upwards, and below "
            f"{extractor.dim:,}, one for each feature, the covariance is singular: compare it only "
            "with FIDs over as many, or give more"
        )


def _training_split(
    reference: Reference, trained_on: DataConfig | None, asked: Split | None
) -> Iterator[str]:
    if asked is not None or trained_on is None or not isinstance(reference, ImageReference):
        return
    same = place(reference.config.source) == place(trained_on.source)
    if same and reference.split == "all" and not holds_out(trained_on):
        yield (
            f"{reference.what} are all images that the model was trained on, none is held out: a "
            "model that knows them by heart would do best; if that is meant, as in many papers, "
            "say --split train"
        )


def _filters(
    samples: Samples, reference: Reference, trained_on: DataConfig | None
) -> Iterator[str]:
    theirs, ours = reference.filter, samples_filter(samples, trained_on)
    if ours is not None and theirs is not None and ours != theirs:
        yield (
            f"{reference.what} were brought down by {theirs}, and what the samples were learnt "
            f"from by {ours}: FID between them measures the filter; prepare both by the same "
            "--filter"
        )


def _windows(
    samples: Samples, reference: Reference, trained_on: DataConfig | None
) -> Iterator[str]:
    # images that were not brought down may be windows that a person has cut
    if reference.filter is None or trained_on is None:
        return
    side = samples.resolution
    if learnt_from_windows(trained_on, side):
        yield (
            f"{reference.what} are whole images brought down, and the model learnt from windows of "
            "larger ones at native size (data.crop=random): FID between them measures the crop; "
            f"give --data of such windows, {side}×{side} each"
        )


def samples_filter(samples: Samples, trained_on: DataConfig | None) -> str | None:
    """The filter of samples that were prepared themselves, or of what their model learnt from."""
    if samples.made_with is None and samples.path.is_dir():
        prepared = read_preparation(samples.path)
        if prepared and prepared["filter"] != NOT_RESIZED:
            return prepared["filter"]
    return training_filter(trained_on, samples.resolution) if trained_on else None


def place(source: str) -> str | Path:
    """Where data is, by whatever path it is named."""
    return source if source == PHOTOS else Path(source).expanduser().resolve()


COMPARED = 10_000
"""Images of either side that are compared at most, drawn at random where there are more: that takes
a minute or so, and of a split that lies wholly among training images it finds some."""
BATCH = 64


@dataclass(frozen=True)
class Overlap:
    """What was compared, and what was found on both sides.

    Attributes:
        shared: how many of the compared held-out images are training images.
        example: the name of one of them; None where there is none.
        held_out, train: how many images of either side were compared.
        held_out_of, train_of: of how many.
    """

    shared: int
    example: str | None
    held_out: int
    held_out_of: int
    train: int
    train_of: int

    def to_tree(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return asdict(self)


def find_overlap(
    held_out: Source,
    train: Source,
    resolution: int,
    ranks: PartialState,
    limit: int | None = None,
    workers: int = 0,
) -> Overlap:
    """Compare held-out images with training images by fingerprints of their pixels.

    The processes share the work, and all get the result.

    Args:
        resolution: side R of the central squares that are compared, pixels.
        limit: only the first so many of the held-out images.
        workers: loader processes.

    Raises:
        LdmError: an image is smaller than R, or more than 1 % of a side is corrupt.
    """
    total = min(len(held_out), limit or len(held_out))
    chosen = _draw(held_out, total)
    ks, ours = _read(chosen, resolution, ranks, workers)
    _, theirs = _read(_draw(train, len(train)), resolution, ranks, workers)
    found = find_shared(ours, theirs)
    example = chosen.name(ks[found[0]]) if found else None
    return Overlap(len(found), example, len(ours), total, len(theirs), len(train))


def _draw(source: Source, total: int) -> Part:
    """At most `COMPARED` of a source's first `total` images."""
    drawn = generator(0, "overlap", total).permutation(total)[:COMPARED]
    return Part(source, np.sort(drawn))


def _read(
    source: Source, resolution: int, ranks: PartialState, workers: int
) -> tuple[list[int], Prints]:
    """The numbers of a source's good images, rising, and their fingerprints."""
    rank, world = ranks.process_index, ranks.num_processes
    workers = workers if len(source) > BATCH * world else 0  # one batch keeps one of them busy
    stream = evaluation_batches(
        source, resolution, BATCH * world, rank=rank, world=world, workers=workers
    )
    mine, ks = Fingerprints(), []
    with fail_together(ranks):
        for batch in stream:
            mine.add(batch.images, batch.k)
            ks += batch.k.tolist()
    everything, numbers = Fingerprints(), []
    for share, some in gather_object([(mine, ks)]):
        everything.merge(share)
        numbers += some
    return sorted(numbers), everything.in_order()
