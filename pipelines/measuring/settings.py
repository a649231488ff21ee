"""How samples are measured, and what makes their features."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.errors import LdmError, UsageError
from ldm.metrics.extractors import Extractor, load_extractor
from ldm.metrics.inception import Mode


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


def find_extractor(
    how: Measuring, resolution: int, device: torch.device
) -> tuple[Extractor | None, LdmError | None]:
    """The extractor, or why there is none. A file or function that was asked for must be there."""
    try:
        extractor = load_extractor(how.features, how.mode, how.weights, device, resolution)
    except UsageError:
        raise
    except LdmError as error:
        if how.weights is not None or how.features is not None:
            raise
        return None, error
    return extractor, None


def describe_extractor(extractor: Extractor | None) -> dict[str, Any] | None:
    """What a result says of an extractor."""
    names = ("name", "sha256", "dim", "is_published")
    return extractor and {name: getattr(extractor, name) for name in names}


def notes_on(extractor: Extractor | None, how: Measuring) -> list[str]:
    """What a reader of numbers made by an extractor has to know."""
    if extractor is None or extractor.is_published:
        return []
    if how.features is not None:
        return [
            f"the features are of {extractor.name}: these numbers are no FID and KID of any paper, "
            "compare them only with others of the same function and weights"
        ]
    return [
        "the network is not the published Inception (another SHA-256): compare this FID only "
        "with others of the same file"
    ]
