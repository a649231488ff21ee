"""Whether images that are measured as held out were trained on: the content of both, compared.

Two images are the same where their pixels are, once both are cut as they would be measured: a copy
under another name, in another container or another lossless format is found, one that was
compressed anew is not.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from ldm.data import Source, evaluation_batches
from ldm.data.split import Part
from ldm.processes import fail_together
from ldm.seeds import generator
from pipelines.measuring.fingerprints import Fingerprints, Prints, find_shared

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
