"""Images through an autoencoder and back: the one loop that every measurement of stage one is."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from autoencoders import Autoencoder
from ldm.data import Batch
from ldm.device import memory_format
from ldm.errors import LdmError
from ldm.images import to_float, to_uint8
from ldm.metrics import psnr, ssim

# An image that comes back bit for bit has an infinite PSNR; one would make the mean infinite. At
# 256² even a single value off by one level is below 102 dB.
PSNR_CEILING = 100.0

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(recon, images) in [−1, 1], (B, 3, H, W) → the distance of each pair, (B,)."""


class Pair(NamedTuple):
    """Images and what became of them, both uint8 (b, 3, R, R) on the device."""

    images: Tensor
    recon: Tensor
    k: Tensor
    """int64 (b,), on the CPU: their numbers in the source."""


@torch.no_grad()
def reconstruct(ae: Autoencoder, stream: Iterable[Batch], device: torch.device) -> Iterator[Pair]:
    """Images and the posterior's mode decoded, rounded to 8 bits.

    Args:
        ae: on `device`; it is put in eval mode, and back.

    Raises:
        LdmError: a reconstruction is not finite; or an image is smaller than the autoencoder takes.
    """
    was_training = ae.training
    ae.eval()
    try:
        for batch in stream:
            pixels = batch.images.to(device).contiguous(memory_format=memory_format(device))
            recon = ae.decode(ae.encode(to_float(pixels)).mode(), pixels.shape[-2:])
            # rounded, a NaN would pass for black
            if not recon.isfinite().all():
                raise LdmError(
                    "reconstructions hold a NaN or an infinity: the autoencoder's weights are "
                    "broken; take an earlier checkpoint"
                )
            yield Pair(pixels, to_uint8(recon), batch.k)
    finally:
        ae.train(was_training)


class Scores:
    """What each pair says by itself: PSNR, SSIM, LPIPS, of every image.

    Memory grows with the images, by a few numbers each.
    """

    def __init__(self) -> None:
        self._ks: list[Tensor] = []
        self._of: dict[str, list[Tensor]] = {}

    @property
    def count(self) -> int:
        """Images seen."""
        return sum(map(len, self._ks))

    def add(self, pair: Pair, perceptual: Perceptual | None) -> None:
        """Take in a batch; there is an `lpips` with `perceptual` alone."""
        images, recon = to_float(pair.images), to_float(pair.recon)
        scores = {
            "psnr": psnr(images, recon).clamp(max=PSNR_CEILING),
            "ssim": ssim(images, recon),
        }
        if perceptual is not None:
            scores["lpips"] = perceptual(recon, images)
            if scores["lpips"].shape != (len(images),):
                raise ValueError("perceptual must give the distance of each pair, (B,)")
        for name, values in scores.items():
            self._of.setdefault(name, []).append(values.cpu().float())
        # a loader's own holds a file open for as long as it lives
        self._ks.append(pair.k.clone())

    def merge(self, other: "Scores") -> None:
        """Take in what another process has seen."""
        self._ks += other._ks
        for name, values in other._of.items():
            self._of.setdefault(name, []).extend(values)

    def means(self) -> dict[str, float]:
        """Over images, summed in float64.

        Raises:
            LdmError: there was none.
        """
        if not self.count:
            raise LdmError("no image to evaluate: the data is empty, or all of it is corrupt")
        return {name: torch.cat(each).double().mean().item() for name, each in self._of.items()}

    def in_order(self) -> dict[str, NDArray]:
        """`k`, int64 (n,), rising: the images' numbers; and by its name each score of each image,
        float32 (n,). Two autoencoders' are of the same images where their `k` are equal.
        """
        ks, order = torch.cat(self._ks).sort()
        scores = {name: torch.cat(each)[order].numpy() for name, each in self._of.items()}
        return {"k": ks.numpy(), **scores}
