"""The classes a model was conditioned on, and which of them each image is to be of."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from ldm.errors import UsageError
from ldm.seeds import generator

Label = int | str
"""A class by its number from 0, −1 for none, or by its name. A number may be of any kind of whole
number, NumPy's and torch's included, or written in words: "3"."""


@dataclass(frozen=True)
class Classes:
    """How many there are, and what they are called; no names: they have numbers alone."""

    count: int = 0
    names: tuple[str, ...] = ()

    def number(self, label: Label) -> int:
        """The number of a class.

        Raises:
            UsageError: there is no such class, or the model has none at all.
        """
        if not self.count:
            raise UsageError(f"label {label!r}: this model has no classes, leave labels out")
        for name in (label, label.strip()) if isinstance(label, str) else ():
            if name in self.names:
                return self.names.index(name)
        number = _as_number(label)
        if number is not None and -1 <= number < self.count:
            return number
        asked = label if number is None else number
        called = f" ({', '.join(self.names[:12])}{' …' if self.count > 12 else ''})"
        raise UsageError(
            f"label {asked!r}: classes are 0 to {self.count - 1}{called if self.names else ''}, "
            "or -1 for none"
        )

    def read(self, labels: Label | Iterable[Label]) -> tuple[int, ...]:
        """The numbers of one class, or of several.

        Raises:
            UsageError: there is no such class, or not one label.
        """
        several = _as_list(labels)
        if several == []:
            raise UsageError("labels are empty: give at least one, or leave them out")
        return tuple(map(self.number, [labels] if several is None else several))

    def choose(
        self, labels: Label | Sequence[Label] | None, n: int, seed: int
    ) -> tuple[int, ...] | None:
        """The classes of images 0 … n−1 of a seed; None for a model without classes.

        Args:
            labels: one for all, one for each, or None: drawn evenly for each.

        Raises:
            UsageError: there is no such class, or not one for each image.
        """
        if labels is None:
            return tuple(self.draw(seed, range(n))) if self.count else None
        chosen = self.read(labels)
        if _as_list(labels) is None:
            return chosen * n
        if len(chosen) != n:
            raise UsageError(f"{len(chosen)} labels for {n} images: give one, or one for each")
        return chosen

    def draw(self, seed: int, indices: Sequence[int]) -> list[int]:
        """A class for each image, evenly over all, a function of (seed, i) alone."""
        return [int(generator(seed, "class", i).integers(self.count)) for i in indices]


def _as_number(label: Any) -> int | None:
    """A label as the number it is or spells; None where it does neither."""
    if isinstance(label, str):
        return int(label) if re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", label) else None
    label = _plain(label)
    try:
        return None if isinstance(label, bool) else index(label)
    except TypeError:
        return None


def _as_list(labels: Any) -> list | None:
    """Several labels; None where they are one."""
    labels = _plain(labels)
    return list(labels) if isinstance(labels, Iterable) and not isinstance(labels, str) else None


def _plain(labels: Any) -> Any:
    """A tensor's or an array's labels as Python's numbers."""
    return labels.tolist() if hasattr(labels, "tolist") else labels
