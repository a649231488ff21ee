"""Judge the paper's claims: compare two rows of a table, column by column.

Two rows are compared image by image: an image is about as hard for one autoencoder as for the
other, so that the differences spread far less than the numbers of either.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.reproduce.tables import COLUMNS, Claim, Number, Relation, Table, TableColumn

FEWEST = 30
"""Images below which two standard errors are too few: Student's t is 2.05 there."""
UNKNOWN = "its error is unknown"

Verdict = Literal["holds", "does not hold", "cannot be judged"]
Each = Mapping[str, NDArray]
"""By column the numbers of every image, and the images' indices as `k`."""
Pairs = tuple[NDArray, NDArray]
"""A column's numbers of the same images in two rows, the claim's first; float64 (n,) each."""


@dataclass(frozen=True)
class Comparison:
    """Two rows in one column."""

    column: str
    verdict: Verdict
    here: tuple[float, float] | None = None
    """The numbers of the two rows, if both were measured."""
    error: float | None = None
    """Standard error of their difference over images, if both rows have the same images."""
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
    numbers: Mapping[str, Mapping[str, Number | None]],
    missing: Mapping[str, Mapping[str, str]],
    not_judged: str = "",
    each: Mapping[str, Each] = MappingProxyType({}),
    counted: Collection[str] = (),
) -> tuple[JudgedClaim, ...]:
    """Judge every claim of a table.

    No column stands in for another: a claim about rFID cannot be judged without rFID, whatever the
    other columns show. In columns that are means over images, a claim that another choice of images
    might reverse is not judged either. In the others the error is unknown, unless they are counts:
    any difference decides, and the comparison carries a caveat.

    Args:
        numbers: our numbers, by row and column.
        missing: why a number is missing or does not count, by row and column.
        not_judged: why no claim is judged, if so.
        each: the numbers of every image, by row.
        counted: columns without an error here, besides those that never have one.
    """

    def compare(claim: Claim, column: str) -> Comparison:
        rows = (claim.row, claim.than)
        ours, other = (numbers.get(row, {}).get(column) for row in rows)
        here = None if ours is None or other is None else (mean(ours), mean(other))
        reasons = [missing.get(row, {}).get(column) for row in rows]
        pairs = pair_images(each.get(claim.row, {}), each.get(claim.than, {}), column)
        error = None if pairs is None else standard_error(pairs[0] - pairs[1])
        why = not_judged or next((reason for reason in reasons if reason), "")
        why = why or _why_undecided(claim.relation, COLUMNS[column], here, pairs)
        if here is None or why:
            return Comparison(column, "cannot be judged", here, error, why)
        kind = COLUMNS[column]
        holds = _holds(claim.relation, kind.gain(*here), kind.yardstick(here[1]))
        is_known = kind.of_each_image or kind.counted or column in counted
        verdict: Verdict = "holds" if holds else "does not hold"
        return Comparison(column, verdict, here, error, "" if is_known else UNKNOWN)

    return tuple(
        JudgedClaim(claim, tuple(compare(claim, column) for column in table.claimed(claim)))
        for claim in table.config.claims
    )


def _holds(relation: Relation, gain: float, yardstick: float) -> bool:
    if relation == "better":
        return gain > 0
    return gain >= -yardstick and (relation == "no_worse" or gain <= yardstick)


def _why_undecided(
    relation: Relation,
    kind: TableColumn,
    here: tuple[float, float] | None,
    pairs: Pairs | None,
) -> str:
    """Why numbers cannot decide a claim; "" if they can."""
    if here is None:
        return "not measured"
    if not all(map(isfinite, here)):
        return "not a finite number"
    if not kind.of_each_image:
        return ""
    if pairs is None:
        return "not measured over the same images"
    if len(pairs[0]) < FEWEST:
        return f"over fewer than {FEWEST} images"
    uncertain = is_uncertain(margins(relation, kind, pairs))
    return "within two standard errors" if uncertain else ""


def mean(number: Number) -> float:
    """Return a number without its ±."""
    return number[0] if isinstance(number, (tuple, list)) else number


# ------------------------------------------------------------------------------ image by image
def pair_images(ours: Each, other: Each, column: str) -> Pairs | None:
    """Pair the images of two rows; None if they are not the same."""
    if column not in ours or column not in other or not np.array_equal(ours["k"], other["k"]):
        return None
    return ours[column].astype(np.float64), other[column].astype(np.float64)


def margins(relation: Relation, kind: TableColumn, pairs: Pairs) -> NDArray:
    """Return each image's margin (n,): a claim holds if their mean is positive.

    A claim of similarity can fail on either side: the margins are those of the nearer one.
    """
    ours, other = pairs
    gains = kind.gain(ours, other)
    if relation == "better":
        return gains
    yardsticks = kind.yardstick(other)
    if relation == "no_worse":
        return yardsticks + gains
    return min(yardsticks + gains, yardsticks - gains, key=np.mean)


def is_uncertain(margins: NDArray) -> bool:
    """Return true if a mean is within two of its standard errors of 0."""
    error = standard_error(margins)
    return error is not None and error > 0 and bool(abs(margins.mean()) <= 2 * error)


def standard_error(values: NDArray) -> float | None:
    """Return the standard error of the mean of (n,); None if n < 2."""
    if len(values) < 2:
        return None
    with np.errstate(invalid="ignore"):  # infinite values have none, and are reported elsewhere
        return float(values.std(ddof=1) / np.sqrt(len(values)))
