"""Checks that a comparison means what it seems to mean.

Each check yields an `Issue`: one line that says what is wrong, why it matters and what to do.
`resolve` refuses the measurement, or, with `--force`, returns the issues to be stored with the
result. Filters and compression leave traces that no eye sees and FID does: FFHQ brought down by one
library and by another is at an FID of 6 or more from itself (Parmar et al. 2022).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import PartialState

from ldm.data import DataConfig, Source, holds_out, open_source
from ldm.data.dataset import PHOTOS
from ldm.data.shards import read_manifest
from ldm.data.split import Part, Split
from ldm.data.transforms import NOT_RESIZED, CorruptImage
from ldm.distributed import from_main
from ldm.errors import LdmError
from ldm.metrics.inception import Extractor
from ldm.seeds import generator
from pipelines.measuring.statistics import (
    CentreCrops,
    ImageSet,
    PassSettings,
    SetStatistics,
    accumulate,
    find_shared,
)
from pipelines.sampling.source import is_lossy


# ------------------------------------------------------------------------------------- protocol
class Issue(NamedTuple):
    """A reason not to trust a comparison.

    Attributes:
        level: an error stops the measurement; a refusal does, unless forced; a warning does not.
    """

    message: str
    level: Literal["error", "refusal", "warning"] = "refusal"


def resolve(issues: Iterable[Issue], force: bool) -> list[str]:
    """Return the messages to store with the result.

    Raises:
        LdmError: an issue stops the measurement.
    """
    warnings = []
    for message, level in issues:
        if level == "error":
            raise LdmError(message)
        if level == "refusal" and not force:
            raise LdmError(f"{message}; --force measures anyway")
        warnings.append(message)
    return warnings


class Samples(ImageSet, Protocol):
    """Generated images to measure: a `SampleFolder`, or `ModelSamples`."""

    path: Path
    made_with: dict[str, Any] | None

    @property
    def result_path(self) -> Path:
        """The default file of a measurement."""

    def name(self, index: int) -> str: ...


class Reference(Protocol):
    """Real images to compare with, or statistics of them.

    Attributes:
        what: a description, for messages and results.
        resolution: edge of the images, pixels.
        filter: the filter that the images were downsampled with, where it is known.
        about: the reference's entry in a result.
        config, split, source: the data; None where only statistics are there.
    """

    what: str
    resolution: int
    filter: str | None
    about: dict[str, Any]
    config: DataConfig | None = None
    split: Split | None = None
    source: Source | None = None

    def __len__(self) -> int: ...

    def statistics(self, settings: PassSettings) -> SetStatistics:
        """Load or compute the statistics; complete on the main process only."""
        ...


@dataclass(frozen=True)
class Comparison:
    """Samples and the reference that they are about to be compared with.

    Attributes:
        trained_on: data that the samples' model was trained on, where it is known.
        extractor: None where no features are compared.
        split: the split of the reference, where the user named one.
    """

    samples: Samples
    reference: Reference
    trained_on: DataConfig | None
    extractor: Extractor | None
    split: Split | None


# ------------------------------------------------------------------------- checks of a comparison
def find_issues(comparison: Comparison) -> Iterator[Issue]:
    """Check a comparison before anything is computed."""
    for check in (_size, _count, _training_split, _filter, _crops, _compression):
        yield from check(comparison)


def find_copies(samples: Samples, fake: SetStatistics, real: SetStatistics) -> Iterator[Issue]:
    """Check that no sample is an image of the reference, as far as its images are known."""
    copies = find_shared(fake.hashes or {}, real.hashes or {})
    if copies:
        yield Issue(
            f"{len(copies):,} of {len(samples):,} samples (such as {samples.name(copies[0])}) are "
            "images of the reference, bit for bit, and a set is near itself whatever the model: "
            "remove the copies, or give a reference without them"
        )


def describe_limits(comparison: Comparison, features: str | None) -> Iterator[Issue]:
    """Yield what limits the use of the numbers, without making them wrong.

    Args:
        features: `module:function` of a user's own extractor; None: Inception.
    """
    extractor = comparison.extractor
    if extractor is not None and not extractor.is_published:
        yield Issue(
            "the network is not the published Inception (another SHA-256): compare this FID only "
            "with others of the same file"
            if features is None
            else f"the features are of {extractor.name}, not Inception: compare these numbers only "
            "with others of the same function and weights, not with published FIDs and KIDs",
            "warning",
        )
    if comparison.reference.source is None:
        yield Issue(
            "no SWD: it compares patches of images, and the reference is statistics without "
            "images; give the images with --data",
            "warning",
        )


def _size(comparison: Comparison) -> Iterator[Issue]:
    ours, theirs = comparison.samples.resolution, comparison.reference.resolution
    if ours != theirs:
        yield Issue(
            f"{comparison.reference.what} are {theirs}×{theirs} and the samples {ours}×{ours}: "
            "FID between sizes measures the resizing; give a reference of the samples' size",
            "error",
        )


def _count(comparison: Comparison) -> Iterator[Issue]:
    ours, theirs = len(comparison.samples), len(comparison.reference)
    extractor = comparison.extractor
    if extractor is not None and min(ours, theirs) < extractor.dim:
        yield Issue(
            f"FID over {ours:,} samples and {theirs:,} images is biased upwards, and with fewer "
            f"than {extractor.dim:,}, one per feature, the covariance is singular: give more "
            "images, or compare it only with FIDs over as many"
        )


def _training_split(comparison: Comparison) -> Iterator[Issue]:
    reference, trained_on = comparison.reference, comparison.trained_on
    if comparison.split is not None or trained_on is None or reference.config is None:
        return
    same = resolve_source(reference.config.source) == resolve_source(trained_on.source)
    if same and reference.split == "all" and not holds_out(trained_on):
        yield Issue(
            f"{reference.what} are all images that the model was trained on, and none is held out: "
            "a model that memorised them would score best; if that is intended, as in many papers, "
            "give --split train"
        )


def _filter(comparison: Comparison) -> Iterator[Issue]:
    reference = comparison.reference
    ours, theirs = samples_filter(comparison.samples, comparison.trained_on), reference.filter
    if ours is not None and theirs is not None and ours != theirs:
        yield Issue(
            f"{reference.what} were downsampled by {theirs}, and the samples' training images by "
            f"{ours}: FID between them measures the filter; prepare both with the same --filter"
        )


def _crops(comparison: Comparison) -> Iterator[Issue]:
    reference, trained_on = comparison.reference, comparison.trained_on
    # images that were not downsampled may be crops that the user has cut
    if reference.filter is None or trained_on is None:
        return
    side = comparison.samples.resolution
    _, crops = read_training(trained_on, side)
    if crops:
        yield Issue(
            f"{reference.what} are whole images, downsampled, and the model was trained on crops "
            "of larger ones at native size (data.crop=random): FID between them measures the crop; "
            f"give --data of such crops, {side}×{side} each"
        )


def _compression(comparison: Comparison) -> Iterator[Issue]:
    source, resolution = comparison.reference.source, comparison.reference.resolution
    name = None if source is None else find_compressed(source, resolution)
    if name is not None:
        yield Issue(
            f"{name} is compressed at the size of the comparison, and the samples are not: FID "
            "between JPEG and PNG measures the compression; give uncompressed reference images"
        )


# ------------------------------------------------------------------------ facts about a data set
PROBES = 16  # images whose size stands for that of all


def resolve_source(source: str) -> str | Path:
    """Return the place of a data set, whatever path names it."""
    return source if source == PHOTOS else Path(source).expanduser().resolve()


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


def read_preparation(config: DataConfig) -> dict[str, Any] | None:
    """Return size, filter, crop and source of data made by `ldm data prepare`; None of other."""
    path = Path(config.source).expanduser()
    if config.source == PHOTOS or path.suffix == ".zip":
        return None
    if not path.exists() and "{" not in config.source:
        return None  # the folder that it is not in may be prepared
    manifest = read_manifest(path if path.is_dir() else path.parent)
    return manifest and {key: manifest[key] for key in ("size", "filter", "crop", "source")}


def find_filter(config: DataConfig, source: Source, resolution: int) -> str | None:
    """Return the filter that a data set's images are, or were, downsampled with; None where it is
    not known, or they were not.

    Args:
        source: its images.
        resolution: edge of the images as they are compared, pixels.
    """
    if config.source == PHOTOS or config.crop == "random":
        return None  # crops at native size
    prepared = read_preparation(config)
    steps = [prepared["filter"]] if prepared and prepared["filter"] != NOT_RESIZED else []
    if _native_size(config, source) > resolution:
        steps.append("lanczos")  # as `center_crop` does
    return ", then ".join(steps) or None


def read_training(config: DataConfig, resolution: int) -> tuple[str | None, bool]:
    """Return the filter of a model's training images, and whether they were crops of larger ones.

    Both are unknown, None and False, where the data is gone. Of the built-in photographs they are
    not crops, for the reference is crops, too.
    """
    with suppress(LdmError):  # the data is gone
        source = open_source(config, "all", resolution)
        crops = config.crop == "random" and config.source != PHOTOS
        crops = crops and _native_size(config, source) > resolution
        return find_filter(config, source, resolution), crops
    return None, False


def samples_filter(samples: Samples, trained_on: DataConfig | None) -> str | None:
    """Return the filter of samples that were prepared themselves, or of their training images."""
    if samples.made_with is None and samples.path.is_dir():
        prepared = read_preparation(DataConfig(source=str(samples.path.resolve())))
        if prepared and prepared["filter"] != NOT_RESIZED:
            return prepared["filter"]
    return read_training(trained_on, samples.resolution)[0] if trained_on else None


def find_compressed(source: Source, resolution: int) -> str | None:
    """Return the name of an image that is lossy at the very size at which it is compared.

    Downsampling removes the traces of compression with the details. A few of the lossy images,
    evenly spread, stand for all.
    """
    lossy = [i for i in range(len(source)) if is_lossy(source.name(i))]
    sides = _shorter_sides(source, lossy)
    return next((source.name(i) for i, side in sides if side == resolution), None)


def _native_size(config: DataConfig, source: Source) -> int:
    """The shorter side of a data set's images, pixels, by its manifest or by most of them."""
    prepared = read_preparation(config)
    if prepared:
        return prepared["size"]
    sides = [side for _, side in _shorter_sides(source, range(len(source)))]
    return int(np.median(sides)) if sides else 0


def _shorter_sides(source: Source, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The index and the shorter side, pixels, of at most `PROBES` images, evenly spread."""
    for place in np.linspace(0, len(indices) - 1, min(PROBES, len(indices))).round():
        index = indices[int(place)]
        with suppress(CorruptImage):
            yield index, min(source.load(index).shape[:2])


# ------------------------------------------------------------------------- held-out images
COMPARED = 10_000
"""Images of either side that are compared at most, drawn at random from more: that takes a minute
or so, and finds some of a split that lies wholly among the training images."""
BATCH = 64


class Overlap(NamedTuple):
    """Images that held-out and training data share.

    Two images are the same if their pixels are, once both are cropped as for measuring: a copy
    under another name, or in another container or lossless format, is found; one that was
    compressed again is not.

    Attributes:
        shared: compared held-out images that are training images.
        example: the name of one of them; None where there is none.
        held_out, train: images of either side that were compared.
        held_out_of, train_of: images of either side.
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
    """Compare held-out images with training images by hashes of their pixels.

    The processes share the work, and all return the result.

    Args:
        resolution: edge R of the centre crops that are compared, pixels.
        limit: only the first so many of the held-out images.
        workers: loader processes.
    """
    total = min(len(held_out), limit or len(held_out))
    chosen = _draw(held_out, total)
    batch_size = BATCH * ranks.num_processes
    settings = PassSettings(None, torch.device("cpu"), ranks, batch_size, workers, swd_images=0)

    def hashes(part: Part, what: str) -> dict[int, int]:
        images = CentreCrops(part, resolution, what, len(part))
        return accumulate(images, settings).hashes or {}

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


# ------------------------------------------------------------------------------------ the result
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
