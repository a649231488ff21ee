"""What every discriminator answers, and how it refuses images that it cannot judge.

Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957) that autocast leaves alone.
"""

from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

from ldm.errors import LdmError

Logits = tuple[Tensor, ...]
"""Maps of logits in float32, the finest first: each (B, 1) or (B, 1, h, w), high is real."""

LogitsT = TypeVar("LogitsT", bound=Logits)


class TakesSizes(Protocol):
    """A discriminator's config: it knows which images the network takes."""

    def check_resolution(self, resolution: int) -> None:
        """Raise a ValueError of one line where a side of so many pixels cannot be judged."""


def split(logits: LogitsT, parts: int) -> list[LogitsT]:
    """Split logits of a batch into those of its equal parts, in order: real, fake, …."""
    assert len(logits[0]) % parts == 0, f"{len(logits[0])} images in {parts} equal parts"
    make = getattr(logits, "_make", tuple)  # a named tuple stays one
    return [make(heads) for heads in zip(*(head.chunk(parts) for head in logits), strict=True)]


def check_images(config: TakesSizes, images: Tensor) -> None:
    """Hold images (B, 3, H, W) against what the config says it takes.

    Raises:
        LdmError: H or W is a size that the network cannot judge.
    """
    height, width = images.shape[-2:]
    try:
        for side in (height, width):
            config.check_resolution(side)
    except ValueError as error:
        raise LdmError(f"images of {height}×{width} pixels: {error}") from error


def spectral_norm(layer: nn.Module) -> nn.Module:
    """The layer, its weight divided by its largest singular value whenever it is used."""
    register_parametrization(layer, "weight", SpectralNorm(layer.weight))
    return layer


class SpectralNorm(nn.Module):
    """W → W / σ(W), σ by one power iteration a training step, on vectors kept in the state.

    Always in the weight's own precision: under autocast PyTorch's module iterates in bfloat16, and
    would know the bound it is there for to two digits.
    """

    def __init__(self, weight: Tensor, warm_up: int = 15) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1)  # (out, in·k·k)
        # any start that is not orthogonal to the first singular vector will do: no dice
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
        """The normalised weight, of the same shape."""
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)
            if self.training:
                self._iterate(matrix)
            # copies, so that a later forward pass may iterate before this one's backward
            u, v = self.u.clone(), self.v.clone()
            return weight / torch.dot(u, matrix @ v)
