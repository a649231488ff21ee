"""A zip of images, such as EDM's dataset tool writes (`00000/img00000000.png` …)."""

import os
import zipfile
from pathlib import Path

import numpy as np

from ldm.data.decode import SUFFIXES, CorruptImage, decode, is_image
from ldm.data.labels import folder_labels, unlabelled
from ldm.errors import LdmError


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
