"""The one place where uint8 pixels become floats in [−1, 1], and back, and pictures are laid out.

Between the parts of the toolkit images are NCHW float32 in [−1, 1]; at the edges (files, metrics on
pixels) they are uint8.
"""

from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.files import write_atomically


def to_float(pixels: Tensor) -> Tensor:
    """uint8 (…, 3, H, W) in 0..255 → float32 in [−1, 1]."""
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels must be uint8, not {pixels.dtype}")
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float (…, 3, H, W) in [−1, 1] → uint8, rounded to the nearest level, clipped."""
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, not {images.dtype}")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def assert_range(images: Tensor, what: str = "images") -> None:
    """Catch the classic mistakes: pixels in [0, 255], or a NaN, where [−1, 1] is meant."""
    low, high = torch.stack(torch.aminmax(images)).tolist()  # one wait for the device, not two
    if not (low >= -1.5 and high <= 1.5):
        raise ValueError(f"{what} must lie in [−1, 1], not [{low:.3g}, {high:.3g}]")


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Lay (N, 3, H, W) images out in rows of `columns`, white between: → (3, H', W')."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    cells = torch.ones(rows * columns, channels, height + gap, width + gap)
    cells[:count, :, :height, :width] = images.detach().float().cpu()
    sheet = rearrange(cells, "(r c) ch h w -> ch (r h) (c w)", c=columns)
    return sheet[:, : rows * (height + gap) - gap, : columns * (width + gap) - gap]


def to_pil(image: Tensor) -> Image.Image:
    """One float image (3, H, W) in [−1, 1] as a picture."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write a PNG sheet of float images (N, 3, H, W) in [−1, 1], whole or not at all."""
    sheet = to_pil(grid(images, columns))
    write_atomically(path, lambda file: sheet.save(file, "PNG"))


def latents_as_rgb(latents: Tensor) -> Tensor:
    """The first three channels of latents (B, n_z, h, w), each stretched to [−1, 1] (Figure 4)."""
    shown = latents[:, :3].float()
    if shown.shape[1] < 3:
        shown = shown.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    flat = shown.transpose(0, 1).flatten(1)
    # 1st and 99th percentile: one outlier must not turn the whole picture grey
    low, high = torch.quantile(flat, torch.tensor([0.01, 0.99], device=flat.device), dim=1)
    shape = (1, 3, 1, 1)
    return ((shown - low.view(shape)) / (high - low).clamp_min(1e-8).view(shape) * 2 - 1).clamp(
        -1, 1
    )
