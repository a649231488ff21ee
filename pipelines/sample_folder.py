"""A folder of samples, read back: as `ldm sample` wrote it, or any folder of PNGs."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.decode import CorruptImage, decode
from ldm.errors import LdmError
from ldm.run_folder import RUNS

MARK = "samples.json"
NUMBERED = re.compile(r"\d{5}/img\d{8}\.png")
LOSSY = {".jpg", ".jpeg", ".webp"}


class SampleFolder:
    """The images of a folder as a data source: square, of one size, lossless.

    Where there is a `samples.json`, only the numbered images beside it count, and its sheet of
    pictures does not; elsewhere every PNG does, however deep.

    Args:
        limit: only the first so many images, by name.

    Attributes:
        made_with: what `samples.json` says of model, seed and sampler; None without one.
        resolution: edge of the images, pixels.

    Raises:
        LdmError: no such folder, fewer than two images, sampling was not finished, compressed
            images, images that are not square, or several folders of samples in one.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        if not path.is_dir():
            raise LdmError(f"no folder of samples at {path}: make one with `ldm sample`")
        self.path = path
        self.made_with = _read_mark(path / MARK)
        names = _list_images(path, numbered=self.made_with is not None)
        announced = (self.made_with or {}).get("n", 0)
        if len(names) < min(announced, limit or announced):
            raise LdmError(
                f"{path} holds {len(names)} of its {announced} samples: run the `ldm sample` that "
                "began it again, it goes on where it stopped"
            )
        self._names = names[:limit]
        if len(self._names) < 2:
            raise LdmError(
                f"{path} gives {len(self._names)} PNG image(s) to measure, and a covariance needs "
                "two or more: sample more with `ldm sample --n`"
            )
        height, width = self._decode(0).shape[:2]
        if height != width:
            raise LdmError(f"{self.name(0)} is {width}×{height}: samples must be square")
        self.resolution = height

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.path}/{self._names[index]}"

    def load(self, index: int) -> np.ndarray:
        """An image as RGB uint8 (R, R, 3).

        Raises:
            LdmError: it is damaged, or of another size than the first.
        """
        image = self._decode(index)
        height, width = image.shape[:2]
        if (height, width) != (self.resolution, self.resolution):
            raise LdmError(
                f"{self.name(index)} is {width}×{height} and {self.name(0)} "
                f"{self.resolution}×{self.resolution}: samples of several sizes do not mix"
            )
        return image

    def _decode(self, index: int) -> np.ndarray:
        try:
            return decode((self.path / self._names[index]).read_bytes(), ".png")
        except (OSError, CorruptImage) as error:
            raise LdmError(
                f"{self.name(index)} is damaged ({error}): delete it and sample it again"
            ) from error


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


def _read_mark(mark: Path) -> dict[str, Any] | None:
    if not mark.is_file():
        return None
    try:
        return dict(json.loads(mark.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise LdmError(f"{mark} is damaged: delete it to measure the folder without it") from error


def _list_images(path: Path, numbered: bool) -> list[str]:
    """Relative paths of the images, sorted."""
    files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    lossy = [file for file in files if file.suffix.lower() in LOSSY]
    if lossy:
        raise LdmError(
            f"{path} holds compressed images ({lossy[0]}): compression changes every number; "
            "write samples as PNG"
        )
    if numbered:
        return [file.as_posix() for file in files if NUMBERED.fullmatch(file.as_posix())]
    inner = [str(path / file.parent) for file in files if file.name == MARK]
    if inner:
        raise LdmError(f"{path} holds folders of samples, give one of them: {', '.join(inner)}")
    return [file.as_posix() for file in files if file.suffix.lower() == ".png"]
