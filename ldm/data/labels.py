"""Classes of images: from folders, from EDM's `dataset.json`, and from CSV files."""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ldm.errors import LdmError, UsageError, brief, listed
from ldm.files import read_bytes
from ldm.records import parse_json

Labels = tuple[tuple[str, ...], np.ndarray]
"""Names of the classes, and the class of each image (n,) int32, as an index into them."""

DATASET_JSON = "dataset.json"
"""File of EDM's and StyleGAN's dataset tools, at the root of a zip or folder."""
MOST_CLASSES = 1_000_000
"""Of classes that are mere numbers: a damaged one must not become millions."""
LIMIT = 2**30
"""Bytes of a file of labels."""
IMAGE_COLUMNS = ("file_name", "filename", "file", "path", "image", "name", "id")
LABEL_COLUMNS = ("label", "class", "category", "target", "labels", "cls")


def folder_labels(names: Sequence[str], where: str, split: bool = False) -> Labels:
    """Read classes from folders; names in the result are sorted.

    A class is the first folder below those that hold every image: cat and dog in `cat/1.png` and
    `dog/a/2.png`, and in `x/cat/1.png` and `x/dog/a/2.png`. `where` is for messages. With `split`,
    the first folder of each is its split, and no class.
    """
    folders = [tuple(name.split("/")[split:-1]) for name in names]
    first, last = min(folders), max(folders)  # a prefix of both is one of all
    depth = next((i for i, part in enumerate(first) if part != last[i]), len(first))
    for name, folder in zip(names, folders, strict=True):
        if len(folder) <= depth:
            raise UsageError(
                f"{where}/{name} has no class: with labels, every image must be in one of two or "
                "more folders named after the classes; move it into one, or omit labels"
            )
    if all(re.fullmatch(r"(.*/)?\d{5}/img\d{8}\.\w+", name) for name in names):
        raise UsageError(
            f"{where} has numbered folders ({names[0]}) without a {DATASET_JSON}, and these are "
            "not classes: name folders after the classes, or omit labels"
        )
    return named_labels([folder[depth] for folder in folders])


def named_labels(values: Sequence[str] | np.ndarray) -> Labels:
    """Turn the name of each image's class into labels; the classes are sorted."""
    classes, labels = np.unique(np.asarray(values), return_inverse=True)
    return tuple(map(printable, classes)), labels.astype(np.int32)


def numbered_labels(values: Sequence[int] | np.ndarray, name: Callable[[int], str]) -> Labels:
    """Turn the number of each image's class into labels; classes are named "0", "1", …

    Args:
        name: gives an image's name, for messages.
    """
    labels = np.asarray(values)
    if labels.min() < 0 or labels.max() >= MOST_CLASSES:
        bad = int(np.argmax((labels < 0) | (labels >= MOST_CLASSES)))
        raise UsageError(
            f"{name(bad)} has class {labels[bad]}, not one from 0 to {MOST_CLASSES - 1:,}: repair "
            "it, or omit labels"
        )
    return tuple(map(str, range(int(labels.max()) + 1))), labels.astype(np.int32)


def printable(name: str) -> str:
    """Convert a file name to valid UTF-8, with other bytes written as \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# -------------------------------------------------------------------------------- label files
def read_dataset_json(data: bytes, where: str) -> dict[str, int] | None:
    """Read EDM's `dataset.json`, {"labels": [[name, number], …]}; None if it has no labels."""
    try:
        tree = parse_json(data.decode("utf-8"))
        labels = tree["labels"]
        return None if labels is None else {str(name): _number(label) for name, label in labels}
    except (ValueError, KeyError, TypeError) as error:
        raise LdmError(
            f"{where} is not a {DATASET_JSON} of EDM's dataset tool ({brief(error)}): repair or "
            "remove it, or omit labels"
        ) from error


def _number(label: object) -> int:
    if not isinstance(label, int) or isinstance(label, bool):
        raise ValueError(f"{label!r} is not a class number")
    return label


def read_label_file(path: Path) -> dict[str, str]:
    """Read a CSV (or TSV) file of images and their classes: names to names.

    With a header, the columns are the first of `IMAGE_COLUMNS` and of `LABEL_COLUMNS` in it;
    without one, there are two, the image and its class.
    """
    try:
        text = read_bytes(path, LIMIT).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LdmError(f"could not read {path} ({brief(error)})") from error
    separator = "\t" if "\t" in text.partition("\n")[0] else ","
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=separator) if row]
    except csv.Error as error:
        raise LdmError(f"{path} is no table of comma-separated values ({error})") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    columns = [
        next((c for c in known if c in header), None) for known in (IMAGE_COLUMNS, LABEL_COLUMNS)
    ]
    image, label = 0, 1
    if all(columns):
        image, label = (header.index(str(column)) for column in columns)
        rows = rows[1:]
    elif len(header) != 2:
        raise UsageError(
            f"{path} has {len(header)} columns and no header that names them: give one with "
            f"{IMAGE_COLUMNS[0]} and {LABEL_COLUMNS[0]}"
        )
    for number, row in enumerate(rows, 2 if all(columns) else 1):
        if len(row) <= max(image, label):
            raise LdmError(f"{path}, line {number}: too few columns: repair it")
    table: dict[str, str] = {}
    for row in rows:
        name, value = row[image].strip(), row[label].strip()
        if table.setdefault(name, value) != value:
            raise LdmError(f"{path} gives {name} two classes, {table[name]} and {value}: repair it")
    return table


def _repeated(names: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore


def match_labels(names: Sequence[str], table: Mapping[str, str], path: Path) -> Labels:
    """Find images in a label file: by their paths, or by their last parts if these are unique.

    Classes that are all numbers keep them.
    """
    if len(set(names)) < len(names):
        raise UsageError(
            f"{path}: several images have one name, such as {_repeated(names)}: omit it"
        )
    found = [table.get(name) for name in names]
    if None in found:
        last = [PurePosixPath(name).name for name in names]
        stems = [PurePosixPath(name).stem for name in names]
        for keys in (last, stems):
            if None in found and len(set(keys)) == len(keys):
                found = [table.get(key) for key in keys]
    missing = [name for name, label in zip(names, found, strict=True) if label is None]
    if missing:
        raise UsageError(
            f"{path} gives no class for {len(missing):,} of {len(names):,} images, such as "
            f"{listed(missing, 1)}: add them, or omit it"
        )
    values = [label for label in found if label is not None]
    if all(re.fullmatch(r"\d{1,6}", value) for value in values):
        return numbered_labels(list(map(int, values)), names.__getitem__)
    return named_labels(values)
