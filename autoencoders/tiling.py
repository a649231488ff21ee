"""Images too large for one pass: encoded and decoded tile by tile, the seams blended.

A tile's convolutions see its own border where the image goes on, and GroupNorm and attention see
the tile alone, so tiles differ where they overlap. There each gives way to its neighbour along a
raised cosine. Sizes are in pixels throughout, of latents too: a tile has tile/f of those.
"""

import math
from collections.abc import Callable
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

    Mean and log-variance are blended. Images no larger than a tile go in one piece, as to
    `ae.encode`. Where a side is no multiple of f, the last row or column is repeated, at the bottom
    or on the right, until it is. No gradients.

    Args:
        ae: in eval mode; its device may be another than that of the images.
        tile: side of a tile, in pixels, a multiple of f.
        overlap: of two neighbouring tiles at least, in pixels, a multiple of f.
        batch: the most tiles in the network at once.

    Raises:
        UsageError: tile, overlap or batch cannot be.
        LdmError: a side is smaller than f.
    """
    f, images = ae.downsampling, ae.pad(images)

    def moments(tiles: Tensor) -> Tensor:
        posterior = ae.encode(tiles)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    tiling = _Tiling(f, tile, overlap, batch)
    channels = 2 * ae.config.latent_channels
    return DiagonalGaussian.from_moments(
        tiling.run(moments, images, _device(ae), channels, inward=f, outward=1)
    )


@torch.no_grad()
def decode_tiled(
    ae: Autoencoder,
    latents: Tensor,
    size: tuple[int, int] | None = None,
    tile: int = 512,
    overlap: int = 128,
    batch: int = 1,
) -> Tensor:
    """Latents (B, n_z, h, w) → images (B, 3, f·h, f·w), float32, not clipped.

    Latents of no more than a tile go in one piece, as to `ae.decode`. No gradients.

    Args:
        size: height and width to crop to, those of the images encoded.
        ae, tile, overlap, batch: as in `encode_tiled`, in pixels of the images.

    Raises:
        UsageError: tile, overlap or batch cannot be.
    """
    f = ae.downsampling
    tiling = _Tiling(f, tile, overlap, batch)
    recon = tiling.run(ae.decode, latents, _device(ae), channels=3, inward=1, outward=f)
    return recon if size is None else recon[..., : size[0], : size[1]]


def reconstruct_tiled(
    ae: Autoencoder, images: Tensor, tile: int = 512, overlap: int = 128, batch: int = 1
) -> Tensor:
    """Images (B, 3, H, W) in [−1, 1] → their reconstruction from the posterior's mode, same size.

    The arguments and errors are those of `encode_tiled`.
    """
    latents = encode_tiled(ae, images, tile, overlap, batch).mode()
    return decode_tiled(ae, latents, images.shape[-2:], tile, overlap, batch)


class _Span(NamedTuple):
    """What a tile covers along one side."""

    source: slice
    """Of what goes into the network."""
    answer: slice
    """Of what comes out."""
    weight: Tensor
    """Its part in the blend (n,); those of all tiles add up to 1 everywhere."""


class _Tiling:
    """How images are cut into tiles, and the network's answers put together again."""

    def __init__(self, f: int, tile: int, overlap: int, batch: int) -> None:
        if tile < f or tile % f or overlap % f:
            raise UsageError(
                f"tile={tile}, overlap={overlap}: both must be multiples of {f}, the "
                "autoencoder's downsampling"
            )
        if not 0 <= overlap < tile:
            raise UsageError(f"overlap={overlap} of tiles of {tile}: from 0 to {tile - f} can be")
        if batch < 1:
            raise UsageError(f"batch={batch}: at least one tile must go through at once")
        # in latents, the coarser grid, so that every cut falls on whole values on both sides
        self.tile, self.overlap, self.batch = tile // f, overlap // f, batch

    def run(
        self,
        network: Callable[[Tensor], Tensor],
        source: Tensor,
        device: torch.device,
        channels: int,
        inward: int,
        outward: int,
    ) -> Tensor:
        """The network's answer to source (B, C, H, W) as a whole: (B, channels, H', W'), float32.

        Args:
            inward: values of the source per latent, along each side.
            outward: values of the answer per latent, along each side.
        """
        height, width = (side // inward for side in source.shape[-2:])
        shape = len(source), channels, height * outward, width * outward
        whole = torch.zeros(shape, device=source.device)
        rows, columns = (
            [_Span(_scaled(a, b, inward), _scaled(a, b, outward), w.to(whole)) for a, b, w in spans]
            for spans in (self.spans(height, outward), self.spans(width, outward))
        )
        jobs = list(product(range(len(source)), rows, columns))
        for first in range(0, len(jobs), self.batch):
            some = jobs[first : first + self.batch]
            tiles = torch.stack(
                [source[i, :, row.source, column.source] for i, row, column in some]
            )
            answers = network(tiles.to(device)).to(whole)
            for answer, (i, row, column) in zip(answers, some, strict=True):
                part = whole[i, :, row.answer, column.answer]
                part += row.weight[:, None] * column.weight * answer
        return whole

    def spans(self, side: int, outward: int) -> list[tuple[int, int, Tensor]]:
        """Start and end of each tile along a side, in latents, and its weights, in answers.

        As few tiles as have the overlap, spread evenly from border to border.
        """
        tile, overlap = min(self.tile, side), self.overlap
        gaps = math.ceil((side - tile) / (self.tile - overlap))
        starts = [i * (side - tile) // max(gaps, 1) for i in range(gaps + 1)]
        ramp = _raised_cosine(overlap * outward)
        weights = torch.zeros(len(starts), side * outward)
        for weight, start in zip(weights, starts, strict=True):
            own = weight[start * outward : (start + tile) * outward]
            own.fill_(1)
            if start > 0:
                own[: len(ramp)] *= ramp
            if start + tile < side:
                own[len(own) - len(ramp) :] *= ramp.flip(0)
        weights /= weights.sum(dim=0)
        return [
            (start, start + tile, weight[start * outward : (start + tile) * outward])
            for start, weight in zip(starts, weights, strict=True)
        ]


def _raised_cosine(length: int) -> Tensor:
    """(length,), from near 0 to near 1, never either; with its mirror image it adds up to 1."""
    return torch.sin((torch.arange(length) + 0.5) * (math.pi / 2 / max(length, 1))).square()


def _scaled(start: int, end: int, factor: int) -> slice:
    return slice(start * factor, end * factor)


def _device(ae: Autoencoder) -> torch.device:
    return next(ae.parameters()).device
