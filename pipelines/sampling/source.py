"""Samples to measure: those on disk, ours or anyone's, and those straight from a model."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.data import Batch, Source, evaluation_batches
from ldm.data.dataset import open_images
from ldm.data.transforms import CorruptImage
from ldm.errors import LdmError
from ldm.images import to_uint8
from pipelines.sampling.model import SamplingJob
from pipelines.sampling.sample_folder import (
    GRID,
    NEIGHBOURS,
    SAMPLES,
    STORES,
    ZIP,
    PngSource,
    PngStore,
    read_manifest,
)
from pipelines.sampling.settings import integer

LOSSY = {".jpg", ".jpeg", ".webp"}
ARCHIVES = {".zip", ".tar"}


class SampleFolder:
    """Samples on disk as a source: square, lossless, of one size.

    With a `samples.json`, only its own images count: numbered PNGs, shards or a zip. Without one,
    every image in the shards, or every PNG at any depth except our own sheets.

    Args:
        limit: only the first so many, by name.
        least: the number of images required; a covariance needs two.
        archives: also accept a .zip, a .tar, or several tars as a/{000..009}.tar.

    Attributes:
        path: the folder or file; for the `samples.zip` of `ldm sample`, its folder.
        made_with: the content of `samples.json`; None without one.
    """

    classes: tuple[str, ...] = ()

    def __init__(
        self, path: Path, limit: int | None = None, least: int = 2, archives: bool = False
    ) -> None:
        if archives and path.name == ZIP and (path.parent / SAMPLES).is_file():
            path = path.parent
        is_archive = path.suffix in ARCHIVES and (path.is_file() or "{" in str(path))
        if not path.is_dir() and not (archives and is_archive):
            raise LdmError(f"no folder of samples at {path}: make one with `ldm sample`")
        self.path = path
        self.made_with = read_manifest(path, "delete it to measure the folder without it")
        self._images = _open(path, self.made_with)
        there = len(self._images)
        announced = (self.made_with or {}).get("n", 0)
        if there < min(announced, limit or announced):
            raise LdmError(
                f"{path} holds {there} of its {announced} samples: run the same `ldm sample` "
                "again to resume"
            )
        self._count = there if limit is None else min(there, limit)
        if self._count < least:
            raise LdmError(
                f"{path} holds {self._count} PNG image(s), at least {least} are needed: sample "
                "more with `ldm sample --n`"
            )
        height, width = self._load(0).shape[:2]
        if height != width:
            raise LdmError(f"{self.name(0)} is {width}×{height}: samples must be square")
        self.resolution = height
        self.what = f"{self._count} images of {path}"

    @property
    def result_path(self) -> Path:
        """The file for a measurement of the samples: in the folder, or beside the archive."""
        if self.path.is_dir():
            return self.path / "fid.json"
        return self.path.with_name(f"{self.path.name}.fid.json")

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Yield every image once over all processes; `k` is its position in name order."""
        return evaluation_batches(
            self, self.resolution, batch_size, rank=rank, world=world, workers=workers
        )

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return self._images.name(index)

    def label(self, index: int) -> int:
        return -1

    def load(self, index: int) -> np.ndarray:
        """Load an image as RGB uint8 (R, R, 3), of the size of the first."""
        image = self._load(index)
        height, width = image.shape[:2]
        if (height, width) != (self.resolution, self.resolution):
            raise LdmError(
                f"{self.name(index)} is {width}×{height} but {self.name(0)} is "
                f"{self.resolution}×{self.resolution}: samples must all have one size"
            )
        return image

    def _load(self, index: int) -> np.ndarray:
        try:
            return self._images.load(index)
        except CorruptImage as error:
            name = Path(self.name(index))  # of a file, or of a member of one
            file = next((path for path in (name, *name.parents) if path.is_file()), name)
            raise LdmError(
                f"{name} is damaged ({error}): delete {file} and sample again"
            ) from error


def _open(path: Path, manifest: dict[str, Any] | None) -> Source:
    """The images in the form in which they are stored."""
    if manifest is not None:
        store = STORES.get(manifest.get("files", "png"), PngStore)(path)
        return store.images() or PngSource(path, [])
    if path.suffix in ARCHIVES or any(path.glob("*.tar")):
        images = open_images(path)
        _refuse_lossy(path, map(images.name, range(len(images))))
        return images
    files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    _refuse_lossy(path, map(str, files))
    inner = [str(path / file.parent) for file in files if file.name == SAMPLES]
    if inner:
        raise LdmError(f"{path} holds folders of samples, give one of them: {', '.join(inner)}")
    pngs = [file for file in files if file.suffix.lower() == ".png"]
    return PngSource(path, [png.as_posix() for png in pngs if png.name not in (GRID, NEIGHBOURS)])


def is_lossy(name: str) -> bool:
    """Test whether a file name's suffix is that of a lossy image format."""
    return Path(name).suffix.lower() in LOSSY


def _refuse_lossy(path: Path, names: Iterable[str]) -> None:
    lossy = next(filter(is_lossy, names), None)
    if lossy:
        raise LdmError(
            f"{path} holds compressed images ({lossy.removeprefix(f'{path}/')}): compression "
            "changes every number; write samples as PNG"
        )


class ModelSamples:
    """Images 0 … n−1 of a seed, as `ldm sample` writes them with the same settings, in memory.

    `made_with` is the content of a `samples.json` of them.
    """

    def __init__(self, model: Path, n: int, seed: int = 0, **job: Any) -> None:
        self._n = integer("--n ", n, least=1)
        self._job = SamplingJob(model, seed, **job)
        self.path, self.resolution = model, self._job.resolution
        self.made_with: dict[str, Any] | None = {"n": self._n} | self._job.settings
        self.what = f"{self._n} images of {self.path}, seed {self._job.seed}"

    def __len__(self) -> int:
        return self._n

    @property
    def result_path(self) -> Path:
        return self._job.folder / "fid" / f"{self._job.slug()}-n{self._n}.json"

    def name(self, index: int) -> str:
        return f"image {index} of seed {self._job.seed}"

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Sample every image once over all processes; there are no workers."""
        share = -(-batch_size // world)
        for first in range(rank * share, self._n, world * share):
            indices = range(first, min(first + share, self._n))
            labels = torch.tensor([self._job.label(i) for i in indices])
            yield Batch(to_uint8(self._job.sample(indices)), torch.tensor(indices), labels)


Samples = SampleFolder | ModelSamples
