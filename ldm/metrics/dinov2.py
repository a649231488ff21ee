"""FD-DINOv2: features of DINOv2's ViT-L/14 (Oquab et al. 2023) in place of Inception's.

Stein et al. 2023 (arXiv 2306.04675) find that the Fréchet distance between them agrees better with
people than FID. As in their evaluation, images are resized to 224×224 by Pillow's bicubic filter at
8 bits, and the features are the class token after the last norm, 1,024 numbers.

The weights are the published file of torch hub. All sizes but that of a head are read from it.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention

from ldm.checkpoint import build_with, read_tensors
from ldm.errors import LdmError
from ldm.files import sha256_of
from ldm.hub import cache_folder, find_or_fetch
from ldm.metrics.inception import Extractor

WEIGHTS = "dinov2_vitl14_pretrain.pth"
URL = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/{WEIGHTS}"
LARGE = 1024, 24
"""Width and blocks of ViT-L/14."""
SIDE, PATCH, HEAD = 224, 14, 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFFSET = 0.1  # of the published code: it interpolates positions to 16.1 patches, and takes 16
EPS = 1e-6


class LayerScaleBlock(nn.Module):
    """Pre-norm transformer block with layer scale (Touvron et al. 2021): (B, T, D) → (B, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.ls1, self.ls2 = (
            nn.ParameterDict({"gamma": nn.Parameter(torch.ones(width))}) for _ in range(2)
        )
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, -1, HEAD))  # (B, T, 3, h, 64)
        mixed = scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4))  # (B, h, T, 64)
        x = x + self.ls1["gamma"] * self.attn["proj"](mixed.transpose(1, 2).flatten(2))
        return x + self.ls2["gamma"] * self.mlp["fc2"](gelu(self.mlp["fc1"](self.norm2(x))))


class VisionTransformer(nn.Module):
    """DINOv2's backbone without registers: (B, 3, H, W) → class tokens (B, D).

    H and W are multiples of 14. Parameters have the published names.

    Args:
        width: D, a multiple of 64.
        grid: positions are embedded on grid × grid patches, and interpolated for other images.
    """

    def __init__(self, width: int, depth: int, grid: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.ModuleList(LayerScaleBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images)  # (B, D, h, w)
        positions = self._positions(*patches.shape[-2:])
        x = patches.flatten(2).mT + positions[:, 1:]  # (B, hw, D)
        first = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def _positions(self, height: int, width: int) -> Tensor:
        """Return the embedding of the positions of a class token and h × w patches."""
        grid = math.isqrt(self.pos_embed.shape[1] - 1)
        if (height, width) == (grid, grid):
            return self.pos_embed
        maps = self.pos_embed[:, 1:].mT.unflatten(2, (grid, grid))  # (1, D, grid, grid)
        factors = [(side + OFFSET) / grid for side in (height, width)]
        maps = interpolate(maps, scale_factor=factors, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], maps.flatten(2).mT], 1)


class Dinov2(Extractor):
    """Class tokens of DINOv2's ViT-L/14, (B, 1024).

    Args:
        path: the weights; None: found in the usual caches, or downloaded.
    """

    def __init__(self, device: torch.device | str, path: Path | None = None) -> None:
        if path is None:
            instead = "omit the metric fd-dinov2"
            path = find_or_fetch(WEIGHTS, URL, "", weight_folders(), instead)
        network = load_network(path)
        self._is_large = (network.norm.normalized_shape[0], len(network.blocks)) == LARGE
        kind = "" if self._is_large else " (not of ViT-L/14's size)"
        self.name = f"{path.name}{kind}, Pillow's bicubic resizing to {SIDE}²"
        self.sha256 = sha256_of(path)
        self.dim = network.norm.normalized_shape[0]
        self._network, self._device = network.to(device), torch.device(device)
        self._threads = ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    @property
    def is_published(self) -> bool | None:
        return None if self._is_large else False  # no SHA-256 was published

    def _features(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        resized = np.stack(list(self._threads.map(_resize, pixels)))  # (B, 224, 224, 3) uint8
        x = torch.from_numpy(resized).to(self._device).permute(0, 3, 1, 2).float() / 255
        mean, std = (x.new_tensor(each).view(3, 1, 1) for each in (MEAN, STD))
        found: Tensor = self._network((x - mean) / std)
        return found


def weight_folders() -> list[Path]:
    """List the folders that may hold the weights: our cache, and torch hub's."""
    return [cache_folder(), Path(torch.hub.get_dir()) / "checkpoints"]


def load_network(path: Path) -> VisionTransformer:
    """Load a published file of weights; an LdmError for another one."""
    weights: Any = read_tensors(path)
    wrong = LdmError(f"{path} does not hold DINOv2's weights: give the published {WEIGHTS}")
    try:
        weights = {name: tensor for name, tensor in weights.items() if name != "mask_token"}
        width, positions = weights["cls_token"].shape[-1], weights["pos_embed"].shape[1] - 1
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise wrong from error
    if width % HEAD or not width or depth > len(weights) or math.isqrt(positions) ** 2 != positions:
        raise wrong
    network = build_with(
        lambda: VisionTransformer(width, depth, math.isqrt(positions)), weights, path
    )
    return network.eval().requires_grad_(False)


def _resize(pixels: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(picture)
