"""Geometry on uint8 images (H, W, 3): what cuts an R×R training image from a whole one.

Bytes of an image file → RGB uint8, whatever the file holds.

Colour profiles are not applied. 16-bit grey is scaled to 8 bits; of 16-bit colour, Pillow itself
keeps the high byte.
"""

import io
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

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


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".npy")
"""What is read, by the end of the name, in any case of letters."""


class CorruptImage(Exception):
    """An image that cannot be read; the message is the reason. It is skipped and counted."""


def is_image(name: str) -> bool:
    """Whether a relative path names an image. Hidden files and macOS's doubles are none."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def decode(data: bytes, suffix: str) -> np.ndarray:
    """One image as RGB uint8 (H, W, 3).

    Grey is repeated, transparency composited on white, CMYK converted, the EXIF orientation
    applied; of an animation the first frame is taken.

    Args:
        data: the whole file.
        suffix: ".npy" for an array saved by NumPy; a picture's format is seen from its bytes.

    Raises:
        CorruptImage: the data is truncated, damaged, or of a kind whose range is unknown.
    """
    try:
        return _decode_array(data) if suffix.lower() == ".npy" else _decode_picture(data)
    except CorruptImage:
        raise
    except UnidentifiedImageError as error:  # its words name an object of Python
        raise CorruptImage("no picture, or its beginning is damaged") from error
    except Exception as error:  # a damaged file makes Pillow's readers raise nearly anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CorruptImage(reason) from error


def _decode_array(data: bytes) -> np.ndarray:
    """uint8 (1, 3, H, W), (3, H, W) or (H, W, 3), as CelebA-HQ is made, → (H, W, 3)."""
    array = np.load(io.BytesIO(data), allow_pickle=False)
    pixels = array[0] if array.ndim == 4 and len(array) == 1 else array
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise CorruptImage(f"a {array.dtype} array of shape {array.shape} is no RGB uint8 image")
    return np.ascontiguousarray(pixels)


def _decode_picture(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        return _grey16_to_rgb(np.asarray(image))
    if image.mode == "F":
        raise CorruptImage("the range of floating-point pixels is unknown")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return np.asarray(image.convert("RGB"))


def _grey16_to_rgb(levels: np.ndarray) -> np.ndarray:
    if levels.min() < 0 or levels.max() > 65535:
        raise CorruptImage("the range of 32-bit pixels is unknown")
    # 65535 = 255 · 257: Pillow's own conversion would clip at 255 instead
    grey = np.round(levels / 257).astype(np.uint8)  # (H, W)
    return np.repeat(grey[..., None], 3, axis=2)
