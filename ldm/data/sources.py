"""Sources of whole images, and two of them: a folder, and a zip such as EDM's dataset tool writes.

Both are in the order of the images' paths, and their folders can name classes.

A split takes the training images of a source, or the held-out ones: the last by name. Labelled
images are sorted by class, so that these would be whole classes: of them, every n-th is held out.
"""

import os
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ldm.data.transforms import SUFFIXES, CorruptImage, decode, is_image
from ldm.errors import LdmError, UsageError

Split = Literal["train", "val", "all"]
Indices = range | np.ndarray
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


# ------------------------------------------------------------------------------------- split
# FFHQ and CelebA-HQ as split by Rombach et al. 2022: 60,000 + 10,000 and 25,000 + 5,000
USUAL_HELD_OUT = {70_000: 10_000, 30_000: 5_000}


def held_out_count(count: int, requested: int | None) -> int:
    """Number of images held out of `count`: as requested, else the default.

    The default is the usual split of FFHQ (70,000 images) and CelebA-HQ (30,000), else one image in
    twenty, at least 1 and at most 10,000.
    """
    usual = USUAL_HELD_OUT.get(count, min(max(count // 20, 1), 10_000))
    held_out = usual if requested is None else requested
    if held_out >= count:
        raise UsageError(
            f"holding out {held_out} of {count} images leaves none to train on: "
            "lower held_out (0 holds out none)"
        )
    return held_out


def split_indices(count: int, held_out: int, evenly: bool) -> tuple[Indices, Indices]:
    """Ascending indices of the training images and of the held-out images among `count`.

    Args:
        evenly: hold out the last of each of `held_out` runs of equal length (to one image), else
            the last of all.
    """
    if not evenly:
        return range(count - held_out), range(count - held_out, count)
    ends = np.arange(1, held_out + 1) * count // held_out - 1
    return np.delete(np.arange(count), ends), ends


@dataclass(frozen=True)
class Part:
    """The images `indices` of a source, as a source with the same classes."""

    whole: Source
    indices: Indices

    @property
    def classes(self) -> tuple[str, ...]:
        return self.whole.classes

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.whole.name(self.indices[index])

    def load(self, index: int) -> np.ndarray:
        return self.whole.load(self.indices[index])

    def label(self, index: int) -> int:
        return self.whole.label(self.indices[index])


def take_split(source: Source, split: Split, held_out: int | None, evenly: bool = False) -> Source:
    """Select the training images, the held-out images, or all images of a source.

    Args:
        held_out: number of images held out; None: the default of `held_out_count`.
        evenly: as in `split_indices`.
    """
    if split == "all":
        return source
    train, val = split_indices(len(source), held_out_count(len(source), held_out), evenly)
    if split == "val" and not len(val):
        raise UsageError("no images are held out for validation: set data.held_out to 1 or more")
    return Part(source, train if split == "train" else val)
