"""Features without weights, to test metrics on."""

import numpy as np
from skimage.transform import downscale_local_mean

from ldm.data.photos import PHOTOGRAPHS, PhotoSource
from ldm.metrics import FeatureStatistics

EDGE = 32


def photo_features(split: str, count: int, dim: int, seed: int = 0) -> np.ndarray:
    """(count, dim) float64 of 32×32 pieces of the photographs: random crops of their left two
    thirds ("train"), or tiles of their right thirds ("val").

    A random view, through a ReLU as Inception's are, of a piece shrunk to 8×8.
    """
    draw = np.random.default_rng(seed)
    if split == "val":
        tiles = PhotoSource("val", EDGE)
        pieces = [tiles.load(index) for index in range(count)]
    else:
        photographs = PhotoSource("train", EDGE)
        pieces = []
        for index in range(count):
            photograph = photographs.load(index % len(PHOTOGRAPHS))
            top, left = (draw.integers(edge - EDGE + 1) for edge in photograph.shape[:2])
            pieces.append(photograph[top : top + EDGE, left : left + EDGE])
    thumbnails = np.stack([downscale_local_mean(piece / 255, (4, 4, 1)) for piece in pieces])
    view = np.random.default_rng(1).standard_normal((thumbnails[0].size, dim)) / 8
    return (thumbnails.reshape(count, -1) @ view).clip(min=0)


def normal_features(count: int, dim: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.standard_normal((count, dim)) @ draw.standard_normal((dim, dim)) + draw.uniform(
        -3, 3, dim
    )


def statistics_of(values: np.ndarray, batch: int = 7) -> FeatureStatistics:
    statistics = FeatureStatistics(values.shape[1])
    for start in range(0, len(values), batch):
        statistics.update(values[start : start + batch])
    return statistics
