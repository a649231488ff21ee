"""What a data set is to the rest of the toolkit: images that have a number, a name, a class.

Class labels: the name of each class, and which class each image of a source is of.

A folder of images, however deep, in the order of their relative paths.

A zip of images, such as EDM's dataset tool writes (`00000/img00000000.png` …).
"""

import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ldm.data.transforms import SUFFIXES, CorruptImage, decode, is_image
from ldm.errors import LdmError, UsageError


class Source(Protocol):
    """Whole images, numbered: one split of a data set. It pickles, so that workers can have it.

    A source without classes may leave out `classes` and `label`: they are read by `label_of`.
    """

    classes: tuple[str, ...]
    """Names of the classes; () where labels were not asked for."""

    def __len__(self) -> int:
        """Number of images."""

    def name(self, index: int) -> str:
        """The path of an image, for messages."""

    def load(self, index: int) -> np.ndarray:
        """An image as RGB uint8 (H, W, 3).

        Raises:
            ldm.data.decode.CorruptImage: it cannot be read.
        """

    def label(self, index: int) -> int:
        """The class of an image: a place in `classes`, or −1 for none."""


def label_of(source: Source, index: int) -> int:
    """The class of an image of any source, −1 where it has none."""
    return source.label(index) if getattr(source, "classes", ()) else -1


def load_at_least(source: Source, index: int, side: int) -> np.ndarray:
    """An image of a source, (H, W, 3) uint8, both sides at least `side` pixels.

    Raises:
        CorruptImage: it cannot be read.
        LdmError: it is smaller; nothing is ever enlarged.
    """
    image = source.load(index)
    height, width = image.shape[:2]
    if min(height, width) < side:
        raise LdmError(
            f"{source.name(index)} is {width}×{height}, smaller than the {side}×{side} asked for: "
            "lower the resolution, or remove the image"
        )
    return image


Labels = tuple[tuple[str, ...], np.ndarray]
"""Names of the classes; int32 (n,), the class of each image, −1 for none."""

_NUMBERED = re.compile(r"(.*/)?\d{5}/img\d{8}\.\w+")


def unlabelled(count: int) -> Labels:
    """No classes, and `count` images of none."""
    return (), np.full(count, -1, np.int32)


def folder_labels(names: Sequence[str], where: str) -> Labels:
    """Classes as folders: the first folder an image lies in below what all images share.

    Of `cat/1.png` and `dog/a/2.png` the classes are cat and dog; so they are of `x/cat/1.png` and
    `x/dog/a/2.png`, for a folder that holds every image tells none from another. Classes are in the
    order of their names.

    Args:
        names: paths of the images, relative, with slashes.
        where: what they are relative to, for messages.

    Raises:
        UsageError: an image lies in no such folder (all of them in one, or in none, included); or
            the folders are those that EDM's dataset tool and `ldm sample` fill in turn.
    """
    folders = [tuple(name.split("/")[:-1]) for name in names]
    first, last = min(folders), max(folders)  # what both begin with, all do
    depth = next((i for i, part in enumerate(first) if part != last[i]), len(first))
    for name, folder in zip(names, folders, strict=True):
        if len(folder) <= depth:
            raise UsageError(
                f"{where}/{name} has no class: labels want every image in one of two or more "
                "folders named after the classes; move it into one, or leave labels out"
            )
    if all(map(_NUMBERED.fullmatch, names)):
        raise UsageError(
            f"{where} holds folders by number ({names[0]}), which are no classes: "
            "name folders after the classes, or leave labels out"
        )
    classes = sorted({folder[depth] for folder in folders})
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[folder[depth]] for folder in folders], np.int32)
    return tuple(map(printable, classes)), labels


def printable(name: str) -> str:
    """A file's name as JSON can hold it: bytes that are no UTF-8 as \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class FolderSource:
    """Every image under a folder. Links to folders are followed; hidden files are left out.

    Args:
        labels: read the folders as classes, as `folder_labels` does.

    Raises:
        LdmError: there is no image in it.
        UsageError: labels are asked for and an image has none.
    """

    def __init__(self, path: Path, labels: bool = False):
        self.path = path
        self._names = sorted(name for name in _walk(path) if is_image(name))
        if not self._names:
            raise LdmError(f"{path} holds no images: {' '.join(SUFFIXES)} are read")
        self.classes, self._labels = (
            folder_labels(self._names, str(path)) if labels else unlabelled(len(self._names))
        )

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.path}/{self._names[index]}"

    def load(self, index: int) -> np.ndarray:
        path = self.path / self._names[index]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CorruptImage(error.strerror or str(error)) from error
        return decode(data, path.suffix)

    def label(self, index: int) -> int:
        return int(self._labels[index])


def _walk(path: Path) -> Iterator[str]:
    """Paths of all files, relative to `path`, each folder entered once even if links go round."""
    entered = set()
    for folder, folders, files in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in entered:
            folders.clear()
            continue
        entered.add(real)
        relative = Path(folder).relative_to(path)
        yield from ((relative / file).as_posix() for file in files)


class ZipSource:
    """Every image in a zip, in the order of their paths; other files in it are ignored.

    Args:
        labels: read the folders as classes, as `folder_labels` does.

    Raises:
        LdmError: it is truncated, no zip, or holds no image.
        UsageError: labels are asked for and an image has none.
    """

    def __init__(self, path: Path, labels: bool = False):
        self.path = path
        self._handle: tuple[int, zipfile.ZipFile] | None = None
        try:
            with zipfile.ZipFile(path) as archive:
                self._names = sorted(name for name in archive.namelist() if is_image(name))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise LdmError(f"{path} is truncated or no zip archive: copy it again") from error
        if not self._names:
            raise LdmError(f"{path} holds no images: {' '.join(SUFFIXES)} are read")
        self.classes, self._labels = (
            folder_labels(self._names, str(path)) if labels else unlabelled(len(self._names))
        )

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.path}/{self._names[index]}"

    def load(self, index: int) -> np.ndarray:
        name = self._names[index]
        try:
            data = self._archive().read(name)
        except Exception as error:  # encryption and damage make zipfile raise nearly anything
            raise CorruptImage(str(error) or type(error).__name__) from error
        return decode(data, Path(name).suffix)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def _archive(self) -> zipfile.ZipFile:
        # one handle a process: forked ones would share, and move, one position in the file
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = os.getpid(), zipfile.ZipFile(self.path)
        return self._handle[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_handle": None}
