"""What a run says while it works: metrics.jsonl, TensorBoard, and a progress bar.

Only the first process writes. Values are kept as tensors and averaged when a row is written, so
that logging every step does not make the device wait for the host.
"""

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

console = Console(highlight=False, soft_wrap=True)


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
    """

    def __init__(self, folder: Path | None, resume_at: int = 0) -> None:
        self._pending: dict[str, list[Tensor | float]] = defaultdict(list)
        self._clock, self._clock_images = time.monotonic(), resume_at
        self._rows = self._board = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            folder.mkdir(parents=True, exist_ok=True)
            cut_rows(folder / "metrics.jsonl", resume_at)
            self._rows = (folder / "metrics.jsonl").open("a", encoding="utf-8")
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_at + 1)

    def add(self, **values: Tensor | float) -> None:
        """Remember values of this step; their means go into the next row."""
        for name, value in values.items():
            self._pending[name].append(value.detach() if isinstance(value, Tensor) else value)

    def row(self, images_seen: int, **values: float) -> dict[str, float]:
        """Write the means since the last row, and `values`, and the speed; return the row."""
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
            self._rows.write(json.dumps({k: _short(v) for k, v in row.items()}) + "\n")
            self._rows.flush()
            for name, value in row.items():
                if name != "images_seen":
                    self._board.add_scalar(name, value, images_seen)
        return row

    def picture(self, name: str, sheet: Tensor, images_seen: int) -> None:
        """Show a float sheet (3, H, W) in [−1, 1] in TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, (sheet + 1).clamp(0, 2) / 2, images_seen)

    def close(self) -> None:
        """Flush and close the files."""
        if self._rows is not None and self._board is not None:
            self._rows.close()
            self._board.close()


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a half-written last line, left by a kill, is passed over."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def cut_rows(path: Path, images_seen: int) -> None:
    """Drop the rows after `images_seen`: a resumed run writes them again."""
    if not path.is_file():
        return
    kept = [row for row in read_rows(path) if row["images_seen"] <= images_seen]
    beside = path.with_suffix(".partial")
    beside.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    beside.replace(path)


def _mean(values: list[Tensor | float]) -> float:
    if isinstance(values[0], Tensor):
        return torch.stack([torch.as_tensor(value).float() for value in values]).mean().item()
    return sum(values) / len(values)


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
