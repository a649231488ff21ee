"""What an analysis leaves: pictures and tables in a folder, and the numbers worth printing."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ldm.files import write_atomically

Cell = str | int | float | None


class Analysis(NamedTuple):
    """What was found, for the person who asked."""

    title: str
    """Of the table: what was measured, on which images."""
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    """Of the table, cells as they are printed."""
    files: tuple[Path, ...]
    """The pictures, then the CSVs with all numbers."""
    notes: tuple[str, ...] = ()
    """What the reader must know to judge the numbers."""


def analysis_folder(out: Path | None, model: Path) -> Path:
    """Where to write: what was asked for, or `analysis/` beside the model, in its run."""
    return out or (model if model.is_dir() else model.parent) / "analysis"


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Path:
    """Write a table whole or not at all; numbers in nine digits, nothing where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow([f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row])
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))
    return path
