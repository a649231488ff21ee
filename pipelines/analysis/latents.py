"""Latents as pictures, and their statistics (Sadat et al. 2024, Figures 2 and 4).

latents.png              images, reconstructions, latents as RGB: channels 1-3 and PCA
latents-statistics.png   per channel: mean, standard deviation, KL; spectrum; correlations
latents.csv              the same numbers per model and channel
latents-spectrum.csv     power per model, channel and frequency, and that of the images
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.ticker import NullLocator
from torch import Tensor
from torch.nn import functional as F

from autoencoders import DiagonalGaussian
from ldm.charts import DIM, INK, WIDTH, colour, drawing, picture_rows, show_image
from ldm.config import shorter_side, size_word
from ldm.data import sheet_images
from ldm.device import full_float32
from ldm.errors import UsageError, check_at_least
from ldm.files import lock
from ldm.images import as_float, as_rgb, latents_as_rgb
from pipelines.analysis.subjects import Analysis, SharedImages, Subject, analysis_folder, write_csv

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: weights of red, green and blue
LEAST = 4  # latents per side, the fewest that have a spectrum
COLUMNS = ("image", "reconstruction", "latent,\nchannels 1-3", "latent,\nPCA")
FEW = 12  # up to this many channels, each has a tick
VERY_FEW = 6  # up to this many, their correlations are printed


@full_float32()
def analyze_latents(
    subjects: Sequence[Subject],
    images: SharedImages,
    n: int = 256,
    count: int = 4,
    out: Path | None = None,
) -> Analysis | None:
    """Show the latents of the first `count` images, and measure those of `n`, or all if fewer."""
    check_at_least(1, n=n, images=count)
    for s in subjects:
        f = s.autoencoder.downsampling
        if not isinstance(images.resolution, int):
            raise UsageError(
                f"--resolution {size_word(images.resolution)}: the spectrum of latents is that of "
                f"square images: give --resolution {shorter_side(images.resolution)}"
            )
        if images.resolution < LEAST * f:
            raise UsageError(
                f"--resolution {images.resolution}: too small for a spectrum of the latents of "
                f"{s.name}, {f}×{f} pixels each: use at least {LEAST * f}"
            )
    folder = analysis_folder(out, subjects[0].path)
    found = {s.name: measure(s, images.draw(n)) for s in subjects}
    if not images.ranks.is_main_process:
        return None
    pictures = (folder / "latents.png", folder / "latents-statistics.png")
    rows = {s.name: _pictures(s, found[s.name], images, count) for s in subjects}
    what = f"{max(s.count for s in found.values()):,} images of {images.what}"
    with lock(folder, wait=True):
        draw_sheet(pictures[0], rows, images.what)
        draw_statistics(pictures[1], found, what)
        tables = _write(folder, found)
    first = next(iter(found.values()))
    return Analysis(
        f"latents of {what}",
        ("model", "n_z", "mean", "std", "KL, nats/value", "|r| up to", "PCA 1-3", "slope"),
        [(name, *_summary(statistics)) for name, statistics in found.items()],
        (*pictures, *tables),
        (
            "mean, std, KL: lowest to highest channel; r: correlation of two channels; "
            "PCA: variance in three components; slope α: power falls as frequency^−α "
            f"(images: {fall(first.frequencies, first.image_spectrum):.2f})",
        ),
    )


# --------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class LatentStatistics:
    """Per-channel statistics of latents drawn from the posteriors; float64, on the CPU.

    The draws are integrated out in closed form.
    """

    count: int  # of images
    mean: Tensor  # (n_z,)
    covariance: Tensor  # (n_z, n_z), at one position
    posterior_std: Tensor  # (n_z,): root mean square of the posteriors' standard deviations
    kl: Tensor  # (n_z,): KL to N(0, 1), in nats per latent value
    frequencies: Tensor  # (k,), in cycles per latent, up to ½
    spectrum: Tensor  # (n_z, k): mean power of the posterior means
    image_spectrum: Tensor  # (k,): that of the images' luma, averaged over each latent's pixels

    @property
    def std(self) -> Tensor:
        """Standard deviation of each channel (n_z,)."""
        # rounding can make the variance of a constant channel negative
        return self.covariance.diagonal().clamp_min(0).sqrt()

    @property
    def correlation(self) -> Tensor:
        """Correlation matrix of the channels (n_z, n_z); 0 for a channel that does not vary."""
        scale = torch.where(self.std > 0, 1 / self.std, 0)
        correlation = scale[:, None] * self.covariance * scale
        return correlation.fill_diagonal_(1)

    def principal_components(self) -> tuple[Tensor, Tensor]:
        """Descending variances (n_z,), and unit directions as rows (n_z, n_z).

        The sign of an eigenvector is arbitrary: the largest entry of each is made positive.
        """
        variances, vectors = torch.linalg.eigh(self.covariance)
        vectors = vectors.flip(1).T
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        return variances.flip(0).clamp_min(0), vectors * largest.sign()


def measure(subject: Subject, images: SharedImages) -> LatentStatistics:
    """Measure the latents of all images in one pass, with the same result on every process."""
    batches = images.gather(subject, _sums)
    count, *sums = (reduce(torch.add, each) for each in zip(*batches, strict=True))
    mean, products, variance, kl, spectrum, image_spectrum = (total / count for total in sums)
    side = math.ceil(
        shorter_side(images.resolution) / subject.autoencoder.downsampling
    )  # of the latents
    return LatentStatistics(
        int(count.item()),
        mean,
        # E[zzᵀ] − E[z]E[z]ᵀ with z = μ + σε: the posteriors' variance counts on the diagonal alone
        products + variance.diag() - mean[:, None] * mean,
        variance.sqrt(),
        kl,
        torch.arange(1, spectrum.shape[1] + 1, dtype=torch.float64) / side,
        spectrum,
        image_spectrum,
    )


def _sums(_ks: Tensor, images: Tensor, posterior: DiagonalGaussian) -> list[Tensor]:
    """Return the number of images, and sums over them of means over positions; on the CPU."""
    mean, variance = posterior.mean.double(), posterior.logvar.double().exp()  # (b, n_z, h, w)
    over, places = (0, 2, 3), mean[0, 0].numel()
    # Kingma & Welling 2014, Appendix B: ½ (μ² + σ² − 1 − ln σ²)
    kl = 0.5 * (mean.square() + variance - 1 - posterior.logvar.double())
    channels = images.shape[1]
    weights = LUMA if channels == 3 else [1 / channels] * channels
    luma = (images.double() * images.new_tensor(weights).double().view(1, -1, 1, 1)).sum(1)
    sums = [
        torch.tensor(len(images)).double(),
        mean.sum(over) / places,
        torch.einsum("bihw,bjhw->ij", mean, mean) / places,
        variance.sum(over) / places,
        kl.sum(over) / places,
        radial_power(mean).sum(0),
        radial_power(F.adaptive_avg_pool2d(luma, (mean.shape[2], mean.shape[3]))).sum(0),
    ]
    return [total.cpu() for total in sums]


def radial_power(maps: Tensor) -> Tensor:
    """Compute the mean power of maps at radial frequencies 1/s, 2/s, … ½: (…, s, s) → (…, ⌊s/2⌋).

    The mean of each map is subtracted, and a Hann window is applied, since the edges do not match.
    White noise of variance v has power v at every frequency but the lowest, where it has 67/72 v
    (s ≥ 3): under the window, the mean lies partly at that frequency.
    """
    side = maps.shape[-1]
    maps = maps.double()
    maps = maps - maps.mean((-2, -1), keepdim=True)
    window = torch.hann_window(side, periodic=True, dtype=torch.float64, device=maps.device)
    window = window / window.square().mean().sqrt()
    power = torch.fft.fft2(maps * window[:, None] * window, norm="ortho").abs().square()
    whole = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64, device=maps.device)
    radius = torch.hypot(whole[:, None], whole).round().long().flatten()  # (s²,)
    # without the mean, and without the corners beyond ½
    bins = F.one_hot(radius).double()[:, 1 : side // 2 + 1]  # (s², k)
    return power.flatten(-2) @ (bins / bins.sum(0))


def fall(frequencies: Tensor, power: Tensor) -> float:
    """Fit α of power ∝ frequency^−α by least squares of the logarithms; NaN if a power is 0."""
    x, y = frequencies.log(), power.log()
    x = x - x.mean()
    return -((x * y).sum() / x.square().sum()).item()


@torch.no_grad()
def _pictures(
    subject: Subject, statistics: LatentStatistics, images: SharedImages, count: int
) -> list[Tensor]:
    """Return images, reconstructions, and latents by channels and PCA, each (B, 3, H, W)."""
    pixels = sheet_images(images.source, images.resolution, count)
    shown = as_float(pixels.to(images.device))
    latents = subject.autoencoder.encode(shown).mode()  # (B, n_z, h, w)
    recon = subject.autoencoder.decode(latents, shown.shape[-2:]).clamp(-1, 1)
    components = project(latents.cpu(), statistics)
    pictures = [as_rgb(shown).cpu(), as_rgb(recon).cpu()]
    return [*pictures, latents_as_rgb(latents).cpu(), latents_as_rgb(components)]


def project(latents: Tensor, statistics: LatentStatistics) -> Tensor:
    """Project latents (B, n_z, h, w) on the first components of all: (B, min(3, n_z), h, w)."""
    centred = latents.double() - statistics.mean.view(1, -1, 1, 1)
    _, vectors = statistics.principal_components()
    return F.conv2d(centred, vectors[:3, :, None, None]).float()


# ------------------------------------------------------------------------------------- files
def _write(folder: Path, found: dict[str, LatentStatistics]) -> list[Path]:
    """Write all numbers: a row per channel, and a row per channel and frequency."""
    widest = max(len(s.mean) for s in found.values())
    header = ("model", "channel", "mean", "std", "posterior_std", "kl_nats_per_value",
              "component_variance", *(f"correlation_{i + 1}" for i in range(widest)))  # fmt: skip
    rows: list[tuple[Any, ...]] = []
    powers: list[tuple[Any, ...]] = []
    for name, s in found.items():
        variances, _ = s.principal_components()
        numbers = torch.stack([s.mean, s.std, s.posterior_std, s.kl, variances], 1)
        table = torch.cat([numbers, s.correlation], 1).tolist()
        gap = [None] * (widest - len(table))
        rows += [(name, channel, *row, *gap) for channel, row in enumerate(table, 1)]
        spectra = torch.cat([s.spectrum, s.image_spectrum[None]]).tolist()
        for channel, spectrum in zip([*range(1, len(spectra)), "image"], spectra, strict=True):
            pairs = zip(s.frequencies.tolist(), spectrum, strict=True)
            powers += [(name, channel, *pair) for pair in pairs]
    spectrum_header = ("model", "channel", "cycles_per_latent", "power")
    return [
        write_csv(folder / "latents.csv", header, rows),
        write_csv(folder / "latents-spectrum.csv", spectrum_header, powers),
    ]


def _summary(s: LatentStatistics) -> tuple[str, ...]:
    variances, _ = s.principal_components()
    off = s.correlation - torch.eye(len(s.correlation))
    ranges = (f"{values.min():.2f} … {values.max():.2f}" for values in (s.mean, s.std, s.kl))
    share = variances[:3].sum() / variances.sum().clamp_min(1e-300)
    slope = fall(s.frequencies, s.spectrum.mean(0))
    return (str(len(s.mean)), *ranges, f"{off.abs().max():.2f}", f"{share:.0%}", f"{slope:.2f}")


# ---------------------------------------------------------------------------------- showing
def draw_sheet(path: Path, rows: dict[str, list[Tensor]], what: str) -> None:
    """Draw a row of `_pictures` per image and model; the models of an image stand together."""
    count = len(next(iter(rows.values()))[0])
    under = (
        f"The first images of {what}, the posteriors' modes. Three channels, or the first three "
        "principal components, as red, green and blue, each scaled from its 1st to its 99th "
        "percentile."
    )
    cell = (WIDTH - 0.6) / len(COLUMNS) - 0.1
    height = count * len(rows) * (cell + 0.12) + 0.55
    pictures = list(rows.values())
    with drawing(path, "Latents as pictures", under, height) as figure:
        grid = picture_rows(figure, list(rows), count, COLUMNS, cell)
        for (image, model, column), axes in np.ndenumerate(grid):
            show_image(axes, pictures[model][column][image])


def draw_statistics(path: Path, found: dict[str, LatentStatistics], what: str) -> None:
    """Draw four panels per model."""
    under = (
        f"{what}. Samples of the posteriors (spectrum: their means). Dashed: "
        "N(0,\u00a01), the target of the KL term. Grey in the spectrum: luma of the images at the "
        "resolution of the latents, scaled to the same sum."
    )
    height = 6.0 * len(found)
    with drawing(path, "Statistics of the latents per channel", under, height) as figure:
        parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
        for i, (part, (name, statistics)) in enumerate(zip(parts, found.items(), strict=True)):
            if len(found) > 1:
                part.suptitle(name, x=0.012, ha="left", fontsize=12, fontweight="bold")
            _draw_model(part, statistics, colour(i))


def _draw_model(part: SubFigure, s: LatentStatistics, shade: str) -> None:
    (moments, kl), (spectrum, correlation) = part.subplots(2, 2)
    channels = np.arange(1, len(s.mean) + 1)
    few = len(channels) <= FEW

    moments.axhline(0, color=DIM, linewidth=0.9)
    for level in (-1, 1):
        moments.axhline(level, color=DIM, linewidth=0.9, linestyle=(0, (4, 3)))
    size = {"capsize": 3} if few else {"markersize": 2.5, "elinewidth": 1}
    moments.errorbar(channels, s.mean, s.std, color=shade, fmt="o", label="latents", **size)
    moments.errorbar(
        channels + 0.25, s.mean, s.posterior_std, color=INK, fmt="none",
        elinewidth=3 if few else 1, label="a single posterior",
    )  # fmt: skip
    moments.set(title="Mean ± standard deviation", xlabel="channel", ylabel="latent value")
    moments.legend(fontsize=8, frameon=True, framealpha=0.85, edgecolor="none")

    kl.bar(channels, s.kl, color=shade)
    kl.set(title="KL to N(0, 1)", xlabel="channel", ylabel="nats per latent value")
    kl.grid(axis="y")
    kl.set_axisbelow(True)

    _draw_spectrum(spectrum, s, shade)
    last = len(channels) + 0.5
    shown = correlation.imshow(
        s.correlation, cmap="RdBu_r", vmin=-1, vmax=1, extent=(0.5, last, last, 0.5)
    )
    correlation.set(title="Correlation r of channels", xlabel="channel", ylabel="channel")
    correlation.spines[:].set_visible(False)
    if len(channels) <= VERY_FEW:
        for row, column in np.ndindex(s.correlation.shape):
            r = s.correlation[row, column].item()
            how = {"color": "white" if abs(r) > 0.6 else INK, "size": 8}
            correlation.text(column + 1, row + 1, f"{r:.2f}", ha="center", va="center", **how)
    part.colorbar(shown, ax=correlation, shrink=0.9)
    if few:
        for axes in (moments, kl, correlation):
            axes.set_xticks(channels)
        correlation.set_yticks(channels)


def _draw_spectrum(axes: Axes, s: LatentStatistics, shade: str) -> None:
    """Draw the channels thin, their mean thick, and the images grey."""
    for power in s.spectrum:
        axes.plot(s.frequencies, power, color=shade, linewidth=0.8, alpha=0.45)
    mean = s.spectrum.mean(0)
    slope, image_slope = (fall(s.frequencies, power) for power in (mean, s.image_spectrum))
    axes.plot(s.frequencies, mean, color=shade, linewidth=2.2, label=f"latents (α = {slope:.1f})")
    # the power of the images has other units: only the shapes can be compared
    scaled = s.image_spectrum * (mean.mean() / s.image_spectrum.mean())
    label = f"images (α = {image_slope:.1f})"
    axes.plot(s.frequencies, scaled, color=DIM, linewidth=1.5, label=label)
    axes.set(
        xscale="log", yscale="log", title=r"Spectrum: power ∝ frequency$^{\,-\alpha}$",
        xlabel="cycles per latent", ylabel="power",
    )  # fmt: skip
    halves = [2**-k for k in range(1, 12) if 2**-k >= 0.99 * s.frequencies[0].item()]
    axes.set_xticks(halves, ["½", "¼", "⅛", *(f"1/{1 / f:.0f}" for f in halves[3:])][: len(halves)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(which="major")
    axes.legend(fontsize=8)
