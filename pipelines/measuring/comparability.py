"""Which comparisons of samples with a reference mean nothing, or less than they seem to.

Each doubt is a line that says what is wrong, why it matters and what to do. A measurement that has
one is refused; told to go on, it is made, and carries them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ldm.data import DataConfig, holds_out
from ldm.data.dataset import PHOTOS
from ldm.data.split import Split
from ldm.data.transforms import NOT_RESIZED
from ldm.errors import LdmError
from ldm.metrics.extractors import Extractor
from pipelines.measuring.fingerprints import Prints, find_shared
from pipelines.measuring.preparation import (
    compressed_image,
    learnt_from_windows,
    read_preparation,
    training_filter,
)
from pipelines.measuring.reference import ImageReference
from pipelines.measuring.statistics_file import StatisticsReference

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
