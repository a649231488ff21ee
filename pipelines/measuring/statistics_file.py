"""Statistics in a file as what samples are compared with: those we kept, or clean-fid's own.

clean-fid publishes mean and covariance of Inception's features of FFHQ (Parmar et al. 2022), at
256² and 1024², over all 70,000 images or over 50,000 of them. At 256² they are of the data set's
own tfrecords, which were brought down from 1024² by averaging.
"""

from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from ldm.errors import LdmError, UsageError
from ldm.metrics import FeatureStatistics
from ldm.metrics.extractors import Extractor
from ldm.metrics.feature_set import FeatureSet
from ldm.weights import cache_folder, find_or_fetch
from pipelines.measuring.fingerprints import Prints
from pipelines.measuring.image_pass import Seen
from pipelines.measuring.kept_statistics import name_extractor, read_prints
from pipelines.measuring.survey import Survey

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
