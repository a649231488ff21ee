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


def center_crop(image: np.ndarray, resolution: int) -> np.ndarray:
    """Shorter side down to R (Lanczos), then the centre: (H, W, 3) → (R, R, 3).

    Raises:
        ValueError: a side is shorter than R; nothing is ever enlarged.
    """
    height, width = _checked_size(image, resolution)
    shorter = min(height, width)
    if shorter > resolution:
        height, width = (round(side * resolution / shorter) for side in (height, width))
        image = resize(image, height, width)
    top, left = (height - resolution) // 2, (width - resolution) // 2
    return image[top : top + resolution, left : left + resolution]


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


def center_square(image: np.ndarray, size: int, filter: Filter = "lanczos") -> np.ndarray:
    """The whole central square, then down to `size`: (H, W, 3) → (size, size, 3).

    Raises:
        ValueError: a side is shorter than `size`.
    """
    height, width = _checked_size(image, size)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    return square if side == size else resize(square, size, size, filter)


def resize(image: np.ndarray, height: int, width: int, filter: Filter = "lanczos") -> np.ndarray:
    """Pillow's antialiased resize: (H, W, 3) → (height, width, 3)."""
    return np.asarray(Image.fromarray(image).resize((width, height), RESAMPLING[filter]))


def _checked_size(image: np.ndarray, resolution: int) -> tuple[int, int]:
    height, width = image.shape[:2]
    if min(height, width) < resolution:
        raise ValueError(f"{width}×{height} is smaller than {resolution}×{resolution}")
    return height, width
