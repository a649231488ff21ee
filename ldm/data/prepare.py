"""Preparation of a data set: images of any kind → square PNGs in tar shards, with a manifest.

Worker processes read, crop and encode; this process writes one shard after the other, each whole or
not at all. The same call resumes an interrupted preparation, and gives the same bytes.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

from PIL import Image
from pydantic import Field

from ldm.data.dataset import open_images
from ldm.data.hf import is_hub
from ldm.data.labels import printable
from ldm.data.loader import FaultCount
from ldm.data.shards import MANIFEST, MANIFEST_FORMAT, PNG, SHARD, sidecar, write_shard
from ldm.data.sources import Indices, Source, held_out_count, split_indices
from ldm.data.transforms import NOT_RESIZED, CorruptImage, Filter, center_crop
from ldm.data.workers import load_in_workers
from ldm.errors import LdmError, UsageError, check_at_least
from ldm.files import check_writable, write_json
from ldm.locks import lock
from ldm.logbook import show_progress
from ldm.records import Count, read_tree, schema

Report = dict[str, Any]
"""Description of a shard, as in the sidecar beside it."""
REPORT = schema(
    **SHARD, bytes=Count, sha256=str, settings=dict[str, Any], resized=(Count, 1),
    skipped=list[Annotated[list[str], Field(min_length=2, max_length=2)]],
)  # fmt: skip
NAMED = {"names_sha256": "the list of images", "labels_sha256": "the class labels"}
"""Settings whose values say nothing to a reader."""
ANOTHER = "choose another folder for the shards"
FEWER_WORKERS = "run the same command with fewer --workers; finished shards are kept"


def prepare(
    source_path: str | Path,
    destination: str | Path,
    size: int = 256,
    filter: Filter = "lanczos",
    held_out: int | None = None,
    shard_size: int = 1000,
    workers: int | None = None,
    labels: bool = False,
    label_file: str | Path = "",
) -> dict[str, Any]:
    """Write the images of a folder, zip, tar shards or table as `size`×`size` PNGs in shards.

    The central square of each image is cropped, then resized; nothing is enlarged. The images keep
    the order of their names. The last `held_out` of them, with labels every n-th, go into
    `val-00000.tar` …, the others into `train-00000.tar` …. Existing shards are kept.

    Args:
        held_out: images for validation; None: those of a table's or prepared data's own split,
            else the default of `held_out_count`.
        workers: processes; None: one per CPU core; 0: this process alone.
        labels: keep the class of each image, see `DataConfig.labels`.
        label_file: CSV file of them.

    Returns:
        The manifest, as written to `manifest.json` in the destination; its filter is
        `NOT_RESIZED` if every image had its size already.
    """
    path, destination = Path(source_path).expanduser(), Path(destination).expanduser()
    _check(path, destination, filter, size, shard_size, workers)
    labels = labels or bool(label_file)
    source = open_images(path, labels, str(label_file))
    names = [source.name(i).removeprefix(f"{path}/") for i in range(len(source))]
    held_out = held_out_count(len(source), source.held_out if held_out is None else held_out)
    evenly = labels and held_out != source.held_out
    settings: dict[str, Any] = {
        "source": str(path) if is_hub(str(path)) else printable(path.resolve().name),
        "images": len(source),
        "names_sha256": sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest(),
        "size": size,
        "filter": filter,
        "crop": "center",
        "held_out": held_out,
        "shard_size": shard_size,
    }
    if labels:
        text = json.dumps([source.classes, [source.label(i) for i in range(len(source))]])
        settings["labels_sha256"] = sha256(text.encode()).hexdigest()
    splits = zip(("train", "val"), split_indices(len(source), held_out, evenly), strict=True)
    shards = {
        f"{split}-{number:05d}.tar": indices[first : first + shard_size]
        for split, indices in splits
        for number, first in enumerate(range(0, len(indices), shard_size))
    }
    with lock(destination, ANOTHER):
        reports = _write_all(source, shards, settings, destination, workers)
        manifest = _manifest(reports, settings, path)
        if labels:
            manifest["classes"] = list(source.classes)
        write_json(destination / MANIFEST, manifest)
    return manifest


def _check(
    source: Path, destination: Path, filter: Filter, size: int, shard_size: int, workers: int | None
) -> None:
    if filter not in get_args(Filter):
        raise UsageError(f"no filter '{filter}': choose one of {', '.join(get_args(Filter))}")
    check_at_least(1, size=size, shard_size=shard_size)
    check_at_least(0, workers=workers)
    if not source.exists() and not is_hub(str(source)):
        raise LdmError(f"{source} does not exist: give a folder of images, a .zip or a .tar")
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"{destination} is a file: the destination must be a folder")
    if destination.exists() and source.exists() and destination.samefile(source):
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
    found = {name: _read_report(destination / name, settings) for name in shards}
    reports = {name: report for name, report in found.items() if report}
    missing = {name: indices for name, indices in shards.items() if name not in reports}
    faults = FaultCount(len(source))
    for report in reports.values():
        faults.add(dict(report["skipped"]))
    total = sum(map(len, missing.values()))
    work = partial(_prepare_image, source, settings["size"], settings["filter"])
    workers = total if workers is None else min(workers, total)
    images = load_in_workers(work, chain(*missing.values()), workers, FEWER_WORKERS)
    with show_progress("preparing", total) as advance, closing(images):
        for name, indices in missing.items():
            part = islice(images, len(indices))
            reports[name] = report = _write_images(destination / name, part, settings, advance)
            faults.add(dict(report["skipped"]))
    return [reports[name] for name in shards]


def _manifest(reports: Sequence[Report], settings: dict[str, Any], source: Path) -> dict[str, Any]:
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
    # earlier versions did not count resized images: theirs may have been
    resized = any(report.get("resized", 1) for report in reports)
    return {
        "format": MANIFEST_FORMAT,
        "count": sum(split["count"] for split in splits.values()),
        "size": settings["size"],
        "filter": settings["filter"] if resized else NOT_RESIZED,
        "crop": settings["crop"],
        "source": settings["source"],
        "splits": splits,
        "skipped": skipped,
    }


# ------------------------------------------------------------------------------------ shards
class Prepared(NamedTuple):
    """An image for a shard; or its name and the reason if it is corrupt."""

    image: PNG | None = None
    resized: bool = False
    fault: tuple[str, str] | None = None


def _prepare_image(source: Source, size: int, filter: Filter, index: int) -> Prepared:
    try:
        image = source.load_at_least(index, size)
    except CorruptImage as error:
        return Prepared(fault=(printable(source.name(index)), str(error)))
    file = io.BytesIO()
    Image.fromarray(center_crop(image, size, filter)).save(file, "PNG")
    prepared = int(index), file.getvalue(), source.label(index)
    return Prepared(prepared, resized=min(image.shape[:2]) != size)


def _write_images(
    tar: Path, images: Iterable[Prepared], settings: dict[str, Any], advance: Callable[[int], None]
) -> Report:
    """Write the good images to a shard; return its description, with the corrupt ones."""
    report: Report = {"name": tar.name, "settings": settings, "skipped": []}
    report["count"] = report["resized"] = 0

    def good() -> Iterator[PNG]:
        for image, resized, fault in images:
            if fault is not None:
                report["skipped"].append(list(fault))
            if image is not None:
                yield image
                report["resized"] += resized
            advance(1)

    write_shard(tar, good(), report)
    return report


def _read_report(tar: Path, settings: dict[str, Any]) -> Report | None:
    """Read the description of a shard; None if it is unfinished. Its settings must be these."""
    report = read_tree(sidecar(tar), REPORT, "delete it to write the shard again")
    if report is None:
        return None
    before = report["settings"]
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
