"""What a run says while it works: metrics.jsonl, TensorBoard, and a progress bar.

Only the first process writes. Values are kept as tensors and averaged when a row is written, so
that logging every step does not make the device wait for the host.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ldm.errors import LdmError
from ldm.files import write_atomically

console = Console(highlight=False, soft_wrap=True, emoji=False)  # a:b: is a path

FORMER_NAMES = {
    "critic": "discriminator",
    "critic_gradient_norm": "discriminator_gradient_norm",
}
"""Metrics that earlier versions wrote under another name."""


def progress_bar(unit: str = "steps") -> Progress:
    """The toolkit's progress bar: what, how far, how fast (field `speed`), how long still."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit} · {{task.fields[speed]}} ·"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class Logbook:
    """Rows of named numbers over images seen.

    Args:
        folder: the run's folder; None where this process does not write.
        resume_at: images seen by the state a run goes on from; later rows, written by the part
            that was lost, are cut off.

    Raises:
        LdmError: (every method that writes) the disk is full, or the folder cannot be written.
    """

    def __init__(self, folder: Path | None, resume_at: int = 0) -> None:
        self._pending: dict[str, list[Tensor | float]] = defaultdict(list)
        self._clock, self._clock_images = time.monotonic(), resume_at
        self._folder, self._rows, self._board = folder, None, None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            cut_rows(folder / "metrics.jsonl", resume_at)
            with _writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._rows = (folder / "metrics.jsonl").open("a", encoding="utf-8")
                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at + 1)

    def add(self, **values: Tensor | float) -> None:
        """Remember values of this step; their means go into the next row."""
        for name, value in values.items():
            self._pending[name].append(value.detach() if isinstance(value, Tensor) else value)

    def row(self, images_seen: int, **values: float) -> dict[str, float]:
        """Write the means since the last row, and `values`, and the speed; return the row.

        Means are over finite values; one of none is NaN here, null in the file.
        """
        now = time.monotonic()
        speed = (images_seen - self._clock_images) / max(now - self._clock, 1e-9)
        row: dict[str, Any] = {"images_seen": images_seen}
        row |= {name: _mean(seen) for name, seen in self._pending.items()}
        if self._pending:
            row["images_per_second"] = speed
            self._clock, self._clock_images = now, images_seen
        row |= values
        self._pending.clear()
        if self._rows is not None and self._board is not None:
            with _writing(self._folder):
                self._rows.write(json.dumps({k: _short(v) for k, v in row.items()}) + "\n")
                self._rows.flush()
                for name, value in row.items():
                    if name != "images_seen" and math.isfinite(value):
                        self._board.add_scalar(name, value, images_seen)
        return row

    def picture(self, name: str, sheet: Tensor, images_seen: int) -> None:
        """Show a float sheet (3, H, W) in [−1, 1] in TensorBoard."""
        if self._board is not None:
            with _writing(self._folder):
                self._board.add_image(name, (sheet + 1).clamp(0, 2) / 2, images_seen)

    def close(self) -> None:
        """Flush and close the files."""
        if self._rows is not None and self._board is not None:
            with _writing(self._folder):
                self._rows.close()
                self._board.close()


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl, without the values that were not finite.

    Metrics of earlier versions get their present names. A half-written last line, left by a
    kill, is passed over.
    """
    return [
        {FORMER_NAMES.get(k, k): v for k, v in row.items() if v is not None}
        for _, row in _lines(path)
    ]


def cut_rows(path: Path, images_seen: int) -> None:
    """Drop the rows after `images_seen`: a resumed run writes them again."""
    kept = [line + "\n" for line, row in _lines(path) if row["images_seen"] <= images_seen]
    if path.is_file():
        write_atomically(path, lambda file: file.write("".join(kept).encode()))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every whole row of a metrics.jsonl, as it is written and as it is read."""
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "images_seen" in row:
            yield line, row


@contextmanager
def _writing(folder: Path | None) -> Iterator[None]:
    """Tell a failed write in one line."""
    try:
        yield
    except OSError as error:
        raise LdmError(
            f"could not write the metrics in {folder} ({error.strerror or error}): make room, "
            "then give the same command again"
        ) from error


def _mean(values: list[Tensor | float]) -> float:
    """The mean of those that are finite, a skipped step's are not; NaN if none is."""
    all_values = torch.stack([torch.as_tensor(value).double() for value in values])
    return all_values[all_values.isfinite()].mean().item()


def _short(value: float) -> float | None:
    """Six digits, for the file; JSON has no word for what is not finite but null."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
