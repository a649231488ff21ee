"""Data sets of the Hugging Face Hub, and parquet or arrow files in folders, by `datasets`.

A data set is a table with a column of images (files as bytes or paths) and, for labels, a column of
classes. It lies in memory-mapped files: an image is read at any position, and only when it is
asked for.

    hf:OWNER/NAME                  the split train; validation (or test), if there is one, held out
    hf:OWNER/NAME@REVISION:SPLIT   that split alone
    hf:OWNER/NAME:CONFIG/SPLIT     of one of several configurations
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm.config import did_you_mean
from ldm.data.labels import named_labels, numbered_labels, printable
from ldm.data.sources import Source
from ldm.data.transforms import (
    LARGE,
    MAX_BYTES,
    CorruptImage,
    decode,
    image_size,
    is_hidden,
    is_image,
    too_large,
)
from ldm.errors import LdmError, UsageError, brief
from ldm.files import read_bytes

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "hf:"
NAME = re.compile(
    r"hf:(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^:@]+))?(:((?P<config>[^:/]+)/)?(?P<split>[^:/]+))?"
)
TABLES = (".parquet", ".arrow")
SAVED = ("dataset_dict.json", "state.json")
"""Files of `datasets`' own save_to_disk, of several splits or one."""
MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp"}
"""Suffixes of images without a name, by their first bytes."""
HELD_OUT = ("validation", "valid", "val", "dev", "test")
"""Names of splits for validation; the first that there is."""


def is_hub(source: str) -> bool:
    """True for the name of a data set on the Hub; `hf://` is the path of a file there."""
    return source.startswith(HUB) and not source.startswith(f"{HUB}//")


def is_saved(folder: Path) -> bool:
    """True for a folder that `datasets`' save_to_disk wrote."""
    return any((folder / name).is_file() for name in SAVED)


def find_tables(folder: Path) -> list[Path]:
    """Return the parquet and arrow files in a folder, or in its `data/`, as on the Hub."""
    inside = (f for where in (folder, folder / "data") if where.is_dir() for f in where.iterdir())
    return sorted(f for f in inside if f.suffix in TABLES and not is_hidden(f.name))


class TableSource(Source):
    """Images of the splits of a `datasets.Dataset`, one after the other.

    Args:
        splits: by name; the second, if there is one, is held out.
        where: the data set's name, for messages.
        roots: folders in which files that the table names may lie; the first begins relative paths.
        labels: read classes.
        image_column, label_column: "" finds the only column that can be meant.
    """

    def __init__(
        self,
        splits: "Mapping[str, Dataset]",
        where: str,
        roots: Sequence[Path],
        labels: bool = False,
        image_column: str = "",
        label_column: str = "",
    ) -> None:
        from datasets import Image

        first = next(iter(splits.values()))
        self.root, self._roots = where, [root.resolve() for root in roots]
        self._column = _find_image_column(first, image_column, where)
        encoded = Image(decode=False)
        self._splits = {
            name: split.select_columns([self._column]).cast_column(self._column, encoded)
            for name, split in splits.items()
        }
        self._starts = [0, *accumulate(len(split) for split in splits.values())]
        self.held_out = len(self) - self._starts[1] or None
        if not len(self):
            raise LdmError(f"{where} has no rows: choose another split")
        if labels:
            self._read_labels(splits, _find_label_column(first, label_column, where))

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, index: int) -> str:
        split, row = self._place(index)
        suffix = ""
        with suppress(CorruptImage):
            data, named = self.read(index)
            suffix = named or next((s for magic, s in MAGIC.items() if data.startswith(magic)), "")
        return f"{self.root}/{split}/{row}{suffix}"

    def file(self, index: int) -> Path:
        return self._files[max(0, bisect_right(self._file_starts, index) - 1)]

    def identity(self) -> str:
        sizes = [file.stat().st_size for file in self._files]
        return sha256(f"{self._starts} {sizes}".encode()).hexdigest()

    def load(self, index: int) -> np.ndarray:
        return decode(*self.read(index), self.channels, self.keep)

    def size(self, index: int) -> tuple[int, int]:
        return image_size(*self.read(index), self.channels)

    def read(self, index: int) -> tuple[bytes, str]:
        """Read the file of an image, and the suffix of its name, or raise `CorruptImage`."""
        split, row = self._place(index)
        try:
            cell = self._splits[split][row][self._column]
            if cell is None or (cell["bytes"] is None and not cell["path"]):
                raise CorruptImage("no image in this row")
            data = cell["bytes"]
            if data is None:
                data = read_bytes(self._find(cell["path"]), MAX_BYTES)
        except OSError as error:
            raise too_large(error) or CorruptImage(brief(error)) from error
        if len(data) > MAX_BYTES:
            raise CorruptImage(f"{LARGE}{len(data):,} bytes, more than {MAX_BYTES:,}")
        return data, Path(cell["path"] or "").suffix

    def _find(self, name: str) -> Path:
        """The file that a table names; none but those in `roots`: others are no part of it."""
        path = (self._roots[0] / name).resolve()
        if not any(path.is_relative_to(root) for root in self._roots):
            raise CorruptImage(f"{name} lies outside of the data set")
        return path

    def _place(self, index: int) -> tuple[str, int]:
        number = bisect_right(self._starts, index) - 1
        return list(self._splits)[number], int(index) - self._starts[number]

    @cached_property
    def _files(self) -> list[Path]:
        return [Path(f["filename"]) for split in self._splits.values() for f in split.cache_files]

    @cached_property
    def _file_starts(self) -> list[int]:
        from datasets import Dataset

        return [0, *accumulate(len(Dataset.from_file(str(file))) for file in self._files)][:-1]

    def _read_labels(self, splits: "Mapping[str, Dataset]", column: str) -> None:
        from datasets import ClassLabel

        features = {name: split.features.get(column) for name, split in splits.items()}
        feature = next(iter(features.values()))
        if other := next((name for name, found in features.items() if found != feature), None):
            raise UsageError(
                f"{self.root}: column '{column}' of split '{other}' is of another kind: name one "
                "split"
            )
        if not re.fullmatch(r"u?int\d+|(large_)?string", str(getattr(feature, "dtype", ""))):
            raise UsageError(f"{self.root}: column '{column}' does not hold classes: name another")
        parts = [
            s.select_columns([column]).with_format("arrow")[:][column] for s in splits.values()
        ]
        values = [value for part in parts for value in part.to_pylist()]
        if None in values:
            raise UsageError(f"{self.name(values.index(None))} has no class: omit labels")
        if "string" in feature.dtype:
            self.classes, self._labels = named_labels(values)
            return
        self.classes, self._labels = numbered_labels(values, self.name)
        if isinstance(feature, ClassLabel):
            if len(self.classes) > len(feature.names):
                raise UsageError(
                    f"{self.root} has class {len(self.classes) - 1}, but names only "
                    f"{len(feature.names)} classes: repair it, or omit labels"
                )
            self.classes = tuple(map(printable, feature.names))


def open_hub(source: str, labels: bool = False, image: str = "", label: str = "") -> TableSource:
    """Open a data set of the Hub, `hf:OWNER/NAME[@REVISION][:[CONFIG/]SPLIT]`.

    It is fetched into `datasets`' cache once. `image` and `label` name columns.
    """
    match = NAME.fullmatch(source)
    if match is None:
        raise UsageError(f"{source}: must have the form hf:OWNER/NAME[@REVISION][:[CONFIG/]SPLIT]")
    library = _library()
    if Path(match["name"]).exists():  # which `datasets` would read instead
        raise UsageError(
            f"{source}: there is a folder {match['name']} here, too: give its path, or change to "
            "another folder"
        )
    try:
        found = library.load_dataset(match["name"], match["config"], revision=match["revision"])
    except Exception as error:  # of the network, of the Hub, of the files: of any class
        raise LdmError(
            f"{source} could not be opened ({brief(error)}): check its name and your connection; "
            "for a private or gated one, log in with `hf auth login`"
        ) from error
    splits, cache = _choose(found, match["split"], source), library.config.HF_CACHE_HOME
    caches = [Path(cache), Path(library.config.HF_DATASETS_CACHE)]
    return TableSource(splits, source, caches, labels, image, label)


def open_tables(
    folder: Path, labels: bool = False, image: str = "", label: str = ""
) -> TableSource:
    """Open a folder of parquet or arrow files, laid out as on the Hub or by `save_to_disk`."""
    library = _library()
    try:
        if is_saved(folder):
            found = library.load_from_disk(str(folder))
            found = found if isinstance(found, dict) else {"train": found}
        else:
            found = library.load_dataset(str(folder))
    except Exception as error:
        raise LdmError(f"{folder} could not be read by `datasets` ({brief(error)})") from error
    splits = _choose(found, None, str(folder))
    return TableSource(splits, str(folder), [folder], labels, image, label)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise LdmError("data sets of the Hub need `datasets`: pip install 'ldm[hf]'") from error
    return datasets


def _choose(
    splits: "Mapping[str, Dataset]", wanted: str | None, where: str
) -> "dict[str, Dataset]":
    """The wanted split; else that for training, and that for validation, if there is one."""
    if wanted is not None:
        if wanted not in splits:
            raise UsageError(f"{where} has no split '{wanted}'{did_you_mean(wanted, list(splits))}")
        return {wanted: splits[wanted]}
    train = "train" if "train" in splits else next(iter(splits))
    held_out = next((name for name in HELD_OUT if name in splits and name != train), None)
    return {name: splits[name] for name in (train, held_out) if name is not None}


def _find_image_column(split: "Dataset", wanted: str, where: str) -> str:
    from datasets import Image, Value

    def may_be(name: str, feature: Any) -> bool:
        if isinstance(feature, dict):
            return feature.keys() >= {"bytes", "path"}
        if isinstance(feature, Value) and feature.dtype == "string" and len(split):
            return is_image(str(split[0][name]))
        binary = isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
        return binary or isinstance(feature, Image)

    kinds = [name for name, feature in split.features.items() if isinstance(feature, Image)]
    found = kinds or [name for name, feature in split.features.items() if may_be(name, feature)]
    return _only(found, split.column_names, wanted, "image", where)


def _find_label_column(split: "Dataset", wanted: str, where: str) -> str:
    from datasets import ClassLabel

    found = [name for name, feature in split.features.items() if isinstance(feature, ClassLabel)]
    found = found or [
        name for name in ("label", "labels", "class", "cls") if name in split.features
    ]
    return _only(found, split.column_names, wanted, "label", where)


def _only(found: Iterable[str], columns: list[str], wanted: str, what: str, where: str) -> str:
    """The wanted column, or the only one that was found."""
    if wanted:
        if wanted not in columns:
            raise UsageError(f"{where} has no column '{wanted}'{did_you_mean(wanted, columns)}")
        return wanted
    names = list(found)
    if len(names) > 1 and what in names:
        return what
    if len(names) != 1:
        many = "several columns" if names else "no column"
        raise UsageError(
            f"{where} has {many} that may hold the {what}s: set data.{what}_column to one of "
            f"{', '.join(names or columns)}"
        )
    return names[0]
