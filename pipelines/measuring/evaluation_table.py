"""Evaluations as a table: to read, or to paste into a paper.

Every layout says with its numbers what they were measured on. A star marks what may not mean what
it seems to, a dash what is missing.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from ldm.errors import UsageError
from ldm.files import to_json
from pipelines.measuring.evaluation import NUMBERS, Evaluation

Layout = Literal["table", "markdown", "latex", "json"]

LATEX = {
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "↓": r"$\downarrow$", "↑": r"$\uparrow$", "×10³": r"$\times 10^3$", "×": r"$\times$",
    "–": "--", "²": "$^2$",
}  # fmt: skip
STAR = r"\\*"
SIGNS = re.compile("|".join(map(re.escape, LATEX)))  # the first that fits, so ×10³ before ×


class Column(NamedTuple):
    """How a number is shown."""

    arrow: str
    """Which way is better."""
    digits: int
    scale: float = 1.0


COLUMNS = {
    "rfid": Column("↓", 2),
    "lpips": Column("↓", 3),
    "psnr": Column("↑", 2),
    "ssim": Column("↑", 3),
    "kid": Column("×10³ ↓", 2, 1e3),
    "precision": Column("↑", 3),
    "recall": Column("↑", 3),
    "swd": Column("×10³ ↓", 2),
}


def format_evaluations(evaluations: Sequence[Evaluation], layout: Layout = "table") -> str:
    """The table of some evaluations: a row for each, those at one resolution together.

    Numbers that no row has are left out.

    Args:
        layout: "table" for a terminal, "markdown", "latex" (with the package booktabs), or "json",
            which holds all that is known of each.

    Raises:
        UsageError: there is no such layout.
    """
    if layout not in get_args(Layout):
        raise UsageError(f"--format {layout}: it must be one of {', '.join(get_args(Layout))}")
    resolutions = list(dict.fromkeys(each.resolution for each in evaluations))
    rows = sorted(evaluations, key=lambda each: resolutions.index(each.resolution))
    if layout == "json":
        return to_json([each.to_tree() for each in rows]).decode().rstrip()
    header, body = _cells(rows)
    write = {"table": _as_text, "markdown": _as_markdown, "latex": _as_latex}[layout]
    return "\n".join(write(header, body, _captions(rows)))


# ------------------------------------------------------------------------------------- content
def _cells(rows: Sequence[Evaluation]) -> tuple[list[str], list[list[str]]]:
    """The titles, and the cells of each row."""
    shown = [name for name in COLUMNS if any(row.numbers[name] is not None for row in rows)]
    data = [_data(row) for row in rows]
    several = len(set(data)) > 1  # else the caption says it
    header = ["model", *(["data"] if several else []), "resolution", "images"]
    names = name_models([row.model for row in rows])
    body = [
        [
            name,
            *([which] if several else []),
            f"{row.resolution}²",
            str(row.count),
            *(_shown(row, number) for number in shown),
        ]
        for name, which, row in zip(names, data, rows, strict=True)
    ]
    return [*header, *(f"{NUMBERS[name]} {COLUMNS[name].arrow}" for name in shown)], body


def _shown(row: Evaluation, name: str) -> str:
    value = row.numbers[name]
    if value is None:
        return "–"
    column = COLUMNS[name]
    star = "*" if name in row.about["doubtful"] else ""
    return f"{value * column.scale:.{column.digits}f}{star}"


def _data(row: Evaluation) -> str:
    return f"{row.about['data']['source']}, {row.about['split']}"


def _captions(rows: Sequence[Evaluation]) -> list[str]:
    """What all of the table was measured on, and what its stars mean."""
    lines = list(dict.fromkeys(f"measured on {_data(row)}: {_how(row.about)}" for row in rows))
    doubts = [f"* {why}" for row in rows for why in row.about["doubtful"].values()]
    notes = [note for row in rows for note in row.about["notes"]]
    return lines + list(dict.fromkeys(doubts + notes))


def _how(about: dict[str, Any]) -> str:
    extractor = about["extractor"]
    features = f"features of {extractor['name']}; " if extractor else ""
    return f"{about['recon']}; {features}ldm {about['versions']['ldm']}"


def name_models(models: Sequence[Path]) -> list[str]:
    """A short name for each model: its run's, or its file's; the whole path where two are alike."""
    names = {model: _name(model) for model in models}
    known = list(names.values())
    return [names[m] if known.count(names[m]) == 1 else str(m) for m in models]


def _name(model: Path) -> str:
    folder = model.resolve() if model.is_dir() else model.resolve().parent
    if model.is_dir() or model.name == "ckpt.pt":
        return folder.name
    # a run's other weights say by themselves neither whose they are nor of what kind
    return f"{folder.name}/{model.name}" if (folder / "run.json").is_file() else model.name


# ------------------------------------------------------------------------------------- layouts
def _as_text(header: list[str], body: list[list[str]], captions: list[str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    left = _words(header)
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *body)
    ]
    return [*lines, *captions]


def _as_markdown(header: list[str], body: list[list[str]], captions: list[str]) -> list[str]:
    left = _words(header)
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    lines = [
        f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |"
        for row in (header, rule, *body)
    ]
    # two spaces end a line; a star at its beginning would make a list
    return [*lines, "", *(f"{re.sub(r'^[*]', STAR, line)}  " for line in captions)]


def _as_latex(header: list[str], body: list[list[str]], captions: list[str]) -> list[str]:
    left = _words(header)
    lines = [f"{' & '.join(map(_escape, row))} \\\\" for row in (header, *body)]
    return [
        *(f"% {line}" for line in captions),
        f"\\begin{{tabular}}{{{'l' * left}{'r' * (len(header) - left)}}}",
        "\\toprule",
        lines[0],
        "\\midrule",
        *lines[1:],
        "\\bottomrule",
        "\\end{tabular}",
    ]


def _words(header: Sequence[str]) -> int:
    """How many of the first columns hold words; the others hold numbers."""
    return header.index("resolution")


def _escape(cell: str) -> str:
    return SIGNS.sub(lambda found: LATEX[found.group()], cell)
