"""Layers that keep the magnitude of what passes through them: Karras et al. 2024, EDM2.

Paper: "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696, the
equations numbered as in its Appendix B). The magnitude of a tensor is the root of the mean of its
squares (Eq. 68). Where the inputs of a layer have magnitude 1 and are uncorrelated, so has its
output: activations neither grow nor fade with depth, and no bias or group norm is needed.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-4
"""Keeps a norm from being 0 where it divides (Appendix B.3 and B.4)."""

SILU_MAGNITUDE = 0.596
"""Magnitude of silu(x) for x ~ N(0, 1), as printed in Eq. 80."""


def pixel_norm(x: Tensor, dim: int = 1) -> Tensor:
    """Scale the vectors along `dim` to magnitude 1; shape and dtype stay.

    The norm is taken in float32 at least: in float16 it could overflow.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide)
    # Eq. 30: a / (√(mean a²) + ε)
    return x * (1 / (norm / math.sqrt(x.shape[dim]) + EPSILON)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU of any shape; of a standard normal x, it has magnitude 1."""
    # Eq. 81
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Blend of two tensors of one shape: a at t = 0, b at t = 1, both alike at t = 0.5."""
    # Eq. 88: ((1 − t) a + t b) / √((1 − t)² + t²)
    magnitude = math.hypot(1 - t, t)
    return torch.add(a * ((1 - t) / magnitude), b, alpha=t / magnitude)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenation along dim 1 of (B, N_a, …) and (B, N_b, …): (B, N_a + N_b, …).

    At t = 0.5 both contribute alike to what is computed from it, however wide each of them is.
    """
    n_a, n_b = a.shape[1], b.shape[1]
    # Eq. 103: C ((1 − t)/√N_a · a ⊕ t/√N_b · b), C = √((N_a + N_b) / ((1 − t)² + t²))
    c = math.sqrt(n_a + n_b) / math.hypot(1 - t, t)
    return torch.cat([a * (c * (1 - t) / math.sqrt(n_a)), b * (c * t / math.sqrt(n_b))], dim=1)


class MPFourier(nn.Module):
    """Features of a number, (B,) → (B, width) in float32 at least, of magnitude 1 on average.

    The frequencies and phases are drawn from torch's generator and stay: they are buffers, and
    travel with the weights.
    """

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
    """A weight (out, …) of which each of the `out` filters is used at norm 1. There is no bias.

    A filter is held at the norm √N, N its fan-in, so that its values have magnitude 1 in every
    layer and one learning rate is the same relative change everywhere. `normalize_` puts it back
    there and must be called after every step of the optimiser. That it is normalised when used,
    too, makes its gradient orthogonal to it (Eq. 59), as Adam's variances need it, and lets an
    average of weights be used as it is.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.normalize_()

    def filters(self, gain: Tensor | float = 1.0) -> Tensor:
        """The weight as it is used: filters of norm `gain`, in the weight's dtype."""
        # Eq. 46: w / ‖w‖
        return (self.weight * (gain / self._norm())).to(self.weight.dtype)

    @torch.no_grad()
    def normalize_(self) -> None:
        """Forced weight normalisation, in place."""
        # Eq. 66: w ← √N w / ‖w‖
        self.weight.copy_(self.weight * (math.sqrt(self.weight[0].numel()) / self._norm()))

    def _norm(self) -> Tensor:
        """Norm of every filter, (out, 1, …), in float32 at least.

        It is ε at least. The paper adds ε (Eq. 47), and Eq. 59 then holds nearly, not exactly.
        """
        dims = tuple(range(1, self.weight.ndim))
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        norm = torch.linalg.vector_norm(self.weight, dim=dims, keepdim=True, dtype=wide)
        return norm.clamp(min=EPSILON)


class MPLinear(MPLayer):
    """(B, in_width) → (B, out_width), in the weight's dtype even under autocast.

    It stands where little is computed and much hangs on it: in the embedding, in the scales of
    the blocks and in the uncertainty, which the paper leaves in full precision (Appendix D.2).
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(out_width, in_width)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        with _without_autocast(x.device):
            return F.linear(x.to(self.weight.dtype), self.filters(gain))


def _without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off, on devices that know it: "meta" does not."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


class MPConv2d(MPLayer):
    """Convolution that keeps the size: (B, in_width, H, W) → (B, out_width, H, W).

    Args:
        in_width, out_width: channels.
        kernel: its side in pixels, odd.
    """

    def __init__(self, in_width: int, out_width: int, kernel: int) -> None:
        super().__init__(out_width, in_width, kernel, kernel)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return F.conv2d(x, self.filters(gain), padding=self.weight.shape[-1] // 2)


def normalize_weights(module: nn.Module) -> None:
    """Forced weight normalisation of every such layer in a module, in place (Eq. 66)."""
    for layer in module.modules():
        if isinstance(layer, MPLayer):
            layer.normalize_()
