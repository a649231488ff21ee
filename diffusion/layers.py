"""The parts of the latent diffusion UNet (Rombach et al. 2022, arXiv 2112.10752)."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(width: int) -> nn.GroupNorm:
    """32 groups where they divide the width, else the largest power of two that does.

    A group has two channels at least: normalised alone, a channel loses whatever constant was
    added to it, and the noise embedding with it.
    """
    return nn.GroupNorm(min(math.gcd(32, width), width // 2), width, eps=1e-5)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with its parameters at 0: what it ends starts out as the identity, or as 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of positions (B,) at falling frequencies → (B, width), width even."""
    # Vaswani et al. 2017, Section 3.5: frequencies 10000^(−i / (width/2))
    ramp = torch.arange(width // 2, dtype=torch.float32, device=positions.device) / (width // 2)
    angles = positions[:, None] * torch.exp(-math.log(10_000) * ramp)  # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class NoiseEmbedding(nn.Module):
    """Noise level c_noise (B,) → embedding (B, 4·channels) that every residual block reads."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.linear_in = nn.Linear(channels, 4 * channels)
        self.linear_out = nn.Linear(4 * channels, 4 * channels)

    def forward(self, c_noise: Tensor) -> Tensor:
        waves = sinusoids(c_noise, self.channels).to(self.linear_in.weight.dtype)
        return self.linear_out(F.silu(self.linear_in(waves)))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, the noise embedding added between them: (B, in, H, W) → (B, out, …)."""

    def __init__(self, in_width: int, out_width: int, embedding_width: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(in_width)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.shift = nn.Linear(embedding_width, out_width)
        self.norm2 = group_norm(out_width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_width, out_width, 3, padding=1))
        same = in_width == out_width
        self.skip = nn.Identity() if same else nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.shift(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.skip(x) + h


class SelfAttention(nn.Module):
    """Multi-head attention between all positions, added to its input (B, width, H, W)."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        self.norm = group_norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        query, key, value = rearrange(
            self.qkv(tokens), "b n (qkv heads d) -> qkv b heads n d", qkv=3, d=self.head_width
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = self.proj(rearrange(mixed, "b heads n d -> b n (heads d)"))
        return x + rearrange(mixed, "b (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Conv2d):
    """Strided 3×3 convolution: (B, width, H, W) → (B, width, H/2, W/2)."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, stride=2, padding=1)


class Upsample(nn.Module):
    """Nearest neighbours, then a 3×3 convolution: (B, width, H, W) → (B, width, 2H, 2W)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
