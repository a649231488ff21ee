"""The paper's tables: rows, columns and published numbers; and its claims, judged by our numbers.

Two rows are compared image by image: an image is about as hard for one autoencoder as for the
other, so that the differences spread far less than the numbers of either.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import isfinite
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from ldm.config import Config, did_you_mean, list_presets, load_preset, published, validate
from ldm.errors import UsageError

Number = float | tuple[float, float]  # or a mean with its ±
Relation = Literal["better", "no_worse", "similar"]


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

    def margins(self, relation: Relation, ours: Any, other: Any) -> Any:
        """Return margins, one or (n,): a claim holds if their mean is positive.

        A claim of similarity can fail on either side: the nearer one decides.
        """
        gain = other - ours if self.better == "lower" else ours - other
        if relation == "better":
            return gain
        yardstick = self.share * abs(other) + self.width + 1e-9  # 0.88 − 0.86 is a hair above 0.02
        if relation == "no_worse":
            return yardstick + gain
        return min(yardstick + gain, yardstick - gain, key=np.mean)


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
BESIDE = {
    "reconstruction": ("psnr", "swd"), "generation": ("swd",), "mmd": (), "encoder": ("gmac",)
}  # fmt: skip
"""Our columns beside the paper's, by the table's measure."""


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


class Row(Config):
    """A row of a table: one recipe, and the paper's numbers."""

    table: str
    """The table's name, such as t09."""
    name: str
    """Its own name, such as gaussian."""
    label: tuple[str, ...]
    """Its label in the paper, one part for each of the table's header."""
    paper: dict[str, Number]
    """The paper's numbers, by column."""
    resolution: int | None = None
    """Image size of the measurement in pixels; None: that at which its training ends."""

    @property
    def preset(self) -> str:
        """The name of its recipe, such as t09-gaussian."""
        return f"{self.table}-{self.name}"


class OurRows(Config):
    """Rows of our own presets beside the paper's, and claims of ours about them."""

    rows: tuple[Row, ...] = ()
    """Without numbers of the paper; the file gives their labels by their names."""
    claims: tuple[Claim, ...] = ()
    """They may name rows of the paper, too."""


class Table(Config):
    """A table of the paper, as written in `configs/tables/`."""

    name: str
    """Such as t09 or t02a: the name of its file."""
    title: str
    """Its subject."""
    measure: Literal["reconstruction", "encoder", "mmd", "generation"] = "reconstruction"
    """The kind of its measurements."""
    header: tuple[str, ...]
    """Titles of the parts of a row's label, which is split at its commas."""
    rows: tuple[Row, ...]
    """In the paper's order; the file gives their names, and a row's recipe gives its numbers."""
    columns: tuple[str, ...]
    """The paper's columns, as named in `COLUMNS`."""
    transposed: bool = False
    """The paper prints the rows as columns."""
    claims: tuple[Claim, ...]
    """The paper's claims about it."""
    ours: OurRows = OurRows()
    """Rows and claims that `with_ours` adds."""

    @model_validator(mode="after")
    def _check_names(self) -> "Table":
        rows = [row.name for row in (*self.rows, *self.ours.rows)]
        names = [("columns", name, [*COLUMNS]) for name in self.columns]
        for claim in (*self.claims, *self.ours.claims):
            names += [("claims", name, rows) for name in (claim.row, claim.than)]
            names += [("claims", name, [*self.columns]) for name in claim.columns]
        for key, name, known in names:
            if name not in known:
                raise ValueError(f"{key}: no '{name}'{did_you_mean(name, known)}")
        return self

    @property
    def number(self) -> str:
        """Such as T9 or T2a."""
        return f"T{self.name[1:].lstrip('0')}"

    @property
    def all_columns(self) -> tuple[str, ...]:
        """The paper's columns, then ours."""
        return tuple(dict.fromkeys(self.columns + BESIDE[self.measure]))

    def with_ours(self) -> "Table":
        """Return the table with our rows and claims among the paper's."""
        rows, claims = (*self.rows, *self.ours.rows), (*self.claims, *self.ours.claims)
        return self.model_copy(update={"rows": rows, "claims": claims, "ours": OurRows()})

    def claimed(self, claim: Claim) -> tuple[str, ...]:
        """Return the columns that a claim is about."""
        return claim.columns or tuple(name for name in self.columns if COLUMNS[name].better)


@cache
def all_tables() -> tuple[Table, ...]:
    """Return every table, in the paper's order."""
    return tuple(map(_read, list_presets("tables")))


def _read(name: str) -> Table:
    tree = load_preset("tables", name)
    kind = "diffusion" if tree.get("measure") == "generation" else "recipes"
    parts = 1 if tree.get("transposed") else len(tree["header"])
    rows = []
    for row in tree["rows"]:
        paper = published(kind, f"{name}-{row}")
        label = paper["row"].split(", ", parts - 1)
        numbers = {column: paper[column] for column in tree["columns"] if column in paper}
        of_row = {"table": name, "name": row, "label": label, "paper": numbers}
        rows.append(of_row | {"resolution": paper.get("resolution")})
    ours = {"rows": {}, "claims": []} | tree.get("ours", {})
    ours["rows"] = [
        {"table": name, "name": row, "label": label.split(", ", parts - 1), "paper": {}}
        for row, label in ours["rows"].items()
    ]
    return validate(Table, tree | {"name": name, "rows": rows, "ours": ours})


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


# -------------------------------------------------------------------------------- the claims
FEWEST = 30
"""Images below which two standard errors are too few: Student's t is 2.05 there."""
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Student's t of a mean over 2, 3 … 10 seeds: 95 % of all means lie within as many errors."""
UNKNOWN = "its error is unknown"

Verdict = Literal["holds", "does not hold", "cannot be judged"]
Each = Mapping[str, NDArray]
"""By column the numbers of every image of a row, and the images' indices as `k`."""


@dataclass(frozen=True)
class Comparison:
    """Two rows in one column."""

    column: str
    verdict: Verdict
    here: tuple[float, float] | None = None
    """The numbers of the two rows, if both were measured."""
    error: float | None = None
    """Standard error of their difference: over images, if both rows have the same images, or over
    seeds, the larger."""
    why: str = ""
    """Why the claim was not judged, or a caveat."""


@dataclass(frozen=True)
class JudgedClaim:
    """A claim, and the comparison that decides it in each column."""

    claim: Claim
    comparisons: tuple[Comparison, ...]

    @property
    def verdict(self) -> Verdict:
        """Does not hold: in at least one column. Holds: in all of them."""
        verdicts = {comparison.verdict for comparison in self.comparisons}
        if "does not hold" in verdicts:
            return "does not hold"
        return "holds" if verdicts == {"holds"} else "cannot be judged"


def judge(
    table: Table,
    records: Mapping[str, Mapping[str, Any]],
    each: Mapping[str, Each],
    not_judged: str,
) -> tuple[JudgedClaim, ...]:
    """Judge every claim of a table by the records of its rows.

    No column stands in for another: a claim about rFID cannot be judged without rFID, whatever the
    other columns show. In columns that are means over images, a claim that another choice of images
    might reverse is not judged either, nor one that other seeds might, if rows were trained with
    several. Otherwise the error is unknown, unless it is a count: any difference decides, and the
    comparison carries a caveat.
    No claim is judged if `not_judged` gives a reason.
    """

    def compare(claim: Claim, column: str) -> Comparison:
        kind, rows = COLUMNS[column], (claim.row, claim.than)
        found = [records[row] for row in rows if row in records]
        numbers = [record["numbers"].get(column) for record in found]
        here = None
        if len(found) == 2 and None not in numbers:
            here = (mean_of(numbers[0]), mean_of(numbers[1]))
        pair = _pair_images(each.get(claim.row, {}), each.get(claim.than, {}), column)
        seeds = _pair_seeds(found, column)
        errors = [_standard_error(a - b) for a, b in filter(None, (pair, seeds))]
        error = max((error for error in errors if error is not None), default=None)
        reasons = [not_judged, *(record["missing"].get(column) for record in found)]
        undecided = partial(_why_undecided, claim.relation, kind, here, pair, seeds)
        why = next(filter(None, reasons), "") or undecided()
        if here is None or why:
            return Comparison(column, "cannot be judged", here, error, why)
        holds = kind.margins(claim.relation, *here) > 0
        counted = kind.counted or any(column in record.get("counted", ()) for record in found)
        why = "" if kind.of_each_image or counted or seeds else UNKNOWN
        return Comparison(column, "holds" if holds else "does not hold", here, error, why)

    return tuple(
        JudgedClaim(claim, tuple(compare(claim, column) for column in table.claimed(claim)))
        for claim in table.claims
    )


def mean_of(number: Number) -> float:
    """A number without its ±."""
    return number[0] if isinstance(number, (tuple, list)) else number


def _pair_images(ours: Each, other: Each, column: str) -> tuple[NDArray, NDArray] | None:
    """A column's numbers of the same images in two rows, float64 (n,) each, if there are any."""
    if column not in ours or column not in other or not np.array_equal(ours["k"], other["k"]):
        return None
    return ours[column].astype(np.float64), other[column].astype(np.float64)


def _pair_seeds(
    records: Sequence[Mapping[str, Any]], column: str
) -> tuple[NDArray, NDArray] | None:
    """A column's numbers of two rows by seed, float64 (n,) each, if there are several."""
    numbers = [record.get("seeds", {}).get(column) for record in records]
    if len(numbers) < 2 or None in numbers:
        return None
    return np.array(numbers[0], float), np.array(numbers[1], float)


def _why_undecided(
    relation: Relation,
    kind: TableColumn,
    here: tuple[float, float] | None,
    pair: tuple[NDArray, NDArray] | None,
    seeds: tuple[NDArray, NDArray] | None,
) -> str:
    """Why numbers cannot decide a claim; "" if they can."""
    if here is None:
        return "not measured"
    if not all(map(isfinite, here)):
        return "not a finite number"
    if seeds is not None:
        margins = np.array([kind.margins(relation, a, b) for a, b in zip(*seeds, strict=True)])
        bound = STUDENT_T[min(len(margins), len(STUDENT_T) + 1) - 2]
        if abs(margins.mean()) <= bound * (_standard_error(margins) or 0.0):
            return "within the error over seeds"
    if not kind.of_each_image:
        return ""
    if pair is None:
        return "not measured over the same images"
    if len(pair[0]) < FEWEST:
        return f"over fewer than {FEWEST} images"
    margins = kind.margins(relation, *pair)
    error = _standard_error(margins) or 0.0
    uncertain = error > 0 and abs(margins.mean()) <= 2 * error
    return "within two standard errors" if uncertain else ""


def _standard_error(values: NDArray) -> float | None:
    """The standard error of the mean of (n,); None if n < 2."""
    if len(values) < 2:
        return None
    with np.errstate(invalid="ignore"):  # infinite values have none, and are reported elsewhere
        return float(values.std(ddof=1) / np.sqrt(len(values)))
