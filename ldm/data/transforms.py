"""Image files → RGB uint8 (H, W, 3), and the crops that make training images of them.

Colour profiles are not applied. 16-bit grey is scaled to 8 bits; of 16-bit colour, Pillow itself
keeps the high byte.

Files come from anywhere, so their sizes are checked before memory is taken, and no format is read
but those named here: for others, Pillow starts programs such as Ghostscript.
"""

import io
import math
import re
import zlib
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.config import Resolution, height_width
from ldm.errors import brief
from ldm.files import LFS_POINTER
from ldm.records import parse_array

Filter = Literal["lanczos", "box", "bicubic"]

NOT_RESIZED = "none"
"""Filter in the manifest of images that already had their size."""
SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff",
    ".gif", ".avif", ".avifs", ".npy",
)  # fmt: skip
"""Suffixes of the files that are read, in upper or lower case."""
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF") + (
    ("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()
)
"""Formats that are read, recognised by content, whatever the suffix; AVIF where Pillow has it."""
MAX_PIXELS = 2**26
"""Pixels of an image, 8192 × 8192: decoding takes 10 to 30 bytes for each."""
MAX_BYTES = 8 * MAX_PIXELS
"""Bytes of an image's file: as many as uncompressed 16-bit RGBA takes."""
MAX_SCANS = 100
"""Scans of a progressive JPEG, each of which is a pass over all pixels; cameras write ten."""
SCAN = re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e][\1-\4]")
"""Start of a scan, by its length and number of components: the two first bytes alone are common in
what phones append to a JPEG, such as a film."""


def covers(height: int, width: int, resolution: Resolution) -> bool:
    """True for an image with no side shorter than a resolution's."""
    least_height, least_width = height_width(resolution)
    return height >= least_height and width >= least_width


def enlarged(height: int, width: int, resolution: Resolution) -> tuple[int, int]:
    """Height and width of an image that is enlarged just enough to cover a resolution."""
    tall, wide = height_width(resolution)
    wanted, side = (tall, height) if tall * width >= wide * height else (wide, width)
    return math.ceil(height * wanted / side), math.ceil(width * wanted / side)


def largest_crop(height: int, width: int, resolution: Resolution) -> tuple[int, int]:
    """Height and width of the largest part of an image that has a resolution's proportions."""
    tall, wide = height_width(resolution)
    if height * wide <= width * tall:
        return height, (height * wide + tall // 2) // tall  # to the nearest pixel
    return (width * tall + wide // 2) // wide, width


def center_crop(
    image: np.ndarray, resolution: Resolution, filter: Filter = "lanczos"
) -> np.ndarray:
    """Crop the largest central part of a resolution's proportions, a square for R, then resize it:
    (H, W, 3) → (R, R, 3), or the (height, width) of the resolution.

    The order matters: resized before the crop, the pixels differ, and so does the FID.
    """
    tall, wide = image.shape[:2]
    height, width = largest_crop(tall, wide, resolution)
    top, left = (tall - height) // 2, (wide - width) // 2
    part = image[top : top + height, left : left + width]
    wanted = height_width(resolution)
    return part if (height, width) == wanted else resize(part, *wanted, filter)


def random_crop(image: np.ndarray, resolution: Resolution, rng: np.random.Generator) -> np.ndarray:
    """Crop a window of a resolution, at native size, uniformly at random from (H, W, 3)."""
    (height, width), (tall, wide) = image.shape[:2], height_width(resolution)
    top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
    return image[top : top + tall, left : left + wide]


def resize(image: np.ndarray, height: int, width: int, filter: Filter = "lanczos") -> np.ndarray:
    """Resize with Pillow's antialiasing: (H, W, 3) → (height, width, 3)."""
    resampling = Image.Resampling[filter.upper()]
    return np.asarray(Image.fromarray(image).resize((width, height), resampling))


class CorruptImage(Exception):
    """An image that cannot be read, to be skipped and counted; the message is the reason."""


SMALL = "too small: "
"""Beginning of the message of a `CorruptImage` that is only smaller than needed."""


def image_size(data: bytes, suffix: str) -> tuple[int, int]:
    """Return width and height of an image file, from its header but for NumPy's arrays."""
    if suffix.lower() == ".npy":
        return _decode_array(data).shape[1::-1]
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            return file.size
    except Exception as error:  # a damaged file makes Pillow's readers raise nearly anything
        raise CorruptImage(brief(error)) from error


def is_image(name: str) -> bool:
    """True for the relative path of an image; hidden files and macOS's copies do not count."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """True for the relative path of a hidden file, or of one that macOS adds to archives."""
    return any(p.startswith(".") or p == "__MACOSX" for p in PurePosixPath(name).parts)


def decode(data: bytes, suffix: str) -> np.ndarray:
    """Decode an image file to RGB uint8 (H, W, 3).

    Grey is repeated, transparency composited on white, CMYK converted, and the EXIF orientation
    applied. Of an animation the first frame is taken. Files are recognised by their content, except
    NumPy's arrays by the suffix ".npy". Damage, and pixels of unknown range, raise `CorruptImage`.
    """
    try:
        return _decode_array(data) if suffix.lower() == ".npy" else _to_rgb(data)
    except CorruptImage:
        raise
    except UnidentifiedImageError as error:  # its message names a Python object
        message = "not an image, or its header is damaged"
        if data.startswith(LFS_POINTER):
            message = "a Git LFS pointer: run `git lfs pull`"
        raise CorruptImage(message) from error
    except Exception as error:  # a damaged file makes Pillow's readers raise nearly anything
        raise CorruptImage(brief(error)) from error


def _decode_array(data: bytes) -> np.ndarray:
    """uint8 (1, 3, H, W), (3, H, W) or (H, W, 3), as CelebA-HQ comes, → (H, W, 3)."""
    array = parse_array(data)
    pixels = array[0] if array.ndim == 4 and len(array) == 1 else array
    if pixels.ndim == 3 and pixels.shape[0] == 3 and pixels.shape[2] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise CorruptImage(f"a {array.dtype} array of shape {array.shape} is not RGB uint8")
    return np.ascontiguousarray(pixels)


def _to_rgb(data: bytes) -> np.ndarray:
    if data.startswith(PNG_SIGNATURE):
        _check_png(data)
    if data[:2] in (b"II", b"MM"):
        _check_tiff(data)
    # the first count alone is fast
    is_long = data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS
    if is_long and len(SCAN.findall(data)) > MAX_SCANS:
        raise CorruptImage(f"more than {MAX_SCANS} scans")
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:  # reads the header only
        tags = getattr(file, "tag_v2", {})  # of a TIFF: a tile may be larger than its image
        for width, height in (file.size, (tags.get(322, 1), tags.get(323, 1))):
            if width * height > MAX_PIXELS:
                raise CorruptImage(f"{width}×{height} pixels, more than {MAX_PIXELS:,}")
        file.load()
        ImageOps.exif_transpose(file, in_place=True)
        image: Image.Image = file
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise CorruptImage("the range of 32-bit pixels is unknown")
        # 65535 = 255 · 257: Pillow's own conversion would clip at 255 instead
        grey = ((levels.astype(np.int32) + 128) // 257).astype(np.uint8)  # (H, W), rounded
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise CorruptImage("the range of floating-point pixels is unknown")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _check_png(data: bytes) -> None:
    """Raise CorruptImage for a wrong checksum or a missing end: Pillow lets them pass in pixels."""
    view, start, kind = memoryview(data), len(PNG_SIGNATURE), b""
    while kind != b"IEND":  # a chunk: length, kind, content, checksum of the last two
        end = start + 8 + int.from_bytes(view[start : start + 4])
        if end + 4 > len(data):
            raise CorruptImage("truncated")
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4]):
            raise CorruptImage(f"wrong checksum of the PNG chunk at byte {start}")
        kind, start = bytes(view[start + 4 : start + 8]), end + 4


TIFF_TYPES = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8, 0])
"""Bytes of a value of each type in a TIFF; 0 for types that do not exist."""


def _check_tiff(data: bytes) -> None:
    """Raise CorruptImage for tags larger than the file: libtiff takes memory before it reads."""
    order, is_big = "<" if data[:1] == b"I" else ">", 43 in data[2:4]
    word, number = (order + size for size in (("u8", "u8") if is_big else ("u4", "u2")))
    start = int(np.frombuffer(data, word, 1, 8 if is_big else 4)[0])
    count = int(np.frombuffer(data, number, 1, start)[0])
    tag = [("tag", order + "u2"), ("type", order + "u2"), ("count", word), ("value", word)]
    tags = np.frombuffer(data, tag, count, start + np.dtype(number).itemsize)
    sizes = TIFF_TYPES[tags["type"].clip(max=len(TIFF_TYPES) - 1)]
    if (tags["count"] * sizes.astype(float)).sum() > len(data):
        raise CorruptImage("tags larger than the file")
