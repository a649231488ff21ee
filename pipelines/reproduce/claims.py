"""Two rows image by image: whether other images might well have turned what is claimed of them.

Images are as hard for the one autoencoder as for the other, so that differences image by image
spread far less than either's numbers.

Whether what the paper claims of two rows holds here, column by column.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.reproduce.tables import COLUMNS, Claim, Column, Number, Relation, Table

FEWEST = 30
"""Images below which two standard errors are too little: Student's t is at 2.05 there."""


class Pairs(NamedTuple):
    """A column's numbers of the same images, float64 (n,)."""

    ours: NDArray
    """Of the row that the claim is made of."""
    other: NDArray


def pair_images(
    ours: Mapping[str, NDArray], other: Mapping[str, NDArray], column: str
) -> Pairs | None:
    """The two rows of a column; None where they are not of the same images.

    Args:
        ours, other: by column the numbers of every image, and the images' own as `k`.
    """
    if column not in ours or column not in other or not np.array_equal(ours["k"], other["k"]):
        return None
    return Pairs(ours[column].astype(np.float64), other[column].astype(np.float64))


def margins(relation: Relation, kind: Column, pairs: Pairs) -> NDArray:
    """How far a claim is from turning, image by image (n,); it holds where their mean is above 0.

    Of a claim that may turn on either side, those of the nearer one.
    """
    gains = kind.gain(pairs.ours, pairs.other)
    if relation == "better":
        return gains
    yardsticks = kind.yardstick(pairs.other)
    if relation == "no_worse":
        return yardsticks + gains
    return min(yardsticks + gains, yardsticks - gains, key=np.mean)


def is_uncertain(margins: NDArray) -> bool:
    """Whether a mean is within two of its standard errors of 0."""
    error = standard_error(margins)
    return error is not None and error > 0 and bool(abs(margins.mean()) <= 2 * error)


def standard_error(values: NDArray) -> float | None:
    """Of the mean of (n,); None of fewer than two."""
    if len(values) < 2:
        return None
    with np.errstate(invalid="ignore"):  # of an infinity there is none, and that is told elsewhere
        return float(values.std(ddof=1) / np.sqrt(len(values)))


Verdict = Literal["holds", "does not hold", "cannot be judged"]
UNKNOWN = "its error is not known"


@dataclass(frozen=True)
class Finding:
    """A claim in one column."""

    column: str
    verdict: Verdict
    here: tuple[float, float] | None = None
    """Of the row and of the one it is compared with, where both were measured."""
    error: float | None = None
    """Standard error of their difference over the images, where both measured the same ones."""
    why: str = ""
    """It cannot be judged; or what is to be known of a verdict."""


@dataclass(frozen=True)
class Judgement:
    """A claim, and what became of it."""

    claim: Claim
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """does not hold: in one column at least. holds: in all of them."""
        verdicts = {finding.verdict for finding in self.findings}
        if "does not hold" in verdicts:
            return "does not hold"
        return "holds" if verdicts == {"holds"} else "cannot be judged"


def judge(
    table: Table,
    numbers: Mapping[str, Mapping[str, Number]],
    missing: Mapping[str, Mapping[str, str]],
    not_judged: str = "",
    each: Mapping[str, Mapping[str, NDArray]] = MappingProxyType({}),
    counted: Collection[str] = (),
) -> tuple[Judgement, ...]:
    """Judge every claim of a table.

    No column stands in for another: a claim on rFID cannot be judged where rFID was not measured,
    whatever the others say. Nor can one that another choice of images might well have turned, in
    columns of which every image has a share. Of the others that are no counts the error is not
    known: any difference decides, and the finding says so.

    Args:
        numbers: what was measured, by row and column.
        missing: why a number is not there, or is not to be judged by, by row and column.
        not_judged: why nothing of it is to be judged, where that is so.
        each: by row, the numbers of every image by column, and the images' own as `k`.
        counted: columns that have no error here, besides those that never have.
    """
    return tuple(
        Judgement(
            claim,
            tuple(
                _find(claim, column, numbers, missing, not_judged, each, counted)
                for column in table.claimed(claim)
            ),
        )
        for claim in table.config.claims
    )


def _find(
    claim: Claim,
    column: str,
    numbers: Mapping[str, Mapping[str, Number]],
    missing: Mapping[str, Mapping[str, str]],
    not_judged: str,
    each: Mapping[str, Mapping[str, NDArray]],
    counted: Collection[str],
) -> Finding:
    rows = (claim.row, claim.than)
    here = tuple(numbers.get(row, {}).get(column) for row in rows)
    both = None if None in here else (mean(here[0]), mean(here[1]))
    reasons = [missing.get(row, {}).get(column) for row in rows]
    why = not_judged or next((reason for reason in reasons if reason), "")
    pairs = pair_images(each.get(claim.row, {}), each.get(claim.than, {}), column)
    error = None if pairs is None else standard_error(pairs.ours - pairs.other)

    def undecided(reason: str) -> Finding:
        return Finding(column, "cannot be judged", both, error, reason)

    if both is None or why:
        return undecided(why or "not measured")
    if not all(map(isfinite, both)):
        return undecided("not a finite number")
    kind = COLUMNS[column]
    gain, yardstick = kind.gain(*both), kind.yardstick(both[1])
    if kind.of_each_image:
        if pairs is None:
            return undecided("not measured over the same images")
        if len(pairs.ours) < FEWEST:
            return undecided(f"over fewer than {FEWEST} images")
        if is_uncertain(margins(claim.relation, kind, pairs)):
            return undecided("within two standard errors")
    holds = {
        "better": gain > 0,
        "no_worse": gain >= -yardstick,
        "similar": abs(gain) <= yardstick,
    }[claim.relation]
    known = kind.of_each_image or kind.counted or column in counted
    verdict: Verdict = "holds" if holds else "does not hold"
    return Finding(column, verdict, both, error, "" if known else UNKNOWN)


def mean(number: Number) -> float:
    """A number without its ±."""
    return number[0] if isinstance(number, (tuple, list)) else number
