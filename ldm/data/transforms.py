"""Image files → pixels (H, W, C), and the crops that make training images of them.

Pixels are uint8, or of deeper files uint16 or float32. Colour profiles are not applied.

Files come from anywhere, so their sizes are checked before memory is taken, and no format is read
but those named here: for others, Pillow starts programs such as Ghostscript.
"""

import io
import math
import re
import sys
import zlib
from contextlib import suppress
from errno import EFBIG
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.config import Resolution, height_width
from ldm.errors import brief
from ldm.files import LFS_POINTER
from ldm.images import PixelType
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
MAX_PIXELS = 2**28
"""Pixels of an image, 16,384 × 16,384: decoding takes 3 to 30 bytes for each."""
MAX_BYTES = 8 * MAX_PIXELS
"""Bytes of an image's file: as many as uncompressed 16-bit RGBA takes."""
UNSUSPECTED, PIXELS_A_BYTE = 2**26, 16
"""Pixels beyond which a header is believed only where its file has a byte for so many of them: a
small file that grows to gigabytes is an attack, and no photograph or scan compresses that well."""
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
    (H, W, C) → (R, R, C), or the (height, width) of the resolution.

    The order matters: resized before the crop, the pixels differ, and so does the FID.
    """
    tall, wide = image.shape[:2]
    height, width = largest_crop(tall, wide, resolution)
    top, left = (tall - height) // 2, (wide - width) // 2
    part = image[top : top + height, left : left + width]
    wanted = height_width(resolution)
    return part if (height, width) == wanted else resize(part, *wanted, filter)


def random_crop(image: np.ndarray, resolution: Resolution, rng: np.random.Generator) -> np.ndarray:
    """Crop a window of a resolution, at native size, uniformly at random from (H, W, C)."""
    (height, width), (tall, wide) = image.shape[:2], height_width(resolution)
    top, left = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
    return image[top : top + tall, left : left + wide]


def resize(image: np.ndarray, height: int, width: int, filter: Filter = "lanczos") -> np.ndarray:
    """Resize with Pillow's antialiasing: (H, W, C) → (height, width, C), of the same type.

    Every channel is resized by itself; of 16 bits, rounded once at the end.
    """
    resampling = Image.Resampling[filter.upper()]
    size = (width, height)
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return np.asarray(Image.fromarray(image).resize(size, resampling))
    if image.dtype == np.uint8:
        planes = [Image.fromarray(plane) for plane in np.moveaxis(image, 2, 0)]
        return np.stack([np.asarray(plane.resize(size, resampling)) for plane in planes], axis=2)
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(image, 2, 0)]
    resized = np.stack([np.asarray(plane.resize(size, resampling)) for plane in planes], axis=2)
    return (
        resized if image.dtype == np.float32 else resized.round().clip(0, 65535).astype(np.uint16)
    )


class CorruptImage(Exception):
    """An image that cannot be read, to be skipped and counted; the message is the reason."""


class OtherChannels(CorruptImage):
    """An image of another number of channels than were requested, which its loader names."""


SMALL, LARGE = "too small: ", "too large: "
"""Beginnings of the message of a `CorruptImage` that is only smaller than needed, or larger than
can be read."""


def too_large(error: OSError) -> CorruptImage | None:
    """The `CorruptImage` for a file of more bytes than can be read; None for another error."""
    if error.errno != EFBIG:
        return None
    return CorruptImage(f"{LARGE}a file of more than {MAX_BYTES:,} bytes")


def image_size(data: bytes, suffix: str, channels: int = 3) -> tuple[int, int]:
    """Return width and height of an image file, from its header but for NumPy's arrays."""
    try:
        if suffix.lower() == ".npy":
            return _channels_last(parse_array(data), channels).shape[1::-1]
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


def decode(data: bytes, suffix: str, channels: int = 3, keep: PixelType = "uint8") -> np.ndarray:
    """Decode an image file to pixels (H, W, C), uint8 by default.

    Grey is repeated for three channels, and colour becomes its luminance (ITU-R 601) for one.
    Transparency is composited on white, unless the channels are those of the file, CMYK converted,
    and the EXIF orientation applied. Of an animation the first frame is taken, and of a TIFF the
    first page, or all as channels where they are as many, and not three. Arrays must have the
    channels, first or last. Files are recognised by their content, except NumPy's arrays by the
    suffix ".npy".

    Args:
        channels: C.
        keep: the deepest type of the pixels: "uint8" rounds 16 bits to 8; "uint16" keeps them, and
            of 8 bits, 8; "float32" also keeps values whose range no type tells.

    Raises:
        OtherChannels: the file has another number of channels, which cannot become C.
        CorruptImage: damage, too large an image, or, without "float32", values of unknown range.
    """
    try:
        if suffix.lower() == ".npy":
            return _decode_array(data, channels, keep)
        return _decode_picture(data, channels, keep)
    except CorruptImage:
        raise
    except UnidentifiedImageError as error:  # its message names a Python object
        message = "not an image, or its header is damaged"
        if data.startswith(LFS_POINTER):
            message = "a Git LFS pointer: run `git lfs pull`"
        raise CorruptImage(message) from error
    except Exception as error:  # a damaged file makes Pillow's readers raise nearly anything
        raise CorruptImage(brief(error)) from error


def _decode_array(data: bytes, channels: int, keep: PixelType) -> np.ndarray:
    """(1, C, H, W), (C, H, W) as CelebA-HQ comes, (H, W, C), or for one channel (H, W)."""
    array = parse_array(data)
    pixels = _channels_last(array, channels)
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    is_kept = pixels.dtype == np.uint8 or (pixels.dtype == np.uint16 and keep != "uint8")
    what = f"a {array.dtype} array of shape {array.shape}"
    if not is_kept and (keep != "float32" or pixels.dtype.kind not in "iuf"):
        types = "not uint8" if keep == "uint8" else "neither uint8 nor uint16"
        raise CorruptImage(f"{what} is {types}: set data.range for its values")
    if pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
        raise OtherChannels(f"{what} is not an image of {channels} channel(s){OTHERWISE}")
    return np.ascontiguousarray(pixels if is_kept else _finite(pixels))


def _channels_last(array: np.ndarray, channels: int) -> np.ndarray:
    pixels = array[0] if array.ndim == 4 and len(array) == 1 else array
    if pixels.ndim == 2 and channels == 1:
        return pixels[..., None]
    if pixels.ndim == 3 and pixels.shape[0] == channels and pixels.shape[2] != channels:
        return pixels.transpose(1, 2, 0)
    return pixels


UNKNOWN = ": for values of another range than that of 8 or 16 bits set data.range"
OTHERWISE = ": set image_channels to those of the data"


def _finite(pixels: np.ndarray) -> np.ndarray:
    """Convert pixels to float32, or raise CorruptImage if some are not finite."""
    with np.errstate(over="ignore"):
        pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise CorruptImage("values that are not finite")
    return pixels


def _decode_picture(data: bytes, channels: int, keep: PixelType) -> np.ndarray:
    if data.startswith(PNG_SIGNATURE):
        _check_png(data)
    # the first count alone is fast
    is_long = data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS
    if is_long and len(SCAN.findall(data)) > MAX_SCANS:
        raise CorruptImage(f"more than {MAX_SCANS} scans")
    pages = _check_tiff(data, channels + 1) if data[:2] in (b"II", b"MM") else 1
    image = _load(data)
    # three grey pages are seldom colour: their first is read, as of any other TIFF of pages
    if pages == channels > 1 and channels != 3 and len(image.getbands()) == 1:
        found = [image, *(_load(data, page) for page in range(1, pages))]
        if all(len(page.getbands()) == 1 and page.size == image.size for page in found):
            return np.concatenate([_to_array(page, 1, keep) for page in found], axis=2)
    if keep != "uint8" and image.info.get(SIXTEEN):  # Pillow has kept the high bytes
        pair = np.asarray(image), np.asarray(_load(data, low=True))
        return fit_channels(pair[0].astype(np.uint16) << 8 | pair[1], channels)
    return _to_array(image, channels, keep)


SIXTEEN = "sixteen bits of colour"
LOW = {
    "16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L",
}  # fmt: skip
"""Pillow's layouts of 16-bit colour, of which it keeps the high byte: for each, that of the low."""

SWAPPED = {"F;32BF": "F;32F", "I;32BS": "I;32S"}
"""Layouts of big-endian files that libtiff has put into this machine's order, unknown to Pillow."""


def _load(data: bytes, page: int = 0, low: bool = False) -> Image.Image:
    """Load a page of a file, upright; `low`: the low bytes of 16-bit colour."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as file:  # reads the header only
        if page:
            file.seek(page)
        tags = getattr(file, "tag_v2", {})  # of a TIFF: a tile may be larger than its image
        for width, height in (file.size, (tags.get(322, 1), tags.get(323, 1))):
            _check_pixels(width, height, len(data))
        tiles: list[Any] = getattr(file, "tile", [])
        layouts = [t.args if isinstance(t.args, str) else t.args and t.args[0] for t in tiles]
        halves = [re.fullmatch("(RGBA?);(16[BLN])", str(layout)) for layout in layouts]
        is_deep = bool(halves) and all(half and half[1] == file.mode for half in halves)
        for i, (tile, half, layout) in enumerate(zip(tiles, halves, layouts, strict=True)):
            other = f"{half[1]};{LOW[half[2]]}" if low and half else None
            if tile.codec_name == "libtiff" and sys.byteorder == "little":
                other = SWAPPED.get(layout, other)
            if other:
                is_text = isinstance(tile.args, str)
                tiles[i] = tile._replace(args=other if is_text else (other, *tile.args[1:]))
        file.load()
        with suppress(ValueError):  # Pillow reads what it can of broken tags
            try:
                _check_tiff(file.info.get("exif", b"").removeprefix(b"Exif\0\0"), 1)
            except CorruptImage:  # before version 13, it takes memory for all of them
                del file.info["exif"]
        ImageOps.exif_transpose(file, in_place=True)
        file.info[SIXTEEN] = is_deep
        return file


def _check_pixels(width: int, height: int, size: int) -> None:
    """Refuse an image of more pixels than can be read, or than its file may hold."""
    if (count := width * height) > MAX_PIXELS:
        raise CorruptImage(
            f"{LARGE}{width}×{height} pixels, more than {MAX_PIXELS:,}: cut it into tiles"
        )
    if count > UNSUSPECTED and count > PIXELS_A_BYTE * size:
        raise CorruptImage(f"{width}×{height} pixels in a file of {size:,} bytes")


def _to_array(image: Image.Image, channels: int, keep: PixelType) -> np.ndarray:
    """Pillow's image → (H, W, C)."""
    if image.mode == "I" and keep == "float32":  # whatever the values of this image
        return fit_channels(_finite(np.asarray(image)[..., None]), channels)
    if image.mode.startswith("I"):
        levels = np.asarray(image)[..., None]
        if levels.min() < 0 or levels.max() > 65535:
            raise CorruptImage(f"the range of 32-bit pixels is unknown{UNKNOWN}")
        if keep == "uint8":
            # 65535 = 255 · 257: Pillow's own conversion would clip at 255 instead
            levels = ((levels.astype(np.int32) + 128) // 257).astype(np.uint8)  # rounded
        return fit_channels(levels.astype(np.uint8 if keep == "uint8" else np.uint16), channels)
    if image.mode == "F":
        if keep != "float32":
            raise CorruptImage(f"the range of floating-point pixels is unknown{UNKNOWN}")
        return fit_channels(_finite(np.asarray(image)[..., None]), channels)
    if image.mode in ("LA", "RGBA") and len(image.getbands()) == channels:
        return np.asarray(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    if channels != 3 and image.mode in ("1", "L"):
        return fit_channels(np.asarray(image.convert("L"))[..., None], channels)
    return fit_channels(
        np.asarray(image if image.mode == "RGB" else image.convert("RGB")), channels
    )


def fit_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Pixels (H, W, c) → (H, W, C): grey is repeated, and colour becomes its luminance."""
    own = pixels.shape[2]
    if own == 4 and channels in (1, 3):  # 16-bit colour with transparency: on white
        alpha = pixels[..., 3:] / 65535
        pixels = (pixels[..., :3] * alpha + 65535 * (1 - alpha)).round().astype(np.uint16)
        own = 3
    if own == channels:
        return pixels
    if own == 1 and channels == 3:
        return np.repeat(pixels, 3, axis=2)
    if own == 3 and channels == 1:
        # ITU-R 601-2, in Pillow's integers
        grey = (pixels.astype(np.uint32) * np.array([19595, 38470, 7471], np.uint32)).sum(
            axis=2, dtype=np.uint32, keepdims=True
        )
        return ((grey + 0x8000) >> 16).astype(pixels.dtype)
    raise OtherChannels(f"an image of {own} channel(s), not {channels}{OTHERWISE}")


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


def _check_tiff(data: bytes, most: int) -> int:
    """Count the pages of a TIFF, at most `most` of them.

    Raise CorruptImage for tags larger than the file: libtiff takes memory before it reads.
    """
    order, is_big = "<" if data[:1] == b"I" else ">", 43 in data[2:4]
    word, number = (order + size for size in (("u8", "u8") if is_big else ("u4", "u2")))
    tag = [("tag", order + "u2"), ("type", order + "u2"), ("count", word), ("value", word)]
    start, pages = int(np.frombuffer(data, word, 1, 8 if is_big else 4)[0]), 0
    while start and pages < most:
        try:
            count = int(np.frombuffer(data, number, 1, start)[0])
            first = start + np.dtype(number).itemsize
            tags = np.frombuffer(data, tag, count, first)
            sizes = TIFF_TYPES[tags["type"].clip(max=len(TIFF_TYPES) - 1)]
            if (tags["count"] * sizes.astype(float)).sum() > len(data):
                raise CorruptImage("tags larger than the file")
            start, pages = int(np.frombuffer(data, word, 1, first + tags.nbytes)[0]), pages + 1
        except (CorruptImage, ValueError):  # of a later page, which is then not read
            if not pages:
                raise
            break
    return pages
