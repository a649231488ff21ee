"""Batches of images for training and evaluation, loaded here or by worker processes.

The images are the same whatever the batch size, the workers and the processes: in a training run,
image k, its crop and its flip are functions of (seed, k) alone, so resuming means starting at
another k.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ldm.config import Resolution, height_width, read_resolution
from ldm.data.dataset import PHOTOS, DataConfig
from ldm.data.hf import is_hub
from ldm.data.photos import PhotoSource
from ldm.data.remote import RemoteSource, is_remote, read_remote_manifest
from ldm.data.shards import MANIFEST, read_manifest
from ldm.data.sources import Source
from ldm.data.transforms import (
    LARGE,
    NOT_RESIZED,
    SMALL,
    CorruptImage,
    center_crop,
    largest_crop,
    random_crop,
)
from ldm.data.workers import load_in_workers
from ldm.errors import LdmError, UsageError, listed
from ldm.images import from_pixels
from ldm.records import checked, schema
from ldm.seeds import generator

TOLERATED = 0.01
"""Share of a source's images that may be corrupt before a job stops."""

MOST_SKIPPED = 10_000
"""Images in a row that may be too small."""

FEWER_WORKERS = "lower data.workers"
SLOWEST = 6 * 3600
"""Seconds that a shard from elsewhere may take, whose transfer is watched by itself."""

log = logging.getLogger("ldm")


class Batch(NamedTuple):
    """Images with their numbers and classes."""

    images: Tensor
    """(b, C, H, W), channels last in memory: uint8, or of pixels of another depth or range float32
    in [−1, 1]."""
    k: Tensor
    """int64 (b,): the number of each image in the run, or its index in the source."""
    labels: Tensor
    """int64 (b,): the class of each image, as an index into the source's `classes`; −1 for none."""
    drawn: Any = None
    """Random numbers for these images, from the `draw` of `batches`."""


# --------------------------------------------------------------------------- corrupt images
class FaultCount:
    """The distinct corrupt images that one process met among the `total` of a source."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.found: dict[str, str] = {}
        self._of_size: dict[str, set[str]] = {SMALL: set(), LARGE: set()}

    def add(self, faults: Mapping[str, str]) -> None:
        """Log the new ones, given by name with the reason; raise LdmError if there are too many.

        Images that are too small or too large are counted by themselves, and logged at 1, 10, …
        """
        for name, reason in faults.items():
            size = next((word for word in (SMALL, LARGE) if reason.startswith(word)), None)
            if size and name not in self._of_size[size]:
                self._of_size[size].add(name)
                count, word = len(self._of_size[size]), size.split()[1].rstrip(":")
                if count == 10 ** (len(str(count)) - 1):
                    log.warning("skipped %s images: %s so far, %s (%s)", word, count, name, reason)
            elif name not in self.found and not size:
                self.found[name] = reason
                log.warning("skipped a corrupt image: %s (%s)", name, reason)
        stop_if_too_many(self.found, self.total)


def stop_if_too_many(faults: Mapping[str, str], total: int) -> None:
    """Raise an LdmError that names the first ten if more than 1 % of `total` are corrupt."""
    corrupt = [name for name, reason in faults.items() if not reason.startswith((SMALL, LARGE))]
    if len(corrupt) <= TOLERATED * total:
        return
    raise LdmError(
        f"{len(corrupt)} of {total} images are corrupt, more than {TOLERATED:.0%}: "
        f"{listed(corrupt, 10)} ({faults[corrupt[0]]}); repair or remove them"
    )


# --------------------------------------------------------------------------------- one image
def image_name(source: Source, seed: int, k: int) -> str:
    """Name the run's k-th image; if it is corrupt, the next good one was taken instead."""
    return source.name(source.shuffled(seed, k))


Image = tuple[np.ndarray, int]  # pixels (H, W, C), and its class
Faults = dict[str, str]  # names of corrupt images → the reasons
Draw = Callable[[Sequence[int]], Any]  # the ks of a batch → its random numbers; can be pickled


def _training_image(
    source: Source, resolution: Resolution, seed: int, at_random: bool, flip: bool, k: int,
    faults: Faults,
) -> Image:  # fmt: skip
    """Load image k of a training run; the next good one replaces a corrupt image."""
    if isinstance(source, RemoteSource):
        source.fetch_ahead(seed, k)
    index, skipped = source.shuffled(seed, k), 0
    while (image := _whole_image(source, resolution, index, faults)) is None:
        stop_if_too_many(faults, len(source))
        index, skipped = (index + 1) % len(source), skipped + 1
        if skipped == min(len(source), MOST_SKIPPED):
            name, reason = next(reversed(faults.items()))
            advice = "lower the resolution, or set data.small=enlarge"
            advice = "cut them into tiles" if reason.startswith(LARGE) else advice
            raise LdmError(
                f"{skipped:,} images in a row were skipped, the last {name} ({reason}): {advice}"
            )
    if at_random:
        image = random_crop(image, resolution, generator(seed, "crop", k))
    else:
        image = center_crop(image, resolution)
    mirrored = flip and generator(seed, "flip", k).integers(2)
    return image[:, ::-1] if mirrored else image, source.label(index)


def _evaluation_image(
    source: Source, resolution: Resolution, index: int, faults: Faults
) -> Image | None:
    """Load the centre of an image; None if it is corrupt."""
    image = _whole_image(source, resolution, index, faults)
    return None if image is None else (center_crop(image, resolution), source.label(index))


def _whole_image(
    source: Source, resolution: Resolution, index: int, faults: Faults
) -> np.ndarray | None:
    try:
        return source.load_at_least(index, resolution)
    except CorruptImage as error:
        faults[source.name(index)] = str(error)
        return None


# ------------------------------------------------------------------------------------ batches
def batches(
    source: Source,
    config: DataConfig,
    resolution: Resolution,
    seed: int,
    start: int,
    stop: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    draw: Draw | None = None,
) -> Iterator[Batch]:
    """Load images k = start … stop−1 of a training run, in batches of crops of a resolution.

    A corrupt image is named in a warning, and replaced by the next good one of the source with its
    label. Each process counts its own corrupt images, from 0 in each call. An incomplete last batch
    is left out.

    Args:
        batch_size: images over all processes; each gets every world-th of every batch.
        draw: draws a batch's random numbers, given its images' k, where the images are loaded.
    """
    at_random = config.crop == "random" or isinstance(source, PhotoSource)
    load = partial(_training_image, source, resolution, seed, at_random, config.flip)
    numbers = whole_shares(start, stop, batch_size, rank, world)
    if isinstance(source, RemoteSource) and start < stop:
        source.fetch_first(seed, start, rank, world)
    return _load(source, resolution, load, numbers, config.workers, draw=draw)


def evaluation_batches(
    source: Source,
    resolution: Resolution,
    batch_size: int,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    faults: FaultCount | None = None,
) -> Iterator[Batch]:
    """Load the centre crop of every image of a source once over all processes, never mirrored.

    A corrupt image is named in a warning and left out, so `k` may have gaps. The last batch may be
    short, and a process may have one batch fewer than another.

    Args:
        batch_size: images over all processes; each gets a contiguous 1/world of every batch.
        limit: number of the source's first images to load; None: all.
        workers: loader processes; 0 loads in this one, as the built-in photographs always do.
        faults: counts the corrupt images of several passes over parts of one source together.
    """
    count = len(source) if limit is None else min(limit, len(source))
    numbers = _shares(0, count, batch_size, rank, world)
    load = partial(_evaluation_image, source, resolution)
    return _load(source, resolution, load, numbers, workers, faults)


def sheet_images(source: Source, resolution: Resolution, count: int) -> Tensor:
    """Load the centres of the first good images of a source: (n, C, H, W), n ≤ `count`, as in a
    `Batch`."""
    faults: Faults = {}
    loaded = (_evaluation_image(source, resolution, k, faults) for k in range(len(source)))
    chosen = list(islice((image[0] for image in loaded if image is not None), count))
    if not chosen:
        name, reason = next(iter(faults.items()))
        raise LdmError(f"no image can be read, not even {name} ({reason}): repair or replace them")
    return stack(chosen, resolution, source)


def whole_shares(start: int, stop: int, batch_size: int, rank: int, world: int) -> Iterator[range]:
    """Return the numbers of a process's images in each batch but an incomplete last one.

    They are every world-th, so that a process reads its own streams of shards elsewhere.
    """
    _check_divides(batch_size, world)
    lasts = range(start + batch_size, stop + 1, batch_size)
    return (range(last - batch_size + rank, last, world) for last in lasts)


def _shares(start: int, stop: int, batch_size: int, rank: int, world: int) -> Iterator[range]:
    """Return the numbers of a process's images in each batch, which follow each other."""
    _check_divides(batch_size, world)
    share = batch_size // world
    firsts = range(start + rank * share, stop, batch_size)
    return (range(first, min(first + share, stop)) for first in firsts)


def _check_divides(batch_size: int, world: int) -> None:
    if batch_size % world:
        raise UsageError(f"batch_size={batch_size} does not divide over {world} processes")


def _load(
    source: Source,
    resolution: Resolution,
    load: Callable[[int, Faults], Image | None],
    numbers: Iterable[range],
    workers: int,
    counted: FaultCount | None = None,
    draw: Draw | None = None,
) -> Iterator[Batch]:
    if isinstance(source, PhotoSource):
        workers = 0  # they are in memory: moving them would cost more than cropping them
    counted = counted or FaultCount(len(source))
    limit = SLOWEST if isinstance(source, RemoteSource) else None
    work, pin = partial(_batch, source, resolution, load, draw), torch.cuda.is_available()
    for batch, faults in load_in_workers(work, numbers, workers, FEWER_WORKERS, pin, limit):
        counted.add(faults)
        if len(batch.k):
            yield batch


def _batch(
    source: Source,
    resolution: Resolution,
    load: Callable[[int, Faults], Image | None],
    draw: Draw | None,
    ks: range,
) -> tuple[Batch, Faults]:
    faults: Faults = {}
    loaded = {k: image for k in ks if (image := load(k, faults)) is not None}
    images = stack([image for image, _ in loaded.values()], resolution, source)
    labels = torch.tensor([label for _, label in loaded.values()], dtype=torch.int64)
    drawn = None if draw is None else draw(list(loaded))
    return Batch(images, torch.tensor(list(loaded), dtype=torch.int64), labels, drawn), faults


def stack(images: Sequence[np.ndarray], resolution: Resolution, source: Source) -> Tensor:
    """Stack pixels (H, W, C) of a source as the images of a `Batch`."""
    if source.range or any(image.dtype != np.uint8 for image in images):
        images = [from_pixels(image, source.range) for image in images]
    none = np.empty((0, *height_width(resolution), source.channels), np.uint8)
    stacked = np.stack(images) if images else none
    return rearrange(torch.from_numpy(stacked), "b h w c -> b c h w")


# -------------------------------------------------------------------- facts about a data set
def resolve_source(source: str) -> str | Path:
    """Return the place of a data set, whatever path names it."""
    named = source == PHOTOS or is_hub(source) or is_remote(source)
    return source if named else Path(source).expanduser().resolve()


def name_data(source: str) -> str:
    """Name a data set in a file name, as in `imagenet-val-1f0c52`."""
    if source == PHOTOS:
        return source
    where = Path(resolve_source(source))
    # two folders of the path, for many data sets end in /val; and a hash, for many end in x/val
    digits = sha256(str(where).encode()).hexdigest()[:6]
    return "-".join([*where.parts[-2:], digits]).replace(":", "-")


def is_same(config: DataConfig | None, source: str) -> bool:
    """Test whether a config, if there is one, is of the data set at `source`."""
    return config is not None and resolve_source(config.source) == resolve_source(source)


def choose_data(data: str | DataConfig | None, own: DataConfig | None) -> DataConfig | None:
    """Return the named data, or by default a model's own."""
    if data is None or isinstance(data, DataConfig):
        return data or own
    # split as for training: another split would hold out images that were trained on
    return own if is_same(own, data) else DataConfig(source=data)


_PREPARATION = schema(size=Resolution, filter=str, crop=str, source=str)


def read_preparation(config: DataConfig) -> dict[str, Any] | None:
    """Return size, filter, crop and source of data made by `ldm data prepare`; None of other."""
    path = Path(config.source).expanduser()
    if config.source == PHOTOS or is_hub(config.source) or path.suffix == ".zip":
        return None
    folder = path if path.is_dir() else path.parent
    if is_remote(config.source):
        manifest = read_remote_manifest(config.source)
    elif not path.exists() and "{" not in config.source:
        return None  # the folder that it is not in may be prepared
    else:
        manifest = read_manifest(folder)
    if manifest is None:
        return None
    checked(_PREPARATION, manifest, folder / MANIFEST)
    return {key: manifest[key] for key in _PREPARATION.model_fields}


def find_filter(config: DataConfig, source: Source, resolution: Resolution) -> str | None:
    """Return the filter that images, centre-cropped, are or were downsampled with, if known."""
    if config.source == PHOTOS:
        return None  # crops at native size
    prepared = read_preparation(config)
    steps = [prepared["filter"]] if prepared and prepared["filter"] != NOT_RESIZED else []
    if is_larger(config, source, resolution):
        steps.append("lanczos")  # as `center_crop` does
    return ", then ".join(steps) or None


def is_larger(config: DataConfig, source: Source, resolution: Resolution) -> bool:
    """Tell whether a data set's images, by its manifest or by most, are cut larger than needed."""
    if prepared := read_preparation(config):
        shape = height_width(read_resolution(prepared["size"]))
        heights = [largest_crop(*shape, resolution)[0]]
    else:
        heights = [height for _, height in crop_heights(source, range(len(source)), resolution)]
    return bool(heights) and int(np.median(heights)) > height_width(resolution)[0]


def crop_heights(
    source: Source, indices: Sequence[int], resolution: Resolution, probes: int = 16
) -> Iterator[tuple[int, int]]:
    """Yield index and height of the largest centre crop, for squares the shorter side, in pixels,
    of at most `probes` images, evenly spread."""
    for place in np.linspace(0, len(indices) - 1, min(probes, len(indices))).round():
        index = indices[int(place)]
        with suppress(CorruptImage):
            height, width = source.load(index).shape[:2]
            yield index, largest_crop(height, width, resolution)[0]


def count_labels(source: Any) -> dict[str, Any] | None:
    """Return the number of classes of a set of images, and the images of the class with fewest and
    of that with most; None where not every image has a class."""
    counts = Counter(source.label(i) for i in range(len(source)))
    if not counts or -1 in counts:
        return None
    return {"classes": len(counts), "images": [min(counts.values()), max(counts.values())]}
