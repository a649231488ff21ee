"""Conversion between the pixels of files and floats in [−1, 1], grids and hashes of images.

Inside the toolkit images are NCHW float32 in [−1, 1]; in files uint8, uint16 or float32, whose
`Pixels` say which values are −1 and 1; in metrics on pixels, uint8.
"""

from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Self

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from pydantic import BeforeValidator, Field, TypeAdapter, model_validator
from torch import Tensor

from ldm.config import Config
from ldm.errors import LdmError
from ldm.files import write_atomically

PixelType = Literal["uint8", "uint16", "float32"]
LEVELS = {"uint8": 255, "uint16": 65535}
"""The largest value of each type of whole numbers."""
LARGEST = 1e30
"""Magnitude of pixels at most: beyond, float32 has no room to compute."""
Bound = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
_BOUNDS = TypeAdapter(tuple[Bound, Bound])


def read_range(given: Any) -> Any:
    """A setting of the range of pixels: "type", "measured", or two ascending numbers.

    A ValueError of one line says what it must be.
    """
    if given in ("type", "measured"):
        return given
    with suppress(ValueError):  # pydantic's
        low, high = _BOUNDS.validate_python(given)
        if low < high:
            return low, high
    raise ValueError("must be type, measured, or two numbers within ±1e30, the lower first")


RangeSetting = Annotated[
    Literal["type", "measured"] | tuple[Bound, Bound], BeforeValidator(read_range)
]
"""Pixel values that become −1 and 1, as requested."""


class Pixels(Config):
    """Pixel values of image files; training notes those of its data here."""

    type: PixelType = "uint8"
    """Type of the values."""
    range: tuple[Bound, Bound] | None = None
    """The values that are −1 and 1; those beyond are clipped. null: the least and the largest of
    the type."""

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range: {list(self.range)} must be two numbers, the lower first")
        return self

    @property
    def is_plain(self) -> bool:
        """True for 8-bit pixels of the whole range, which batches hold as uint8."""
        return self.type == "uint8" and self.range is None

    @property
    def bounds(self) -> tuple[float, float]:
        """The values that are −1 and 1; an LdmError for floats without a range."""
        if self.range is None and self.type == "float32":
            raise LdmError(
                "the range of floating-point pixels is unknown: set data.range to the values that "
                "are black and white, as data.range=[0,1], or to measured"
            )
        return self.range or (0.0, float(LEVELS[self.type]))

    def round(self, images: Tensor) -> Tensor:
        """Round float images in [−1, 1] as files would, to float32; plain ones to uint8. A second
        time changes nothing."""
        if self.is_plain:
            return as_uint8(images)
        images = images.float().clamp(-1, 1)
        if self.type == "float32":
            return images
        (low, high), levels = self.bounds, LEVELS[self.type]
        values = ((images.double() + 1) / 2 * (high - low) + low).round().clamp(0, levels)
        return ((values - low) / (high - low) * 2 - 1).clamp(-1, 1).float()

    def to_array(self, image: Tensor) -> np.ndarray:
        """Convert a float image (C, H, W) in [−1, 1], or a rounded one, to the pixels of a file,
        (H, W, C)."""
        if self.is_plain:
            return as_uint8(image).permute(1, 2, 0).cpu().numpy()
        low, high = self.bounds
        values = (image.double().clamp(-1, 1) + 1) / 2 * (high - low) + low
        pixels = values.permute(1, 2, 0).cpu().numpy()
        if self.type == "float32":
            return pixels.astype(np.float32)
        return pixels.round().clip(0, LEVELS[self.type]).astype(self.type)


def file_suffix(kind: str, channels: int) -> str:
    """Return ".png" for pixels that a PNG can hold: 8 bits, of one channel 16; else ".npy"."""
    fits = (("uint8", 1), ("uint8", 3), ("uint16", 1))
    return ".png" if (kind, channels) in fits else ".npy"


def write_pixels(pixels: np.ndarray, file: IO[bytes], compress_level: int = 6) -> None:
    """Write pixels (H, W, C) in the format of their `file_suffix`; a PNG at a level of zlib's."""
    if file_suffix(str(pixels.dtype), pixels.shape[2]) == ".npy":
        np.save(file, np.ascontiguousarray(pixels))
    else:
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
        image.save(file, "PNG", compress_level=compress_level)


def from_pixels(pixels: np.ndarray, range: tuple[float, float] | None = None) -> np.ndarray:
    """Pixels of any shape and of a `PixelType` → float32 in [−1, 1], by their type or a range."""
    kind: PixelType = {"uint8": "uint8", "uint16": "uint16"}.get(str(pixels.dtype), "float32")  # type: ignore[assignment]
    low, high = Pixels(type=kind, range=range).bounds
    if range is None:
        half = np.float32(high / 2)
        return pixels.astype(np.float32) / half - np.float32(1)
    scaled = (pixels.astype(np.float64) - low) / (high - low) * 2 - 1
    return scaled.clip(-1, 1).astype(np.float32)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 (…, C, H, W) in 0..255 → float32 in [−1, 1]."""
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels must be uint8, not {pixels.dtype}")
    return pixels.float() / 127.5 - 1


def as_float(images: Tensor) -> Tensor:
    """Images of a batch, uint8 or float32 in [−1, 1] already, → float32 in [−1, 1]."""
    return images if images.dtype == torch.float32 else to_float(images)


def as_uint8(images: Tensor) -> Tensor:
    """Images of a batch, uint8 or float32 in [−1, 1], → uint8."""
    return images if images.dtype == torch.uint8 else to_uint8(images)


def as_rgb(images: Tensor) -> Tensor:
    """Show images (…, C, H, W) in colour: the first three channels, or the first repeated."""
    channels = images.shape[-3]
    return images[..., :3, :, :] if channels >= 3 else images[..., [0, 0, 0], :, :]


def to_uint8(images: Tensor) -> Tensor:
    """float (…, C, H, W) in [−1, 1] → uint8, rounded to the nearest level, clipped."""
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, not {images.dtype}")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def assert_range(images: Tensor) -> None:
    """Raise a ValueError for pixels in [0, 255], or a NaN, instead of values in [−1, 1]."""
    low, high = torch.stack(torch.aminmax(images)).tolist()  # one synchronisation
    if not (low >= -1.5 and high <= 1.5):
        raise ValueError(f"images must lie in [−1, 1], not [{low:.3g}, {high:.3g}]")


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Arrange images (N, C, H, W) in rows of `columns`, with white gaps: → (3, H', W').

    The first three channels are shown, of one or two the first, in grey.
    """
    images = as_rgb(images)
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    cells = torch.ones(rows * columns, channels, height + gap, width + gap)
    cells[:count, :, :height, :width] = images.detach().float().cpu()
    sheet = rearrange(cells, "(r c) ch h w -> ch (r h) (c w)", c=columns)
    return sheet[:, : rows * (height + gap) - gap, : columns * (width + gap) - gap]


def to_pil(image: Tensor) -> Image.Image:
    """Convert a float image (C, H, W) in [−1, 1] to PIL; one of more channels than three to RGB."""
    if len(image) == 1:
        return Image.fromarray(to_uint8(image)[0].cpu().numpy())
    return Image.fromarray(to_uint8(as_rgb(image)).permute(1, 2, 0).cpu().numpy())


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write a PNG grid of float images (N, C, H, W) in [−1, 1], atomically; see `grid`."""
    sheet = to_pil(grid(images, columns))
    write_atomically(path, lambda file: sheet.save(file, "PNG"))


def latents_as_rgb(latents: Tensor) -> Tensor:
    """Show three channels of latents (B, n_z, h, w), each scaled to [−1, 1] (Figure 4)."""
    shown = latents[:, :3].float()
    if shown.shape[1] < 3:
        shown = shown.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    flat = shown.transpose(0, 1).flatten(1)
    # 1st and 99th percentile, so that an outlier does not turn the picture grey
    low, high = torch.quantile(flat, torch.tensor([0.01, 0.99], device=flat.device), dim=1)
    low, high = low.view(1, 3, 1, 1), high.view(1, 3, 1, 1)
    return ((shown - low) / (high - low).clamp_min(1e-8) * 2 - 1).clamp(-1, 1)


# --------------------------------------------------------------------------------- hashes
Hashes = dict[int, int]
"""The number of an image in its set → 64 bits of the SHA-256 of its pixels, as compared."""

HASH_BYTES = 8  # of 50,000 and 70,000 images, two different ones collide once in 5·10⁹ comparisons


def hash_images(images: Tensor, ks: Tensor) -> Hashes:
    """Hash images (B, C, H, W), at 8 bits, with the numbers `ks` (B,)."""
    images = as_uint8(images)
    # the same pixels may lie in memory in either layout: bring them to one
    pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    digests = (sha256(image.data).digest()[:HASH_BYTES] for image in pixels)
    return {k: int.from_bytes(d, "little") for k, d in zip(ks.tolist(), digests, strict=True)}


def pack_hashes(hashes: Hashes) -> bytes:
    """Join hashes in the order of the images' numbers."""
    return np.array([hashes[k] for k in sorted(hashes)], "<u8").tobytes()


def find_shared(hashes: Hashes, others: Hashes) -> list[int]:
    """Return the sorted numbers of the images of a set that another set contains, too."""
    known = set(others.values())
    return sorted(k for k, value in hashes.items() if value in known)
