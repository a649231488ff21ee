"""The models of an analysis, the images that all of them see, and the files it writes."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from autoencoders import Autoencoder, DiagonalGaussian
from autoencoders.autoencoder import AutoencoderConfig, assemble
from autoencoders.pretrained import read_autoencoder
from ldm.config import (
    Resolution,
    Tree,
    format_size,
    read_resolution,
    shorter_side,
    size_word,
    validate,
)
from ldm.data import DataConfig, Source, evaluation_batches, open_source
from ldm.data.loader import is_same, resolve_source
from ldm.data.sources import Part, Split
from ldm.device import memory_format
from ldm.distributed import fail_together, join_processes
from ldm.errors import LdmError, UsageError, check_at_least
from ldm.files import check_writable, write_atomically
from ldm.images import as_float
from ldm.run_folder import newest_run
from ldm.seeds import generator

T = TypeVar("T")
SEED = 0  # of the drawn images and of all noise, the same in every analysis
TIMESTAMP = re.compile(r"^\d{8}-\d{6}-")  # a run folder's name begins with it


class Analysis(NamedTuple):
    """Result of an analysis: a table to print, and the files that were written.

    Under a distributed launch, all processes but the main one get None.
    """

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    files: tuple[Path, ...]
    """The pictures, then the CSV files with all numbers."""
    notes: tuple[str, ...] = ()
    """Caveats about the numbers."""


class Subject(NamedTuple):
    """An autoencoder under analysis."""

    name: str
    path: Path
    autoencoder: Autoencoder
    """On the device, in eval mode."""


@dataclass(frozen=True)
class SharedImages:
    """The images that all subjects see, divided among the launched processes."""

    source: Source
    resolution: Resolution
    """Size R that they are resized to, in pixels."""
    what: str
    """Such as "the val split of photos, 64×64"."""
    workers: int
    batch_size: int
    ranks: PartialState
    device: torch.device

    def draw(self, count: int, draw: int = 0) -> "SharedImages":
        """Draw `count` images, the same ones for the same `draw`; all if there are no more."""
        if count >= len(self.source):
            return self
        # at random: a data set may be sorted by class
        order = generator(SEED, "analysed images", draw).permutation(len(self.source))
        return replace(self, source=Part(self.source, np.sort(order[:count])))

    @torch.no_grad()
    def gather(
        self, subject: Subject, measure: Callable[[Tensor, Tensor, DiagonalGaussian], T]
    ) -> list[T]:
        """Encode every image once, in float32, and return what is measured of all, on all.

        `measure` takes the images' numbers (b,), the images (b, C, R, R) in [−1, 1], and
        their posteriors.
        """
        world, found = self.ranks.num_processes, []
        with fail_together(self.ranks):
            for batch in evaluation_batches(
                self.source, self.resolution, self.batch_size * world, workers=self.workers,
                rank=self.ranks.process_index, world=world,
            ):  # fmt: skip
                pixels = batch.images.to(self.device)
                shown = as_float(pixels.contiguous(memory_format=memory_format(self.device)))
                posterior = subject.autoencoder.encode(shown)
                if not posterior.isfinite().all():
                    raise LdmError(
                        f"{subject.path}: latents are not finite, the training may have diverged: "
                        "use an earlier checkpoint"
                    )
                found.append(measure(batch.k, shown, posterior))
        found = gather_object(found)
        if not found:
            raise LdmError(f"{self.what}: no image is readable")
        return found


def open_analysis(
    models: Sequence[str | Path],
    data: str | DataConfig | None = None,
    split: Split = "val",
    resolution: Resolution | None = None,
    device: str = "auto",
    batch_size: int = 16,
) -> tuple[list[Subject], SharedImages]:
    """Load the models, and open the images for all of them, on every launched process.

    Data and resolution (pixels) default to those of the models' training.
    """
    check_at_least(1, batch_size=batch_size, resolution=resolution)
    ranks, where = join_processes(device)
    with fail_together(ranks):
        subjects, recipes = [], {}
        for name, path in parse_models(models).items():
            file = read_autoencoder(path)
            autoencoder = assemble(file, path).to(where).eval().requires_grad_(False)
            subjects.append(Subject(name, path, autoencoder))
            recipes[name] = file.provenance.get("recipe") or {}
        check_alike({each.name: each.autoencoder.config for each in subjects})
        config = agree_on_data(recipes, data).of(subjects[0].autoencoder.config)
        if resolution is None:
            phases = {name: each["phases"] for name, each in recipes.items() if each.get("phases")}
            ended = {name: read_resolution(p[-1]["resolution"]) for name, p in phases.items()}
            resolution = ended[_agreed(recipes, ended, "resolution")]
        coarsest = max(subjects, key=lambda s: s.autoencoder.downsampling)
        f = coarsest.autoencoder.downsampling
        if shorter_side(resolution) < f:
            raise UsageError(
                f"--resolution {size_word(resolution)}: {coarsest.name} encodes {f}×{f} pixels "
                f"into one latent: use at least {f}"
            )
        source = open_source(config, split, resolution)
        if not len(source):
            raise LdmError(f"{config.source} has no images in its {split} split: use other --data")
    what = f"the {split} split of {config.source}, {format_size(resolution)}"
    images = SharedImages(source, resolution, what, config.workers, batch_size, ranks, where)
    return subjects, images


# -------------------------------------------------------------------------------- the models
def check_alike(configs: Mapping[str, AutoencoderConfig]) -> None:
    """Refuse models, by name, that do not see one image alike."""
    for key in ("image_channels", "pixels.range"):
        found = {name: attrgetter(key)(config) for name, config in configs.items()}
        if len(set(found.values())) > 1:
            each = ", ".join(f"{name} {value}" for name, value in found.items())
            raise UsageError(f"the models have different {key} ({each}): analyse each by itself")


def parse_models(words: Sequence[str | Path]) -> dict[str, Path]:
    """Map names to paths from PATH or NAME=PATH arguments; none stands for the newest run."""
    given = [split_name(word) for word in words or [newest_run("autoencoder")]]
    for name, path in given:
        if not name and "=" in str(path) and not path.exists():
            raise UsageError(f"'{path}' is neither an existing path nor of the form NAME=PATH")
    return dict(zip(distinct_names(given), (path for _, path in given), strict=True))


def split_name(word: str | Path) -> tuple[str, Path]:
    """Split NAME=PATH; the name is "" for a mere path, which may contain a "=" itself."""
    name, _, path = str(word).partition("=")
    is_name = "/" not in name or Path(path).exists()
    named = name and path and is_name and not Path(word).exists()
    return (name, Path(path)) if named else ("", Path(word))


def distinct_names(given: Sequence[tuple[str, Path]]) -> list[str]:
    """Return the given names; paths without one get their shortest ends that are all distinct.

    A run folder stands for its ckpt.pt, and loses its timestamp if that leaves it distinct.
    """
    parts = []
    for _, path in given:
        *above, run, file = ("", *path.absolute().parts)
        if path.suffix not in (".pt", ".ckpt", ".safetensors"):
            parts.append((*above, run, file))
        else:
            parts.append((*above, run if path.stem == "ckpt" else f"{run}/{path.stem}"))
    depths = range(1, max(map(len, parts)) - 1)
    ends = [
        [TIMESTAMP.sub("", part[-1]) for part in parts],
        *(["/".join(part[-depth:]) for part in parts] for depth in depths),
        [str(path) for _, path in given],
    ]
    count = len({path.absolute() for _, path in given})  # one may be given under several names
    for each in ends:
        names = [name or end for (name, _), end in zip(given, each, strict=True)]
        if len(set(each)) == count and len(set(names)) == len(names):
            break
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"the name '{twice[0]}' is used twice: name each path with NAME=PATH")
    return names


# -------------------------------------------------------------------------------- the images
def agree_on_data(recipes: Mapping[str, Tree], data: str | DataConfig | None) -> DataConfig:
    """Return the requested data, or that of the models' recipes.

    A path that a model was trained on is split as in its training.
    """
    if isinstance(data, DataConfig):
        return data
    configs = {n: validate(DataConfig, r["data"]) for n, r in recipes.items() if "data" in r}
    if data is None:
        sources = {name: resolve_source(config.source) for name, config in configs.items()}
        return configs[_agreed(recipes, sources, "data")]
    same = (config for config in configs.values() if is_same(config, data))
    return next(same, DataConfig(source=data))


def _agreed(models: Iterable[str], values: dict[str, Any], what: str) -> str:
    """Return the name of a model whose value is that of all models that have one."""
    if not values:
        name = next(iter(models))
        raise UsageError(f"{name} does not record the {what} of its training: use --{what}")
    if len(set(values.values())) > 1:
        each = ", ".join(f"{name} {value}" for name, value in values.items())
        raise UsageError(f"the models were trained on different {what} ({each}): use --{what}")
    return next(iter(values))


# ------------------------------------------------------------------------------------- files
def analysis_folder(out: Path | None, model: Path) -> Path:
    """Return the requested folder, or `analysis/` next to the model, if it can be written."""
    folder = out or (model if model.is_dir() else model.parent) / "analysis"
    check_writable(folder / "numbers.csv", advice="give --out another folder")
    return folder


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write a table atomically, with nine significant digits; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row])
    write_atomically(path, text.getvalue().encode())
    return path
