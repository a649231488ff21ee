"""The network of EDM2 and its layers: Karras et al. 2024.

Paper: "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696, the
equations numbered as in its Appendix B; the network is config G, Figure 22). The magnitude of a
tensor is the root of the mean of its squares (Eq. 68). The layers preserve it: where their inputs
have magnitude 1 and are uncorrelated, so have their outputs. Activations neither grow nor fade with
depth, and no bias or group norm is needed.
"""

import math
from contextlib import nullcontext
from typing import Annotated, Literal

import torch
from einops import rearrange
from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.unet import Factors, UNetBase, UNetSizes, Way, resample
from ldm.config import Depth, Width

Balance = Annotated[float, Field(ge=0, le=1)]

EPSILON = 1e-4
"""Keeps a norm from being 0 where it divides (Appendix B.3 and B.4)."""


def pixel_norm(x: Tensor, dim: int = 1) -> Tensor:
    """Scale the vectors along `dim` to magnitude 1; shape and dtype stay.

    The norm is taken in float32 at least: in float16 it could overflow.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide)
    # Eq. 30: a / (√(mean a²) + ε)
    return x * (1 / (norm / math.sqrt(x.shape[dim]) + EPSILON)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU, scaled so that the result has magnitude 1 for a standard normal x."""
    # Eq. 81, with the magnitude of silu(x) for x ~ N(0, 1) as printed in Eq. 80
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Blend two tensors of one shape: a at t = 0, b at t = 1, equal parts at t = 0.5."""
    # Eq. 88: ((1 − t) a + t b) / √((1 − t)² + t²)
    magnitude = math.hypot(1 - t, t)
    return torch.add(a * ((1 - t) / magnitude), b, alpha=t / magnitude)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenate (B, N_a, …) and (B, N_b, …) along dim 1: (B, N_a + N_b, …).

    At t = 0.5 both contribute equally to the next layer, whatever their widths.
    """
    n_a, n_b = a.shape[1], b.shape[1]
    # Eq. 103: C ((1 − t)/√N_a · a ⊕ t/√N_b · b), C = √((N_a + N_b) / ((1 − t)² + t²))
    c = math.sqrt(n_a + n_b) / math.hypot(1 - t, t)
    return torch.cat([a * (c * (1 - t) / math.sqrt(n_a)), b * (c * t / math.sqrt(n_b))], dim=1)


class MPFourier(nn.Module):
    """Fourier features of a number, (B,) → (B, width), at least float32, of mean magnitude 1.

    The random frequencies and phases are buffers: drawn once, and saved with the weights.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # Eq. 36: f ~ N(0, 1), φ ~ U(0, 1)
        self.register_buffer("frequencies", torch.randn(width))
        self.register_buffer("phases", torch.rand(width))

    def forward(self, a: Tensor) -> Tensor:
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        # Eq. 75: √2 cos(2π (f a + φ))
        turns = a[:, None] * self.frequencies + self.phases
        return math.sqrt(2) * torch.cos(2 * math.pi * turns)


class MPLayer(nn.Module):
    """A weight (out, in, …) whose `out` filters are used at norm 1, without a bias.

    A filter is stored at the norm √N, N its fan-in: its values then have magnitude 1 in every
    layer, and one learning rate is the same relative change everywhere. `normalize_` restores this
    norm; call it after every step of the optimiser. Normalisation at use makes the gradient
    orthogonal to the filter (Eq. 59), which Adam's variances need, and keeps averaged weights
    valid.
    """

    def __init__(self, in_width: int, out_width: int, *kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_width, in_width, *kernel))
        self.normalize_()

    def filters(self, gain: Tensor | float = 1.0) -> Tensor:
        """The weight at use: filters of norm `gain`, in the weight's dtype."""
        # Eq. 46: w / ‖w‖
        return (self.weight * (gain / self._norm())).to(self.weight.dtype)

    @torch.no_grad()
    def normalize_(self, unless: Tensor | None = None) -> None:
        """Forced weight normalisation, in place; `unless` () is not 0: leave every bit."""
        # Eq. 66: w ← √N w / ‖w‖
        scale = math.sqrt(self.weight[0].numel()) / self._norm()
        if unless is not None:
            scale = scale.masked_fill(unless != 0, 1)
        self.weight.copy_(self.weight * scale)

    def _norm(self) -> Tensor:
        """Norm of every filter, (out, 1, …), at least float32, and at least ε.

        The paper adds ε instead (Eq. 47); Eq. 59 then holds only approximately.
        """
        dims = tuple(range(1, self.weight.ndim))
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        norm = torch.linalg.vector_norm(self.weight, dim=dims, keepdim=True, dtype=wide)
        return norm.clamp(min=EPSILON)


class MPLinear(MPLayer):
    """(B, in_width) → (B, out_width), in the weight's dtype even under autocast.

    It serves the embedding, the scales of the blocks and the uncertainty, which are cheap and which
    the paper leaves in full precision (Appendix D.2).
    """

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        device = x.device.type
        known = torch.amp.is_autocast_available(device)  # not on "meta"
        with torch.autocast(device, enabled=False) if known else nullcontext():
            return F.linear(x.to(self.weight.dtype), self.filters(gain))


class MPConv2d(MPLayer):
    """Convolution of an odd kernel that keeps H and W: (B, in, H, W) → (B, out, H, W)."""

    def __init__(self, in_width: int, out_width: int, kernel: int) -> None:
        super().__init__(in_width, out_width, kernel, kernel)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return F.conv2d(x, self.filters(gain), padding=self.weight.shape[-1] // 2)


class MPModule(nn.Module):
    """A module with `MPLayer`s among its parts."""

    def normalize_weights(self, unless: Tensor | None = None) -> None:
        """Forced weight normalisation, in place (Eq. 66); call it after every optimiser step.

        Args:
            unless: a number () on the weights' device; if it is not 0, the step was skipped, and
                the weights stay as they are.
        """
        for layer in self.modules():
            if isinstance(layer, MPLayer):
                layer.normalize_(unless)


class EDM2Config(UNetSizes):
    """The defaults are EDM2-S: 280.2 M parameters with the 1000 classes of ImageNet."""

    type: Literal["edm2"] = "edm2"
    """Type of the network."""
    channels: Width = 192
    """Width at full resolution, in channels: 128 XS, 192 S, 256 M, 320 L, 384 XL, 448 XXL."""
    blocks: Depth = 3
    """Blocks a level on the way down; one more on the way up."""
    attention_factors: Factors = (4, 8)
    """Downsampling factors at which blocks have attention; the middle always has it. The default
    gives the paper's 16×16 and 8×8 for latents of 64×64; for 32×32 use (2, 4)."""
    head_width: Width = 64
    """Channels of an attention head; divides every width that has attention."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping a value inside a block; the paper's is 0.1 from M upwards."""
    label_balance: Balance = 0.5
    """Share of the class in the embedding, 0 to 1; the rest is the noise level's."""
    residual_balance: Balance = 0.3
    """Share of the residual branch in a block's sum, 0 to 1."""
    attention_balance: Balance = 0.3
    """Share of the attention in a block's sum, 0 to 1."""
    concat_balance: Balance = 0.5
    """Share of the skip in the decoder's concatenation, 0 to 1."""
    clip: PositiveFloat = 256.0
    """Largest activation that leaves a block, in absolute value."""
    embedding_multiplier: Depth | None = None
    """Width of the embedding, in multiples of `channels`; null: the widest level's."""

    @property
    def embedding_width(self) -> int:
        """Width of the embedding, in channels."""
        return self.channels * (self.embedding_multiplier or max(self.multipliers))


class Embedding(nn.Module):
    """Noise level, class and augmentation as the vector (B, width) that every block reads.

    An image without a label adds zeros to the sum of noise level and class; a network without
    classes has no sum, as the unconditional ones of the paper. The augmentation is not the paper's:
    its layer has no bias, so that zeros (no augmentation) change nothing.
    """

    def __init__(self, config: EDM2Config) -> None:
        super().__init__()
        width, self.config = config.embedding_width, config
        self.fourier = MPFourier(config.channels)
        self.noise = MPLinear(config.channels, width)
        self.label = MPLinear(config.classes, width) if config.classes else None
        augmented = config.augment_parameters
        self.augmentation = MPLinear(augmented, width) if augmented else None

    def forward(self, c_noise: Tensor, labels: Tensor, augment: Tensor) -> Tensor:
        """c_noise (B,), labels (B,), augment (B, A) → (B, width)."""
        embedding = self.noise(self.fourier(c_noise))
        if self.label is not None:
            classes = self.config.classes
            one_hot = labels[:, None] == torch.arange(classes, device=labels.device)  # (B, N)
            # Appendix B.3: √N one-hot has magnitude 1
            label = self.label(math.sqrt(classes) * one_hot)
            embedding = mp_sum(embedding, label, self.config.label_balance)
        if self.augmentation is not None:
            embedding = embedding + self.augmentation(augment)
        return mp_silu(embedding)


class Residual(nn.Module):
    """Two 3×3 convolutions, scaled by the embedding in between: (B, in, H, W) → (B, out, H, W)."""

    def __init__(self, in_width: int, out_width: int, config: EDM2Config) -> None:
        super().__init__()
        self.conv1 = MPConv2d(in_width, out_width, 3)
        self.scale = MPLinear(config.embedding_width, out_width)
        self.gain = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = MPConv2d(out_width, out_width, 3)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.conv1(mp_silu(x))
        # Eq. 104: a learned gain, initially 0, so that the embedding starts without effect
        scale = 1 + self.scale(embedding, self.gain)  # (B, out)
        x = mp_silu(x * scale[:, :, None, None].to(x.dtype))
        return self.conv2(self.dropout(x))


class CosineAttention(nn.Module):
    """Multi-head cosine attention between all positions: (B, width, H, W) → (B, width, H, W)."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.qkv = MPConv2d(width, 3 * width, 1)
        self.proj = MPConv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = rearrange(
            self.qkv(x), "b (qkv heads d) h w -> qkv b heads (h w) d", qkv=3, d=self.head_width
        )
        # Eq. 32 to 34: each of norm √d, so that ⟨q, k⟩/√d is √d cos φ
        query, key, value = pixel_norm(qkv, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(rearrange(mixed, "b heads (h w) d -> b (heads d) h w", h=x.shape[2]))


class EDM2Block(nn.Module):
    """A residual branch, then attention where there is any: (B, in, H, W) → (B, out, H', W').

    A block of the encoder (`encodes`) normalises its input. A 1×1 convolution maps between
    different numbers of channels.
    """

    def __init__(
        self, in_width: int, out_width: int, config: EDM2Config,
        encodes: bool, attends: bool = False, way: Way | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.encodes, self.way = config, encodes, way
        self.fit = MPConv2d(in_width, out_width, 1) if in_width != out_width else nn.Identity()
        self.residual = Residual(out_width if encodes else in_width, out_width, config)
        self.attention = CosineAttention(out_width, config.head_width) if attends else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = resample(x, self.way)
        main = self.fit(x)
        if self.encodes:  # its residual branch follows the 1×1 convolution
            x = main = pixel_norm(main)
        x = mp_sum(main, self.residual(x, embedding), self.config.residual_balance)
        if self.attention is not None:
            x = mp_sum(x, self.attention(x), self.config.attention_balance)
        return x.clamp(-self.config.clip, self.config.clip)


class EDM2UNet(UNetBase, MPModule):
    """The network of EDM2; untrained, it answers 0.

    Blocks change the resolution. Every activation has about magnitude 1 where x has, as c_in(σ)
    makes it. Call `normalize_weights` after every step of the optimiser.
    """

    config: EDM2Config

    def __init__(self, config: EDM2Config) -> None:
        embed = Embedding(config)
        # one channel more: a constant 1, in place of every bias (Appendix B.3)
        super().__init__(config, embed, MPConv2d(config.latent_channels + 1, config.channels, 3))
        width = config.channels * config.multipliers[0]
        self.out = MPConv2d(width, config.latent_channels, 3)
        self.gain = nn.Parameter(torch.zeros(()))

    def make_block(
        self, in_width: int, out_width: int, attends: bool, encodes: bool = False
    ) -> EDM2Block:
        return EDM2Block(in_width, out_width, self.config, encodes, attends)

    def make_resample(self, width: int, way: Way) -> EDM2Block:
        return EDM2Block(width, width, self.config, encodes=way == "down", way=way)

    def concat(self, x: Tensor, skip: Tensor) -> Tensor:
        return mp_cat(x, skip, self.config.concat_balance)

    def transform(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        return self.out(super().transform(x, embedding), self.gain)
