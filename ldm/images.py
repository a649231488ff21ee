"""Conversion between uint8 pixels and floats in [−1, 1], and grids of images.

Inside the toolkit images are NCHW float32 in [−1, 1]; in files and metrics on pixels, uint8.
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


def assert_range(images: Tensor) -> None:
    """Raise a ValueError for pixels in [0, 255], or a NaN, instead of values in [−1, 1]."""
    low, high = torch.stack(torch.aminmax(images)).tolist()  # one synchronisation
    if not (low >= -1.5 and high <= 1.5):
        raise ValueError(f"images must lie in [−1, 1], not [{low:.3g}, {high:.3g}]")


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Arrange images (N, 3, H, W) in rows of `columns`, with white gaps: → (3, H', W')."""
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    cells = torch.ones(rows * columns, channels, height + gap, width + gap)
    cells[:count, :, :height, :width] = images.detach().float().cpu()
    sheet = rearrange(cells, "(r c) ch h w -> ch (r h) (c w)", c=columns)
    return sheet[:, : rows * (height + gap) - gap, : columns * (width + gap) - gap]


def to_pil(image: Tensor) -> Image.Image:
    """Convert a float image (3, H, W) in [−1, 1] to PIL."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).cpu().numpy())


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write a PNG grid of float images (N, 3, H, W) in [−1, 1], atomically."""
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
