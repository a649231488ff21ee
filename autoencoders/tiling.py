"""Images too large for one pass: encoded and decoded tile by tile, with blended seams.

At its border a tile's convolutions see padding instead of the image, and GroupNorm and attention
see the tile alone, so tiles differ where they overlap. There a raised cosine blends each into its
neighbour. Sizes are in pixels throughout, for latents too: a tile has tile/f of those.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from autoencoders.autoencoder import Autoencoder, DiagonalGaussian
from ldm.errors import UsageError


@torch.no_grad()
def encode_tiled(
    ae: Autoencoder, images: Tensor, tile: int = 512, overlap: int = 128, batch: int = 1
) -> DiagonalGaussian:
    """Images (B, C, H, W) in [−1, 1] → posterior over latents (B, n_z, ⌈H/f⌉, ⌈W/f⌉).

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

    height, width = (side // f for side in images.shape[-2:])
    shape = (len(images), 2 * ae.config.latent_channels, height, width)
    return DiagonalGaussian.from_moments(_blend(ae, moments, images, shape, tile, overlap, batch))


@torch.no_grad()
def decode_tiled(
    ae: Autoencoder,
    latents: Tensor,
    size: Sequence[int] | None = None,
    tile: int = 512,
    overlap: int = 128,
    batch: int = 1,
) -> Tensor:
    """Latents (B, n_z, h, w) → images (B, C, f·h, f·w), float32, not clipped.

    Latents no larger than a tile go through in one piece, as by `ae.decode`. No gradients.

    Args:
        size: height and width to crop to, those of the encoded images.
        ae, tile, overlap, batch: as in `encode_tiled`, in pixels of the images.

    Raises:
        UsageError: tile, overlap or batch is out of range.
    """
    height, width = (side * ae.downsampling for side in latents.shape[-2:])
    shape = (len(latents), ae.config.image_channels, height, width)
    recon = _blend(ae, ae.decode, latents, shape, tile, overlap, batch)
    return recon if size is None else recon[..., : size[0], : size[1]]


def reconstruct_tiled(
    ae: Autoencoder, images: Tensor, tile: int = 512, overlap: int = 128, batch: int = 1
) -> Tensor:
    """Images (B, C, H, W) in [−1, 1] → reconstruction from the posterior's mode, of equal size.

    Arguments and errors are those of `encode_tiled`.
    """
    latents = encode_tiled(ae, images, tile, overlap, batch).mode()
    return decode_tiled(ae, latents, images.shape[-2:], tile, overlap, batch)


def _blend(
    ae: Autoencoder,
    network: Callable[[Tensor], Tensor],
    source: Tensor,
    shape: Sequence[int],
    tile: int,
    overlap: int,
    batch: int,
) -> Tensor:
    """Apply the network to source (B, C, H, W) by tiles: an output of a shape, float32."""
    f, device = ae.downsampling, next(ae.parameters()).device
    if tile < f or tile % f or overlap % f:
        raise UsageError(
            f"tile={tile}, overlap={overlap}: both must be multiples of {f}, the autoencoder's "
            "downsampling"
        )
    if not 0 <= overlap < tile:
        raise UsageError(f"overlap={overlap}, tile={tile}: overlap must be 0 to {tile - f}")
    if batch < 1:
        raise UsageError(f"batch={batch}: must be at least 1")
    # tiles are cut in latents, the coarser grid, so that every cut falls on whole values in both
    whole = torch.zeros(tuple(shape), device=source.device)
    sides = [min(pair) for pair in zip(source.shape[-2:], shape[-2:], strict=True)]
    in_scale, out_scale = source.shape[-1] // sides[1], shape[-1] // sides[1]
    rows, columns = (
        [
            (_span(start, end, in_scale), _span(start, end, out_scale), weights.to(whole))
            for start, end, weights in cut(side, tile // f, overlap // f, out_scale)
        ]
        for side in sides
    )
    tiles = list(product(range(len(source)), rows, columns))
    for first in range(0, len(tiles), batch):
        some = tiles[first : first + batch]
        inputs = torch.stack([source[i, :, row[0], column[0]] for i, row, column in some])
        outputs = network(inputs.to(device)).to(whole)
        for output, (i, (_, row, down), (_, column, across)) in zip(outputs, some, strict=True):
            whole[i, :, row, column] += down[:, None] * across * output
    return whole


def cut(side: int, tile: int, overlap: int, out_scale: int) -> list[tuple[int, int, Tensor]]:
    """Cut a side into tiles: the start and end of each, and its weights, which add up to 1.

    As few tiles as keep the overlap, spread evenly from border to border. Sides, tiles, overlaps,
    starts and ends are in latents, each of which has `out_scale` weights.
    """
    gaps = math.ceil(max(side - tile, 0) / (tile - overlap))
    tile = min(tile, side)
    starts = [i * (side - tile) // max(gaps, 1) for i in range(gaps + 1)]
    # a raised cosine within (0, 1): it and its mirror image add up to 1
    length = overlap * out_scale
    ramp = torch.sin((torch.arange(length) + 0.5) * (math.pi / 2 / max(length, 1))).square()
    weights = torch.zeros(len(starts), side * out_scale)
    for weight, start in zip(weights, starts, strict=True):
        own = weight[_span(start, start + tile, out_scale)]
        own.fill_(1)
        if start > 0:
            own[:length] *= ramp
        if start + tile < side:
            own[len(own) - length :] *= ramp.flip(0)
    weights /= weights.sum(dim=0)
    return [
        (start, start + tile, weight[_span(start, start + tile, out_scale)])
        for start, weight in zip(starts, weights, strict=True)
    ]


def _span(start: int, end: int, scale: int) -> slice:
    return slice(start * scale, end * scale)
