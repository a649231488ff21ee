"""MMD between latents and N(0, I), where diffusion starts (Sadat et al. 2024, Table 6).

mmd.png   MMD² over the kernel width σ, a line per model
mmd.csv   a row per model and σ

The paper says "between latent codes and samples from a standard Gaussian", and no more. Our reading
of what it leaves open:

- **Scale of the latents**: by default divided by their standard deviation over all channels and
  positions, as Rombach et al. 2022 do for stage two; see `SCALES`.
- **One sample** is the whole latent of an image, d = n_z·h·w values. The table's peak near σ = 50
  supports this: a shift of the mean shows most at σ ≈ √d, and √(32·32·4) = 64.
- **MMD or MMD²**, and its **unit**: from σ = 250 to 500 the table falls by four, as MMD² does; MMD²
  is at most 2, so 28.90 is a multiple. We give MMD² × 100: the channel means of SD-VAE over
  ImageNet that Karras et al. 2024 published, times its factor of 0.18215, then give 0.65 at
  σ = 500, where the table has 0.44; a factor of ten either way would be far off.
- **Images and repetitions**: in `analyze_mmd` each draw takes other held-out images (if there are
  more), posterior noise and Gaussian samples, and ± is the standard deviation over draws. In
  `latents_mmd`, for `ldm reproduce`, all draws take the same images, and ± is the standard error
  over them. It is known for any number of images, and two models compare image by image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoencoders import DiagonalGaussian
from ldm.charts import drawing, line_style
from ldm.config import height_width
from ldm.device import full_float32
from ldm.distributed import from_main
from ldm.errors import LdmError, UsageError, check_at_least
from ldm.files import lock
from ldm.metrics.mmd import rbf_mmd
from ldm.seeds import normal
from pipelines.analysis.subjects import (
    SEED,
    Analysis,
    SharedImages,
    Subject,
    analysis_folder,
    write_csv,
)
from pipelines.latents import measure_latents

SIGMAS = (25.0, 50.0, 100.0, 250.0, 500.0)  # Sadat et al. 2024, Table 6
HUNDREDTHS = 100  # MMD² is given in these
GROUPS = 50  # of images, at most, for the jackknife: they give the standard error to about a tenth
Scale = Literal["scaled", "standardised", "raw"]
SCALES = {
    "scaled": "divided by their standard deviation",
    "standardised": "standardised to mean 0 and standard deviation 1 per channel",
    "raw": "as encoded",
}
Distances = dict[float, tuple[float, float]]


@dataclass(frozen=True)
class MmdSettings:
    """Settings of a measurement."""

    n: int = 1000
    """Images, and samples of N(0, I); all images if there are fewer."""
    sigmas: Sequence[float] = SIGMAS
    """Widths of the RBF kernel."""
    draws: int = 5
    """Repetitions with other posterior noise and other samples of N(0, I)."""
    scale: Scale = "scaled"
    """Scale of the latents, see `SCALES`."""

    def __post_init__(self) -> None:
        check_at_least(1, draws=self.draws)
        check_at_least(2, n=self.n)
        if self.scale not in SCALES:
            raise UsageError(f"--latents {self.scale}: must be one of {', '.join(SCALES)}")
        if not self.sigmas or not all(0 < sigma < math.inf for sigma in self.sigmas):
            widths = ", ".join(map(str, self.sigmas))
            raise UsageError(f"--sigmas {widths}: must be above 0 and finite")


@dataclass(frozen=True)
class LatentsMMD:
    """Distances of one set of images, with standard errors over the images."""

    distances: Distances
    """For each σ the mean over draws and its standard error, which is up to 50 % too large for
    latents that are nearly normal."""
    count: int
    """Number of images."""
    ks: list[int]
    """Number of the first image of each group that the jackknife leaves out (g,)."""
    shares: dict[float, NDArray]
    """For each σ the pseudo-values of the groups (g,); see `jackknife`."""


@full_float32()
def analyze_mmd(
    subjects: Sequence[Subject],
    images: SharedImages,
    settings: MmdSettings = MmdSettings(),
    out: Path | None = None,
) -> Analysis | None:
    """Measure MMD² × 100 to N(0, I) of the latents of one or several models, as in Table 6."""
    folder = analysis_folder(out, subjects[0].path)
    found = {s.name: measure_draws(s, images, settings) for s in subjects}
    if not images.ranks.is_main_process:
        return None
    used, sides = min(settings.n, len(images.source)), height_width(images.resolution)
    what = f"{used:,} images of {images.what}"
    dims = {
        s.name: s.autoencoder.config.latent_channels
        * math.prod(math.ceil(side / s.autoencoder.downsampling) for side in sides)
        for s in subjects
    }
    rows = [
        (name, dims[name], sigma, *numbers, settings.draws, used, images.what, settings.scale)
        for name, distances in found.items()
        for sigma, numbers in distances.items()
    ]
    header = ("model", "d", "sigma", "mmd2_x100", "std", "draws", "images", "data", "latents")
    with lock(folder, wait=True):
        files = (folder / "mmd.png", write_csv(folder / "mmd.csv", header, rows))
        _draw(files[0], found, dims, what, settings)
    cells = [
        (f"{sigma:g}", *(f"{d[sigma][0]:.2f} ± {d[sigma][1]:.2f}" for d in found.values()))
        for sigma in dict.fromkeys(settings.sigmas)
    ]
    notes = tuple(_notes(dims, settings, used))
    return Analysis(f"MMD² × 100 to N(0, I), {what}", ("σ", *found), cells, files, notes)


def latents_mmd(
    subject: Subject, images: SharedImages, settings: MmdSettings = MmdSettings()
) -> LatentsMMD:
    """Measure MMD² × 100 of a model's latents to N(0, I), for each kernel width."""
    ks, posterior = _encode(subject, images.draw(settings.n))
    if len(ks) < 3:
        raise LdmError(f"{images.what}: the standard error of an MMD needs three images")
    return from_main(images.ranks, lambda: _with_errors(posterior, ks, settings, images.device))


# --------------------------------------------------------------------------------- measuring
def measure_draws(subject: Subject, images: SharedImages, settings: MmdSettings) -> Distances:
    """Return mean and standard deviation over draws, the same on every process."""
    taken: list[dict[float, float]] = []
    for draw in range(settings.draws):
        if draw == 0 or settings.n < len(images.source):
            ks, posterior = _encode(subject, images.draw(settings.n, draw))
            if len(ks) < 2:
                raise LdmError(f"{images.what}: MMD needs at least two readable images")
        compare = partial(_compare, posterior, ks, draw, settings, images.device)
        taken.append(from_main(images.ranks, compare))
    of = {s: [HUNDREDTHS * distances[s] for distances in taken] for s in settings.sigmas}
    return {s: (fmean(v), stdev(v) if len(v) > 1 else 0.0) for s, v in of.items()}


def _with_errors(
    posterior: DiagonalGaussian, ks: list[int], settings: MmdSettings, where: torch.device
) -> LatentsMMD:
    """Return means over draws with standard errors.

    The jackknife leaves out an image together with its noise and its Gaussian sample, so that the
    error covers these as well.
    """

    def measure(chosen: NDArray[np.intp]) -> NDArray:
        some = DiagonalGaussian(posterior.mean[chosen], posterior.logvar[chosen])
        numbers = [ks[i] for i in chosen]
        found = [_compare(some, numbers, draw, settings, where) for draw in range(settings.draws)]
        return HUNDREDTHS * np.mean([[each[s] for s in settings.sigmas] for each in found], 0)

    means, shares = jackknife(measure, len(ks))
    errors = shares.std(0, ddof=1) / math.sqrt(len(shares))
    pairs = zip(means.tolist(), errors.tolist(), strict=True)
    return LatentsMMD(
        dict(zip(settings.sigmas, pairs, strict=True)),
        len(ks),
        ks[: len(shares)],
        dict(zip(settings.sigmas, shares.T, strict=True)),
    )


def jackknife(
    measure: Callable[[NDArray[np.intp]], NDArray], count: int
) -> tuple[NDArray, NDArray]:
    """Measure statistics of images, also without each group (Efron & Tibshirani 1993, Chapter 11).

    A bootstrap would not do for an MMD: an image drawn twice is at distance 0 from itself, a bias
    of about 1/n.

    `measure` maps ascending indices of images (m,), of `count`, to statistics (s,). These are
    returned with pseudo-values (g, s): their mean is about the statistic, their standard
    error is its standard error. Image i belongs to group i modulo g.
    """
    images = np.arange(count)
    group = images % min(count, GROUPS)
    whole = measure(images)
    without = np.stack([measure(images[group != one]) for one in range(group.max() + 1)])
    return whole, whole + (len(without) - 1) * (without.mean(0) - without)


def _encode(subject: Subject, images: SharedImages) -> tuple[list[int], DiagonalGaussian]:
    """Encode all images: their numbers (n,) and posteriors, on the CPU, on every process."""
    batches = images.gather(subject, lambda ks, _, p: (ks, p.mean.cpu(), p.logvar.cpu()))
    ks, mean, logvar = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    order = ks.argsort()
    return ks[order].tolist(), DiagonalGaussian(mean[order], logvar[order])


def _compare(
    posterior: DiagonalGaussian,
    ks: list[int],
    draw: int,
    settings: MmdSettings,
    where: torch.device,
) -> dict[float, float]:
    """Return MMD² between one draw of the latents of images `ks` and N(0, I), for each σ.

    The noise and the Gaussian samples are functions of the images' numbers.
    """
    noise = normal(SEED, f"mmd posterior {draw}", ks, posterior.mean.shape[1:])
    latents = _scale(posterior, noise, settings.scale).flatten(1)  # (n, d)
    gaussian = normal(SEED, f"mmd gaussian {draw}", ks, latents.shape[1:])
    return rbf_mmd(latents.to(where), gaussian.to(where), settings.sigmas)


def _scale(posterior: DiagonalGaussian, noise: Tensor, scale: Scale) -> Tensor:
    """Sample latents (n, n_z, h, w) and scale them by their own statistics."""
    latents = posterior.sample(noise=noise)
    if scale == "raw":
        return latents
    mean, std = (t.view(1, -1, 1, 1) for t in measure_latents([posterior]))  # (1, n_z, 1, 1)
    if scale == "standardised":
        return ((latents - mean) / std.clamp_min(1e-12)).float()
    # Rombach et al. 2022, Appendix G: one factor for all channels, and no shift
    variance = (std.square() + mean.square()).mean() - mean.mean().square()
    return (latents / variance.sqrt().clamp_min(1e-12)).float()


# ---------------------------------------------------------------------------------- showing
def _notes(dims: dict[str, int], settings: MmdSettings, used: int) -> list[str]:
    notes = []
    if used < settings.n:
        notes.append(f"there are only {used:,} images: every draw takes the same ones")
    if len(set(dims.values())) > 1:
        each = ", ".join(f"{name} {d:,}" for name, d in dims.items())
        notes.append(f"the latents differ in dimension ({each}): do not compare their distances")
    low, high = min(settings.sigmas), max(settings.sigmas)
    outside = [d for d in dict.fromkeys(dims.values()) if not low <= math.sqrt(d) <= high]
    if outside:
        side = ", ".join(f"√{d:,} = {math.sqrt(d):.0f}" for d in outside)
        notes.append(
            f"MMD is most sensitive to a shift of the mean at σ = √d, here {side}, outside the "
            "range of σ; the paper chose its σ for d of about 4,096"
        )
    return notes


def _draw(
    path: Path, found: dict[str, Distances], dims: dict[str, int], what: str, settings: MmdSettings
) -> None:
    many = f"{settings.draws} draw{'s' if settings.draws > 1 else ''}"
    under = (
        f"{what}; latents {SCALES[settings.scale]}. Maximum mean discrepancy with an RBF kernel of "
        "width σ; lower is closer to the noise that diffusion starts from. "
        f"Mean\u00a0±\u00a0standard deviation of {many}."
    )
    with drawing(path, "Distance of the latents from Gaussian noise", under, 3.9) as figure:
        axes = figure.subplots()
        for i, (name, distances) in enumerate(found.items()):
            widths = sorted(distances)  # a line goes from point to point
            means, stds = zip(*(distances[sigma] for sigma in widths), strict=True)
            axes.errorbar(
                widths, means, stds, **line_style(i), capsize=4,
                label=f"{name} (d = {dims[name]:,})",
            )  # fmt: skip
        axes.set(xscale="log", xlabel="kernel width σ, in standard deviations of the noise",
                 ylabel="MMD² × 100")  # fmt: skip
        axes.set_xticks(sorted(settings.sigmas), [f"{s:g}" for s in sorted(settings.sigmas)])
        axes.minorticks_off()
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.grid(axis="y")
        axes.legend()
