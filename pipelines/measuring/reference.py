"""The images that samples are compared with: one split of a data set.

The statistics of references, kept under the data's hash: a pass over a data set is made once.

$LDM_CACHE/statistics/<key>.npz   mean, covariance and a sample of the features of one reference

The key is a SHA-256 over all that decides the features: the images' content (see
`ImageReference.content`), the split, the resolution, the crop; the extractor's weights and its
resizing; the version of Pillow, which decodes and resizes. What only some images are needed for,
patches for the sliced Wasserstein distance, is not kept but made anew from these.

Statistics in a file as what samples are compared with: those we kept, or clean-fid's own.

clean-fid publishes mean and covariance of Inception's features of FFHQ (Parmar et al. 2022), at
256² and 1024², over all 70,000 images or over 50,000 of them. At 256² they are of the data set's
own tfrecords, which were brought down from 1024² by averaging.
"""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import file_digest, sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from torch import Tensor

from ldm.config import to_tree
from ldm.data import Batch, DataConfig, batches, evaluation_batches, open_source
from ldm.data.dataset import PHOTOS, content_identity
from ldm.data.loader import FaultCount
from ldm.data.split import Part, Split
from ldm.distributed import from_main
from ldm.errors import LdmError, UsageError
from ldm.logbook import console
from ldm.metrics import FeatureStatistics
from ldm.metrics.features import FeatureSet
from ldm.metrics.inception import Extractor, FeatureExtractor
from ldm.run_folder import provenance
from ldm.weights import cache_folder, find_or_fetch
from pipelines.measuring.preparation import preparation, resize_filter
from pipelines.measuring.statistics import (
    SEED,
    Prints,
    Seen,
    Survey,
    Tools,
    drawn_images,
    survey_images,
)

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


FORMAT = 1


def survey_reference(reference: ImageReference, tools: Tools, mode: str) -> Seen | None:
    """See every image of a reference once, or take up what was kept of it; None but on the main
    process.

    The numbers are the same either way, but for the last digits of float64.

    Args:
        mode: of the extractor's resizing.

    Raises:
        LdmError: as `survey_images`.
    """
    identity = from_main(tools.ranks, lambda: identify(reference, tools.extractor, mode))
    if identity is None:
        return survey_images(reference, tools)
    about = {"content": identity["content"], "statistics": str(statistics_path(identity))}
    kept = _load(identity) if tools.ranks.is_main_process else None
    if from_main(tools.ranks, lambda: kept is not None):
        drawn = drawn_images(len(reference), tools.swd_images)
        patches = replace(tools, extractor=None, swd_images=len(drawn))
        seen = survey_images(reference.part(drawn), patches)
        if seen is None or kept is None:
            return None
        features, prints = kept
        survey = replace(seen.survey, features=features, count=features.count)
        return Seen(survey, prints, about | {"kept": True})
    seen = survey_images(reference, tools)
    if seen is None or seen.survey.features is None or seen.prints is None:
        return seen
    try:
        _save(seen.survey.features, seen.prints, reference, identity)
    except LdmError as error:
        console.print(f"note: the reference's statistics are not kept: {error}", markup=False)
        about |= {"statistics": None}
    return replace(seen, about=about | {"kept": False})


def identify(
    reference: ImageReference, extractor: Extractor | None, mode: str
) -> dict[str, Any] | None:
    """All that decides a reference's features; None where keeping them would not be right.

    The built-in photographs are quickly cut, into as many crops as there are samples. Fewer images
    than features take less time than their covariance takes room. Of an extractor of one's own
    nothing tells whether its weights are still the same.

    Raises:
        LdmError: a file of the data cannot be read.
    """
    if extractor is None or not isinstance(extractor, FeatureExtractor):
        return None
    if reference.config.source == PHOTOS or len(reference) < extractor.dim:
        return None
    return {
        "format": FORMAT,
        "content": reference.content(),
        "split": reference.split,
        "images": len(reference),
        "resolution": reference.resolution,
        "crop": "center",
        "extractor": name_extractor(extractor, mode),
        "pillow": version("pillow"),
    }


def name_extractor(extractor: Extractor, mode: str) -> dict[str, Any]:
    """What two extractors must share for their features to be compared."""
    return {"sha256": extractor.sha256, "mode": mode, "dim": extractor.dim}


def statistics_path(identity: dict[str, Any]) -> Path:
    """Where the statistics of a reference are kept."""
    key = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "statistics" / f"{key[:32]}.npz"


def read_prints(about: dict[str, Any], count: int) -> Prints:
    """The fingerprints of so many images in what was said of kept statistics.

    Raises:
        LdmError: they are damaged.
    """
    try:
        told = base64.b64decode(about["fingerprints"], validate=True)
        prints = np.frombuffer(told, "<u8").astype(np.uint64)
    except (KeyError, TypeError, ValueError):
        prints = np.empty(0, np.uint64)
    if len(prints) != count:
        raise LdmError("the fingerprints of kept statistics are damaged")
    return prints


def _save(
    features: FeatureSet, prints: Prints, reference: ImageReference, identity: dict[str, Any]
) -> None:
    about = {
        "identity": identity,
        "reference": reference.about(),
        "fingerprints": base64.b64encode(prints.astype("<u8").tobytes()).decode(),
        **provenance(),
    }
    features.save(statistics_path(identity), about)


def _load(identity: dict[str, Any]) -> tuple[FeatureSet, Prints] | None:
    """What was kept of a reference; None where nothing was, or it is damaged, which is said."""
    path = statistics_path(identity)
    if not path.is_file():
        return None
    try:
        features, about = FeatureSet.load(path)
        if about.get("identity") == identity:
            return features, read_prints(about, features.count)
        damage = f"{path} is not what its name says"
    except LdmError as error:
        damage = str(error)
    console.print(f"note: {damage}; computing the reference's statistics anew", markup=False)
    return None


ADDRESS = "https://www.cs.cmu.edu/~clean-fid/stats"


class Published(NamedTuple):
    """A reference of clean-fid's: how its files name it, and what it is of."""

    split: str
    resolution: int
    count: int
    filter: str | None


PUBLISHED = {
    "ffhq256": Published("trainval70k", 256, 70_000, "box"),
    "ffhq1024": Published("trainval70k", 1024, 70_000, None),
    "ffhq256-50k": Published("trainval", 256, 50_000, "box"),
    "ffhq1024-50k": Published("trainval", 1024, 50_000, None),
}


@dataclass(frozen=True)
class StatisticsReference:
    """Statistics of images that need not be here.

    Attributes:
        what: what they are of, in words.
        resolution: edge of the images, pixels.
        filter: what the images were brought down by, where that is known.
        features: of clean-fid's, the statistics alone.
        prints: the images' fingerprints; None where they are not known.
        told: what a result says of them.
    """

    what: str
    resolution: int
    filter: str | None
    features: FeatureSet
    prints: Prints | None
    told: dict[str, Any]

    def __len__(self) -> int:
        return self.features.count

    def about(self) -> dict[str, Any]:
        """What a result says of them."""
        return self.told

    def seen(self) -> Seen:
        """What a pass over the images would have left, but for patches."""
        return Seen(Survey(self.features, None, len(self)), self.prints)


def open_statistics(name: str, extractor: Extractor, mode: str) -> StatisticsReference:
    """The statistics of a published data set, or those in a file that we kept.

    Args:
        name: one of `PUBLISHED`, or the path of a .npz.
        extractor: what the samples' features are made by.
        mode: clean or legacy-tensorflow.

    Raises:
        UsageError: there is no such name, nor such a file.
        LdmError: they cannot be had, are damaged, or were computed by another extractor.
    """
    if name in PUBLISHED:
        return _open_published(name, extractor, mode)
    path = Path(name).expanduser()
    if path.suffix != ".npz" or not path.is_file():
        raise UsageError(
            f"no reference '{name}': give {', '.join(PUBLISHED)}, or a .npz of "
            f"{cache_folder() / 'statistics'}; images are given with --data"
        )
    return _open_kept(path, extractor, mode)


def _open_kept(path: Path, extractor: Extractor, mode: str) -> StatisticsReference:
    ours = "give one that `ldm fid` kept, or --data"
    try:
        features, about = FeatureSet.load(path)
        identity, told = about["identity"], about["reference"]
        theirs, resolution = identity["extractor"], identity["resolution"]
        told |= {"statistics": str(path), "content": identity["content"], "kept": True}
        what, used = told["what"], told["filter"]
        prints = read_prints(about, features.count)
    except (LdmError, KeyError, TypeError) as error:
        raise LdmError(f"{path} is damaged, or holds no statistics of ours: {ours}") from error
    now = name_extractor(extractor, mode)
    if theirs != now:
        raise LdmError(
            f"the statistics in {path} were computed with another extractor "
            f"({_named(theirs)}) than the samples' features would be ({_named(now)}): distances "
            "between two networks' features mean nothing; give the same --weights and --mode"
        )
    return StatisticsReference(what, resolution, used, features, prints, told)


def _open_published(name: str, extractor: Extractor, mode: str) -> StatisticsReference:
    known = PUBLISHED[name]
    if not extractor.is_published:
        raise LdmError(
            f"the statistics of {name} were computed with another extractor, the published "
            f"Inception, than the samples' features would be ({extractor.name}): distances between "
            "two networks' features mean nothing; leave out --features and --weights, or give "
            "--data"
        )
    # the name that clean-fid gives and looks for
    file = f"ffhq_{mode.replace('-', '_')}_{known.split}_{known.resolution}.npz"
    instead = "compare with images of your own by --data"
    path = find_or_fetch(file, f"{ADDRESS}/{file}", "", statistics_folders(), instead)
    try:
        with np.load(path, allow_pickle=False) as parts:
            statistics = FeatureStatistics.from_moments(known.count, parts["mu"], parts["sigma"])
        with path.open("rb") as opened:
            digest = file_digest(opened, "sha256").hexdigest()
    except (OSError, KeyError, ValueError, EOFError, BadZipFile) as error:
        raise LdmError(f"{path} is damaged: delete it to have it fetched again") from error
    if statistics.dim != extractor.dim:
        raise LdmError(f"{path} holds {statistics.dim} features, not {extractor.dim}: delete it")
    features = FeatureSet(extractor.dim, known.count, kept=0)
    features.statistics = statistics
    what = f"FFHQ at {known.resolution}² as clean-fid has it: {known.count} images"
    told = {
        "what": what,
        "split": known.split,
        "count": known.count,
        "filter": known.filter,
        "statistics": str(path),
        "statistics_sha256": digest,
    }
    return StatisticsReference(what, known.resolution, known.filter, features, None, told)


def statistics_folders() -> list[Path]:
    """Where clean-fid's statistics may lie: our cache, and where clean-fid puts them."""
    import cleanfid

    return [cache_folder() / "statistics", Path(cleanfid.__file__).parent / "stats"]


def _named(extractor: dict[str, Any]) -> str:
    return f"{extractor['mode']}, SHA-256 {str(extractor['sha256'])[:12]}"
