"""Two sides measured in one run: their options, a table of ratios, targets, a page."""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from ldm.tables import markdown_table

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    group: str
    name: str
    seconds: float
    """Median of a call."""
    ratio: float
    """Speed as a multiple of the group's reference."""
    images_per_second: float
    peak_mib: float | None = None
    """Memory of one forward pass, beyond the loaded model."""


@dataclass(frozen=True)
class Target:
    """A ratio to reach beside a reference of the same group."""

    what: str
    group: str
    name: str
    reference: str
    bound: float
    of_memory: bool = False
    """At most `bound` of the reference's memory, instead of at least `bound` times its speed."""


@dataclass(frozen=True)
class Verdict:
    """A target, beside what was measured."""

    what: str
    target: str
    measured: float
    reached: bool


def describe_machine(device: "torch.device", precision: str) -> dict[str, str]:
    """Describe the device, its threads, the precision, the versions and the date."""
    import torch

    from ldm.device import name_device

    return {
        "device": name_device(device),
        "precision": precision,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Make a parser whose help is the script's docstring."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def measuring_parser(doc: str | None, quick: str, batch: str) -> argparse.ArgumentParser:
    """Make the parser of a script that compares two sides.

    Args:
        quick: what --quick measures.
        batch: the batch sizes without --batch.
    """
    parser = make_parser(doc)
    parser.add_argument("--quick", action="store_true", help=f"a trial run: {quick}")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--batch", type=int, help=f"batch size (default: {batch})")
    parser.add_argument(
        "--keep-memory", action="store_true",
        help="CPU: keep freed memory on both sides, as our commands do",
    )  # fmt: skip
    add_out(parser)
    return parser


def add_out(parser: argparse.ArgumentParser, folder: str = "docs/results") -> None:
    """Add --out, the folder of the results."""
    parser.add_argument(
        "--out", type=Path, default=Path(folder), help="folder to write to (default: %(default)s)"
    )


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format the mean ± standard deviation over seeds; one value alone."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def compare(
    group: str,
    seconds: dict[str, float],
    reference: str,
    images: int,
    peaks: dict[str, float] | None = None,
) -> list[Row]:
    """Set each side of a group beside the reference.

    Args:
        seconds: of a call, by name.
        images: images that a call processes.
        peaks: peak memory in MiB, by name.
    """
    return [
        Row(group, name, s, seconds[reference] / s, images / s, (peaks or {}).get(name))
        for name, s in seconds.items()
    ]


def judge(targets: Sequence[Target], rows: Sequence[Row]) -> list[Verdict]:
    """Compare each target with the measurements."""
    found = {(row.group, row.name): row for row in rows}
    verdicts = []
    for target in targets:
        own, other = (found[target.group, name] for name in (target.name, target.reference))
        if target.of_memory:
            assert own.peak_mib is not None and other.peak_mib is not None
            measured = own.peak_mib / other.peak_mib
            aim, reached = f"≤ {target.bound} of the memory", measured <= target.bound
        else:
            measured = other.seconds / own.seconds
            aim, reached = f"≥ {target.bound} times as fast", measured >= target.bound
        verdicts.append(Verdict(target.what, aim, measured, reached))
    return verdicts


def as_markdown(
    title: str, facts: dict[str, Any], rows: Sequence[Row], verdicts: Sequence[Verdict]
) -> str:
    """Format the comparison as a Markdown page."""
    lines = [f"# {title}", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    header = ("", "", "ms a call", "images/s", "times as fast", "peak memory, MiB")
    lines += ["", *markdown_table(header, [_cells(row) for row in rows], left=2)]
    if verdicts:
        reached = [(v.what, v.target, f"{v.measured:.2f}", "yes" if v.reached else "no")
                   for v in verdicts]  # fmt: skip
        lines += ["", *markdown_table(("", "target", "measured", "reached"), reached, left=2)]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    digits = 0 if row.images_per_second >= 100 else 2
    return (
        row.group,
        row.name,
        f"{1000 * row.seconds:.1f}",
        f"{row.images_per_second:,.{digits}f}",
        f"{row.ratio:.2f}",
        "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
    )


def write(
    folder: Path,
    name: str,
    title: str,
    facts: dict[str, Any],
    rows: Sequence[Row],
    verdicts: Sequence[Verdict],
) -> str:
    """Write `<name>.json` and `<name>.md` to the folder; return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {**facts, "rows": [vars(row) for row in rows], "targets": [vars(v) for v in verdicts]}
    text = json.dumps(tree, indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", "utf-8")
    page = as_markdown(title, facts, rows, verdicts)
    (folder / f"{name}.md").write_text(page, "utf-8")
    return page
