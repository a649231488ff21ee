"""A folder of images, however deep, in the order of their relative paths."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ldm.data.decode import SUFFIXES, CorruptImage, decode, is_image
from ldm.data.labels import folder_labels, unlabelled
from ldm.errors import LdmError


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
