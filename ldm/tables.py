"""Tables as text, Markdown and LaTeX: the one writer of every command.

A table is a header and rows of strings, all of one length. The first `left` columns hold words and
are aligned left; the others hold numbers and are aligned right.
"""

import re
from collections.abc import Sequence
from functools import partial

Row = Sequence[str]

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "×10³": r"$\times 10^3$", "–": "--",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "²": r"$^2$", "±": r"$\pm$", "×": r"$\times$",
    "−": "$-$", "σ": r"$\sigma$",
}  # fmt: skip
SPECIAL = re.compile("|".join(map(re.escape, LATEX)))  # the first that fits: ×10³ before ×


def text_table(header: Row, rows: Sequence[Row], left: int = 1, gap: str = "  ") -> list[str]:
    """Return the lines of a table for a terminal; nothing is cut, however narrow it is."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [gap.join(_aligned(row, widths, left)).rstrip() for row in (header, *rows)]


def markdown_table(header: Row, rows: Sequence[Row], left: int = 1) -> list[str]:
    """Return the lines of a Markdown table whose columns line up in the source, too."""
    header, *rows = [[cell.replace("|", "&#124;") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    dashes = ["-" * (width + 1) for width in widths]
    rule = [f":{dash}" if i < left else f"{dash}:" for i, dash in enumerate(dashes)]
    lines = [f"| {' | '.join(_aligned(row, widths, left))} |" for row in (header, *rows)]
    return [lines[0], f"|{'|'.join(rule)}|", *lines[1:]]


def latex_table(header: Row, rows: Sequence[Row], left: int = 1) -> list[str]:
    """Return the lines of a LaTeX `tabular` with the rules of the booktabs package."""
    escape = partial(SPECIAL.sub, lambda found: LATEX[found.group()])
    first, *others = [f"{' & '.join(map(escape, row))} \\\\" for row in (header, *rows)]
    columns = "l" * left + "r" * (len(header) - left)
    return [
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        first,
        "\\midrule",
        *others,
        "\\bottomrule",
        "\\end{tabular}",
    ]


def _aligned(row: Row, widths: Sequence[int], left: int) -> list[str]:
    return [
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
