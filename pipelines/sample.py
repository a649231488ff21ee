"""Sample many images to disk: any number of processes, stopped and gone on with at will.

<out>/samples.json   the model, the seed, the sampler: what every image here was made with
<out>/00000/img00000000.png …   a thousand images a folder
<out>/grid.png       the first few, as one picture
"""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor

from ldm.checkpoint import write_atomically, write_json
from ldm.config import to_tree
from ldm.errors import LdmError, UsageError
from ldm.images import save_grid, to_float, to_pil
from ldm.logbook import progress_bar
from ldm.run import resolve_device
from ldm.run_folder import provenance
from pipelines.latent_diffusion import LatentDiffusionPipeline

GRID = 64
WRITERS = 4


def sample_images(
    model: Path,
    n: int,
    out: Path | None = None,
    seed: int = 0,
    steps: int = 18,
    batch_size: int = 64,
    device: str = "auto",
    precision: str = "auto",
) -> Path:
    """Write images 0..n−1 of a seed as PNGs, those already there left as they are.

    Image i depends on (model, seed, steps, i) alone; another batch size or another number of
    processes changes it by rounding at most (1/255). Under a distributed launch every process takes
    its share of the batches.

    Args:
        model: a stage-two `ckpt.pt` or run folder.
        out: where to; by default `samples/seed<seed>-steps<steps>` beside the model.

    Returns:
        The folder of the images.

    Raises:
        UsageError: n, steps or batch size below one.
        LdmError: the model cannot be read, or `out` holds images of another model or setting.
    """
    for name, value in (("n", n), ("steps", steps), ("batch-size", batch_size)):
        if value < 1:
            raise UsageError(f"--{name} {value}: it must be at least 1")
    ranks = PartialState(cpu=resolve_device(device).type == "cpu")
    device = str(ranks.device) if ranks.num_processes > 1 else device
    pipe = LatentDiffusionPipeline.from_pretrained(model, device, precision)
    beside = model if model.is_dir() else model.parent
    out = out or beside / "samples" / f"seed{seed}-steps{steps}"

    settings = {
        "model": {"path": str(model), "sha256": pipe.sha256},
        "seed": seed,
        "sampler": "heun",
        "steps": steps,
        "precision": pipe.precision,
        "resolution": pipe.recipe.resolution,
        "data": to_tree(pipe.recipe.data),
    }
    if ranks.is_main_process:
        _claim(out, settings, n)
    ranks.wait_for_everyone()

    missing = [i for i in range(n) if not image_path(out, i).is_file()]
    ranks.wait_for_everyone()  # nobody writes before everybody has looked
    batches = list(_split(missing, batch_size))[ranks.process_index :: ranks.num_processes]
    if ranks.is_main_process and len(missing) < n:
        print(f"{n - len(missing):,} of {n:,} images are in {out} already")

    bar = progress_bar("images") if ranks.is_main_process else nullcontext()
    with bar as progress, ThreadPoolExecutor(WRITERS) as pool:
        if progress is not None:
            total = sum(map(len, batches))
            task = progress.add_task("sampling", total=total, speed="", note="")
        writing: list[Future] = []
        for indices in batches:
            images = pipe.sample(indices, seed, steps)
            # while these are written the next are computed; the one before must be done by then,
            # so that memory does not grow with n
            _finish(writing)
            writing = [
                pool.submit(_write_png, image, image_path(out, i))
                for i, image in zip(indices, images, strict=True)
            ]
            if progress is not None:
                speed = progress.tasks[task].speed
                shown = f"{speed:.1f} images/s" if speed else ""
                progress.update(task, advance=len(indices), speed=shown)
        _finish(writing)
    ranks.wait_for_everyone()
    if ranks.is_main_process:
        shown = [_read_png(image_path(out, i)) for i in range(min(n, GRID))]
        columns = max(1, round(len(shown) ** 0.5))
        save_grid(torch.stack(shown), out / "grid.png", columns)
    ranks.wait_for_everyone()
    return out


def image_path(out: Path, i: int) -> Path:
    """Where image i of a sampling job is: a thousand a folder."""
    return out / f"{i // 1000:05d}" / f"img{i:08d}.png"


def _claim(out: Path, settings: dict, n: int) -> None:
    """Mark the folder as holding images of these settings, or refuse one that holds others."""
    mark = out / "samples.json"
    if mark.is_file():
        try:
            found = json.loads(mark.read_text("utf-8"))
        except ValueError as error:
            raise LdmError(f"{mark} is damaged: give --out another folder") from error
        other = [key for key in _identity(settings) if found.get(key) != settings[key]]
        if found.get("model", {}).get("sha256") != settings["model"]["sha256"]:
            other.append("model")
        if other:
            raise LdmError(
                f"{out} holds samples made with another {', '.join(other)}: give --out another "
                "folder"
            )
        if n <= found.get("n", 0):
            return  # it tells already of all that will be here, and of who made them
    elif out.is_dir() and any(out.iterdir()):
        raise LdmError(f"{out} is not empty and holds no samples.json: give --out another folder")
    write_json(mark, {"format": 1, "n": n} | settings | provenance())


def _identity(settings: dict) -> set[str]:
    return settings.keys() - {"model", "data"}


def _split(indices: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _write_png(image: Tensor, path: Path) -> None:
    picture = to_pil(image)
    write_atomically(path, lambda file: picture.save(file, format="png"))


def _read_png(path: Path) -> Tensor:
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    return to_float(pixels.permute(2, 0, 1))


def _finish(writing: list[Future]) -> None:
    for future in writing:
        future.result()  # a full disk is raised here
