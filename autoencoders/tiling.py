"""Images too large for one pass: encoded and decoded tile by tile, with blended seams.

At its border a tile's convolutions see padding instead of the image, and GroupNorm and attention
see the tile alone, so tiles differ where they overlap. There a raised cosine blends each into its
neighbour. Sizes are in pixels throughout, for latents too: a tile has tile/f of those.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from autoencoders.autoencoder import Autoencoder
from autoencoders.posterior import DiagonalGaussian
from ldm.errors import UsageError


@torch.no_grad()
def encode_tiled(
    ae: Autoencoder, images: Tensor, tile: int = 512, overlap: int = 128, batch: int = 1
) -> DiagonalGaussian:
    """Images (B, 3, H, W) in [−1, 1] → posterior over latents (B, n_z, ⌈H/f⌉, ⌈W/f⌉).

    Mean and log-variance are blended. Images no larger than a tile go through in one piece, as by
    `ae.encode`, and sides that are no multiples of f are padded as there. No gradients.

    Args:
        ae: in eval mode; its device may differ from that of the images.
        tile: side of a tile, in pixels, a multiple of f.
        overlap: least overlap of two neighbouring tiles, in pixels, a multiple of f.
        batch: largest number of tiles in the network at once.

    Raises:
        UsageError: tile, overlap or batch is out of range.
        LdmError: a side is smaller than f.
    """
    f, images = ae.downsampling, ae.pad(images)

    def moments(tiles: Tensor) -> Tensor:
        posterior = ae.encode(tiles)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    tiling = _Tiling(f, tile, overlap, batch)
    channels = 2 * ae.config.latent_channels
    return DiagonalGaussian.from_moments(
        tiling.run(moments, images, _device(ae), channels, in_scale=f, out_scale=1)
    )


@torch.no_grad()
def decode_tiled(
    ae: Autoencoder,
    latents: Tensor,
    size: Sequence[int] | None = None,
    tile: int = 512,
    overlap: int = 128,
    batch: int = 1,
) -> Tensor:
    """Latents (B, n_z, h, w) → images (B, 3, f·h, f·w), float32, not clipped.

    Latents no larger than a tile go through in one piece, as by `ae.decode`. No gradients.

    Args:
        size: height and width to crop to, those of the encoded images.
        ae, tile, overlap, batch: as in `encode_tiled`, in pixels of the images.

    Raises:
        UsageError: tile, overlap or batch is out of range.
    """
    f = ae.downsampling
    tiling = _Tiling(f, tile, overlap, batch)
    recon = tiling.run(ae.decode, latents, _device(ae), channels=3, in_scale=1, out_scale=f)
    return recon if size is None else recon[..., : size[0], : size[1]]


def reconstruct_tiled(
    ae: Autoencoder, images: Tensor, tile: int = 512, overlap: int = 128, batch: int = 1
) -> Tensor:
    """Images (B, 3, H, W) in [−1, 1] → reconstruction from the posterior's mode, of equal size.

    Arguments and errors are those of `encode_tiled`.
    """
    latents = encode_tiled(ae, images, tile, overlap, batch).mode()
    return decode_tiled(ae, latents, images.shape[-2:], tile, overlap, batch)


class _Span(NamedTuple):
    """Extent of a tile along one side."""

    source: slice
    """In the network's input."""
    output: slice
    """In its output."""
    weight: Tensor
    """Weights of the blend (n,); those of all tiles add up to 1 everywhere."""


class _Tiling:
    """Cuts inputs into tiles and blends the network's outputs."""

    def __init__(self, f: int, tile: int, overlap: int, batch: int) -> None:
        if tile < f or tile % f or overlap % f:
            raise UsageError(
                f"tile={tile}, overlap={overlap}: both must be multiples of {f}, the "
                "autoencoder's downsampling"
            )
        if not 0 <= overlap < tile:
            raise UsageError(f"overlap={overlap}, tile={tile}: overlap must be 0 to {tile - f}")
        if batch < 1:
            raise UsageError(f"batch={batch}: must be at least 1")
        # in latents, the coarser grid, so that every cut falls on whole values in both
        self.tile, self.overlap, self.batch = tile // f, overlap // f, batch

    def run(
        self,
        network: Callable[[Tensor], Tensor],
        source: Tensor,
        device: torch.device,
        channels: int,
        in_scale: int,
        out_scale: int,
    ) -> Tensor:
        """Apply the network to source (B, C, H, W) by tiles: (B, channels, H', W'), float32.

        Args:
            in_scale: values of the source per latent, along each side.
            out_scale: values of the output per latent, along each side.
        """
        height, width = (side // in_scale for side in source.shape[-2:])
        shape = len(source), channels, height * out_scale, width * out_scale
        whole = torch.zeros(shape, device=source.device)
        rows, columns = (
            [
                _Span(_scaled(start, end, in_scale), _scaled(start, end, out_scale), w.to(whole))
                for start, end, w in self.spans(side, out_scale)
            ]
            for side in (height, width)
        )
        tiles = list(product(range(len(source)), rows, columns))
        for first in range(0, len(tiles), self.batch):
            some = tiles[first : first + self.batch]
            inputs = torch.stack(
                [source[i, :, row.source, column.source] for i, row, column in some]
            )
            outputs = network(inputs.to(device)).to(whole)
            for output, (i, row, column) in zip(outputs, some, strict=True):
                part = whole[i, :, row.output, column.output]
                part += row.weight[:, None] * column.weight * output
        return whole

    def spans(self, side: int, out_scale: int) -> list[tuple[int, int, Tensor]]:
        """Start and end of each tile along a side, in latents, and its weights, in outputs.

        As few tiles as keep the overlap, spread evenly from border to border.
        """
        tile, overlap = min(self.tile, side), self.overlap
        gaps = math.ceil((side - tile) / (self.tile - overlap))
        starts = [i * (side - tile) // max(gaps, 1) for i in range(gaps + 1)]
        ramp = _raised_cosine(overlap * out_scale)
        weights = torch.zeros(len(starts), side * out_scale)
        for weight, start in zip(weights, starts, strict=True):
            own = weight[start * out_scale : (start + tile) * out_scale]
            own.fill_(1)
            if start > 0:
                own[: len(ramp)] *= ramp
            if start + tile < side:
                own[len(own) - len(ramp) :] *= ramp.flip(0)
        weights /= weights.sum(dim=0)
        return [
            (start, start + tile, weight[start * out_scale : (start + tile) * out_scale])
            for start, weight in zip(starts, weights, strict=True)
        ]


def _raised_cosine(length: int) -> Tensor:
    """Rise (length,) within (0, 1); it and its mirror image add up to 1."""
    return torch.sin((torch.arange(length) + 0.5) * (math.pi / 2 / max(length, 1))).square()


def _scaled(start: int, end: int, factor: int) -> slice:
    return slice(start * factor, end * factor)


def _device(ae: Autoencoder) -> torch.device:
    return next(ae.parameters()).device
