"""How samples are measured."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.errors import UsageError
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
