"""Images through an autoencoder and back: the one loop that every measurement of stage one is."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
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
"""(recon, images) in [−1, 1] → scalar mean over the batch."""


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


class Sums:
    """What each pair says by itself, summed in float64: PSNR, SSIM, LPIPS."""

    def __init__(self) -> None:
        self.count = 0
        self._totals: Counter[str] = Counter()

    def add(self, pair: Pair, perceptual: Perceptual | None) -> None:
        """Take in a batch; `lpips` is summed with `perceptual` alone."""
        images, recon = to_float(pair.images), to_float(pair.recon)
        self._totals["psnr"] += psnr(images, recon).clamp(max=PSNR_CEILING).sum().item()
        self._totals["ssim"] += ssim(images, recon).sum().item()
        if perceptual is not None:
            self._totals["lpips"] += perceptual(recon, images).item() * len(images)
        self.count += len(images)

    def merge(self, other: "Sums") -> None:
        """Take in what another process has seen."""
        self._totals.update(other._totals)
        self.count += other.count

    def means(self) -> dict[str, float]:
        """Over images.

        Raises:
            LdmError: there was none.
        """
        if not self.count:
            raise LdmError("no image to evaluate: the data is empty, or all of it is corrupt")
        return {name: total / self.count for name, total in self._totals.items()}
