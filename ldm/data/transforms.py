"""Geometry on uint8 images (H, W, 3): what cuts an R×R training image from a whole one."""

from typing import Literal

import numpy as np
from PIL import Image

Filter = Literal["lanczos", "box", "bicubic"]

RESAMPLING = {
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
}
NOT_RESIZED = "none"
"""What a manifest says of the filter of images that had their size already."""


def center_crop(image: np.ndarray, resolution: int, filter: Filter = "lanczos") -> np.ndarray:
    """The whole central square, then down to R: (H, W, 3) → (R, R, 3).

    In this order always: cut after resizing, the pixels would be others, and so would the FID.

    Raises:
        ValueError: a side is shorter than R; nothing is ever enlarged.
    """
    height, width = _checked_size(image, resolution)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    return square if side == resolution else resize(square, resolution, resolution, filter)


def random_crop(image: np.ndarray, resolution: int, rng: np.random.Generator) -> np.ndarray:
    """An R×R window at a uniformly random place, at native size: (H, W, 3) → (R, R, 3).

    Raises:
        ValueError: a side is shorter than R.
    """
    height, width = _checked_size(image, resolution)
    top, left = rng.integers(height - resolution + 1), rng.integers(width - resolution + 1)
    return image[top : top + resolution, left : left + resolution]


def mirror(image: np.ndarray) -> np.ndarray:
    """Left and right exchanged: (H, W, 3) → (H, W, 3)."""
    return image[:, ::-1]


def resize(image: np.ndarray, height: int, width: int, filter: Filter = "lanczos") -> np.ndarray:
    """Pillow's antialiased resize: (H, W, 3) → (height, width, 3)."""
    return np.asarray(Image.fromarray(image).resize((width, height), RESAMPLING[filter]))


def _checked_size(image: np.ndarray, resolution: int) -> tuple[int, int]:
    height, width = image.shape[:2]
    if min(height, width) < resolution:
        raise ValueError(f"{width}×{height} is smaller than {resolution}×{resolution}")
    return height, width
