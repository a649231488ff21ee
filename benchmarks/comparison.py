"""Two sides measured in one run: a table of ratios, targets, a page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    group: str
    name: str
    seconds: float
    """Median of a call."""
    ratio: float
    """How many times as fast as the group's reference."""
    images_per_second: float
    peak_mib: float | None = None
    """Memory of one forward pass, beyond the loaded model."""


@dataclass(frozen=True)
class Target:
    """What is to be reached beside a reference of the same group."""

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


def compare(
    group: str,
    seconds: dict[str, float],
    reference: str,
    images: int,
    peaks: dict[str, float] | None = None,
) -> list[Row]:
    """A group's part of the table, each beside the reference; a call does so many images."""
    return [
        Row(group, name, s, seconds[reference] / s, images / s, (peaks or {}).get(name))
        for name, s in seconds.items()
    ]


def judge(targets: Sequence[Target], rows: Sequence[Row]) -> list[Verdict]:
    """Each target with what was measured, and whether that reaches it."""
    found = {(row.group, row.name): row for row in rows}
    verdicts = []
    for target in targets:
        own, other = (found[target.group, name] for name in (target.name, target.reference))
        if target.of_memory:
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
    """The whole comparison as a page."""
    lines = [f"# {title}", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "| | | ms a call | images/s | times as fast | peak memory, MiB |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for row in rows:
        peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
        digits = 0 if row.images_per_second >= 100 else 2
        lines.append(
            f"| {row.group} | {row.name} | {1000 * row.seconds:.1f} | "
            f"{row.images_per_second:,.{digits}f} | {row.ratio:.2f} | {peak} |"
        )
    if verdicts:
        lines += ["", "| | target | measured | reached |", "|---|---|---:|---|"]
    for verdict in verdicts:
        reached = "yes" if verdict.reached else "no"
        lines.append(f"| {verdict.what} | {verdict.target} | {verdict.measured:.2f} | {reached} |")
    return "\n".join(lines) + "\n"


def write(
    folder: Path,
    name: str,
    title: str,
    facts: dict[str, Any],
    rows: Sequence[Row],
    verdicts: Sequence[Verdict],
) -> str:
    """`<name>.json` and `<name>.md` in the folder; answers the page."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {**facts, "rows": [vars(row) for row in rows], "targets": [vars(v) for v in verdicts]}
    text = json.dumps(tree, indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", "utf-8")
    page = as_markdown(title, facts, rows, verdicts)
    (folder / f"{name}.md").write_text(page, "utf-8")
    return page
