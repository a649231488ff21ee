"""Small images made on the spot, and files of them."""

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data import Source
from ldm.data.transforms import CorruptImage


def noise(seed: int, height: int = 48, width: int = 40) -> np.ndarray:
    """(height, width, 3) uint8, every pixel another."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def coordinates(index: int, height: int = 48, width: int = 40) -> np.ndarray:
    """(height, width, 3) uint8: every pixel holds (index, row, column)."""
    row, column = np.indices((height, width))
    return np.stack([np.full_like(row, index), row, column], axis=-1).astype(np.uint8)


def encode(image: np.ndarray, format: str = "PNG", **options) -> bytes:
    """A file of the image; mode by its shape and type."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format, **options)
    return file.getvalue()


def png_folder(path: Path, images: list[np.ndarray]) -> Path:
    """`0000.png`, `0001.png` … in a new folder."""
    path.mkdir(parents=True)
    for number, image in enumerate(images):
        (path / f"{number:04d}.png").write_bytes(encode(image))
    return path


def class_folder(path: Path, images: dict[str, np.ndarray]) -> Path:
    """A new folder of PNGs by their paths in it, such as `cat/1.png`."""
    for name, image in images.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(encode(image))
    return path


def zip_file(path: Path, members: dict[str, bytes]) -> Path:
    """A zip of these members, in this order."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


class Coded(Source):
    """Images in memory whose pixels hold (index, row, column); `corrupt` ones cannot be read."""

    def __init__(self, count, corrupt=(), height=24, width=20):
        self.count, self.corrupt, self.sides = count, corrupt, (height, width)

    def __len__(self):
        return self.count

    def name(self, index):
        return f"image {index}"

    def load(self, index):
        if index in self.corrupt:
            raise CorruptImage("truncated")
        return coordinates(index, *self.sides)


class CodedClasses(Coded):
    """`Coded`, where image i is of class i % 3."""

    classes = ("a", "b", "c")

    def __init__(self, count, corrupt=(), **size):
        super().__init__(count, corrupt, **size)
        self._labels = np.arange(count) % 3


def labels_of(source):
    return [source.label(index) for index in range(len(source))]
