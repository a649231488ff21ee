"""One pass over a set of images, shared by all processes: all that a comparison needs of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import PartialState

from ldm.data import Batch
from ldm.logbook import progress_bar
from ldm.metrics.extractors import Extractor
from ldm.processes import fail_together
from pipelines.measuring.bootstrap import FeatureRows
from pipelines.measuring.fingerprints import Fingerprints, Prints
from pipelines.measuring.survey import Survey, Surveyor, gather, gather_surveys


class Images(Protocol):
    """A set of images of one size, numbered from 0."""

    @property
    def what(self) -> str:
        """What they are, in words."""

    @property
    def resolution(self) -> int:
        """Edge, pixels."""

    def __len__(self) -> int: ...

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Tools:
    """With what a pass is made.

    Attributes:
        extractor: None leaves the features out.
        device: where patches are cut.
        batch_size: images over all processes.
        workers: loader processes.
        swd_images: how many images give patches.
    """

    extractor: Extractor | None
    device: torch.device
    batch_size: int
    workers: int
    ranks: PartialState
    swd_images: int


@dataclass(frozen=True)
class Seen:
    """What is known of a set after its pass, on the main process.

    Attributes:
        prints: the images' fingerprints; None where they are not known.
        about: what a result says of how it came about.
    """

    survey: Survey
    prints: Prints | None
    about: dict[str, Any] = field(default_factory=dict)


def survey_images(images: Images, tools: Tools, rows: FeatureRows | None = None) -> Seen | None:
    """See every image once; None but on the main process.

    Args:
        rows: is given the features of this process's images.

    Raises:
        UsageError: the batch size does not divide over the processes.
        LdmError: an image cannot be read, or its features are not finite.
    """
    surveyor = Surveyor(
        len(images), images.resolution, tools.extractor, tools.device, tools.swd_images
    )
    rank, world = tools.ranks.process_index, tools.ranks.num_processes
    prints, bar = Fingerprints(), progress_bar("images")
    # starting processes for a single batch takes longer than loading it
    workers = min(tools.workers, len(images) // tools.batch_size)
    bar.disable = bar.disable or rank != 0
    with fail_together(tools.ranks), bar:
        task = bar.add_task(images.what, total=-(-len(images) // world), speed="", note="")
        for batch in images.batches(tools.batch_size, rank, world, workers):
            features = surveyor.add(batch.images, batch.k)
            prints.add(batch.images, batch.k)
            if rows is not None and features is not None:
                rows.add(features)
            speed = bar.tasks[task].speed
            shown = f"{speed * world:.1f} images/s" if speed else ""
            bar.update(task, advance=len(batch.images), speed=shown)
    survey, found = gather_surveys(surveyor.survey, tools.ranks), gather(prints, tools.ranks)
    if survey is None:
        return None
    for other in found[1:]:
        found[0].merge(other)
    return Seen(survey, found[0].in_order())
