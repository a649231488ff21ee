"""Preparation of a data set: images of any kind → square PNGs in tar shards, with a manifest.

Each shard is one piece of work, written whole or not at all. The same call resumes an interrupted
preparation, and the result is the same to the byte.
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from ldm.data.dataset import open_images
from ldm.data.loader import FaultCount, leave_signals_to_parent, start_method
from ldm.data.shards import (
    MANIFEST,
    MANIFEST_FORMAT,
    ShardJob,
    finished_shard,
    sidecar,
    write_shard,
)
from ldm.data.sources import Source, held_out_count, printable, split_indices
from ldm.data.transforms import NOT_RESIZED, RESAMPLING, Filter
from ldm.errors import LdmError, UsageError
from ldm.files import write_json
from ldm.logbook import show_progress

Report = dict[str, Any]


def prepare(
    source_path: str | Path,
    destination: str | Path,
    size: int = 256,
    filter: Filter = "lanczos",
    held_out: int | None = None,
    shard_size: int = 1000,
    workers: int | None = None,
    labels: bool = False,
) -> dict[str, Any]:
    """Write a folder, a zip or tar shards of images as `size`×`size` PNGs in shards.

    The central square of each image is cropped, then resized. The images keep the order of their
    names. The last `held_out` of them, with labels every n-th, go into `val-00000.tar` …, the
    others into `train-00000.tar` …. Existing shards are kept.

    Args:
        size: side of the images, in pixels; nothing is enlarged.
        filter: Pillow's filter for resizing. FID depends on it.
        held_out: images for validation; None: the default of `held_out_count`.
        shard_size: images per shard.
        workers: processes; None: one per CPU core; 0: this process alone.
        labels: keep the class of each image (see `folder_labels`; in shards, `.cls`).

    Returns:
        The manifest, as written to `manifest.json` in the destination; its filter is
        `NOT_RESIZED` if every image had its size already.
    """
    path, destination = Path(source_path).expanduser(), Path(destination).expanduser()
    _check(path, destination, size, filter, shard_size)
    source = open_images(path, labels)
    names = [source.name(i).removeprefix(f"{path}/") for i in range(len(source))]
    held_out = held_out_count(len(source), held_out)
    settings: dict[str, Any] = {
        "source": printable(path.resolve().name),
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
    splits = zip(("train", "val"), split_indices(len(source), held_out, labels), strict=True)
    jobs = {
        split: [
            ShardJob(f"{split}-{number:05d}", indices[first : first + shard_size])
            for number, first in enumerate(range(0, len(indices), shard_size))
        ]
        for split, indices in splits
    }
    reports = _write_all(source, jobs["train"] + jobs["val"], settings, destination, workers)
    manifest = _manifest(jobs, reports, settings, path)
    if labels:
        manifest["classes"] = list(source.classes)
    write_json(destination / MANIFEST, manifest)
    return manifest


def _check(source: Path, destination: Path, size: int, filter: Filter, shard_size: int) -> None:
    if not source.exists():
        raise LdmError(f"{source} does not exist: give a folder of images, a .zip or a .tar")
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"{destination} is a file: the destination must be a folder")
    if destination.exists() and destination.samefile(source):
        raise UsageError(f"{destination} is the source: choose another folder for the shards")
    foreign = [tar for tar in sorted(destination.glob("*.tar")) if not sidecar(tar).is_file()]
    if foreign:
        raise UsageError(
            f"{foreign[0]} was not written by `ldm data prepare`: choose an empty folder"
        )
    if filter not in RESAMPLING:
        raise UsageError(f"no filter '{filter}': choose one of {', '.join(RESAMPLING)}")
    if size < 1 or shard_size < 1:
        raise UsageError(f"size={size} and shard_size={shard_size} must be at least 1")


def _write_all(
    source: Source,
    jobs: Sequence[ShardJob],
    settings: dict[str, Any],
    destination: Path,
    workers: int | None,
) -> dict[str, Report]:
    """Write the shards that are missing; return the description of every shard by its name."""
    done = {job.name: finished_shard(job, settings, destination) for job in jobs}
    reports = {name: report for name, report in done.items() if report}
    missing = [job for job in jobs if job.name not in reports]
    destination.mkdir(parents=True, exist_ok=True)
    for partial_file in destination.glob(".*.partial"):  # of a preparation that was killed
        partial_file.unlink(missing_ok=True)
    faults = FaultCount(len(source))
    for report in reports.values():
        faults.add(dict(report["skipped"]))
    work = partial(write_shard, source, settings=settings, destination=destination)
    processes = min(_cores() if workers is None else workers, len(missing))
    total = sum(len(job.indices) for job in missing)
    with (
        show_progress("preparing", total) as advance,
        closing(run_jobs(work, missing, processes, advance)) as finished,
    ):
        for report in finished:
            reports[report["name"].removesuffix(".tar")] = report
            faults.add(dict(report["skipped"]))
    return reports


def _manifest(
    jobs: dict[str, list[ShardJob]],
    reports: dict[str, Report],
    settings: dict[str, Any],
    source: Path,
) -> dict[str, Any]:
    splits, skipped = {}, []
    for split, its_jobs in jobs.items():
        described = [reports[job.name] for job in its_jobs]
        shards = [{key: r[key] for key in ("name", "count", "sha256", "bytes")} for r in described]
        splits[split] = {"count": sum(shard["count"] for shard in shards), "shards": shards}
        skipped += [
            {"name": name.removeprefix(printable(f"{source}/")), "reason": reason}
            for report in described
            for name, reason in report["skipped"]
        ]
    # earlier versions did not count resized images: theirs may have been
    resized = any(report.get("resized", 1) for report in reports.values())
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


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # those that this process may use
    return len(affinity(0)) if affinity else os.cpu_count() or 1


# --------------------------------------------------------------------------------- processes
def run_jobs(
    work: Callable[..., Any],
    jobs: Sequence[Any],
    processes: int,
    advance: Callable[[int], None],
) -> Generator[Any]:
    """Yield `work(job, count=…)` of every job, in the order in which they finish.

    Closing the iterator early, by Ctrl-C or an error, ends running jobs at their next count.

    Args:
        work: picklable; it calls `count()` after each piece of a job, and cleans up if that raises.
        processes: 0 works in this process, in the order of the jobs.
        advance: called with the number of pieces since the last call.
    """
    if not processes:
        for job in jobs:
            yield work(job, count=partial(advance, 1))
        return
    context = multiprocessing.get_context(start_method())
    stop, counted, shown = context.Event(), context.Value("q", 0), 0
    # each process gets the work once, not with every job: it may hold a large source
    pool = ProcessPoolExecutor(processes, context, _start_worker, (work, stop, counted))
    try:
        pending = {pool.submit(_do, job) for job in jobs}
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            now = counted.value
            advance(now - shown)
            shown = now
            yield from (future.result() for future in finished)
    except BrokenProcessPool as error:
        raise LdmError(
            "a worker was killed, usually because memory ran out: run the same command with fewer "
            "--workers; finished shards are kept"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


class Stopped(Exception):
    """Ends a running job whose result is no longer needed."""


def _start_worker(work: Callable[..., Any], stop: Any, counted: Any) -> None:
    leave_signals_to_parent()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    def count() -> None:
        with counted.get_lock():
            counted.value += 1
        if stop.is_set():
            raise Stopped

    threading.Thread(target=end_with_parent, daemon=True).start()
    global _work
    _work = partial(work, count=count)


_work: Callable[..., Any]


def _do(job: Any) -> Any:
    return _work(job)
