"""Bytes of an image file → RGB uint8, whatever the file holds.

Colour profiles are not applied. 16-bit grey is scaled to 8 bits; of 16-bit colour, Pillow itself
keeps the high byte.
"""

import io
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

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
