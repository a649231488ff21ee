"""What an analysis leaves: pictures and tables in a folder, and the numbers worth printing.

How far a number over images would move with other images: the jackknife.

Efron & Tibshirani 1993, Chapter 11: the number is measured again without some of the images, and
again without others. It holds for what is no mean over images, too. Images drawn with replacement
would not do where images are compared with each other: one that is drawn twice is at distance 0
from itself, which shifts an MMD by about 1/n.

What is analysed: one or several autoencoders, and the images that all of them are shown.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from autoencoders import Autoencoder
from autoencoders.autoencoder import assemble
from autoencoders.loading import read_autoencoder
from autoencoders.posterior import DiagonalGaussian
from ldm.config import validate
from ldm.data import DataConfig, Source, evaluation_batches, open_source
from ldm.data.dataset import PHOTOS
from ldm.data.split import Part, Split
from ldm.device import memory_format
from ldm.errors import LdmError, UsageError
from ldm.files import write_atomically
from ldm.images import to_float
from ldm.run_folder import newest_run
from ldm.seeds import generator

Cell = str | int | float | None


class Analysis(NamedTuple):
    """What was found, for the person who asked."""

    title: str
    """Of the table: what was measured, on which images."""
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    """Of the table, cells as they are printed."""
    files: tuple[Path, ...]
    """The pictures, then the CSVs with all numbers."""
    notes: tuple[str, ...] = ()
    """What the reader must know to judge the numbers."""


def analysis_folder(out: Path | None, model: Path) -> Path:
    """Where to write: what was asked for, or `analysis/` beside the model, in its run."""
    return out or (model if model.is_dir() else model.parent) / "analysis"


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Path:
    """Write a table whole or not at all; numbers in nine digits, nothing where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
    return path


GROUPS = 50
"""Images are left out one by one, and of more than these in so many groups: their standard error is
known to a tenth."""


def image_shares(
    measure: Callable[[NDArray[np.intp]], NDArray], count: int
) -> tuple[NDArray, NDArray]:
    """Some numbers over images, and the share that each image has in them.

    Args:
        measure: positions of images, rising, (m,) → the numbers over them (s,).
        count: how many images there are; `measure` sees all of them, and all but a group.

    Returns:
        The numbers (s,), and by group shares (g, s), of which these are the means and whose
        standard errors are theirs. Image i is of group i modulo g.
    """
    images = np.arange(count)
    group = images % min(count, GROUPS)
    whole = measure(images)
    without = np.stack([measure(images[group != one]) for one in range(group.max() + 1)])
    # Efron & Tibshirani 1993, Chapter 11: pseudo-values, here about the number itself
    return whole, whole + (len(without) - 1) * (without.mean(0) - without)


SEED = 0  # of which images are drawn, and of all noise: the same in every analysis
TIME = re.compile(r"^\d{8}-\d{6}-")  # how a run's folder begins


class Subject(NamedTuple):
    """An autoencoder under analysis."""

    name: str
    """What tables and legends call it."""
    path: Path
    autoencoder: Autoencoder
    """On the device, in eval mode."""
    recipe: dict[str, Any]
    """It was trained by, as far as its file says; {} for other people's."""


class Images(NamedTuple):
    """The images that all subjects are shown, and what to call them."""

    source: Source
    resolution: int
    """Side R they are brought to, pixels."""
    what: str
    """Such as "the val split of photos, 64×64"."""
    workers: int


# -------------------------------------------------------------------------------- the models
def parse_models(words: Sequence[str | Path]) -> dict[str, Path]:
    """Names and paths of what was typed: PATH, or NAME=PATH; nothing is the newest run.

    A name that is not given is the run folder's, without its time where that leaves no doubt.

    Raises:
        UsageError: two models are given one name.
        LdmError: nothing was typed, and there is no run.
    """
    given: list[tuple[str | None, Path]] = []
    for word in words or [newest_run("autoencoder")]:
        name, equals, path = str(word).partition("=")
        if not equals or Path(word).exists():
            given.append((None, Path(word)))
        elif name and path:
            given.append((name, Path(path)))
        else:
            raise UsageError(f"'{word}' is not a path, nor of the form NAME=PATH")
    long = [_folder_name(path) for _, path in given]
    short = [TIME.sub("", name) for name in long]
    names = [
        told or next((n for n, all_ in ((s, short), (n, long)) if all_.count(n) == 1), str(path))
        for (told, path), s, n in zip(given, short, long, strict=True)
    ]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"two models are called '{twice[0]}': say NAME=PATH, each another name")
    return dict(zip(names, (path for _, path in given), strict=True))


def load_subjects(words: Sequence[str | Path], device: torch.device) -> list[Subject]:
    """The autoencoders that were typed, see `parse_models`, on a device.

    Raises:
        UsageError: two of them are given one name.
        LdmError: one cannot be read.
    """
    subjects = []
    for name, path in parse_models(words).items():
        file = read_autoencoder(path)
        recipe = file.provenance.get("recipe") or {}
        autoencoder = assemble(file, path).to(device).eval().requires_grad_(False)
        subjects.append(Subject(name, path, autoencoder, recipe))
    return subjects


def _folder_name(path: Path) -> str:
    """What a person calls a model: its run, and which file of it unless it is the usual one."""
    path = path.absolute()
    if path.suffix not in (".pt", ".ckpt", ".safetensors"):
        return path.name
    if path.stem == "ckpt":
        return path.parent.name
    return f"{path.parent.name}/{path.stem}"


# -------------------------------------------------------------------------------- the images
def open_images(
    subjects: Sequence[Subject],
    data: str | DataConfig | None,
    split: Split,
    resolution: int | None,
) -> Images:
    """Images for all subjects alike; what is left out is what they were trained on.

    Args:
        data: `photos`, a folder, a zip, or shards, split as their own where they were trained on
            it; or all of how it is split.
        resolution: side of the images, pixels.

    Raises:
        UsageError: data or resolution is left out, and the files do not say, or disagree; or a
            resolution is smaller than a latent.
        LdmError: the data cannot be read.
    """
    recipes = {s.name: s.recipe for s in subjects}
    config = data if isinstance(data, DataConfig) else choose_data(recipes, data)
    if resolution is None:
        ended = {n: r["phases"][-1]["resolution"] for n, r in recipes.items() if r.get("phases")}
        resolution = ended[_agreed(recipes, ended, "resolution")]
    coarsest = max(subjects, key=lambda s: s.autoencoder.downsampling)
    if resolution < coarsest.autoencoder.downsampling:
        f = coarsest.autoencoder.downsampling
        raise UsageError(
            f"--resolution {resolution}: {coarsest.name} makes one latent of {f}×{f} pixels; give "
            f"{f} or more"
        )
    source = open_source(config, split, resolution)
    if not len(source):
        raise LdmError(f"{config.source} has no image in its {split} split: give another --data")
    what = f"the {split} split of {config.source}, {resolution}×{resolution}"
    return Images(source, resolution, what, config.workers)


def choose_data(recipes: Mapping[str, dict[str, Any]], data: str | None) -> DataConfig:
    """The data asked for, or what models of these recipes were trained on, by their names.

    Raises:
        UsageError: nothing is asked for, and the models do not say, or disagree.
    """
    told = {n: validate(DataConfig, r["data"]) for n, r in recipes.items() if "data" in r}
    sources = {name: _place(config.source) for name, config in told.items()}
    if data is None:
        return told[_agreed(recipes, sources, "data")]
    # split as a training split it: another split would take in what it has seen
    same = [name for name, place in sources.items() if place == _place(data)]
    return told[same[0]] if same else DataConfig(source=data)


def draw_images(source: Source, count: int, draw: int = 0) -> Source:
    """`count` images of a source, the same for the same `draw`; all where it has no more."""
    if count >= len(source):
        return source
    # at random: a data set may be sorted by class
    order = generator(SEED, "analysed images", draw).permutation(len(source))
    return Part(source, np.sort(order[:count]))


def _place(source: str) -> str:
    return source if source == PHOTOS else str(Path(source).expanduser().resolve())


def _agreed(models: Iterable[str], said: dict[str, Any], what: str) -> str:
    """The name of a model that says what all that say anything agree on."""
    if not said:
        name = next(iter(models))
        raise UsageError(f"{name} does not say what it was trained on: give --{what}")
    if len(set(said.values())) > 1:
        each = ", ".join(f"{name} {value}" for name, value in said.items())
        raise UsageError(f"the models were trained on different {what} ({each}): give --{what}")
    return next(iter(said))


# ----------------------------------------------------------------------------- several processes
def gather(ranks: PartialState, share: Any) -> list[Any]:
    """What every process has, in their order, on all of them."""
    return gather_object([share]) if ranks.num_processes > 1 else [share]


@torch.no_grad()
def encode_share(
    subject: Subject, images: Images, batch_size: int, ranks: PartialState, where: torch.device
) -> Iterator[tuple[Tensor, Tensor, DiagonalGaussian]]:
    """This process's share of the images: numbers (b,), images (b, 3, R, R), their posteriors.

    Every image comes on exactly one process, in float32.

    Raises:
        UsageError: the batch does not divide over the processes.
        LdmError: (while iterating) an image is too small, too many are corrupt, or a latent is not
            finite.
    """
    for batch in evaluation_batches(
        images.source, images.resolution, batch_size, workers=images.workers,
        rank=ranks.process_index, world=ranks.num_processes,
    ):  # fmt: skip
        pixels = batch.images.to(where).contiguous(memory_format=memory_format(where))
        shown = to_float(pixels)
        posterior = subject.autoencoder.encode(shown)
        if not (posterior.mean.isfinite().all() and posterior.logvar.isfinite().all()):
            raise LdmError(
                f"{subject.path}: its latents are not finite, as of a training that went wrong: "
                "take an earlier state, or another model"
            )
        yield batch.k, shown, posterior
