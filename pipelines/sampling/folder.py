"""Samples on disk, read back: as `ldm sample` wrote them in any form, or those of others."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data import Batch, Source, evaluation_batches
from ldm.data.archive import ZipSource
from ldm.data.dataset import open_images
from ldm.data.decode import CorruptImage, decode
from ldm.data.shards import ShardSource
from ldm.errors import LdmError
from ldm.run_folder import RUNS
from pipelines.sampling.store import SHARDS, ZIP

MARK = "samples.json"
GRID, NEIGHBOURS = "grid.png", "neighbours.png"
"""Sheets of pictures that our commands write beside samples, and are none."""
NUMBERED = re.compile(r"\d{5}/img\d{8}\.png")
LOSSY = {".jpg", ".jpeg", ".webp"}
ARCHIVES = {".zip", ".tar"}
KINDS = {"n": int, "model": dict, "weaker": dict | None, "data": dict, "files": str}
"""What is read of a `samples.json`, and of which kind it is."""


class SampleFolder:
    """The images of a folder as a data source: square, of one size, lossless.

    Where there is a `samples.json`, only the images it speaks of count, numbered PNGs, shards or a
    zip; elsewhere all that shards hold, or every PNG, however deep, but for sheets named as those
    that we write.

    Args:
        limit: only the first so many images, by name.
        least: how many there must be; a covariance needs two.
        archives: take a .zip, a .tar, or several as a/{000..009}.tar, too.

    Attributes:
        path: the folder or file; of a `samples.zip` that `ldm sample` wrote, its folder.
        made_with: what `samples.json` says of model, seed and sampler; None without one.
        resolution: edge of the images, pixels.

    Raises:
        LdmError: no such folder, too few images, sampling was not finished, compressed images,
            images that are not square, several folders of samples in one, or a damaged archive.
    """

    def __init__(
        self, path: Path, limit: int | None = None, least: int = 2, archives: bool = False
    ) -> None:
        if archives and path.name == ZIP and (path.parent / MARK).is_file():
            path = path.parent
        if not path.is_dir() and not (archives and _is_archive(path)):
            raise LdmError(f"no folder of samples at {path}: make one with `ldm sample`")
        self.path = path
        self.made_with = read_mark(path, "delete it to measure the folder without it")
        self._images = _open(path, self.made_with)
        there = len(self._images) if self._images else 0
        announced = (self.made_with or {}).get("n", 0)
        if there < min(announced, limit or announced):
            raise LdmError(
                f"{path} holds {there} of its {announced} samples: run the `ldm sample` that "
                "began it again, it goes on where it stopped"
            )
        self._count = there if limit is None else min(there, limit)
        if self._count < least:
            needed = "a covariance needs two or more" if least == 2 else f"{least} are needed"
            raise LdmError(
                f"{path} gives {self._count} PNG image(s) to measure, and {needed}: sample more "
                "with `ldm sample --n`"
            )
        height, width = self._load(0).shape[:2]
        if height != width:
            raise LdmError(f"{self.name(0)} is {width}×{height}: samples must be square")
        self.resolution = height

    @property
    def what(self) -> str:
        """What the images are, in words."""
        return f"{len(self)} images of {self.path}"

    @property
    def result_path(self) -> Path:
        """Where a measurement of the samples is written: in the folder, or beside the archive."""
        if self.path.is_dir():
            return self.path / "fid.json"
        return self.path.with_name(f"{self.path.name}.fid.json")

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Every image once over all processes, `k` its place in the order of names.

        Raises:
            LdmError: (while iterating) an image is damaged, or of another size than the first.
        """
        return evaluation_batches(
            self, self.resolution, batch_size, rank=rank, world=world, workers=workers
        )

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        return self._images.name(index)

    def load(self, index: int) -> np.ndarray:
        """An image as RGB uint8 (R, R, 3).

        Raises:
            LdmError: it is damaged, or of another size than the first.
        """
        image = self._load(index)
        height, width = image.shape[:2]
        if (height, width) != (self.resolution, self.resolution):
            raise LdmError(
                f"{self.name(index)} is {width}×{height} and {self.name(0)} "
                f"{self.resolution}×{self.resolution}: samples of several sizes do not mix"
            )
        return image

    def _load(self, index: int) -> np.ndarray:
        try:
            return self._images.load(index)
        except CorruptImage as error:
            name = Path(self.name(index))  # of a file, or of what lies in one
            file = next((path for path in (name, *name.parents) if path.is_file()), name)
            raise LdmError(
                f"{name} is damaged ({error}): delete {file} and sample again"
            ) from error


class _Pngs:
    """The PNGs of a folder, by their relative paths."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path, self._names = path, names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.path}/{self._names[index]}"

    def load(self, index: int) -> np.ndarray:
        try:
            return decode((self.path / self._names[index]).read_bytes(), ".png")
        except OSError as error:
            raise CorruptImage(error.strerror or str(error)) from error


def is_lossy(name: str) -> bool:
    """Whether the image of a name is compressed with loss, as far as its ending tells."""
    return Path(name).suffix.lower() in LOSSY


def newest_samples() -> Path:
    """The folder under `runs/` in which sampling began last, where a command's path was left out.

    Raises:
        LdmError: there is none.
    """
    # as deep as those of a demo's run lie, and no deeper: among the images there is none
    marks = [mark for depth in range(1, 5) for mark in RUNS.glob("*/" * depth + MARK)]
    if not marks:
        raise LdmError(f"no samples under {RUNS}/: give their folder, or `ldm sample` first")
    return max(marks, key=lambda mark: mark.stat().st_mtime).parent


def read_mark(folder: Path, advice: str) -> dict[str, Any] | None:
    """What a folder's `samples.json` says, its parts of the kinds that they should be; None where
    there is none.

    Raises:
        LdmError: it cannot be read, or is damaged; `advice` is what to do then.
    """
    mark = folder / MARK
    if not mark.is_file():
        return None
    try:
        told = json.loads(mark.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LdmError(f"{mark} is damaged: {advice}") from error
    if not isinstance(told, dict) or not all(
        isinstance(told[key], kind) for key, kind in KINDS.items() if key in told
    ):
        raise LdmError(f"{mark} is damaged: {advice}")
    return told


def _open(path: Path, made_with: dict[str, Any] | None) -> Source | None:
    """The images in the form in which they are kept; None where there are none yet."""
    if made_with is None and (path.suffix in ARCHIVES or any(path.glob("*.tar"))):
        images = open_images(path)
        _refuse_lossy(path, map(images.name, range(len(images))))
        return images
    files = (made_with or {}).get("files", "png")
    if files == "zip":
        return ZipSource(path / ZIP) if (path / ZIP).is_file() else None
    if files == "shards":
        shards = sorted(path.glob(SHARDS))
        return ShardSource(shards) if shards else None
    return _Pngs(path, _list_images(path, numbered=made_with is not None))


def _list_images(path: Path, numbered: bool) -> list[str]:
    """Relative paths of the images, sorted."""
    files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    _refuse_lossy(path, map(str, files))
    if numbered:
        return [file.as_posix() for file in files if NUMBERED.fullmatch(file.as_posix())]
    inner = [str(path / file.parent) for file in files if file.name == MARK]
    if inner:
        raise LdmError(f"{path} holds folders of samples, give one of them: {', '.join(inner)}")
    sheets = (GRID, NEIGHBOURS)
    return [f.as_posix() for f in files if f.suffix.lower() == ".png" and f.name not in sheets]


def _is_archive(path: Path) -> bool:
    return path.suffix in ARCHIVES and (path.is_file() or "{" in str(path))


def _refuse_lossy(path: Path, names: Iterable[str]) -> None:
    lossy = next(filter(is_lossy, names), None)
    if lossy:
        raise LdmError(
            f"{path} holds compressed images ({lossy.removeprefix(f'{path}/')}): compression "
            "changes every number; write samples as PNG"
        )
