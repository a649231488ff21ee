"""Logs of a run: metrics.jsonl, TensorBoard, other trackers, and a progress bar.

Only the first process writes. Values stay on the device until a row is written, so that logging
every step does not synchronise.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ldm.errors import LdmError, escape
from ldm.files import read_bytes, write_atomically
from ldm.records import RESTORE, Count, Schema, checked, parse_json
from ldm.trackers import Trackers


class _Console(Console):
    """A console that escapes what could forge lines: names in files may hold it."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as Rich does; the line breaks of a text stay."""
        super().print(*(escape(o, "\n") if isinstance(o, str) else o for o in objects), **options)


console = _Console(highlight=False, soft_wrap=True, emoji=False)  # emoji: a:b: is a path

LIMIT = 2**30
"""Bytes of a `metrics.jsonl`; a million rows take half of them."""
FORMER_NAMES = {"critic": "discriminator", "critic_gradient_norm": "discriminator_gradient_norm"}
"""Names of metrics in earlier versions."""


def progress_bar(unit: str, visible: bool = True) -> Progress:
    """Create a progress bar; tasks give its fields `speed` and `note`."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit} · {{task.fields[speed]}} ·"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not (visible and console.is_terminal),
    )


@contextmanager
def show_progress(
    what: str, total: int, visible: bool = True, unit: str = "images"
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar of `total` units, if it is visible; call the result with each count."""
    with progress_bar(unit, visible) as bar:
        task = bar.add_task(what, total=total, speed="", note="")

        def advance(count: int) -> None:
            speed = bar.tasks[task].speed
            bar.update(task, advance=count, speed=f"{speed:.1f} {unit}/s" if speed else "")

        yield advance


ShowRow = Callable[[Mapping[str, float], str], None]
"""Shows a row of metrics and a note in the progress bar of a training."""


@contextmanager
def show_training(total: int, step: Callable[[], int], visible: bool = True) -> Iterator[ShowRow]:
    """Show the progress bar of a training of `total` steps, if it is visible."""
    with progress_bar("steps", visible) as bar:
        task = bar.add_task("training", total=total, completed=step(), speed="", note="")

        def show(row: Mapping[str, float], note: str) -> None:
            speed = f"{row['images_per_second']:.1f} images/s, data {row['data_wait']:.0%}"
            speed += f", MFU {row['mfu']:.0%}" if "mfu" in row else ""
            bar.update(task, completed=step(), speed=speed, note=note)

        yield show


class LogRow(Schema):
    """A row of a `metrics.jsonl`: numbers by their names."""

    images_seen: Count
    __pydantic_extra__: dict[str, Annotated[float, Field(ge=-1e100, le=1e100)] | None]


class Logbook:
    """Rows of named numbers over images seen; a write that fails is an LdmError.

    As a context it ends the trackers' records, of a failed run too.

    Args:
        folder: the run's folder; None on processes that do not write.
        resume_at: images seen at the state that the run resumes from; later rows are removed.
        saved: the `state_dict` of that state.
        trackers: names as in `RunConfig.trackers`; metrics.jsonl is always written.
        config: the resolved configuration, for the trackers.
        usage: (seconds, images) since the last row → more values of a row, by name.

    Attributes:
        opening: a line for each tracker, with the link of its record.

    Raises:
        LdmError: a tracker did not start; one that fails later is left out, with a warning.
    """

    def __init__(
        self,
        folder: Path | None,
        resume_at: int = 0,
        saved: Mapping[str, Any] | None = None,
        trackers: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
        usage: Callable[[float, int], Mapping[str, float]] = lambda seconds, images: {},
    ) -> None:
        self._usage = usage
        saved = saved or {}  # of an earlier version
        self._pending: dict[str, list[Tensor | float]] = defaultdict(list)
        self._pending |= {name: [*values] for name, values in saved.get("pending", {}).items()}
        self._clock, self._clock_images = time.monotonic(), resume_at
        self._folder, self._rows, self._board = folder, 0, None
        others = [name for name in trackers if name != "tensorboard"] if folder else []
        if folder is not None:
            self._rows = cut_rows(folder / "metrics.jsonl", resume_at, saved.get("rows"))
            with _writing(folder):
                (folder / "metrics.jsonl").touch()
                if "tensorboard" in trackers:
                    # not accelerate's class, which does not remove the rows after `resume_at`
                    from torch.utils.tensorboard import SummaryWriter

                    board = str(folder / "tensorboard")
                    self._board = SummaryWriter(board, purge_step=resume_at + 1)
        self._trackers = Trackers(others, folder or Path(), dict(config or {}))
        self.opening = self._trackers.opening

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._trackers.finish(failed=error is not None)
        with suppress(*([] if error is None else [LdmError])):  # the first error is the cause
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of rows and the values of the next one, which waits for the device."""
        pending = {name: stack_scalars(values).tolist() for name, values in self._pending.items()}
        return {"rows": self._rows, "pending": pending}

    def add(self, **values: Tensor | float) -> None:
        """Add values of this step to the means of the next row."""
        for name, value in values.items():
            self._pending[name].append(value.detach() if isinstance(value, Tensor) else value)

    def row(self, images_seen: int, **values: float) -> dict[str, float]:
        """Write the means since the last row, the speed and `values`; return the row.

        Means are over finite values; without any they are NaN here and null in the file.
        """
        now = time.monotonic()
        seconds, images = max(now - self._clock, 1e-9), images_seen - self._clock_images
        row: dict[str, Any] = {"images_seen": images_seen}
        row |= {name: _mean(seen) for name, seen in self._pending.items()}
        if self._pending:
            row |= {"images_per_second": images / seconds, **self._usage(seconds, images)}
            self._clock, self._clock_images = now, images_seen
        row |= values
        self._pending.clear()
        self._rows += 1
        if self._folder is not None:
            with _writing(self._folder):
                with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as rows:
                    rows.write(json.dumps({k: _short(v) for k, v in row.items()}) + "\n")
                finite = {k: v for k, v in row.items() if k != "images_seen" and math.isfinite(v)}
                for name, value in finite.items():
                    if self._board is not None:
                        self._board.add_scalar(name, value, images_seen)
            self._trackers.log(finite, images_seen)
        return row

    def picture(self, name: str, sheet: Tensor, images_seen: int) -> None:
        """Write a float image (3, H, W) in [−1, 1] to TensorBoard and other trackers."""
        if self._folder is not None and self._board is not None:
            with _writing(self._folder):
                self._board.add_image(name, (sheet + 1).clamp(0, 2) / 2, images_seen)
        self._trackers.picture(name, sheet, images_seen)

    def close(self) -> None:
        """Flush and close TensorBoard's file."""
        if self._folder is not None and self._board is not None:
            with _writing(self._folder):
                self._board.close()


def read_rows(path: Path) -> list[dict[str, float]]:
    """Read a metrics.jsonl: finite values under their present names, without partial lines."""
    return [
        {FORMER_NAMES.get(k, k): v for k, v in row.items() if v is not None}
        for _, row in _lines(path)
    ]


def cut_rows(path: Path, images_seen: int, count: int | None = None) -> int:
    """Keep the rows up to `images_seen`, the first `count` of them, and return their number.

    A resumed run writes the others again.
    """
    kept = [line + "\n" for line, row in _lines(path) if row["images_seen"] <= images_seen][:count]
    if path.is_file():
        write_atomically(path, "".join(kept).encode())
    return len(kept)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the complete rows of a metrics.jsonl, as text and parsed."""
    try:
        text = read_bytes(path, LIMIT) if path.exists() else b""
    except OSError as error:
        raise LdmError(f"could not read {path} ({error.strerror}): {RESTORE}") from error
    for number, line in enumerate(text.decode("utf-8", "replace").splitlines(), 1):
        try:
            row = parse_json(line)
        except ValueError:  # of a killed process
            continue
        if isinstance(row, dict) and "images_seen" in row:
            yield line, checked(LogRow, row, path, RESTORE, f"line {number}").model_dump()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn a failed write into an LdmError."""
    try:
        yield
    except OSError as error:
        raise LdmError(
            f"could not write the metrics in {folder} ({error.strerror or error}): free disk "
            "space, then run the same command to resume"
        ) from error


def size_numbers(images: Tensor) -> dict[str, int]:
    """The size of images (B, C, H, W) for a row: their `resolution`, else `height` and `width`."""
    height, width = images.shape[-2:]
    return {"resolution": width} if height == width else {"height": height, "width": width}


def stack_scalars(values: Sequence[Tensor | float]) -> Tensor:
    """Stack numbers and tensors () of any type and device: (n,) float64, on a GPU if one is."""
    devices = (value.device for value in values if isinstance(value, Tensor))
    device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
    return torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values])


def _mean(values: list[Tensor | float]) -> float:
    """Average the finite values (a skipped step's are not); NaN if there are none."""
    finite = [value for value in stack_scalars(values).tolist() if math.isfinite(value)]
    return fmean(finite) if finite else math.nan  # on any device, and after a resume, the same bits


def _short(value: float) -> float | None:
    """Round to six digits; non-finite numbers are null in JSON."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
