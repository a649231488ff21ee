"""Sample many images to disk: any number of processes, stopped and gone on with at will.

<out>/samples.json   the model, the seed, the sampler: what every image here was made with
<out>/labels.json    the class of each image, where the model has classes
<out>/grid.png       the first few, as one picture
<out>/…              the images, as PNGs, shards or a zip: see `pipelines.sampling.sample_folder`
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from ldm.config import to_tree, validate
from ldm.device import keep_freed_memory
from ldm.distributed import from_main, join_processes
from ldm.errors import UsageError
from ldm.images import save_grid, to_float, to_pil
from ldm.logbook import console, progress_bar
from pipelines.sampling.model import LatentModel
from pipelines.sampling.sample_folder import (
    GRID,
    STORES,
    Files,
    PngStore,
    SampleFolder,
    claim_folder,
    default_folder,
    write_labels,
)
from pipelines.sampling.settings import Classes, Label, Sampling, count, noise_levels, whole

IN_GRID = 64
WRITERS = 4
LABELS = "labels.json"


def sample_images(
    model: Path | str,
    n: int,
    out: Path | str | None = None,
    seed: int = 0,
    *,
    labels: Label | Sequence[Label] | None = None,
    weaker: Path | str | None = None,
    files: Files = "png",
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "auto",
    **sampling: Any,
) -> Path:
    """Write images 0 … n−1 of a seed, those already there left as they are.

    Image i depends on (model, seed, settings, i) alone; another batch size or another number of
    processes changes it by rounding at most. In fp32 that is one level of 255; what it comes to in
    bf16 on a GPU has not been measured. Under a distributed launch every process takes its share of
    the batches.

    Args:
        model: a stage-two `ckpt.pt` or run folder.
        out: where to; by default a folder of `samples/` beside the model, named after the seed and
            the settings: `seed0-steps18`.
        labels: classes, image i is of the (i mod len)-th; None: drawn evenly for each image, as
            FID against all of a data set needs, where the model has classes.
        weaker: a model to be guided away from, see `LatentDiffusionPipeline`.
        files: "png": files of their own; "shards": tar, readable as data, with its labels where
            every image has a class; "zip": one archive.
        sampling: the fields of `Sampling`.

    Returns:
        The folder of the images.

    Raises:
        UsageError: a setting has no meaning, would change nothing, or does not fit the model.
        LdmError: a model cannot be read; `out` cannot be written, holds images of another model or
            setting, or another process is at work in it; or images came out that are not finite,
            of which none is written.
    """
    n, batch_size = count("--n ", n), count("--batch-size ", batch_size)
    model, out, seed = Path(model), Path(out) if out else None, whole("--seed ", seed)
    if files not in STORES:
        raise UsageError(f"--format {files}: it must be one of {', '.join(STORES)}")
    how = validate(Sampling, sampling)
    ranks, where = join_processes(device)
    keep_freed_memory(where)
    pipe = LatentModel.from_pretrained(model, where, precision)
    # what cannot be is refused before a folder is made
    noise_levels(how, pipe.denoiser)
    chosen = None if labels is None else pipe.classes.read(labels)
    worse = pipe.check_guidance(how, weaker, chosen)
    label = _labeller(pipe.classes, chosen, seed)
    settings = {
        "model": _named(model, pipe),
        "seed": seed,
        **to_tree(how),
        "weaker": worse and _named(weaker, worse),
        "labels": chosen and list(chosen),
        "files": files,
        "precision": pipe.precision,
        "resolution": pipe.recipe.resolution,
        "data": to_tree(pipe.recipe.data),
    }
    out = out or default_folder(model, settings)
    store = STORES[files](out, label, ranks.process_index, ranks.num_processes)

    def make(indices: list[int]) -> Tensor:
        theirs = None if label is None else [label(i) for i in indices]
        return pipe.sample(indices, seed, how, theirs, worse)

    with ExitStack() as held:

        def begin() -> list[int]:
            announced = claim_folder(out, settings, n, held)
            if label is not None:
                write_labels(out / LABELS, [label(i) for i in range(announced)], pipe.classes.names)
            missing = store.missing(n)
            store.begin(missing)
            return missing

        # one process looks and all take its word, so that nobody writes before; and where it
        # refuses, all do
        missing = from_main(ranks, begin)
        if ranks.is_main_process:
            _say_what_is_there(out, n - len(missing), n)
        else:
            store.begin(missing)
        mine = list(_split(missing, batch_size))[ranks.process_index :: ranks.num_processes]
        _write_batches(mine, make, store, shown=ranks.is_main_process)
        _pack(store, ranks)
        if ranks.is_main_process:
            source = f"samples of model {pipe.sha256[:12]}, seed {seed}"
            store.conclude(pipe.recipe.resolution, source, pipe.classes.names)
            _draw_grid(out, store)
    return out


# ---------------------------------------------------------------------------- what is asked for
def _labeller(
    classes: Classes, chosen: Sequence[int] | None, seed: int
) -> Callable[[int], int] | None:
    """The class of image i, chosen or drawn; None for a model without classes."""
    if not classes.count:
        return None
    if chosen is None:
        return lambda i: classes.draw(seed, [i])[0]
    return lambda i: chosen[i % len(chosen)]


def _named(path: Path | str | None, model: LatentModel) -> dict[str, str]:
    return {"path": str(path), "sha256": model.sha256, "identity": model.identity}


def _say_what_is_there(out: Path, there: int, n: int) -> None:
    if there:
        console.print(f"{there:,} of {n:,} images are in {out} already", markup=False)


# ------------------------------------------------------------------------------------ the work
def _write_batches(
    batches: Sequence[list[int]],
    make: Callable[[list[int]], Tensor],
    store: PngStore,
    shown: bool,
) -> None:
    """Make each batch of images while the one before is written.

    Args:
        make: numbers of images → images (len, 3, H, W) in [−1, 1], on the CPU.
        shown: whether there is a bar.
    """
    bar = progress_bar("images")
    bar.disable = bar.disable or not shown
    with bar, ThreadPoolExecutor(WRITERS) as pool:
        task = bar.add_task("sampling", total=sum(map(len, batches)), speed="", note="")
        writing: list[Future] = []
        for indices in batches:
            images = make(indices)
            # the batch before must be written by now, so that memory does not grow with n
            _finish(writing)
            writing = [
                pool.submit(store.write, i, to_pil(image))
                for i, image in zip(indices, images, strict=True)
            ]
            writing.append(pool.submit(store.tidy))
            speed = bar.tasks[task].speed
            bar.update(task, advance=len(indices), speed=f"{speed:.1f} images/s" if speed else "")
        _finish(writing)


def _pack(store: PngStore, ranks: PartialState) -> None:
    """Pack every process's share, once all images are there; the main process's own comes last."""
    ranks.wait_for_everyone()
    if not ranks.is_main_process:
        store.finish()
    ranks.wait_for_everyone()
    # a zip is all its share, and a large one takes longer than processes wait for one another
    if ranks.is_main_process:
        store.finish()


def _finish(writing: list[Future]) -> None:
    for future in writing:
        future.result()  # a full disk is raised here


def _split(indices: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _draw_grid(out: Path, store: PngStore) -> None:
    """The first images that are there, however few were asked for now, so that it never shrinks."""
    gaps = store.missing(IN_GRID)
    shown = gaps[0] if gaps else IN_GRID
    folder = SampleFolder(out, limit=shown, least=1)
    images = torch.stack([torch.tensor(folder.load(i)).permute(2, 0, 1) for i in range(shown)])
    save_grid(to_float(images), out / GRID, max(1, round(shown**0.5)))
