"""Checks that a comparison means what it seems to mean.

Each check yields an `Issue`: one line that says what is wrong, why it matters and what to do.
`resolve` refuses the measurement, or, with `--force`, returns the issues to be stored with the
result. Resize filters and compression leave traces that FID detects although no eye does: FFHQ
downsampled by two libraries differs from itself by an FID of 6 or more (Parmar et al. 2022).
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from accelerate import PartialState

from ldm.data import DataConfig, Source, holds_out, open_source
from ldm.data.dataset import PHOTOS
from ldm.data.sources import Part, Split
from ldm.data.transforms import NOT_RESIZED
from ldm.distributed import from_main
from ldm.errors import LdmError
from ldm.metrics.inception import Extractor
from ldm.seeds import generator
from pipelines.measuring.reference import (
    Reference,
    find_filter,
    is_same,
    native_size,
    read_preparation,
    resolve_source,
    shorter_sides,
)
from pipelines.measuring.statistics import (
    CentreCrops,
    Hashes,
    SetStatistics,
    accumulate,
    find_shared,
)
from pipelines.sampling.source import Samples, is_lossy


# ------------------------------------------------------------------------------------- protocol
class Issue(NamedTuple):
    """A reason not to trust a comparison.

    Attributes:
        level: an error stops the measurement; a refusal does, unless forced; a warning does not.
    """

    message: str
    level: Literal["error", "refusal", "warning"] = "refusal"


def resolve(issues: Iterable[Issue], force: bool) -> list[str]:
    """Raise an LdmError for an issue that stops the measurement, or return the messages to store
    with the result."""
    warnings = []
    for message, level in issues:
        if level == "error":
            raise LdmError(message)
        if level == "refusal" and not force:
            raise LdmError(f"{message}; --force measures anyway")
        warnings.append(message)
    return warnings


# ------------------------------------------------------------------------- checks of a comparison
def find_issues(
    samples: Samples,
    reference: Reference,
    trained_on: DataConfig | None,
    extractor: Extractor | None,
    split: Split | None,
) -> Iterator[Issue]:
    """Check a comparison before anything is computed.

    Args:
        trained_on: data that the samples' model was trained on, where it is known.
        extractor: None where no features are compared.
        split: the split of the reference, where the user named one.
    """
    ours, theirs = samples.resolution, reference.resolution
    if ours != theirs:
        yield Issue(
            f"{reference.what} are {theirs}×{theirs} and the samples {ours}×{ours}: "
            "FID between sizes measures the resizing; give a reference of the samples' size",
            "error",
        )
    if extractor is not None and min(len(samples), len(reference)) < extractor.dim:
        yield Issue(
            f"FID over {len(samples):,} samples and {len(reference):,} images is biased upwards, "
            f"and with fewer than {extractor.dim:,}, one per feature, the covariance is singular: "
            "give more images, or compare it only with FIDs over as many"
        )
    if (
        trained_on is not None
        and split is None
        and reference.split == "all"
        and is_same(reference.config, trained_on.source)
        and not holds_out(trained_on)
    ):
        yield Issue(
            f"{reference.what} are all images that the model was trained on, and none is held out: "
            "a model that memorised them would score best; if that is intended, as in many papers, "
            "give --split train"
        )
    yield from _find_other_preparation(samples, reference, trained_on)
    name = reference.source and find_compressed(reference.source, reference.resolution)
    if name is not None:
        yield Issue(
            f"{name} is compressed at the size of the comparison, and the samples are not: FID "
            "between JPEG and PNG measures the compression; give uncompressed reference images"
        )


def _find_other_preparation(
    samples: Samples, reference: Reference, trained_on: DataConfig | None
) -> Iterator[Issue]:
    ours, theirs = samples_filter(samples, trained_on), reference.filter
    if theirs is None:
        return
    if ours is not None and ours != theirs:
        yield Issue(
            f"{reference.what} were downsampled by {theirs}, and the samples' training images by "
            f"{ours}: FID between them measures the filter; prepare both with the same --filter"
        )
    side = samples.resolution
    # a reference that was not downsampled may be crops that the user has cut
    if trained_on is not None and read_training(trained_on, side)[1]:
        yield Issue(
            f"{reference.what} are whole images, downsampled, and the model was trained on crops "
            "of larger ones at native size (data.crop=random): FID between them measures the crop; "
            f"give --data of such crops, {side}×{side} each"
        )


def samples_filter(samples: Samples, trained_on: DataConfig | None) -> str | None:
    """Return the filter of samples that were prepared themselves, or of their training images."""
    if samples.made_with is None and samples.path.is_dir():
        prepared = read_preparation(DataConfig(source=str(samples.path.resolve())))
        if prepared and prepared["filter"] != NOT_RESIZED:
            return prepared["filter"]
    return read_training(trained_on, samples.resolution)[0] if trained_on else None


def read_training(config: DataConfig, resolution: int) -> tuple[str | None, bool]:
    """Return the filter of a model's training images, and whether they were crops of larger ones.

    Of the built-in photographs they do not count as crops: the reference is made of crops as well.
    """
    with suppress(LdmError):  # the data is gone
        source = open_source(config, "all", resolution)
        crops = config.crop == "random" and config.source != PHOTOS
        crops = crops and native_size(config, source) > resolution
        return find_filter(config, source, resolution), crops
    return None, False


def find_compressed(source: Source, resolution: int) -> str | None:
    """Return the name of an image that is lossy at the very size at which it is compared."""
    # downsampling removes the traces of compression with the details
    lossy = [i for i in range(len(source)) if is_lossy(source.name(i))]
    sides = shorter_sides(source, lossy)
    return next((source.name(i) for i, side in sides if side == resolution), None)


def find_copies(samples: Samples, fake: SetStatistics, real: SetStatistics) -> Iterator[Issue]:
    """Check that no sample is an image of the reference, as far as its images are known."""
    copies = find_shared(fake.hashes or {}, real.hashes or {})
    if copies:
        yield Issue(
            f"{len(copies):,} of {len(samples):,} samples (such as {samples.name(copies[0])}) are "
            "images of the reference, bit for bit, and a set is near itself whatever the model: "
            "remove the copies, or give a reference without them"
        )


def describe_limits(
    reference: Reference, extractor: Extractor | None, is_inception: bool
) -> Iterator[Issue]:
    """Yield what limits the use of the numbers, without making them wrong."""
    if extractor is not None and not extractor.is_published:
        yield Issue(
            "the network is not the published Inception (another SHA-256): compare this FID only "
            "with others of the same file"
            if is_inception
            else f"the features are of {extractor.name}, not Inception: compare these numbers only "
            "with others of the same function and weights, not with published FIDs and KIDs",
            "warning",
        )
    if reference.source is None:
        yield Issue(
            "no SWD: it compares patches of images, and the reference is statistics without "
            "images; give the images with --data",
            "warning",
        )


# ------------------------------------------------------------------------- held-out images
COMPARED = 10_000
"""Images of either side that are compared at most, drawn at random from more: that takes a minute
or so, and finds some of a split that lies wholly among the training images."""
BATCH = 64


class Overlap(NamedTuple):
    """Images that held-out and training data share.

    Attributes:
        shared: compared held-out images that are training images; `example` is the name of one.
        held_out, train: images of each side that were compared.
        held_out_of, train_of: images of each side.
    """

    shared: int
    example: str | None
    held_out: int
    held_out_of: int
    train: int
    train_of: int


def find_overlap(
    held_out: Source,
    train: Source,
    resolution: int,
    ranks: PartialState,
    limit: int | None = None,
    workers: int = 0,
) -> Overlap:
    """Compare held-out images, the first `limit`, with training images by hashes of their pixels.

    Both are cropped as for measuring. A copy under another name, or in another container or
    lossless format, is found; one that was compressed again is not. The processes share the work,
    and all return the result.
    """
    total = min(len(held_out), limit or len(held_out))
    chosen = _draw(held_out, total)

    def hashes(part: Part, what: str) -> Hashes:
        images = CentreCrops(part, resolution, what, len(part))
        batch_size = BATCH * ranks.num_processes
        found = accumulate(images, ranks, batch_size=batch_size, workers=workers, swd_images=0)
        return found.hashes or {}

    ours, theirs = hashes(chosen, "held out"), hashes(_draw(train, len(train)), "trained on")

    def compare() -> Overlap:
        found = find_shared(ours, theirs)
        example = chosen.name(found[0]) if found else None
        return Overlap(len(found), example, len(ours), total, len(theirs), len(train))

    return from_main(ranks, compare)


def _draw(source: Source, total: int) -> Part:
    """At most `COMPARED` of a source's first `total` images."""
    drawn = generator(0, "overlap", total).permutation(total)[:COMPARED]
    return Part(source, np.sort(drawn))


# ------------------------------------------------------------------------------- result files
def name_data(source: str) -> str:
    """Name a data set in a file name: two folders of its path and a hash of the whole path, as in
    `imagenet-val-1f0c52`."""
    if source == PHOTOS:
        return source
    where = Path(resolve_source(source))
    # two folders of a path, for many data sets end in /val; and many of those in x/val
    digits = sha256(str(where).encode()).hexdigest()[:6]
    return "-".join([*where.parts[-2:], digits])


def join_words(*words: str) -> str:
    """Join words into a file name without its ending."""
    return re.sub(r"[^\w.=-]+", "_", "-".join(words)).strip("_-")


def check_writable(*paths: Path) -> None:
    """Refuse result files that could not be written, before hours of work."""
    for path in paths:
        if path.is_dir():
            raise LdmError(f"{path} is a folder: give --out a file, such as {path / 'eval.json'}")
        beside = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.touch()
            beside.unlink()
        except OSError as error:
            message = f"could not write {path} ({error.strerror}): give --out another file"
            raise LdmError(message) from error
