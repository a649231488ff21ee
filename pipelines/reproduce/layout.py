"""A table as the paper prints it, ours beside theirs, in Markdown that reads as it stands."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from math import floor, log10

from pipelines.reproduce.claims import Finding, Judgement
from pipelines.reproduce.columns import COLUMNS
from pipelines.reproduce.tables import Claim, Number, Row, Table

NOTHING = "–"
BESIDE = {
    "reconstruction": ("psnr", "swd"), "generation": ("swd",), "mmd": (), "encoder": ("gmac",)
}  # fmt: skip
"""What is shown beside the paper's columns, and never in their place."""

LONG = 60
"""Characters of a reason that still stands beside a claim."""

Numbers = Mapping[str, Mapping[str, Number | None]]


def shown_columns(table: Table) -> tuple[str, ...]:
    """The paper's columns, then ours."""
    theirs = table.config.columns
    return (*theirs, *(name for name in BESIDE[table.config.measure] if name not in theirs))


def table_lines(table: Table, numbers: Numbers) -> list[str]:
    """The table in Markdown, its columns padded.

    Args:
        numbers: what was measured, by row and column.
    """
    grid = _across(table, numbers) if table.config.transposed else _down(table, numbers)
    return _aligned(grid, left=1 if table.config.transposed else len(table.config.header))


def _down(table: Table, numbers: Numbers) -> list[list[str]]:
    """Rows as rows: the label, then every column of the paper's beside ours."""
    header = list(table.config.header)
    for name in shown_columns(table):
        column = COLUMNS[name]
        if name in table.config.columns:
            header += [f"{column.title}{column.arrow} paper", "here"]
        else:
            header.append(f"{column.title}{column.arrow} here")
    return [header, *([*row.label, *_cells(table, row, numbers)] for row in table.rows)]


def _cells(table: Table, row: Row, numbers: Numbers) -> Iterator[str]:
    for name in shown_columns(table):
        both = _both(row, name, numbers)
        yield from both if name in table.config.columns else both[1:]


def _across(table: Table, numbers: Numbers) -> list[list[str]]:
    """Rows as columns: each of the paper's beside ours."""
    names = chain.from_iterable((f"{row.label[0]} paper", "here") for row in table.rows)
    grid = [[table.config.header[0], *names]]
    for column in table.config.columns:
        pairs = (_both(row, column, numbers) for row in table.rows)
        grid.append([COLUMNS[column].title, *chain.from_iterable(pairs)])
    return grid


def _both(row: Row, column: str, numbers: Numbers) -> tuple[str, str]:
    """The paper's number and ours."""
    ours = numbers.get(row.name, {}).get(column)
    return _printed(column, row.paper.get(column)), show(column, ours)


def claim_lines(judgements: Sequence[Judgement], table: Table) -> list[str]:
    """A line for each claim, and under it one for each column that it is about."""
    lines = []
    for judgement in judgements:
        reasons = {finding.why for finding in judgement.findings}
        same = reasons.pop() if len(reasons) == 1 else ""
        alike = len({finding.verdict for finding in judgement.findings}) == 1
        because = f" ({_short(same)})" if same else ""
        lines.append(f"- **{judgement.verdict}**{because}: {judgement.claim.says}")
        for finding in judgement.findings:
            line = f"  - {_comparison(judgement.claim, finding, table)}"
            if len(judgement.findings) > 1 and not (same and alike):
                line += f": {finding.verdict}"
            if finding.why and not same:
                line += f" ({_short(finding.why)})"
            lines.append(line)
    return lines


def _short(why: str) -> str:
    """A reason, or where it is said in full."""
    return why if len(why) <= LONG else "see below"


def _comparison(claim: Claim, finding: Finding, table: Table) -> str:
    """Two rows in one column: ours, and the paper's."""
    papers = {row.name: row.paper[finding.column] for row in table.rows}
    theirs = (_printed(finding.column, papers[name]) for name in (claim.row, claim.than))
    told = f"the paper's {' against '.join(theirs)}"
    if finding.here is not None:
        ours = " against ".join(show(finding.column, value) for value in finding.here)
        if finding.error is not None:
            difference = finding.here[0] - finding.here[1]
            ours += f" ({_signed(finding.column, difference, finding.error)})"
        told = f"{ours}, {told}"
    title = COLUMNS[finding.column].title
    if table.config.transposed:
        title = f"{table.config.header[0]} = {title}"
    return f"{title}: {told}"


def show(column: str, value: Number | None) -> str:
    """One of our numbers, a mean with its ±, or a dash."""
    if value is None:
        return NOTHING
    digits = COLUMNS[column].digits
    if isinstance(value, (tuple, list)):
        return f"{value[0]:,.{digits}f} ± {value[1]:,.{digits}f}"
    return f"{value:,.{digits}f}"


def _signed(column: str, difference: float, error: float) -> str:
    """A difference with its standard error."""
    digits = COLUMNS[column].digits
    if 0 < error < 10 ** (1 - digits):  # two figures of it
        digits = min(6, 1 - floor(log10(error)))
    return f"{difference:+.{digits}f} ± {error:.{digits}f}".replace("-", "−")


def _printed(column: str, value: Number | None) -> str:
    """One of the paper's numbers."""
    if value is None:
        return NOTHING
    digits = COLUMNS[column].printed
    form = "g" if digits is None else f".{digits}f"
    parts = value if isinstance(value, tuple) else (value,)
    return " ± ".join(f"{part:{form}}" for part in parts)


def _aligned(grid: Sequence[Sequence[str]], left: int) -> list[str]:
    """Rows of cells as Markdown, numbers to the right.

    Args:
        left: how many of the first columns are words.
    """
    widths = [max(3, *map(len, column)) for column in zip(*grid, strict=True)]
    lines = [
        " | ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in grid
    ]
    rule = "|".join(
        f":{'-' * (w + 1)}" if i < left else f"{'-' * (w + 1)}:" for i, w in enumerate(widths)
    )
    return [f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]
