"""Long jobs shared out over worker processes that can be stopped, and leave nothing behind.

Preparation: whole images of any kind → square PNGs in tar shards, with a manifest.

Each shard is one piece of work, written whole or not at all. A preparation that was stopped goes
on when it is asked for again, and the result is the same to the byte.
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
)
from rich.text import Text

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
from ldm.data.sources import Source, printable
from ldm.data.split import Indices, held_out_count, split_indices
from ldm.data.transforms import NOT_RESIZED, RESAMPLING, Filter
from ldm.errors import LdmError, UsageError
from ldm.files import write_json

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    work: Callable[..., Any],
    jobs: Sequence[Job],
    processes: int,
    advance: Callable[[int], None],
) -> Iterator[Result]:
    """`work(job, count=…)` for every job; results as they are finished.

    Closing the iterator early, by Ctrl-C or an error, ends running jobs at their next count.

    Args:
        work: picklable; it must call `count()` after each small piece of a job, and clean up after
            itself when that raises.
        processes: 0 works in this process, in the order of the jobs.
        advance: told of the pieces counted since it was last called.

    Raises:
        LdmError: what `work` raises; or a worker was killed.
    """
    if processes:
        yield from _in_pool(work, jobs, processes, advance)
    else:
        for job in jobs:
            yield work(job, count=partial(advance, 1))


def _in_pool(
    work: Callable[..., Any], jobs: Sequence[Job], processes: int, advance: Callable[[int], None]
) -> Iterator[Result]:
    context = multiprocessing.get_context(start_method())
    stop, counted, told = context.Event(), context.Value("q", 0), 0
    # the work goes to each process once, not with every job: it may hold a large source
    pool = ProcessPoolExecutor(processes, context, _start_worker, (work, stop, counted))
    try:
        pending = {pool.submit(_do, job) for job in jobs}
        while pending:
            finished, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            now = counted.value
            advance(now - told)
            told = now
            yield from (future.result() for future in finished)
    except BrokenProcessPool as error:
        raise LdmError(
            "a worker was killed, most often for want of memory: run the same command with fewer "
            "--workers, what is finished is kept"
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------ in a worker process
class Stopped(Exception):
    """Ends a job whose result nobody waits for any more."""


def _start_worker(work: Callable[..., Any], stop: Any, counted: Any) -> None:
    leave_signals_to_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def count() -> None:
        with counted.get_lock():
            counted.value += 1
        if stop.is_set():
            raise Stopped

    global _work
    _work = partial(work, count=count)


def _do(job: Job) -> Any:
    return _work(job)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


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

    The central square of each image is cut out, then resized. The images keep the order of their
    names; the last `held_out` (with labels: every so many-th, so that each class has its share) go
    into `val-00000.tar` …, the others into `train-00000.tar` ….
    Shards that are there already are kept.

    Args:
        size: side of the images, in pixels; nothing is enlarged.
        filter: how Pillow resizes. FID depends on it: say it with the number.
        held_out: images for validation; None: FFHQ's and CelebA-HQ's usual split, else one in
            twenty, at least 1 and at most 10,000.
        shard_size: images per shard.
        workers: processes; None: one per CPU core; 0: none but this one.
        labels: write the class of each image beside it, and the names of the classes into the
            manifest. A class is the first folder an image lies in (see `folder_labels`), or what
            the `.cls` of a shard says.

    Returns:
        The manifest, as written to `manifest.json` in the destination; its filter is
        `NOT_RESIZED` where every image had its size already.

    Raises:
        LdmError: there are no images at the source; one is smaller than `size`; more than 1 % are
            corrupt; the destination was made with other settings; the disk is full.
        UsageError: an argument has no meaning; or labels are asked for and an image has none.
    """
    source_path, destination = Path(source_path).expanduser(), Path(destination).expanduser()
    _check(source_path, destination, size, filter, shard_size)
    source = open_images(source_path, labels)
    count = len(source)
    held_out = held_out_count(count, held_out)
    names = "\n".join(source.name(i).removeprefix(f"{source_path}/") for i in range(count))
    settings = {
        "source": printable(source_path.resolve().name),
        "images": count,
        "names_sha256": sha256(names.encode("utf-8", "surrogateescape")).hexdigest(),
        "size": size,
        "filter": filter,
        "crop": "center",
        "held_out": held_out,
        "shard_size": shard_size,
    }
    if labels:
        of_images = [source.label(i) for i in range(count)]
        text = json.dumps([source.classes, of_images])
        settings["labels_sha256"] = sha256(text.encode()).hexdigest()
    train, val = split_indices(count, held_out, evenly=labels)
    jobs = {"train": _plan("train", train, shard_size), "val": _plan("val", val, shard_size)}
    reports = _write_all(source, jobs["train"] + jobs["val"], settings, destination, workers)
    manifest = _manifest(jobs, reports, settings, source_path)
    if labels:
        manifest["classes"] = list(source.classes)
    write_json(destination / MANIFEST, manifest)
    return manifest


def _check(source: Path, destination: Path, size: int, filter: Filter, shard_size: int) -> None:
    if not source.exists():
        raise LdmError(f"there is nothing at {source}: give a folder of images, a .zip or a .tar")
    if destination.exists() and not destination.is_dir():
        raise UsageError(f"{destination} is a file: the destination is a folder of shards")
    if destination.exists() and destination.samefile(source):
        raise UsageError(f"{destination} is the source: choose another folder for the shards")
    foreign = [tar for tar in sorted(destination.glob("*.tar")) if not sidecar(tar).is_file()]
    if foreign:
        raise UsageError(f"{foreign[0]} is in the way: choose an empty folder for the shards")
    if filter not in RESAMPLING:
        raise UsageError(f"no filter '{filter}'; there are: {', '.join(RESAMPLING)}")
    if size < 1 or shard_size < 1:
        raise UsageError(f"size={size} and shard_size={shard_size} must be 1 or more")


def _plan(split: str, indices: Indices, shard_size: int) -> list[ShardJob]:
    return [
        ShardJob(f"{split}-{number:05d}", indices[first : first + shard_size])
        for number, first in enumerate(range(0, len(indices), shard_size))
    ]


def _manifest(
    jobs: dict[str, list[ShardJob]],
    reports: dict[str, Report],
    settings: dict[str, Any],
    source_path: Path,
) -> dict[str, Any]:
    splits = {}
    for split, its_jobs in jobs.items():
        shards = [
            {key: reports[job.name][key] for key in ("name", "count", "sha256", "bytes")}
            for job in its_jobs
        ]
        splits[split] = {"count": sum(shard["count"] for shard in shards), "shards": shards}
    skipped = [
        {"name": name.removeprefix(printable(f"{source_path}/")), "reason": reason}
        for its_jobs in jobs.values()
        for job in its_jobs
        for name, reason in reports[job.name]["skipped"]
    ]
    # sidecars of versions that did not count are of images that may have been
    resized = any(report.get("resized", 1) for report in reports.values())
    told = settings if resized else settings | {"filter": NOT_RESIZED}
    return {
        "format": MANIFEST_FORMAT,
        "count": sum(split["count"] for split in splits.values()),
        **{key: told[key] for key in ("size", "filter", "crop", "source")},
        "splits": splits,
        "skipped": skipped,
    }


# ----------------------------------------------------------------------------- doing the work
def _write_all(
    source: Source,
    jobs: list[ShardJob],
    settings: dict[str, Any],
    destination: Path,
    workers: int | None,
) -> dict[str, Report]:
    """What each shard's sidecar says, by the shard's name; those not there are written first."""
    done = {job.name: finished_shard(job, settings, destination) for job in jobs}
    reports = {name: report for name, report in done.items() if report}
    left = [job for job in jobs if job.name not in reports]
    destination.mkdir(parents=True, exist_ok=True)
    for partial_file in destination.glob(".*.partial"):  # of a preparation that was killed
        partial_file.unlink(missing_ok=True)
    faults = FaultCount(len(source))
    for report in reports.values():
        faults.add(dict(report["skipped"]))
    with _progress() as progress:
        task = progress.add_task("", total=sum(len(job.indices) for job in left))
        work = partial(write_shard, source, settings=settings, destination=destination)
        processes = min(_cores() if workers is None else workers, len(left))
        with closing(run_jobs(work, left, processes, partial(progress.advance, task))) as finished:
            for report in finished:
                reports[report["name"].removesuffix(".tar")] = report
                faults.add(dict(report["skipped"]))
    return reports


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # those this process may use, where known
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} images/s")


def _progress() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
