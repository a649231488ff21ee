"""The parts of the latent diffusion UNet (Rombach et al. 2022, arXiv 2112.10752)."""

import math
from typing import Literal

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
    """Cosines, then sines, of positions (B,) at falling frequencies → (B, width), width even.

    In float32, or in the positions' dtype where that is finer: a time step of 999 needs it.
    """
    # Vaswani et al. 2017, Section 3.5: frequencies 10000^(−i / (width/2))
    ramp = torch.arange(width // 2, dtype=torch.float32, device=positions.device)
    frequencies = torch.exp(-math.log(10_000) * ramp / (width // 2))
    angles = positions[:, None] * frequencies  # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class NoiseEmbedding(nn.Module):
    """What every residual block reads: the noise level and, where the network knows them, the
    image's class and the parameters of its augmentation, in one vector of 4·channels values.

    Args:
        channels: the UNet's width, which is that of the noise level's sinusoids.
        classes: rows of the table of classes, added to the embedding (Dhariwal and Nichol 2021,
            Section 3.1); 0: it knows no classes.
        augment_parameters: values that describe an augmentation (Karras et al. 2022, Appendix F.2),
            embedded linearly without a bias, so that zeros add nothing; 0: it takes none.
    """

    def __init__(self, channels: int, classes: int = 0, augment_parameters: int = 0):
        super().__init__()
        self.channels = channels
        self.linear_in = nn.Linear(channels, 4 * channels)
        self.linear_out = nn.Linear(4 * channels, 4 * channels)
        self.classes = nn.Embedding(classes, 4 * channels) if classes else None
        self.augment = (
            nn.Linear(augment_parameters, 4 * channels, bias=False) if augment_parameters else None
        )

    def forward(
        self, c_noise: Tensor, labels: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        """c_noise (B,), labels (B,) or None, augment (B, A) or None → (B, 4·channels)."""
        weight = self.linear_in.weight
        waves = sinusoids(c_noise, self.channels).to(weight.dtype)
        embedding = self.linear_out(F.silu(self.linear_in(waves)))
        # None is spelled out, so that these weights have a gradient in every step, as DDP expects
        if self.classes:
            if labels is None:
                labels = torch.full((len(c_noise),), -1, device=weight.device)
            labels = labels.to(weight.device)
            is_known = (labels >= 0).to(weight.dtype)[:, None]  # (B, 1)
            embedding = embedding + is_known * self.classes(labels.clamp(min=0))
        if self.augment:
            if augment is None:
                augment = weight.new_zeros(len(c_noise), self.augment.in_features)
            embedding = embedding + self.augment(augment.to(weight))
        return F.silu(embedding)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, the noise embedding between them: (B, in, H, W) → (B, out, H, W).

    Args:
        scale_shift: the embedding scales and shifts what is normalised (Dhariwal and Nichol 2021,
            Section 3.1, AdaGN) instead of being added before the normalisation.
        resample: halve or double H and W, on the skip too, before the first convolution (BigGAN's
            blocks, Brock et al. 2019, Appendix B).
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        embedding_width: int,
        dropout: float,
        scale_shift: bool = False,
        resample: Literal["down", "up"] | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = group_norm(in_width)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.shift = nn.Linear(embedding_width, (2 if scale_shift else 1) * out_width)
        self.norm2 = group_norm(out_width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_width, out_width, 3, padding=1))
        same = in_width == out_width
        self.skip = nn.Identity() if same else nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, in, H, W), embedding (B, 4·channels) → (B, out, H, W), or half or twice as large.

        The sums are made in the convolutions' own output, which no gradient asks for: new memory
        costs a CPU more than the sum.
        """
        h = F.silu(self.norm1(x))
        if self.resample:
            x, h = self._resampled(x), self._resampled(h)
        h = self.conv1(h)
        shift = self.shift(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            # Dhariwal and Nichol 2021, Section 3.1, with the scale counted from 1
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h.add_(shift))
        h = self.conv2(self.dropout(F.silu(h)))
        return h.add_(self.skip(x))

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest")


class SelfAttention(nn.Module):
    """Multi-head attention between all positions, added to its input (B, width, H, W)."""

    def __init__(self, width: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        self.norm = group_norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) → (B, width, H, W)."""
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        query, key, value = rearrange(
            self.qkv(tokens), "b n (qkv heads d) -> qkv b heads n d", qkv=3, d=self.head_width
        )
        # Vaswani et al. 2017, Equation 1
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
        """(B, width, H, W) → (B, width, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
