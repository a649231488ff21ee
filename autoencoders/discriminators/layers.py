"""Parts that the discriminators share: their logits, the check of image sizes, spectral norm."""

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from ldm.errors import LdmError

Logits = tuple[Tensor, ...]
"""Maps of logits in float32, the finest first: each (B, 1) or (B, 1, h, w), high is real."""

LogitsT = TypeVar("LogitsT", bound=Logits)
LayerT = TypeVar("LayerT", nn.Conv2d, nn.Linear)


def split(logits: LogitsT, parts: int) -> list[LogitsT]:
    """Split logits of a batch into those of its equal parts, in order: real, fake, …."""
    assert len(logits[0]) % parts == 0, f"{len(logits[0])} images in {parts} equal parts"
    make: Any = getattr(logits, "_make", tuple)  # a named tuple stays one
    return [make(maps) for maps in zip(*(each.chunk(parts) for each in logits), strict=True)]


class SizedConfig(Protocol):
    """Config of a discriminator, which knows the image sizes that the network takes."""

    def check_resolution(self, resolution: int) -> None:
        """Raise a ValueError of one line if the network cannot take sides of that many pixels."""


def check_images(config: SizedConfig, images: Tensor) -> None:
    """Raise LdmError if the network cannot take the size of images (B, 3, H, W)."""
    height, width = images.shape[-2:]
    try:
        for side in (height, width):
            config.check_resolution(side)
    except ValueError as error:
        raise LdmError(f"images of {height}×{width} pixels: {error}") from error


def spectral_norm(layer: LayerT) -> LayerT:
    """Divide the layer's weight by its largest singular value whenever it is used."""
    register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    return layer


class SpectralNorm(nn.Module):
    """W → W / σ(W) (Miyato et al. 2018, arXiv 1802.05957).

    σ comes from one power iteration a training step, on vectors kept in the state, in the weight's
    own precision: PyTorch's module iterates in bfloat16 under autocast, which leaves σ two digits.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, warm_up: int = 15) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)  # (out, in·k·k)
        # any start not orthogonal to the first singular vector will do: no random numbers
        self.register_buffer("u", F.normalize(matrix.sum(1), dim=0))
        self.register_buffer("v", torch.zeros_like(matrix[0]))
        for _ in range(warm_up):
            self._iterate(matrix)

    @torch.no_grad()
    def _iterate(self, matrix: Tensor) -> None:
        # Miyato et al. 2018, Algorithm 1
        self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))
        self.u.copy_(F.normalize(matrix @ self.v, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        """Normalise a weight (out, in, …)."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)
            if self.training:
                self._iterate(matrix)
            # copies: a later forward pass may iterate before this one's backward
            u, v = self.u.clone(), self.v.clone()
            # Miyato et al. 2018, Equations 7 and 8: W / σ(W), σ(W) ≈ uᵀ W v
            return weight / torch.dot(u, matrix @ v)
