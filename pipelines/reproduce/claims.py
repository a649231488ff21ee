"""Whether what the paper claims of two rows holds here, column by column."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.reproduce.columns import COLUMNS
from pipelines.reproduce.tables import Claim, Number, Table

Verdict = Literal["holds", "does not hold", "cannot be judged"]


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
    """It cannot be judged."""


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
) -> tuple[Judgement, ...]:
    """Judge every claim of a table.

    No column stands in for another: a claim on rFID cannot be judged where rFID was not measured,
    whatever the others say. Nor can one that another choice of images might well have turned.

    Args:
        numbers: what was measured, by row and column.
        missing: why a number is not there, or is not to be judged by, by row and column.
        not_judged: why nothing of it is to be judged, where that is so.
        each: by row, the numbers of every image by column, and the images' own as `k`.
    """
    return tuple(
        Judgement(
            claim,
            tuple(
                _find(claim, column, numbers, missing, not_judged, each)
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
) -> Finding:
    rows = (claim.row, claim.than)
    here = tuple(numbers.get(row, {}).get(column) for row in rows)
    both = None if None in here else (mean(here[0]), mean(here[1]))
    reasons = [missing.get(row, {}).get(column) for row in rows]
    why = not_judged or next((reason for reason in reasons if reason), "")
    error = standard_error(*(each.get(row, {}) for row in rows), column)
    if both is None or why:
        return Finding(column, "cannot be judged", both, error, why or "not measured")
    if not all(map(isfinite, both)):
        return Finding(column, "cannot be judged", both, error, "not a finite number")
    kind = COLUMNS[column]
    gain, yardstick = kind.gain(*both), kind.yardstick(both[1])
    spread = sum(map(_spread, here))
    if claim.relation == "better" and spread and abs(gain) <= spread:
        return Finding(column, "cannot be judged", both, error, "within their standard deviations")
    # how far the claim is from turning
    margin = {
        "better": gain,
        "no_worse": gain + yardstick,
        "similar": yardstick - abs(gain),
    }[claim.relation]
    if error and abs(margin) <= 2 * error:
        return Finding(column, "cannot be judged", both, error, "within two standard errors")
    holds = margin > 0 if claim.relation == "better" else margin >= 0
    return Finding(column, "holds" if holds else "does not hold", both, error)


def standard_error(
    ours: Mapping[str, NDArray], other: Mapping[str, NDArray], column: str
) -> float | None:
    """Of the difference of two means over the same images; None where they are not the same ones.

    Images are as hard for the one autoencoder as for the other, so that differences image by image
    spread far less than either's numbers.
    """
    if column not in ours or column not in other or not np.array_equal(ours["k"], other["k"]):
        return None
    differences = ours[column].astype(np.float64) - other[column]
    if len(differences) < 2:
        return None
    return float(differences.std(ddof=1) / np.sqrt(len(differences)))


def mean(number: Number) -> float:
    """A number without its standard deviation."""
    return number[0] if isinstance(number, (tuple, list)) else number


def _spread(number: Number) -> float:
    """Its standard deviation, 0 where it has none."""
    return number[1] if isinstance(number, (tuple, list)) else 0.0
