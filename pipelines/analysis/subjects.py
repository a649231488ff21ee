"""Subjects of an analysis, the images that all of them see, and the files that are written."""

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

SEED = 0  # of the drawn images and of all noise, the same in every analysis
TIMESTAMP = re.compile(r"^\d{8}-\d{6}-")  # a run folder's name begins with it
GROUPS = 50
"""The jackknife leaves out images one by one, or at most this many groups of them; that gives the
standard error to about a tenth."""


class Analysis(NamedTuple):
    """Result of an analysis: a table to print, and the files that were written."""

    title: str
    """Title of the table: the measurement and the images."""
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    """Cells as they are printed."""
    files: tuple[Path, ...]
    """The pictures, then the CSV files with all numbers."""
    notes: tuple[str, ...] = ()
    """Caveats about the numbers."""


class Subject(NamedTuple):
    """An autoencoder under analysis."""

    name: str
    """Label in tables and legends."""
    path: Path
    autoencoder: Autoencoder
    """On the device, in eval mode."""
    recipe: dict[str, Any]
    """Training recipe stored in the file; {} for third-party models."""


class SharedImages(NamedTuple):
    """The images that all subjects see, and their description."""

    source: Source
    resolution: int
    """Size R that they are resized to, in pixels."""
    what: str
    """Such as "the val split of photos, 64×64"."""
    workers: int


# ------------------------------------------------------------------------------------- files
def analysis_folder(out: Path | None, model: Path) -> Path:
    """Return the requested folder, or `analysis/` next to the model."""
    return out or (model if model.is_dir() else model.parent) / "analysis"


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Path:
    """Write a table atomically, with nine significant digits; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
    return path


# ------------------------------------------------------------------------- standard errors
def image_shares(
    measure: Callable[[NDArray[np.intp]], NDArray], count: int
) -> tuple[NDArray, NDArray]:
    """Measure statistics of a set of images, and the jackknife's pseudo-values of image groups.

    The jackknife (Efron & Tibshirani 1993, Chapter 11) measures again without each group of images,
    and so gives standard errors for statistics that are no means over images. A bootstrap would
    not do for an MMD: an image drawn twice is at distance 0 from itself, a bias of about 1/n.

    Args:
        measure: maps ascending indices of images (m,) to their statistics (s,).
        count: number of images.

    Returns:
        The statistics (s,), and pseudo-values (g, s): their mean is about the statistic, their
        standard error is its standard error. Image i belongs to group i modulo g.
    """
    images = np.arange(count)
    group = images % min(count, GROUPS)
    whole = measure(images)
    without = np.stack([measure(images[group != one]) for one in range(group.max() + 1)])
    # Efron & Tibshirani 1993, Chapter 11: pseudo-values, here about the number itself
    return whole, whole + (len(without) - 1) * (without.mean(0) - without)


# -------------------------------------------------------------------------------- the models
def parse_models(words: Sequence[str | Path]) -> dict[str, Path]:
    """Map names to paths from PATH or NAME=PATH arguments; none stands for the newest run.

    The default name is the run folder's, without its timestamp where that is unambiguous.

    Raises:
        UsageError: two models have the same name.
        LdmError: no argument was given, and there is no run.
    """
    given: list[tuple[str | None, Path]] = []
    for word in words or [newest_run("autoencoder")]:
        name, equals, path = str(word).partition("=")
        if not equals or Path(word).exists():
            given.append((None, Path(word)))
        elif name and path:
            given.append((name, Path(path)))
        else:
            raise UsageError(f"'{word}' is neither an existing path nor of the form NAME=PATH")
    long = [_folder_name(path) for _, path in given]
    short = [TIMESTAMP.sub("", name) for name in long]
    names = [
        name or next((n for n, all_ in ((s, short), (n, long)) if all_.count(n) == 1), str(path))
        for (name, path), s, n in zip(given, short, long, strict=True)
    ]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UsageError(f"two models are called '{twice[0]}': name them with NAME=PATH")
    return dict(zip(names, (path for _, path in given), strict=True))


def load_subjects(words: Sequence[str | Path], device: torch.device) -> list[Subject]:
    """Load the autoencoders of PATH or NAME=PATH arguments; see `parse_models`."""
    subjects = []
    for name, path in parse_models(words).items():
        file = read_autoencoder(path)
        recipe = file.provenance.get("recipe") or {}
        autoencoder = assemble(file, path).to(device).eval().requires_grad_(False)
        subjects.append(Subject(name, path, autoencoder, recipe))
    return subjects


def _folder_name(path: Path) -> str:
    """Name a model after its run, and after its file unless that is ckpt.pt."""
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
) -> SharedImages:
    """Open the images for all subjects; by default those that they were trained on.

    Args:
        data: `photos`, a folder, a zip or shards, split as in a subject's training where it was
            trained on them; or a complete `DataConfig`.
        resolution: image size in pixels.

    Raises:
        UsageError: data or resolution is missing, and the files do not give it or disagree; or the
            resolution is below the size of one latent.
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
            f"--resolution {resolution}: {coarsest.name} encodes {f}×{f} pixels into one latent: "
            f"use at least {f}"
        )
    source = open_source(config, split, resolution)
    if not len(source):
        raise LdmError(f"{config.source} has no images in its {split} split: use other --data")
    what = f"the {split} split of {config.source}, {resolution}×{resolution}"
    return SharedImages(source, resolution, what, config.workers)


def choose_data(recipes: Mapping[str, dict[str, Any]], data: str | None) -> DataConfig:
    """Return the requested data, or the data that the models were trained on.

    Raises:
        UsageError: none is requested, and the recipes do not name data or disagree.
    """
    configs = {n: validate(DataConfig, r["data"]) for n, r in recipes.items() if "data" in r}
    sources = {name: _resolve(config.source) for name, config in configs.items()}
    if data is None:
        return configs[_agreed(recipes, sources, "data")]
    # keep the split of the training: another one would mix training images into the held-out part
    same = [name for name, source in sources.items() if source == _resolve(data)]
    return configs[same[0]] if same else DataConfig(source=data)


def draw_images(source: Source, count: int, draw: int = 0) -> Source:
    """Draw `count` images, the same ones for the same `draw`; all if there are no more."""
    if count >= len(source):
        return source
    # at random: a data set may be sorted by class
    order = generator(SEED, "analysed images", draw).permutation(len(source))
    return Part(source, np.sort(order[:count]))


def _resolve(source: str) -> str:
    return source if source == PHOTOS else str(Path(source).expanduser().resolve())


def _agreed(models: Iterable[str], values: dict[str, Any], what: str) -> str:
    """Return the name of a model whose value is that of all models that have one."""
    if not values:
        name = next(iter(models))
        raise UsageError(f"{name} does not record the {what} of its training: use --{what}")
    if len(set(values.values())) > 1:
        each = ", ".join(f"{name} {value}" for name, value in values.items())
        raise UsageError(f"the models were trained on different {what} ({each}): use --{what}")
    return next(iter(values))


# ----------------------------------------------------------------------------- several processes
def gather(ranks: PartialState, share: Any) -> list[Any]:
    """Gather one object per process, in the order of ranks, on all of them."""
    return gather_object([share]) if ranks.num_processes > 1 else [share]


@torch.no_grad()
def encode_share(
    subject: Subject,
    images: SharedImages,
    batch_size: int,
    ranks: PartialState,
    where: torch.device,
) -> Iterator[tuple[Tensor, Tensor, DiagonalGaussian]]:
    """Yield this process's share: image numbers (b,), images (b, 3, R, R), their posteriors.

    Every image is encoded on exactly one process, in float32.
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
                f"{subject.path}: latents are not finite, the training may have diverged: use an "
                "earlier checkpoint"
            )
        yield batch.k, shown, posterior
