"""Class labels: the name of each class, and which class each image of a source is of."""

import re
from collections.abc import Sequence

import numpy as np

from ldm.errors import UsageError

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
