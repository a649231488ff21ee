"""How samples are measured.

How results are named: by the data, the split and the features their numbers are of.

photos-val-64.json    an evaluation; of other data, two folders of its path and a few digits
fid.json              samples against the data of their model, all of it, by Inception
fid-photos-val.json   the same samples against other data, and one split of it
fid-swd.json          what was measured without an FID, where `fid.json` holds one
"""

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch

from ldm.data.dataset import PHOTOS
from ldm.data.split import Split
from ldm.errors import UsageError
from ldm.metrics.inception import Mode
from pipelines.measuring.checks import place
from pipelines.measuring.reference import PUBLISHED


@dataclass(frozen=True)
class Measuring:
    """How a measurement is made.

    Attributes:
        mode: how Inception's images are resized: as clean-fid does, or as the first FIDs did.
        features: `module:function` of an extractor of one's own; None: Inception.
        weights: `inception-2015-12-05.pt`; by default from where it usually lies, or fetched.
        bootstrap: draws of the interval about FID; 0: none.
        force: measure what there are doubts about, and note them.
        out: the file to write; by default where the module says.
    """

    mode: Mode = "clean"
    features: str | None = None
    weights: Path | None = None
    device: str | torch.device = "auto"
    batch_size: int = 64
    limit: int | None = None
    bootstrap: int = 0
    force: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch size {self.batch_size}: it must be at least 1")
        if self.limit is not None and self.limit < 2:
            raise UsageError(f"limit {self.limit}: a covariance needs two images or more")
        if self.bootstrap < 0 or self.bootstrap == 1:
            raise UsageError(f"bootstrap {self.bootstrap}: it must be 0, or 2 draws or more")


DEFAULT_SPLIT: Split = "all"
"""What samples are compared with where no split is named."""


def name_data(source: str) -> str:
    """A data set in the name of a file: two folders of its path with a few digits of the whole, as
    in `imagenet-val-1f0c52`."""
    if source == PHOTOS:
        return source
    where = Path(place(source))
    # two folders of a path, for many data sets end in /val; and many of those in x/val
    digits = sha256(str(where).encode()).hexdigest()[:6]
    return "-".join([*where.parts[-2:], digits])


def join_words(*words: str) -> str:
    """Words as the name of a file, without its ending."""
    return re.sub(r"[^\w.=-]+", "_", "-".join(words)).strip("_-")


def fid_path(plain: Path, other: str | None, split: Split | None, how: Measuring) -> Path:
    """Where a measurement of samples is kept: `plain`, with a word for all that is not as by
    default.

    Args:
        other: the data or the statistics that the samples are compared with; None for the data of
            their own model.
    """
    words = [
        *([] if other is None else [other if other in PUBLISHED else name_data(other)]),
        *([] if split in (None, DEFAULT_SPLIT) else [str(split)]),
        *([f"first{how.limit}"] if how.limit else []),
        *([how.features] if how.features else []),
        *([how.mode] if how.mode != "clean" else []),
    ]
    # of an archive, the beginning is its name, as it is
    return plain.with_name("-".join([plain.stem, *map(join_words, words)]) + ".json")


def path_without_fid(path: Path) -> Path:
    """Where a result that has no FID is kept: at `path`, or beside it where one with an FID is."""
    try:
        has_fid = json.loads(path.read_text("utf-8"))["fid"] is not None
    except (OSError, ValueError, TypeError, KeyError):  # none is there, or it is damaged
        has_fid = False
    return path.with_name(f"{path.stem}-swd.json") if has_fid else path
