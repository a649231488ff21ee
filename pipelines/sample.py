"""Sample many images to disk on any number of processes; an interrupted job resumes.

See `pipelines.sampling.sample_folder` for the files.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, get_args
from zipfile import ZipFile, ZipInfo

import numpy as np
from numpy.lib.format import write_array_header_1_0

from ldm.config import Resolution, height_width
from ldm.data import sheet_images
from ldm.device import full_float32
from ldm.distributed import from_main, wait_for_files
from ldm.errors import LdmError, UsageError
from ldm.files import check_writable, keep, write_atomically
from ldm.images import as_float, file_suffix, save_grid
from ldm.logbook import console, show_progress
from pipelines.sampling.model import ModelSamples
from pipelines.sampling.sample_folder import (
    GRID,
    LABELS,
    MIDNIGHT,
    Files,
    SampleFolder,
    SampleStore,
    open_for_writing,
)
from pipelines.sampling.settings import Label, integer

IN_GRID = 64
WRITERS = 4


@full_float32()
def sample_images(
    model: Path | str,
    n: int,
    out: Path | str | None = None,
    seed: int = 0,
    *,
    size: Resolution | None = None,
    labels: Label | Sequence[Label] | None = None,
    guide: Path | str | None = None,
    files: Files = "png",
    npz: Path | str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "auto",
    **sampling: Any,
) -> Path:
    """Write images 0 … n−1 of a seed and return their folder; images already there are kept.

    Image i depends on (model, seed, settings, i) alone; another batch size or number of processes
    changes it by rounding only: in fp32 at most one level of 255. Under a distributed launch each
    process samples its share of the batches.

    Args:
        model: a stage-two `ckpt.pt` or run folder, or a repository of the Hugging Face Hub.
        out: the folder; None: in `samples/` beside the model, as `seed0-steps18`.
        size: of the images in pixels; None: that of the training.
        labels: classes, image i has the (i mod len)-th; "balanced": all of them, so that numbers
            of images differ by one at most; None: drawn uniformly for each image.
        guide: the guiding model of autoguidance, see `LatentDiffusionPipeline`.
        files: "png": one each; "shards": tar shards, readable as data, with labels if every image
            has a class; "zip": one archive.
        npz: a new file to write the n images to as well, as ADM's evaluator reads them.
        batch_size: images at a time, per process.
        sampling: the fields of `Sampling`.

    Raises:
        UsageError: a setting is invalid, has no effect, or does not fit the model.
        LdmError: a model cannot be read; `out` cannot be written, holds images of another model or
            other settings, or is in use by another process; or a batch is not finite.
    """
    batch_size = integer("--batch-size ", batch_size, least=1)
    if files not in get_args(Files):
        raise UsageError(f"--format {files}: it must be one of {', '.join(get_args(Files))}")
    job = ModelSamples(
        model, n, seed, size=size, labels=labels, guide=guide, device=device, precision=precision,
        **sampling,
    )  # fmt: skip
    check_npz(npz, job)
    out, ranks = Path(out) if out else job.folder / "samples" / job.slug(files), job.ranks
    store = SampleStore(out, files, job.label, file_suffix(job.pixels.type, job.channels))
    with ExitStack() as held:
        # on the main process, so that its checks come before anyone writes and stop all of them
        missing = from_main(ranks, lambda: _begin(job, store, held))
        held.enter_context(keep(out))
        batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
        _write_batches(job, store, batches[ranks.process_index :: ranks.num_processes])
        ranks.wait_for_everyone()
        from_main(ranks, lambda: _finish(job, store, npz))
    return out


def _begin(job: ModelSamples, store: SampleStore, held: ExitStack) -> list[int]:
    """Open the folder for writing; return the images that it lacks."""
    n, classes = len(job), job.model.classes
    announced = open_for_writing(store.out, job.made_with | {"files": store.files}, held)
    if classes.count:
        labels = [job.label(i) for i in range(announced)]
        text = json.dumps({"classes": classes.names, "labels": labels}, ensure_ascii=False)
        write_atomically(store.out / LABELS, text.encode())
    missing = store.missing(n)
    if len(missing) < n:
        there = f"{n - len(missing):,} of {n:,} images are in {store.out} already"
        console.print(there, markup=False)
    if missing:
        store.begin()
    return missing


def _write_batches(job: ModelSamples, store: SampleStore, batches: Sequence[Sequence[int]]) -> None:
    """Sample each batch while the one before is being written."""
    is_main, total = job.ranks.is_main_process, sum(map(len, batches))
    with show_progress("sampling", total, is_main) as advance, ThreadPoolExecutor(WRITERS) as pool:
        writing: list[Future] = []
        for indices in batches:
            images = job.sample(indices)
            # the batch before must be written by now, so that memory does not grow with n
            _wait(writing)
            writing = [
                pool.submit(store.write, i, job.pixels.to_array(image))
                for i, image in zip(indices, images, strict=True)
            ]
            if is_main:
                writing.append(pool.submit(store.tidy))
            advance(len(indices))
        _wait(writing)


def _finish(job: ModelSamples, store: SampleStore, npz: Path | str | None) -> None:
    """Pack, describe and draw the images, if all of them are here."""
    if missing := wait_for_files(partial(store.missing, len(job)), job.ranks.num_processes):
        raise LdmError(
            f"{store.out} lacks {len(missing):,} of {len(job):,} images, which other processes "
            "wrote: it is not on a disk that all machines share. Give --out a folder that is, or "
            "copy the other machines' images into it and run the same command again"
        )
    origin = f"samples of model {job.model.sha256[:12]}, seed {job.seed}"
    classes, kind = job.model.classes.names, job.pixels.type
    store.finish(job.resolution, origin, classes, job.channels, kind)
    _draw_grid(store)
    if npz is not None:
        write_npz(SampleFolder(store.out, limit=len(job), least=1), Path(npz))


def _wait(writing: Sequence[Future]) -> None:
    for future in writing:
        future.result()  # raises here if the disk is full


def _draw_grid(store: SampleStore) -> None:
    """Draw the first images that are there, even if fewer were requested now."""
    gaps = store.missing(IN_GRID)
    shown = gaps[0] if gaps else IN_GRID
    folder = SampleFolder(store.out, limit=shown, least=1)
    sheet = as_float(sheet_images(folder, folder.resolution, shown))
    save_grid(sheet, store.out / GRID, max(1, round(shown**0.5)))


# ----------------------------------------------------------------------- for ADM's evaluator
def check_npz(npz: Path | str | None, job: ModelSamples) -> None:
    """Refuse a file, if one is given, that could not be written or read by ADM's evaluator."""
    if npz is None:
        return
    path = Path(npz)
    if path.suffix != ".npz":
        raise UsageError(f"--npz {path}: give a name that ends in .npz")
    if job.channels != 3 or job.pixels.type != "uint8":
        raise UsageError("--npz: ADM's evaluator reads images of 3 channels at 8 bits, not these")
    from_main(job.ranks, lambda: _check_new(path))


def _check_new(path: Path) -> None:
    advice = "give --npz another file"
    if path.is_file():
        raise LdmError(f"{path} exists: {advice}, or delete it")
    check_writable(path, advice=advice)


def write_npz(samples: SampleFolder, path: Path) -> None:
    """Write samples one after the other into a .npz in the layout of ADM's evaluator.

    `arr_0` holds the images (N, H, W, 3) uint8; `arr_1` their classes (N,), where all have one.
    """
    count, size = len(samples), height_width(samples.resolution)
    labels = np.array([samples.label(i) for i in range(count)], np.int64)

    def write(file: IO[bytes]) -> None:
        with ZipFile(file, "w") as pack, show_progress(path.name, count) as advance:
            with _member(pack, "arr_0", (count, *size, 3), "|u1") as member:
                for i in range(count):
                    member.write(samples.load(i).tobytes())
                    advance(1)
            if labels.min() >= 0:
                with _member(pack, "arr_1", labels.shape, "<i8") as member:
                    member.write(labels.astype("<i8").tobytes())

    write_atomically(path, write)
    console.print(f"wrote {path} for ADM's evaluator", markup=False)


@contextmanager
def _member(pack: ZipFile, name: str, shape: tuple[int, ...], kind: str) -> Iterator[IO[bytes]]:
    """Open an array of a .npz to write its bytes, after its header."""
    with pack.open(ZipInfo(f"{name}.npy", MIDNIGHT), "w", force_zip64=True) as member:
        header = {"descr": kind, "fortran_order": False, "shape": shape}
        write_array_header_1_0(member, header)
        yield member
