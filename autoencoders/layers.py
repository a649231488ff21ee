"""Parts of all the autoencoders, on features (B, C, H, W), and their speed on a CPU.

The models compute the same without the last section, to rounding, and slower on a CPU where no
gradient is wanted. On other devices, and while training, its functions do what their first lines
say and nothing more.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldm.errors import LdmError

Norm = Literal["group", "smc"]


class GroupNorm(nn.GroupNorm):
    """PyTorch's GroupNorm, which here takes groups of one value too, as in a latent of 1×1."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape: each group normalised, then scale and shift."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def group_norm(width: int, least: int = 1) -> GroupNorm:
    """GroupNorm of `count_groups` groups."""
    return GroupNorm(count_groups(width, least), width, eps=1e-6)


def count_groups(width: int, least: int = 1) -> int:
    """The largest of 32, 16, 8, 4, 2 and 1 that splits a width into large enough, equal groups.

    Args:
        width: channels.
        least: channels in a group, at least, unless the width has fewer. A group of one channel
            loses that channel's mean and contrast: it is an instance norm.
    """
    groups = math.gcd(32, width)
    while groups > 1 and width // groups < least:
        groups //= 2
    return groups


class SelfModulatedConv2d(nn.Conv2d):
    """3×3 convolution that learns the scale of each input channel (Sadat et al. 2024, Section 4.2).

    Its weight has unit norm per output channel, so its input needs no normalisation, and the
    relative magnitudes of the features survive. Nothing depends on the sample: the weight is
    modulated once, in its own precision, and an ordinary convolution follows.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(in_width))
        self.gain = nn.Parameter(torch.ones(()))
        # Equation 3 divides by a filter's norm, which only sets how far a step turns the filter.
        # PyTorch's default (0.6) collapses at Adam's 1e-3; 4 is stable there, and as good at 1e-4.
        nn.init.normal_(self.weight, std=4 / math.sqrt(self.weight[0].numel()))

    def modulated_weight(self, eps: float = 1e-8) -> Tensor:
        """Weight (out, in, 3, 3), by operations that autocast leaves in float32."""
        # Sadat et al. 2024, Equation 3: w'_ijk = s_i w_ijk / √(Σ_{i,k} (s_i w_ijk)² + ε)
        scaled = self.scales.view(1, -1, 1, 1) * self.weight
        norm = scaled.square().sum(dim=(1, 2, 3), keepdim=True)
        return self.gain * scaled * torch.rsqrt(norm + eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H, W)."""
        return F.conv2d(x, self.modulated_weight(), self.bias, padding=1)

    def fused(self) -> nn.Conv2d:
        """Plain convolution with the same output, for inference."""
        assert self.bias is not None
        conv = nn.Conv2d(self.in_channels, self.out_channels, 3, padding=1, device="meta")
        conv.weight = nn.Parameter(self.modulated_weight().detach())
        conv.bias = nn.Parameter(self.bias.detach().clone())
        return conv


def fuse(module: nn.Module) -> nn.Module:
    """Copy a module for inference, with the work done once that does not depend on the input.

    Self-modulated convolutions become plain ones, and upsampling convolutions read the small image.
    The copy is frozen, and refuses to be saved: its tensors are not those its config describes.
    """
    if isinstance(module, SelfModulatedConv2d | Upsample):
        return module.fused().eval().requires_grad_(False)
    copy = deepcopy(module)
    for parent in list(copy.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (SelfModulatedConv2d, Upsample)):
                setattr(parent, name, child.fused())
    copy.register_state_dict_pre_hook(_refuse_to_save)
    return copy.eval().requires_grad_(False)


def _refuse_to_save(*_: object) -> None:
    raise LdmError("a fused autoencoder cannot be saved: save the one that it was fused from")


class Block(nn.Module, ABC):
    """Part of a network that can recompute its activations in the backward pass.

    A subclass implements `transform`; see `checkpoint_blocks`.
    """

    recompute = False

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """Compute the block's output from (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply `transform`, and keep only `x` for the backward pass if `recompute` is set."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.transform, x, use_reentrant=False)
        return self.transform(x)


def checkpoint_blocks(module: nn.Module) -> None:
    """Let every `Block` in a module recompute its activations in the backward pass.

    Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174): the same gradients, bit for bit,
    and the same state dict, for about a third more time and much less memory.
    """
    for part in module.modules():
        if isinstance(part, Block):
            part.recompute = True


class ResidualBlock(Block):
    """x + two 3×3 convolutions of it, with a 1×1 convolution on the skip if the width changes.

    Args:
        norm: "group" normalises before each convolution; "smc" has self-modulated convolutions
            instead.
        least: channels in a group, at least.
    """

    def __init__(self, in_width: int, out_width: int, norm: Norm = "group", least: int = 1) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm_and_conv(in_width, out_width, norm, least)
        self.norm2, self.conv2 = _norm_and_conv(out_width, out_width, norm, least)
        same = in_width == out_width
        self.skip = nn.Identity() if same else nn.Conv2d(in_width, out_width, 1)

    def transform(self, x: Tensor) -> Tensor:
        """(B, in, H, W) → (B, out, H, W)."""
        h = chain(x, self.norm1, F.silu, self.conv1, self.norm2, F.silu, self.conv2)
        # written over the convolution's output, which no gradient needs
        return h.add_(self.skip(x))


def _norm_and_conv(
    in_width: int, out_width: int, norm: Norm, least: int
) -> tuple[nn.Module, nn.Module]:
    if norm == "smc":
        return nn.Identity(), SelfModulatedConv2d(in_width, out_width)
    return group_norm(in_width, least), nn.Conv2d(in_width, out_width, 3, padding=1)


class SelfAttention(Block):
    """x + single-head attention between all its positions."""

    def __init__(self, width: int, least: int = 1) -> None:
        super().__init__()
        self.norm = group_norm(width, least)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def transform(self, x: Tensor) -> Tensor:
        """(B, width, H, W) → (B, width, H, W)."""
        tokens = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")  # (B, 1 head, H·W, width)
        mixed = F.scaled_dot_product_attention(
            self.query(tokens), self.key(tokens), self.value(tokens)
        )
        return x + rearrange(self.out(mixed), "b 1 (h w) c -> b c h w", h=x.shape[2])


def middle(width: int, norm: Norm = "group", least: int = 1) -> nn.Sequential:
    """Middle of SD-VAE's encoder and decoder: residual block, attention, residual block."""
    return nn.Sequential(
        ResidualBlock(width, width, norm, least),
        SelfAttention(width, least),
        ResidualBlock(width, width, norm, least),
    )


class Downsample(nn.Module):
    """Strided 3×3 convolution: (B, width, H, W) → (B, width, H/2, W/2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Pad on the right and at the bottom only, as SD-VAE's weights expect."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbours, then a 3×3 convolution: (B, width, H, W) → (B, width, 2H, 2W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))

    def fused(self) -> "FusedUpsample":
        """Equal module with four ninths of the multiplications, for inference."""
        return FusedUpsample(self.conv)


class Quantizer(nn.Module):
    """Vector quantisation: every latent vector is replaced by the nearest of the codes.

    Gradients pass straight through to the latents; the codes themselves get none.
    """

    AT_ONCE = 4096
    """Vectors compared with all the codes at once: 128 MiB of distances with 8,192 codes."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.empty(count, width).uniform_(-1 / count, 1 / count))

    def forward(self, latents: Tensor) -> Tensor:
        """(B, width, h, w) → the same shape, in float32."""
        latents, (height, width) = latents.float(), latents.shape[-2:]
        vectors = rearrange(latents, "b c h w -> (b h w) c")
        nearest = torch.cat([self._nearest(part) for part in vectors.split(self.AT_ONCE)])
        codes = rearrange(self.codes.float()[nearest], "(b h w) c -> b c h w", h=height, w=width)
        # van den Oord et al. 2017 (arXiv 1711.00937), Section 3.2: the straight-through estimator
        return latents + (codes - latents).detach()

    @torch.no_grad()
    def _nearest(self, vectors: Tensor) -> Tensor:
        """(N, width) → indices of the nearest codes (N,): van den Oord et al. 2017, Equation 1."""
        # by differences, not by a product of matrices: the same whatever the batch, without
        # cancellation
        return torch.cdist(
            vectors, self.codes.float(), compute_mode="donot_use_mm_for_euclid_dist"
        ).argmin(dim=1)


class FusedUpsample(nn.Module):
    """`Upsample` by four 2×2 convolutions of the small image, one for each pixel of 2×2.

    Of the three rows of the enlarged image under a 3×3 filter, two are copies of one input row: for
    an even row of the output its own and the one below, for an odd row its own and the one above.
    The filter's weights on the copies add up. The same holds for columns.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None
        merge = conv.weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        # merge[parity, tap of 2, tap of 3]
        weight = torch.einsum("pik,ockl,qjl->pqocij", merge, conv.weight.detach(), merge)
        filters = rearrange(weight, "p q o c i j -> (p q) o c i j")
        self.filters = nn.ParameterList(filter.clone() for filter in filters)
        self.bias = nn.Parameter(conv.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) → (B, width, 2H, 2W)."""
        batch, width, height, columns = x.shape
        padded = F.pad(x, (1, 1, 1, 1))
        out = torch.empty(
            (batch, width, 2 * height, 2 * columns), dtype=x.dtype, device=x.device,
            memory_format=torch.channels_last,
        )  # fmt: skip
        for filter, (row, column) in zip(self.filters, product((0, 1), repeat=2), strict=True):
            window = padded[..., row : row + height + 1, column : column + columns + 1]
            out[..., row::2, column::2] = F.conv2d(window, filter, self.bias)
        return out


# ------------------------------------------------------------------------------- speed on a CPU
PIXELS_AT_ONCE = defaultdict(lambda: 2 * 256**2, sdvae=256**2, decoder=256**2)
"""Pixels of the images that go through a network at once, by an encoder's `type`, or `decoder`."""


def in_small_batches(
    network: Callable[[Tensor], Tensor], x: Tensor, pixels: int, at_once: int
) -> Tensor:
    """Apply `network` to x: images of `pixels` pixels each, or their latents.

    On a CPU, to at most `at_once` ÷ `pixels` images at a time, and at least one: the features of
    more leave its caches.
    """
    few = max(at_once // max(pixels, 1), 1)
    if x.device.type != "cpu" or torch.is_grad_enabled() or len(x) <= few:
        return network(x)
    return torch.cat([network(part) for part in x.split(few)])


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W), on a CPU with the channels last in memory.

    Convolutions then need not reorder their input and output each time. With gradients it does not
    pay: in that layout GroupNorm's backward pass is slow.
    """
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        return x.contiguous(memory_format=torch.channels_last)
    return x


def chain(x: Tensor, *parts: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply the parts one after another: `nn.Sequential` without a place in the state dict.

    Each value is freed once it is read, and `F.silu` overwrites what it reads, except `x`: on a
    CPU the memory of a new tensor costs several times what the function does.
    """
    h = x
    for part in parts:
        if part is F.silu:
            h = F.silu(h, inplace=h is not x and not torch.is_grad_enabled())
        else:
            h = part(h)
    return h
