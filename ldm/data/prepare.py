"""Preparation of a data set: images of any kind → PNGs of one size in tar shards, with a manifest.

Pixels that no PNG can hold (`file_suffix`) are written as .npy.

Worker processes read, crop and encode; this process writes one shard after the other, each whole or
not at all. The same call resumes an interrupted preparation, and gives the same bytes.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

from pydantic import Field

from ldm.config import Resolution, format_size, height_width, plain_size, read_resolution
from ldm.data.dataset import held_out_count, open_images, split_indices
from ldm.data.hf import is_hub
from ldm.data.labels import printable
from ldm.data.loader import FaultCount
from ldm.data.remote import is_remote
from ldm.data.shard_index import keep_index
from ldm.data.shards import (
    MANIFEST,
    MANIFEST_FORMAT,
    PNG,
    SHARD,
    listed_shards,
    sidecar,
    write_shard,
)
from ldm.data.sources import UTF8, Indices, Small, Source, name_size
from ldm.data.transforms import (
    NOT_RESIZED,
    SMALL,
    CorruptImage,
    Filter,
    center_crop,
    covers,
    largest_crop,
)
from ldm.data.workers import load_in_workers
from ldm.errors import LdmError, UsageError, check_at_least, listed
from ldm.files import check_writable, lock, write_json
from ldm.images import PixelType, write_pixels
from ldm.logbook import show_progress
from ldm.records import Count, read_tree, schema

Report = dict[str, Any]
"""Description of a shard, as in the sidecar beside it."""
REPORT = schema(
    **SHARD, bytes=Count, sha256=str, settings=dict[str, Any], resized=(Count, 1),
    own_sha256=(str, ""), dtype=(PixelType, "uint8"),
    skipped=list[Annotated[list[str], Field(min_length=2, max_length=2)]],
)  # fmt: skip
OF_IMAGES = ("images", "names_sha256", "labels_sha256", "held_out")
"""Settings that follow from the images."""
NAMED = {"names_sha256": "the list of images", "labels_sha256": "the class labels"}
"""Settings whose values say nothing to a reader."""
TYPES = get_args(PixelType)  # the deepest last
ANOTHER = "choose another folder for the shards"
AGAIN = "delete it to write the shard again"
FEWER_WORKERS = "run the same command with fewer --workers; finished shards are kept"


def prepare(
    source_path: str | Path,
    destination: str | Path,
    size: Resolution = 256,
    filter: Filter = "lanczos",
    held_out: int | None = None,
    shard_size: int = 1000,
    workers: int | None = None,
    labels: bool = False,
    label_file: str | Path = "",
    small: Small = "error",
    image_column: str = "",
    label_column: str = "",
    channels: int = 3,
) -> dict[str, Any]:
    """Write the images of a folder, zip, tar shards or table as PNGs of one size in shards.

    The central square of each image, or for a size (H, W) the largest central part of those
    proportions, is cropped, then resized. The images keep the order of their names. The last
    `held_out` of them, with labels every n-th, go into `val-00000.tar` …, the others into
    `train-00000.tar` …. Existing shards are kept.

    Args:
        held_out: images for validation; None: those of a table's or prepared data's own split,
            else the default of `held_out_count`.
        workers: processes; None: one per CPU core; 0: this process alone.
        labels: keep the class of each image, see `DataConfig.labels`.
        label_file: CSV file of them.
        image_column, label_column: of a table; by default the only ones.
        small: treatment of images smaller than `size`: an error, or left out, or enlarged.
        channels: of the images: 1 for grey, 3 for colour, others for arrays. Their depth is kept.

    Returns:
        The manifest, as in the destination; its filter is `NOT_RESIZED` if no image was resized.
    """
    path, destination = _path_of(source_path), Path(destination).expanduser()
    _check(path, destination, filter, size, shard_size, workers, channels)
    labels, columns = labels or bool(label_file), (image_column, label_column)
    source = open_images(path, labels, str(label_file), *columns)
    source.small, source.channels, source.keep = small, channels, "float32"
    held_out = held_out_count(len(source), source.held_out if held_out is None else held_out)
    evenly = labels and held_out != source.held_out
    settings: dict[str, Any] = {
        "source": path if isinstance(path, str) else printable(path.resolve().name),
        **_describe_images(source, path, labels),
        "size": plain_size(size),
        "filter": filter,
        "crop": "center",
        "held_out": held_out,
        "shard_size": shard_size,
        **_unless({"small": "error", "channels": 3}, small=small, channels=channels),
    }
    shards = _divide(split_indices(len(source), held_out, evenly), shard_size)
    with lock(destination, ANOTHER):
        reports = _write_all(source, shards, settings, destination, workers)
        manifest = _manifest(reports, settings, path)
        manifest |= {"classes": list(source.classes)} if labels else {}
        keep_index(destination, listed_shards(manifest), labels)
        write_json(destination / MANIFEST, manifest)
    return manifest


def _path_of(source: str | Path) -> Path | str:
    """The path of a source; of what is not on this machine, its name."""
    is_elsewhere = is_hub(str(source)) or is_remote(str(source))
    return str(source) if is_elsewhere else Path(source).expanduser()


def _unless(defaults: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """The settings without those at their defaults, which earlier versions did not have."""
    return {key: value for key, value in settings.items() if value != defaults[key]}


def _divide(splits: tuple[Indices, Indices], shard_size: int) -> dict[str, Indices]:
    """Indices of each shard's images, by its name: training shards, then held-out ones."""
    return {
        f"{split}-{number:05d}.tar": indices[first : first + shard_size]
        for split, indices in zip(("train", "val"), splits, strict=True)
        for number, first in enumerate(range(0, len(indices), shard_size))
    }


def _describe_images(source: Source, path: Path | str, labels: bool) -> dict[str, Any]:
    """Number, names and classes of the images, for the settings."""
    names = [source.name(i).removeprefix(f"{path}/") for i in range(len(source))]
    found: dict[str, Any] = {
        "images": len(source),
        "names_sha256": sha256("\n".join(names).encode(*UTF8)).hexdigest(),
    }
    if labels:
        text = json.dumps([source.classes, [source.label(i) for i in range(len(source))]])
        found["labels_sha256"] = sha256(text.encode()).hexdigest()
    return found


def _check(
    source: Path | str, destination: Path, filter: Filter, size: Resolution, shard_size: int,
    workers: int | None, channels: int,
) -> None:  # fmt: skip
    if filter not in get_args(Filter):
        raise UsageError(f"no filter '{filter}': choose one of {', '.join(get_args(Filter))}")
    check_at_least(1, size=size, shard_size=shard_size, channels=channels)
    check_at_least(0, workers=workers)
    if isinstance(source, Path) and not source.exists():
        raise LdmError(f"{source} does not exist: give a folder of images, a .zip or a .tar")
    if re.match(r"\w+:/", str(destination)):
        raise UsageError(f"{destination} is not on this machine: {ANOTHER}, and copy it then")
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"{destination} is a file: the destination must be a folder")
    is_path = isinstance(source, Path) and destination.exists()
    if is_path and destination.samefile(source):
        raise UsageError(f"{destination} is the source: {ANOTHER}")
    check_writable(destination / MANIFEST, advice=ANOTHER)
    foreign = [tar for tar in sorted(destination.glob("*.tar")) if not sidecar(tar).is_file()]
    if foreign:
        raise UsageError(
            f"{foreign[0]} was not written by `ldm data prepare`: choose an empty folder"
        )


def _write_all(
    source: Source,
    shards: Mapping[str, Indices],
    settings: dict[str, Any],
    destination: Path,
    workers: int | None,
) -> list[Report]:
    """Write the shards that are missing; return the descriptions of all."""
    own = {name: _own_images(source, indices) for name, indices in shards.items()}
    is_ours = _is_same_attempt(destination, own)
    found = {
        name: _read_report(destination / name, settings, own[name] if is_ours else None)
        for name in shards
    }
    for tar in set(destination.glob("*.tar")) - {destination / name for name in shards}:
        if is_ours:  # of the earlier attempt, with more images
            tar.unlink()
            sidecar(tar).unlink(missing_ok=True)
    reports = {name: report for name, report in found.items() if report}
    missing = {name: indices for name, indices in shards.items() if name not in reports}
    faults = FaultCount(len(source))
    for report in reports.values():
        faults.add(dict(report["skipped"]))
    total = sum(map(len, missing.values()))
    size = read_resolution(settings["size"])
    work = partial(_prepare_image, source, size, settings["filter"])
    workers = total if workers is None else min(workers, total)
    images = load_in_workers(work, chain(*missing.values()), workers, FEWER_WORKERS)
    with show_progress("preparing", total) as advance, closing(images):
        for name, indices in missing.items():
            part = islice(images, len(indices))
            try:
                report = _write_images(destination / name, part, settings, own[name], advance)
            except _TooSmall:
                raise _count_small(source, size, workers) from None
            reports[name] = report
            faults.add(dict(report["skipped"]))
    return [reports[name] for name in shards]


def _manifest(
    reports: Sequence[Report], settings: dict[str, Any], source: Path | str
) -> dict[str, Any]:
    splits = {}
    for split in ("train", "val"):
        its_own = [report for report in reports if report["name"].startswith(split)]
        shards = [{key: r[key] for key in ("name", "count", "sha256", "bytes")} for r in its_own]
        splits[split] = {"count": sum(shard["count"] for shard in shards), "shards": shards}
    skipped = [
        {"name": name.removeprefix(printable(f"{source}/")), "reason": reason}
        for report in reports
        for name, reason in report["skipped"]
    ]
    deepest = max((r.get("dtype", "uint8") for r in reports), key=TYPES.index, default="uint8")
    # earlier versions did not count resized images: theirs may have been
    resized = any(report.get("resized", 1) for report in reports)
    return {
        "format": MANIFEST_FORMAT,
        "count": sum(split["count"] for split in splits.values()),
        "size": settings["size"],
        "filter": settings["filter"] if resized else NOT_RESIZED,
        "crop": settings["crop"],
        "source": settings["source"],
        **({"channels": settings["channels"]} if "channels" in settings else {}),
        **({} if deepest == "uint8" else {"dtype": deepest}),
        "splits": splits,
        "skipped": skipped,
    }


# ------------------------------------------------------------------------------------ shards
class Prepared(NamedTuple):
    """An image for a shard; or its name and the reason if it is corrupt."""

    image: PNG | None = None
    resized: bool = False
    dtype: str = "uint8"
    fault: tuple[str, str] | None = None


def _prepare_image(source: Source, size: Resolution, filter: Filter, index: int) -> Prepared:
    name = printable(source.name(index))
    try:
        image = source.load_named(index)
    except CorruptImage as error:
        return Prepared(fault=(name, str(error)))
    height, width = image.shape[:2]
    if not covers(height, width, size) and source.small != "enlarge":
        return Prepared(fault=(name, f"{SMALL}{name_size(height, width, size)}"))
    file = io.BytesIO()
    write_pixels(center_crop(image, size, filter), file)
    prepared = int(index), file.getvalue(), source.label(index)
    is_resized = largest_crop(height, width, size) != height_width(size)
    return Prepared(prepared, is_resized, str(image.dtype))


class _TooSmall(Exception):
    """An image is too small, and that is an error."""


def _count_small(source: Source, size: Resolution, workers: int) -> LdmError:
    """Look at the size of every image; return an error that counts and names the small ones."""
    with show_progress("looking at sizes", len(source)) as advance:
        small = []
        work = partial(_small_image, source, size)
        for found in load_in_workers(work, range(len(source)), workers, FEWER_WORKERS):
            small += [found] if found else []
            advance(1)
    return LdmError(
        f"{len(small):,} of {len(source):,} images are smaller than {format_size(size)}: "
        f"{listed(small, 10)}: give --small skip or --small enlarge, or a smaller --size"
    )


def _small_image(source: Source, size: Resolution, index: int) -> str | None:
    """Name and size of an image that is too small."""
    with suppress(CorruptImage):
        width, height = source.size(index)
        shown = f"{source.name(index)} ({name_size(height, width, size)})"
        return None if covers(height, width, size) else shown
    return None


def _own_images(source: Source, indices: Indices) -> str:
    """SHA-256 of the numbers, names and classes of a shard's images."""
    text = json.dumps([[int(i), source.name(i), source.label(i)] for i in indices])
    return sha256(text.encode()).hexdigest()


def _write_images(
    tar: Path,
    images: Iterable[Prepared],
    settings: dict[str, Any],
    own: str,
    advance: Callable[[int], None],
) -> Report:
    """Write the good images to a shard; return its description, with the corrupt ones."""
    report: Report = {"name": tar.name, "settings": settings, "own_sha256": own, "skipped": []}
    report["count"] = report["resized"] = 0

    def good() -> Iterator[PNG]:
        for image, resized, dtype, fault in images:
            if fault is not None:
                if fault[1].startswith(SMALL) and "small" not in settings:
                    raise _TooSmall
                report["skipped"].append(list(fault))
            if image is not None:
                yield image
                report["resized"] += resized
                if dtype != "uint8":
                    report["dtype"] = max(report.get("dtype", "uint8"), dtype, key=TYPES.index)
            advance(1)

    write_shard(tar, good(), report)
    return report


def _is_same_attempt(destination: Path, own: Mapping[str, str]) -> bool:
    """True for a preparation that is not complete, and has a shard of these very images."""
    if (destination / MANIFEST).is_file():
        return False
    reports = (read_tree(sidecar(destination / name), REPORT, AGAIN) for name in own)
    found = (report["own_sha256"] for report in reports if report is not None)
    return any(digest in own.values() for digest in found)


def _read_report(tar: Path, settings: dict[str, Any], own: str | None) -> Report | None:
    """Read the description of a shard; None if it is unfinished. Its settings must be these.

    As long as the preparation is not complete, images may be added and removed, as after an error
    that named them: a shard stays if its own images are still those of `own`.
    """
    report = read_tree(sidecar(tar), REPORT, AGAIN)
    if report is None:
        return None
    before = report["settings"]
    others = [{k: v for k, v in tree.items() if k not in OF_IMAGES} for tree in (before, settings)]
    if own is not None and before != settings and others[0] == others[1]:
        if report["own_sha256"] != own:
            tar.unlink(missing_ok=True)  # before there is another sidecar beside it
            return None
        before = report["settings"] = settings
        write_json(sidecar(tar), report)
    differing = [
        NAMED.get(key) or f"{key} {before.get(key)!r} there, {settings.get(key)!r} now"
        for key in settings | before
        if before.get(key) != settings.get(key)
    ]
    if differing:
        raise LdmError(
            f"{tar.parent} was prepared with other settings ({'; '.join(differing)}): "
            "choose another destination, or empty this one"
        )
    return report if tar.is_file() and tar.stat().st_size == report["bytes"] else None
