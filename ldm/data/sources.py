"""Sources of whole images, and two of them: a folder, and a zip such as EDM's dataset tool writes.

Both are in the order of the images' paths, and their folders can name classes.
"""

import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ldm.data.transforms import SUFFIXES, CorruptImage, decode, is_image
from ldm.errors import LdmError, UsageError

_NUMBERED = re.compile(r"(.*/)?\d{5}/img\d{8}\.\w+")


class Source(Protocol):
    """Whole images by number: one split of a data set. It can be pickled, for worker processes.

    A source without classes may omit `classes` and `label`: they are read by `label_of`.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; () without labels."""

    def __len__(self) -> int:
        """Number of images."""

    def name(self, index: int) -> str:
        """The path of an image, for messages."""

    def load(self, index: int) -> np.ndarray:
        """Load an image as RGB uint8 (H, W, 3), or raise `CorruptImage`."""

    def label(self, index: int) -> int:
        """The class of an image, as an index into `classes`; −1 for none."""


def label_of(source: Source, index: int) -> int:
    """The class of an image of any source, −1 for none."""
    return source.label(index) if getattr(source, "classes", ()) else -1


def load_at_least(source: Source, index: int, side: int) -> np.ndarray:
    """Load an image (H, W, 3) uint8; raise LdmError if a side is shorter than `side` pixels."""
    image = source.load(index)
    height, width = image.shape[:2]
    if min(height, width) < side:
        raise LdmError(
            f"{source.name(index)} is {width}×{height}, smaller than the {side}×{side} requested: "
            "lower the resolution, or remove the image"
        )
    return image


def folder_labels(names: Sequence[str], where: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the classes, sorted, and the class of each image (n,) int32.

    A class is the first folder below those that hold every image: cat and dog in `cat/1.png` and
    `dog/a/2.png`, and in `x/cat/1.png` and `x/dog/a/2.png`.

    Args:
        names: relative paths of the images, with slashes.
        where: folder or archive of the images, for messages.
    """
    folders = [tuple(name.split("/")[:-1]) for name in names]
    first, last = min(folders), max(folders)  # a prefix of both is one of all
    depth = next((i for i, part in enumerate(first) if part != last[i]), len(first))
    for name, folder in zip(names, folders, strict=True):
        if len(folder) <= depth:
            raise UsageError(
                f"{where}/{name} has no class: with labels, every image must be in one of two or "
                "more folders named after the classes; move it into one, or omit labels"
            )
    if all(map(_NUMBERED.fullmatch, names)):
        raise UsageError(
            f"{where} has numbered folders ({names[0]}), which are not classes: "
            "name folders after the classes, or omit labels"
        )
    classes = sorted({folder[depth] for folder in folders})
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[folder[depth]] for folder in folders], np.int32)
    return tuple(map(printable, classes)), labels


def printable(name: str) -> str:
    """Convert a file name to valid UTF-8, with other bytes written as \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class PathSource(ABC):
    """Images known by their paths in a folder or an archive.

    Args:
        names: relative paths of all files; those of images are taken.
        labels: read folders as classes, see `folder_labels`.
    """

    def __init__(self, path: Path, names: Iterable[str], labels: bool) -> None:
        self.path = path
        self._names = sorted(filter(is_image, names))
        if not self._names:
            raise LdmError(f"{path} holds no images: {' '.join(SUFFIXES)} are read")
        self.classes: tuple[str, ...] = ()
        if labels:
            self.classes, self._labels = folder_labels(self._names, str(path))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.path}/{self._names[index]}"

    def load(self, index: int) -> np.ndarray:
        name = self._names[index]
        return decode(self.read(name), Path(name).suffix)

    def label(self, index: int) -> int:
        return int(self._labels[index]) if self.classes else -1

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Read a file by its relative path, or raise `CorruptImage`."""


class FolderSource(PathSource):
    """Every image under a folder. Links to folders are followed; hidden files are ignored."""

    def __init__(self, path: Path, labels: bool = False) -> None:
        super().__init__(path, _walk(path), labels)

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise CorruptImage(error.strerror or str(error)) from error


def _walk(path: Path) -> Iterator[str]:
    """Yield relative paths of all files, entering each folder once even if links form a loop."""
    entered = set()
    for folder, folders, files in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in entered:
            folders.clear()
            continue
        entered.add(real)
        relative = Path(folder).relative_to(path)
        yield from ((relative / file).as_posix() for file in files)


class ZipSource(PathSource):
    """Every image in a zip; other files in it are ignored."""

    def __init__(self, path: Path, labels: bool = False) -> None:
        self._handle: tuple[int, zipfile.ZipFile] | None = None
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise LdmError(f"{path} is truncated or not a zip archive: copy it again") from error
        super().__init__(path, names, labels)

    def read(self, name: str) -> bytes:
        try:
            # one handle per process: forked ones would share, and move, one position in the file
            if self._handle is None or self._handle[0] != os.getpid():
                self._handle = os.getpid(), zipfile.ZipFile(self.path)
            return self._handle[1].read(name)
        except Exception as error:  # encryption and damage make zipfile raise nearly anything
            raise CorruptImage(str(error) or type(error).__name__) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None}
