"""Rows measured over images that are all alike, and claims judged by rows' numbers."""

from collections.abc import Collection, Mapping
from types import MappingProxyType

import numpy as np

from pipelines.reproduce.tables import COLUMNS, Each, JudgedClaim, Table, judge

NONE = MappingProxyType({})


def equal_images(numbers: dict[str, dict], count: int = 40) -> dict[str, dict]:
    """By row and column what each of so many images has, where the mean is this."""
    return {
        row: {"k": np.arange(count)}
        | {
            name: np.full(count, value[0] if isinstance(value, tuple) else value)
            for name, value in of.items()
            if COLUMNS[name].of_each_image and value is not None
        }
        for row, of in numbers.items()
    }


def judge_numbers(
    table: Table,
    numbers: Mapping[str, Mapping],
    missing: Mapping[str, Mapping[str, str]] = NONE,
    not_judged: str = "",
    each: Mapping[str, Each] = NONE,
    counted: Collection[str] = (),
) -> tuple[JudgedClaim, ...]:
    """Judge a table's claims by numbers, and reasons for missing ones, by row and column."""
    records = {
        row: {"numbers": of, "missing": missing.get(row, {}), "counted": counted}
        for row, of in numbers.items()
    }
    return judge(table, records, each, not_judged)
