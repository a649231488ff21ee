"""Rows measured over images that are all alike."""

import numpy as np

from pipelines.reproduce.claims import mean
from pipelines.reproduce.tables import COLUMNS


def equal_images(numbers: dict[str, dict], count: int = 40) -> dict[str, dict]:
    """By row and column what each of so many images has, where the mean is this."""
    return {
        row: {"k": np.arange(count)}
        | {
            name: np.full(count, mean(value))
            for name, value in of.items()
            if COLUMNS[name].of_each_image and value is not None
        }
        for row, of in numbers.items()
    }
