"""The columns of the paper's tables, which end of each is the better one, and what is alike.

The paper's tables: their rows, their columns, and what the paper says they show.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import model_validator

from ldm.config import Config, did_you_mean, list_presets, load_preset, published, validate
from ldm.errors import UsageError


@dataclass(frozen=True)
class Column:
    """A number that a table has of every row."""

    title: str
    """Its name and unit."""
    digits: int
    """After the point, of ours."""
    better: Literal["lower", "higher"] | None = None
    """Which end is the better one; None: it is no matter of quality."""
    share: float = 0.0
    """The yardstick of what is alike, as a share of the row compared with."""
    width: float = 0.0
    """The same in the number's own unit."""
    printed: int | None = None
    """Digits after the point of the paper's; None: as many as there are."""
    of_each_image: bool = False
    """Whether every image has its own share in it, by which two rows are compared."""
    counted: bool = False
    """Whether it is counted, and has no error."""

    @property
    def arrow(self) -> str:
        """↓, ↑ or nothing."""
        return {"lower": " ↓", "higher": " ↑", None: ""}[self.better]

    def gain(self, ours: float, other: float) -> float:
        """By how much a number is better than another one, in its unit."""
        return other - ours if self.better == "lower" else ours - other

    def yardstick(self, other: float) -> float:
        """How far from another number a number still is alike."""
        return self.share * abs(other) + self.width + 1e-9  # 0.88 − 0.86 is a hair above 0.02


# The yardsticks are the widest differences for the worse that the paper itself calls similar,
# comparable or equally good, rounded up: FID 4.3 % (Table 11, DeepFashion), LPIPS 11.1 % and PSNR
# 0.37 dB (Table 10, PatchGAN), SSIM 0.02 (Table 16).
COLUMNS = {
    "params": Column("Params (M)", 2, counted=True),
    "aggregator_params": Column("Params (M)", 2, "lower", counted=True),
    "rfid": Column("rFID", 2, "lower", share=0.05, printed=2),
    "lpips": Column("LPIPS", 3, "lower", share=0.12, printed=3, of_each_image=True),
    "psnr": Column("PSNR", 2, "higher", width=0.4, printed=2, of_each_image=True),
    "ssim": Column("SSIM", 3, "higher", width=0.02, printed=2, of_each_image=True),
    "fid": Column("FID", 2, "lower", share=0.05, printed=2),
    "swd": Column("SWD ×10³", 1, "lower"),
    "gmac": Column("GMAC", 2, "lower", counted=True),
    "memory": Column("Memory (MB)", 0, "lower", share=0.05),
    "images_per_second": Column("Throughput (img/s)", 1, "higher", share=0.05),
    **{f"mmd_{sigma}": Column(str(sigma), 3, "lower", share=0.05, printed=2, of_each_image=True)
       for sigma in (25, 50, 100, 250, 500)},
}  # fmt: skip

SIGMAS = (25.0, 50.0, 100.0, 250.0, 500.0)
"""Widths of the kernels of Table 6."""


Measure = Literal["reconstruction", "encoder", "mmd", "generation"]
Number = float | tuple[float, float]  # or a mean with its ±
Relation = Literal["better", "no_worse", "similar"]


class Claim(Config):
    """What the paper says two rows of a table show."""

    says: str
    """The claim, in words."""
    row: str
    """The row that it is made of."""
    relation: Relation
    """better: by however little. no_worse: at most by the column's yardstick. similar: within the
    yardstick both ways. Each by more than other images might well turn, where that is known: in
    PSNR, SSIM, LPIPS and MMD. The error of rFID, FID, throughput and memory is not, and the verdict
    says so."""
    than: str
    """The row it is compared with."""
    columns: tuple[str, ...] = ()
    """The columns it is said of; none: all that have a better end."""


class TableConfig(Config):
    """A table as `configs/tables/` has it."""

    title: str
    """What it is of."""
    measure: Measure = "reconstruction"
    """What its rows are measured by."""
    header: tuple[str, ...]
    """Names of the parts of a row's label, which is split at its commas."""
    rows: tuple[str, ...]
    """Names of its rows, in the paper's order: those of their recipes without the table's."""
    columns: tuple[str, ...]
    """Its numbers, as `COLUMNS` names them."""
    transposed: bool = False
    """Whether the paper prints the rows as columns."""
    claims: tuple[Claim, ...]
    """What the paper says of it."""

    @model_validator(mode="after")
    def _speaks_of_what_is_there(self) -> "TableConfig":
        for name in self.columns:
            if name not in COLUMNS:
                raise ValueError(f"columns: no '{name}'{did_you_mean(name, list(COLUMNS))}")
        for claim in self.claims:
            for name, known in (
                *((row, self.rows) for row in (claim.row, claim.than)),
                *((column, self.columns) for column in claim.columns),
            ):
                if name not in known:
                    raise ValueError(f"claims: no '{name}'{did_you_mean(name, known)}")
        return self


@dataclass(frozen=True)
class Row:
    """A row of a table: one recipe, and what the paper reports of it."""

    table: str
    """The table's name, t09."""
    name: str
    """Its own, gaussian."""
    kind: str
    """The folder of its recipe: `recipes`, or `diffusion`."""
    label: tuple[str, ...]
    """As the paper prints it, a part for each of the table's header."""
    paper: dict[str, Number]
    """The paper's numbers, by column."""
    resolution: int | None
    """Side of the images it is measured on, where that is not what its training ends at."""

    @property
    def preset(self) -> str:
        """Name of its recipe, t09-gaussian."""
        return f"{self.table}-{self.name}"


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    name: str
    """t09, or t02a."""
    config: TableConfig
    rows: tuple[Row, ...]

    @property
    def number(self) -> str:
        """T9, or T2a."""
        return f"T{self.name[1:].lstrip('0')}"

    def claimed(self, claim: Claim) -> tuple[str, ...]:
        """The columns that a claim is about."""
        return claim.columns or tuple(c for c in self.config.columns if COLUMNS[c].better)


@cache
def all_tables() -> tuple[Table, ...]:
    """Every table, in the paper's order."""
    return tuple(_read(name) for name in list_presets("tables"))


def find_tables(word: str) -> list[Table]:
    """The tables that a word means: t9, T09 or 9; t2 is both halves of Table 2.

    Raises:
        UsageError: there is none; the nearest, and all there are.
    """
    match = re.fullmatch(r"(?:table[ -]?|t)?0*(\d+)([a-z]?)", word.strip().lower())
    wanted = f"T{match[1]}{match[2]}" if match else ""
    found = [t for t in all_tables() if wanted in (t.number, t.number.rstrip("ab"))]
    if not found:
        numbers = [table.number for table in all_tables()]
        near = did_you_mean(wanted or word, numbers)
        hint = near.rstrip("?") if near.startswith("; did") else ""
        what = f"no table '{word}'{hint}" if word.strip() else "which table"
        raise UsageError(f"{what}; there are: {', '.join(numbers)}, and figures F2 to F9")
    return found


def find_row(table: Table, word: str) -> Row:
    """The row of a table that a word means: gaussian, t09-gaussian or t09/gaussian.

    Raises:
        UsageError: there is none; those there are.
    """
    name = word.removeprefix(f"{table.name}-").removeprefix(f"{table.name}/")
    for row in table.rows:
        if row.name == name:
            return row
    known = [row.name for row in table.rows]
    raise UsageError(f"{table.number} has no row '{word}'; its rows are: {', '.join(known)}")


def trained_rows() -> Iterator[Row]:
    """All rows that something is trained for, in the paper's order."""
    for table in all_tables():
        if table.config.measure != "encoder":
            yield from table.rows


def _read(name: str) -> Table:
    config = validate(TableConfig, load_preset("tables", name))
    kind = "diffusion" if config.measure == "generation" else "recipes"
    return Table(name, config, tuple(_read_row(name, row, kind, config) for row in config.rows))


def _read_row(table: str, name: str, kind: str, config: TableConfig) -> Row:
    paper: dict[str, Any] = published(kind, f"{table}-{name}")
    parts = len(config.header) if not config.transposed else 1
    label = tuple(paper["row"].split(", ", parts - 1))
    numbers = {c: _number(paper[c]) for c in config.columns if c in paper}
    return Row(table, name, kind, label, numbers, paper.get("resolution"))


def _number(value: float | list[float]) -> Number:
    return (value[0], value[1]) if isinstance(value, list) else float(value)
