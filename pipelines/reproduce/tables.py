"""The paper's tables: their rows, their columns, and the claims that the paper makes."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pydantic import model_validator

from ldm.config import Config, did_you_mean, list_presets, load_preset, published, validate
from ldm.errors import UsageError


@dataclass(frozen=True)
class TableColumn:
    """A number that a table has for every row."""

    title: str
    """Name and unit."""
    digits: int
    """Decimals of our numbers."""
    better: Literal["lower", "higher"] | None = None
    """The better end; None: not a matter of quality."""
    share: float = 0.0
    """Largest similar difference, as a share of the row compared with."""
    width: float = 0.0
    """Largest similar difference in the number's unit, added to `share`."""
    printed: int | None = None
    """Decimals of the paper's numbers; None: as many as there are."""
    of_each_image: bool = False
    """It is a mean over images, so that two rows can be compared image by image."""
    counted: bool = False
    """It is counted, and has no error."""

    def gain(self, ours: Any, other: Any) -> Any:
        """Return by how much numbers (floats or arrays) are better than others, in their unit."""
        return other - ours if self.better == "lower" else ours - other

    def yardstick(self, other: Any) -> Any:
        """Return the largest difference from a number (float or array) that counts as similar."""
        return self.share * abs(other) + self.width + 1e-9  # 0.88 − 0.86 is a hair above 0.02


# Similar: the widest differences for the worse that the paper itself calls similar, comparable or
# equally good, rounded up: FID 4.3 % (Table 11, DeepFashion), LPIPS 11.1 % and PSNR 0.37 dB
# (Table 10, PatchGAN), SSIM 0.02 (Table 16).
COLUMNS = {
    "params": TableColumn("Params (M)", 2, counted=True),
    "aggregator_params": TableColumn("Params (M)", 2, "lower", counted=True),
    "rfid": TableColumn("rFID", 2, "lower", share=0.05, printed=2),
    "lpips": TableColumn("LPIPS", 3, "lower", share=0.12, printed=3, of_each_image=True),
    "psnr": TableColumn("PSNR", 2, "higher", width=0.4, printed=2, of_each_image=True),
    "ssim": TableColumn("SSIM", 3, "higher", width=0.02, printed=2, of_each_image=True),
    "fid": TableColumn("FID", 2, "lower", share=0.05, printed=2),
    "swd": TableColumn("SWD ×10³", 1, "lower"),
    "gmac": TableColumn("GMAC", 2, "lower", counted=True),
    "memory": TableColumn("Memory (MB)", 0, "lower", share=0.05),
    "images_per_second": TableColumn("Throughput (img/s)", 1, "higher", share=0.05),
    **{
        f"mmd_{sigma}": TableColumn(
            str(sigma), 3, "lower", share=0.05, printed=2, of_each_image=True
        )
        for sigma in (25, 50, 100, 250, 500)
    },
}

SIGMAS = (25.0, 50.0, 100.0, 250.0, 500.0)
"""Kernel widths of Table 6."""
BESIDE = {
    "reconstruction": ("psnr", "swd"), "generation": ("swd",), "mmd": (), "encoder": ("gmac",)
}  # fmt: skip
"""Our columns beside the paper's, by the table's measure."""

Measure = Literal["reconstruction", "encoder", "mmd", "generation"]
Number = float | tuple[float, float]  # or a mean with its ±
Relation = Literal["better", "no_worse", "similar"]


class Claim(Config):
    """A claim of the paper: how one row of a table compares with another."""

    says: str
    """The claim, in words."""
    row: str
    """The row that it is about."""
    relation: Relation
    """better: by any difference. no_worse: by at most the column's yardstick. similar: within the
    yardstick both ways. In PSNR, SSIM, LPIPS and MMD the difference must be larger than its error
    over images; the error of rFID, FID, throughput and memory is unknown, and reported as such."""
    than: str
    """The row that it is compared with."""
    columns: tuple[str, ...] = ()
    """The columns that it is about; none: all with a better end."""


class TableConfig(Config):
    """A table as written in `configs/tables/`."""

    title: str
    """Its subject."""
    measure: Measure = "reconstruction"
    """The kind of its measurements."""
    header: tuple[str, ...]
    """Titles of the parts of a row's label, which is split at its commas."""
    rows: tuple[str, ...]
    """Row names in the paper's order: the recipe's name without the table's."""
    columns: tuple[str, ...]
    """The paper's columns, as named in `COLUMNS`."""
    transposed: bool = False
    """The paper prints the rows as columns."""
    claims: tuple[Claim, ...]
    """The paper's claims about it."""

    @model_validator(mode="after")
    def _check_names(self) -> "TableConfig":
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
    """A row of a table: one recipe, and the paper's numbers."""

    table: str
    """The table's name, such as t09."""
    name: str
    """Its own name, such as gaussian."""
    kind: str
    """The folder of its recipe: `recipes` or `diffusion`."""
    label: tuple[str, ...]
    """Its label in the paper, one part for each of the table's header."""
    paper: dict[str, Number]
    """The paper's numbers, by column."""
    resolution: int | None
    """Image size of the measurement in pixels; None: that at which its training ends."""

    @property
    def preset(self) -> str:
        """The name of its recipe, such as t09-gaussian."""
        return f"{self.table}-{self.name}"


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    name: str
    """Such as t09 or t02a."""
    config: TableConfig
    rows: tuple[Row, ...]

    @property
    def number(self) -> str:
        """Such as T9 or T2a."""
        return f"T{self.name[1:].lstrip('0')}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The paper's columns, then ours."""
        theirs = self.config.columns
        return (*theirs, *(name for name in BESIDE[self.config.measure] if name not in theirs))

    def claimed(self, claim: Claim) -> tuple[str, ...]:
        """Return the columns that a claim is about."""
        return claim.columns or tuple(c for c in self.config.columns if COLUMNS[c].better)


@cache
def all_tables() -> tuple[Table, ...]:
    """Return every table, in the paper's order."""
    return tuple(_read(name) for name in list_presets("tables"))


def find_tables(word: str) -> list[Table]:
    """Find the tables that a word names: t9, T09 or 9; t2 names both halves of Table 2."""
    match = re.fullmatch(r"(?:table[ -]?|t)?0*(\d+)([a-z]?)", word.strip().lower())
    wanted = f"T{match[1]}{match[2]}" if match else ""
    found = [t for t in all_tables() if wanted in (t.number, t.number.rstrip("ab"))]
    if not found:
        numbers = [table.number for table in all_tables()]
        near = did_you_mean(wanted or word, numbers)
        hint = near if near.startswith("; did") else ":"
        what = f"no table '{word}'{hint}" if word.strip() else "which table?"
        raise UsageError(f"{what} choose from {', '.join(numbers)}, or a figure, F2 to F9")
    return found


def find_row(table: Table, word: str) -> Row:
    """Find the row of a table that a word names: gaussian, t09-gaussian or t09/gaussian."""
    name = word.removeprefix(f"{table.name}-").removeprefix(f"{table.name}/")
    for row in table.rows:
        if row.name == name:
            return row
    known = [row.name for row in table.rows]
    raise UsageError(f"{table.number} has no row '{word}'; its rows are: {', '.join(known)}")


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
