"""Sources of whole images: a folder, and a zip such as EDM's dataset tool writes.

Images in files are in the order of their paths, and their folders can name classes.
"""

import logging
import os
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from ldm.config import Resolution, format_size
from ldm.data.labels import (
    DATASET_JSON,
    LIMIT,
    Labels,
    folder_labels,
    match_labels,
    numbered_labels,
    read_dataset_json,
    read_label_file,
)
from ldm.data.transforms import (
    LARGE,
    MAX_BYTES,
    SMALL,
    SUFFIXES,
    CorruptImage,
    OtherChannels,
    covers,
    decode,
    enlarged,
    image_size,
    is_hidden,
    is_image,
    resize,
    too_large,
)
from ldm.errors import LdmError, UsageError, brief, listed
from ldm.files import HeaderReader, lfs_pointer, read_bytes
from ldm.images import PixelType
from ldm.seeds import shuffled

Split = Literal["train", "val", "all"]
Small = Literal["error", "skip", "enlarge"]

UTF8 = ("utf-8", "surrogateescape")  # of file names, which may have any bytes

log = logging.getLogger("ldm")
_told: set[str] = set()


def tell(note: str) -> None:
    """Log a note about a data set, which may be opened often: once, in the first process."""
    if note not in _told and os.environ.get("RANK", "0") == "0":
        log.warning("%s", note)
        _told.add(note)


MAX_ENLARGED = 2**26
"""Pixels of an image that is enlarged, 8192 × 8192."""
PROBED = 500  # images that are looked at, when one is too small, to say how many are


class LeftOut:
    """Files that are no images of a data set, counted by their kind, with the first of each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def keeps(self, name: str) -> bool:
        """True for the relative path of an image; others are counted, but for label files."""
        if is_image(name):
            return True
        suffix = PurePosixPath(name).suffix.lower()
        if name != DATASET_JSON and suffix != ".cls":
            self.add("hidden" if is_hidden(name) else suffix or "without a suffix", name)
        return False

    def add(self, kind: str, name: str) -> None:
        """Count a file of some kind, such as ".txt" or "links"."""
        self._counts[kind] += 1
        self._first.setdefault(kind, name)

    @property
    def kinds(self) -> dict[str, tuple[int, str]]:
        """The number, and the first, of each kind."""
        return {kind: (count, self._first[kind]) for kind, count in self._counts.items()}

    def merge(self, kinds: Mapping[str, tuple[int, str]]) -> None:
        """Count those of a later place."""
        for kind, (count, first) in kinds.items():
            self._counts[kind] += count
            self._first.setdefault(kind, first)

    def __str__(self) -> str:
        if not self._counts:
            return ""
        kinds = [f"{count:,} {kind}" for kind, count in self._counts.most_common()]
        some = self._first[self._counts.most_common(1)[0][0]]
        return f" (left out: {listed(kinds, 8)}, such as {some})"

    def tell(self, where: str, kept: int) -> None:
        """Log what was left out, if anything was."""
        if self._counts:
            tell(f"{where}: {kept:,} images{self}")


class Source(ABC):
    """Whole images by number: one split of a data set. It can be pickled, for worker processes."""

    classes: tuple[str, ...] = ()
    """Names of the classes; () without labels."""
    held_out: int | None = None
    """Images, the last ones, that whoever made the data set holds out; None if that is not said."""
    root: str = ""
    """Beginning of all names, where it is no part of their files' paths."""
    small: Small = "error"
    """Treatment of images that are too small by `load_at_least`."""
    channels: int = 3
    """C, channels of the images."""
    keep: PixelType = "uint16"
    """The deepest type of pixels that is kept, see `decode`."""
    range: tuple[float, float] | None = None
    """The values of pixels that are −1 and 1; None: those of their type."""

    _labels: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the path of an image, for messages."""

    @abstractmethod
    def load(self, index: int) -> np.ndarray:
        """Load an image as pixels (H, W, C) of its own depth, or raise `CorruptImage`."""

    def identity(self) -> str:
        """SHA-256 of the list of images, by their names: quick, and blind to their contents."""
        listing = sha256()
        for index in range(len(self)):
            listing.update(f"{self.name(index)}\0".encode(*UTF8))
        return listing.hexdigest()

    def label(self, index: int) -> int:
        """Return the class of an image, as an index into `classes`; −1 for none."""
        return -1 if self._labels is None else int(self._labels[index])

    def file(self, index: int) -> Path:
        """Return the file with an image: its own, or an archive of many."""
        return Path(self.name(index))

    def shuffled(self, seed: int, k: int) -> int:
        """Return the index of the k-th image of a training run, a function of (seed, k) alone.

        Each epoch k div n visits every image once, in a new order.
        """
        return shuffled(seed, k, len(self))

    def part(self, indices: "Indices") -> "Source":
        """Return some of the images as a source."""
        return Part(self, indices)

    def with_keep(self, keep: PixelType) -> "Source":
        """Return the same images, of which `keep` is the deepest type."""
        other = copy(self)
        other.keep = keep
        return other

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height of an image, from its file's header where it has one."""
        height, width = self.load(index).shape[:2]
        return width, height

    def load_at_least(self, index: int, resolution: Resolution) -> np.ndarray:
        """Load an image (H, W, C) with no side shorter than a resolution's.

        Raises:
            CorruptImage, LdmError: it is smaller, and `small` is "skip" or "error".
            LdmError: it has another number of channels; see `load_named`.
        """
        image = self.load_named(index)
        height, width = image.shape[:2]
        if covers(height, width, resolution):
            return image
        if self.small == "enlarge":
            taller, wider = enlarged(height, width, resolution)
            if taller * wider > MAX_ENLARGED:
                raise CorruptImage(
                    f"{name_size(height, width, resolution)}, too narrow to be enlarged"
                )
            return resize(image, taller, wider)
        if self.small == "skip":
            raise CorruptImage(f"{SMALL}{name_size(height, width, resolution)}")
        raise LdmError(
            f"{self.name(index)} is {name_size(height, width, resolution)}, smaller than the "
            f"{format_size(resolution)} requested{self._share_smaller(resolution)}: set "
            "data.small=skip or data.small=enlarge, or lower the resolution"
        )

    def load_named(self, index: int) -> np.ndarray:
        """Load an image; an LdmError names one that has not the number of channels requested.

        In data of three channels, as most are, it is corrupt instead.
        """
        try:
            return self.load(index)
        except OtherChannels as error:
            if self.channels == 3:
                raise
            raise LdmError(f"{self.name(index)} is {error}") from error

    def _share_smaller(self, resolution: Resolution) -> str:
        """Say how many of some images, evenly spread, are smaller."""
        probed, smaller = np.linspace(0, len(self) - 1, min(PROBED, len(self))).round(), 0
        for index in probed.astype(int).tolist():
            with suppress(CorruptImage):
                width, height = self.size(index)
                smaller += not covers(height, width, resolution)
        return f", as are {smaller} of {len(probed)} images that were looked at" if smaller else ""


def name_size(height: int, width: int, resolution: Resolution) -> str:
    """An image's size beside a resolution: as usual width first, but height first if it is H×W."""
    is_square = isinstance(resolution, int)
    return f"{width}×{height}" if is_square else f"{height}×{width} (height×width)"


# ---------------------------------------------------------------------------- folder and zip
SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
"""Names of folders that are splits, where one is train and another val."""


class PathSource(Source):
    """Images known by their paths in a folder or an archive, given the paths of all files.

    If all lie in folders train and val, as ImageNet's do, those of val are the held-out ones.

    Args:
        names: of all files; those that are no images are counted in `left_out`.
        labels: read classes: of `label_file`, of a `dataset.json`, or of folders.
        label_file: path of a CSV file, see `read_label_file`.
    """

    def __init__(
        self, path: Path, names: Iterable[str], left_out: LeftOut, labels: bool, label_file: str
    ) -> None:
        self.path = path
        self._names = sorted(filter(left_out.keeps, names))
        if not self._names:
            raise LdmError(f"{path} holds no images{left_out}: {' '.join(SUFFIXES)} are read")
        left_out.tell(str(path), len(self._names))
        is_split = self._take_splits()
        if labels:
            self.classes, self._labels = self._read_labels(is_split, label_file)

    def _take_splits(self) -> bool:
        """Put images of val last, if there are splits."""
        tops = {name.partition("/")[0] if "/" in name else "" for name in self._names}
        splits = [SPLITS.get(top) for top in tops]
        if None in splits or not {"train", "val"} <= set(splits):
            return False
        groups: dict[str, list[str]] = {"train": [], "val": [], "test": []}
        for name in self._names:
            groups[SPLITS[name.partition("/")[0]]].append(name)
        self._names, self.held_out = groups["train"] + groups["val"], len(groups["val"])
        counts = ", ".join(f"{len(group):,} of {name}" for name, group in groups.items() if group)
        without = "; those of test are left out" if groups["test"] else ""
        tell(f"{self.path} has splits, not classes: {counts} images; val is held out{without}")
        return True

    def _read_labels(self, is_split: bool, label_file: str) -> Labels:
        if label_file:
            path = Path(label_file).expanduser()
            return match_labels(self._names, read_label_file(path), path)
        content = self.read_file(DATASET_JSON)
        table = content and read_dataset_json(content, f"{self.path}/{DATASET_JSON}")
        if table:
            missing = [name for name in self._names if name not in table]
            if missing:
                raise UsageError(
                    f"{self.path}/{DATASET_JSON} gives no class for {len(missing):,} images, such "
                    f"as {missing[0]}: make it again, or omit labels"
                )
            return numbered_labels([table[name] for name in self._names], self.name)
        return folder_labels(self._names, str(self.path), is_split)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return f"{self.path}/{self._names[index]}"

    def identity(self) -> str:
        names = "\0".join(self._names)  # without the folder, which may be moved
        return sha256(names.encode(*UTF8)).hexdigest()

    def load(self, index: int) -> np.ndarray:
        return decode(self.read(index), Path(self._names[index]).suffix, self.channels, self.keep)

    def size(self, index: int) -> tuple[int, int]:
        return image_size(self.read(index), Path(self._names[index]).suffix, self.channels)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Read the file of an image, or raise `CorruptImage`."""

    @abstractmethod
    def read_file(self, name: str) -> bytes | None:
        """Read a small file that is no image; None if there is none of that name."""


class FolderSource(PathSource):
    """Every image under a folder. Links to folders are followed; hidden files are left out."""

    def __init__(self, path: Path, labels: bool = False, label_file: str = "") -> None:
        left_out = LeftOut()
        super().__init__(path, walk(path, left_out), left_out, labels, label_file)

    def read(self, index: int) -> bytes:
        try:
            return read_bytes(self.path / self._names[index], MAX_BYTES)
        except OSError as error:
            raise too_large(error) or CorruptImage(brief(error)) from error

    def read_file(self, name: str) -> bytes | None:
        try:
            return read_bytes(self.path / name, LIMIT)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LdmError(f"could not read {self.path / name} ({brief(error)})") from error


def walk(path: Path, left_out: LeftOut) -> Iterator[str]:
    """Yield relative paths of all files; enter each folder once even if links form a loop."""
    entered = set()

    def refused(error: OSError) -> None:
        left_out.add("folders that cannot be read", str(error.filename))

    for folder, folders, files in os.walk(path, onerror=refused, followlinks=True):
        if (real := os.path.realpath(folder)) in entered:
            folders.clear()
            continue
        entered.add(real)
        relative = "" if folder == str(path) else f"{Path(folder).relative_to(path).as_posix()}/"
        yield from (f"{relative}{file}" for file in files)


MAX_DIRECTORY = 2**30
"""Bytes of a zip's directory, of ten million images; in memory it takes ten times as much."""


class ZipSource(PathSource):
    """Every image in a zip. Of two with one name, the last counts.

    Only stored and deflated images are read: other methods cannot be stopped at a size.
    """

    def __init__(self, path: Path, labels: bool = False, label_file: str = "") -> None:
        self._handle: tuple[int, zipfile.ZipFile] | None = None
        try:
            with HeaderReader(path, MAX_DIRECTORY) as file, zipfile.ZipFile(file) as archive:
                names = sorted(set(archive.namelist()))
        except Exception as error:  # damage makes zipfile raise nearly anything
            message = f"{path} is truncated or not a zip archive ({brief(error)}): copy it again"
            raise LdmError(lfs_pointer(path, "the archive") or message) from error
        super().__init__(path, names, LeftOut(), labels, label_file)

    def file(self, index: int) -> Path:
        return self.path

    def read(self, index: int) -> bytes:
        return self._read(self._names[index], MAX_BYTES)

    def read_file(self, name: str) -> bytes | None:
        try:
            return self._read(name, LIMIT)
        except CorruptImage as error:
            if isinstance(error.__cause__, KeyError):
                return None
            raise LdmError(f"could not read {self.path}/{name} ({error})") from error

    def _read(self, name: str, limit: int) -> bytes:
        try:
            # one handle per process: forked ones would share, and move, one position in the file
            if self._handle is None or self._handle[0] != os.getpid():
                self._handle = os.getpid(), zipfile.ZipFile(self.path)
            archive, entry = self._handle[1], self._handle[1].getinfo(name)
            if entry.file_size > limit:
                raise CorruptImage(f"{LARGE}{entry.file_size:,} bytes, more than {limit:,}")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise CorruptImage("compressed by another method than deflate")
            with archive.open(entry) as file:
                return file.read(entry.file_size + 1)  # without a number, it inflates all at once
        except Exception as error:  # encryption and damage make zipfile raise nearly anything
            raise CorruptImage(brief(error)) from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None}


# -------------------------------------------------------------------------------------- part
Indices = Sequence[int] | np.ndarray


class Part(Source):
    """The images `indices` of a source, as a source with the same classes."""

    def __init__(self, whole: Source, indices: Indices) -> None:
        self._whole, self._indices, self.classes = whole, indices, whole.classes
        self.small, self.channels = whole.small, whole.channels
        self.keep, self.range = whole.keep, whole.range

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._whole.name(self._indices[index])

    def label(self, index: int) -> int:
        return self._whole.label(self._indices[index])

    def file(self, index: int) -> Path:
        return self._whole.file(self._indices[index])

    def identity(self) -> str:
        return self._whole.identity()  # which images of it these are follows from the settings

    def with_keep(self, keep: PixelType) -> Source:
        return Part(self._whole.with_keep(keep), self._indices)

    def load(self, index: int) -> np.ndarray:
        return self._whole.load(self._indices[index])

    def size(self, index: int) -> tuple[int, int]:
        return self._whole.size(self._indices[index])
