"""Statistics of latents over many images, in one pass: moments, KL, correlation, spectrum."""

import math
from typing import NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn import functional as F

from autoencoders.posterior import DiagonalGaussian
from ldm.errors import LdmError
from ldm.processes import fail_together
from pipelines.analysis.subjects import Images, Subject, encode_share, gather

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601: luma of red, green and blue


class LatentStatistics(NamedTuple):
    """Of draws from the posteriors, summed over in closed form; float64, on the CPU."""

    count: int
    """Images."""
    mean: Tensor
    """Of each channel (n_z,)."""
    covariance: Tensor
    """Of the channels at one place (n_z, n_z)."""
    posterior_std: Tensor
    """Root mean square of the posteriors' own standard deviation (n_z,)."""
    kl: Tensor
    """KL to N(0, 1) of each channel (n_z,), nats per latent value."""
    frequencies: Tensor
    """Of the spectra (k,), cycles per latent, up to ½."""
    spectrum: Tensor
    """Mean power of each channel's posterior means at each frequency (n_z, k)."""
    image_spectrum: Tensor
    """The same of the images' luma, averaged over the pixels of each latent (k,)."""

    @property
    def std(self) -> Tensor:
        """Of each channel (n_z,)."""
        # of a channel that does not vary, rounding may leave less than nothing
        return self.covariance.diagonal().clamp_min(0).sqrt()

    @property
    def correlation(self) -> Tensor:
        """Of each two channels (n_z, n_z); of one that does not vary with another 0."""
        scale = torch.where(self.std > 0, 1 / self.std, 0)
        correlation = scale[:, None] * self.covariance * scale
        return correlation.fill_diagonal_(1)

    def principal_components(self) -> tuple[Tensor, Tensor]:
        """Variances (n_z,), falling, and unit directions as rows (n_z, n_z).

        The largest entry of each direction is positive: eigenvectors leave their sign open.
        """
        variances, vectors = torch.linalg.eigh(self.covariance)
        vectors = vectors.flip(1).T
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        return variances.flip(0).clamp_min(0), vectors * largest.sign()

    @property
    def slope(self) -> float:
        """α of power ∝ frequency^−α, fitted to the mean of the channels' spectra."""
        return fall(self.frequencies, self.spectrum.mean(0))

    @property
    def image_slope(self) -> float:
        """α of the images themselves: about 2 for photographs."""
        return fall(self.frequencies, self.image_spectrum)


def measure(
    subject: Subject, images: Images, batch_size: int, ranks: PartialState, where: torch.device
) -> LatentStatistics:
    """One pass over the images, the same result on every process.

    Raises:
        LdmError: there is no image, or a latent is not finite.
    """
    share, counted = None, 0
    with fail_together(ranks):
        for _, shown, posterior in encode_share(subject, images, batch_size, ranks, where):
            sums = _sums(posterior, shown)
            share = sums if share is None else [a + b for a, b in zip(share, sums, strict=True)]
            counted += len(shown)
    shares = [(s, n) for s, n in gather(ranks, (share, counted)) if n]
    if not shares:
        raise LdmError(f"{images.what}: no image can be read")
    count = sum(n for _, n in shares)
    totals = [sum(parts) / count for parts in zip(*(s for s, _ in shares), strict=True)]
    mean, products, variance, kl, spectrum, image_spectrum = totals
    return LatentStatistics(
        count,
        mean,
        # E[zzᵀ] − E[z]E[z]ᵀ with z = μ + σε: the posteriors' variance counts on the diagonal alone
        products + variance.diag() - mean[:, None] * mean,
        variance.sqrt(),
        kl,
        torch.arange(1, spectrum.shape[1] + 1, dtype=torch.float64) / _side(subject, images),
        spectrum,
        image_spectrum,
    )


def radial_power(maps: Tensor) -> Tensor:
    """Mean power of square maps (…, s, s) at radial frequencies 1/s, 2/s, … ½: (…, ⌊s/2⌋), float64.

    Each map's mean is taken off, and a Hann window laid over it, for its edges do not meet. White
    noise of variance v has power v at every frequency but the lowest, and 67/72 v there (s ≥ 3),
    since a mean under the window lies in part at that frequency, and goes.
    """
    side = maps.shape[-1]
    maps = maps.double()
    maps = maps - maps.mean((-2, -1), keepdim=True)
    window = torch.hann_window(side, periodic=True, dtype=torch.float64, device=maps.device)
    window = window / window.square().mean().sqrt()
    power = torch.fft.fft2(maps * window[:, None] * window, norm="ortho").abs().square()
    whole = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64, device=maps.device)
    radius = torch.hypot(whole[:, None], whole).round().long().flatten()  # (s²,)
    # the corners, beyond ½, and the mean, are left out
    bins = F.one_hot(radius).double()[:, 1 : side // 2 + 1]  # (s², k)
    return power.flatten(-2) @ (bins / bins.sum(0))


def fall(frequencies: Tensor, power: Tensor) -> float:
    """α of power ∝ frequency^−α, by least squares of the logarithms; NaN where power is 0."""
    x, y = frequencies.log(), power.log()
    x = x - x.mean()
    return -((x * y).sum() / x.square().sum()).item()


def _sums(posterior: DiagonalGaussian, images: Tensor) -> list[Tensor]:
    """Sums over the images of a batch, of means over places: on the CPU."""
    mean, variance = posterior.mean.double(), posterior.logvar.double().exp()  # (b, n_z, h, w)
    over, places = (0, 2, 3), mean[0, 0].numel()
    # Kingma & Welling 2014, Appendix B: ½ (μ² + σ² − 1 − ln σ²)
    kl = 0.5 * (mean.square() + variance - 1 - posterior.logvar.double())
    luma = (images.double() * images.new_tensor(GREY).double().view(1, 3, 1, 1)).sum(1)
    sums = [
        mean.sum(over) / places,
        torch.einsum("bihw,bjhw->ij", mean, mean) / places,
        variance.sum(over) / places,
        kl.sum(over) / places,
        radial_power(mean).sum(0),
        radial_power(F.adaptive_avg_pool2d(luma, mean.shape[-2:])).sum(0),
    ]
    return [total.cpu() for total in sums]


def _side(subject: Subject, images: Images) -> int:
    """Latents along a side."""
    return math.ceil(images.resolution / subject.autoencoder.downsampling)
