"""MMD² × 100 between latents and N(0, I): over draws of images, or of one set with its error.

How far latents are from N(0, I), the noise diffusion starts at (Sadat et al. 2024, Table 6).

mmd.png   MMD² over the kernel's width σ, a line a model
mmd.csv   a row for every model and σ

The paper says "between latent codes and samples from a standard Gaussian", and no more. What it
leaves open, and what is done here:

- the latents' **scale**: raw, or as stage two sees them. Here divided by their standard deviation
  over all channels and places, as Rombach et al. 2022 do for stage two and as the paper follows
  them there; `raw` and `standardised` (each channel to mean 0, standard deviation 1) can be asked.
- **what is one sample**: here all latents of an image, d = n_z·h·w values. The peak of the table
  near σ = 50 says so, too: a shift of the mean shows most at σ ≈ √d, and √(32·32·4) is 64.
- **MMD or MMD²**, and its **unit**: from σ = 250 to 500 the table falls by four, as MMD² does; that
  is 2 at most, so that 28.90 is a multiple. Here MMD² × 100: the means of SD-VAE's channels over
  ImageNet that Karras et al. 2024 published, times its factor of 0.18215, then give 0.65 at
  σ = 500, where the table has 0.44; ten times more or less would be far from it.
- **which images**, how many, and what varies from draw to draw: here held-out ones; a draw takes
  others of them (where there are more than one draw needs), other noise for the posteriors, and
  other Gaussian samples. ± is the standard deviation over draws. (Table 6 as `ldm reproduce` makes
  it has the same images in all draws, and ± is the standard error over them: `latents_mmd`.)
"""

import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor

from autoencoders.posterior import DiagonalGaussian
from ldm.charts import colour, drawing, marker
from ldm.data import DataConfig
from ldm.data.split import Split
from ldm.distributed import fail_together, from_main, join_processes
from ldm.errors import LdmError, UsageError
from ldm.metrics.mmd import rbf_mmd
from ldm.seeds import normal
from pipelines.analysis.subjects import (
    SEED,
    Analysis,
    Images,
    Subject,
    analysis_folder,
    draw_images,
    encode_share,
    gather,
    image_shares,
    load_subjects,
    open_images,
    write_csv,
)
from pipelines.codec import measure_latents

SIGMAS = (25.0, 50.0, 100.0, 250.0, 500.0)  # Sadat et al. 2024, Table 6
HUNDREDTHS = 100  # MMD² is given in these
Scale = Literal["scaled", "standardised", "raw"]
SCALES = {
    "scaled": "divided by their standard deviation",
    "standardised": "each channel with mean 0 and standard deviation 1",
    "raw": "as the encoder gives them",
}
Distances = dict[float, tuple[float, float]]


class Plan(NamedTuple):
    """How distances are measured."""

    sigmas: tuple[float, ...]
    draws: int
    scale: Scale
    n: int
    """Images a draw takes."""
    batch_size: int


class LatentsMMD(NamedTuple):
    """Distances of one set of images, and how far others would move them."""

    distances: Distances
    """For each σ the mean over draws, and its standard error over the images; of latents that are
    nearly normal it is up to half too large."""
    count: int
    """Images."""
    ks: list[int]
    """Of each group of images that is left out, the number of the first (g,)."""
    shares: dict[float, NDArray]
    """For each σ what the groups have in the mean (g,); see `image_shares`."""


def latents_mmd(
    model: Path,
    data: str | DataConfig | None = None,
    n: int = 1000,
    sigmas: Sequence[float] = SIGMAS,
    draws: int = 5,
    resolution: int | None = None,
    device: str = "auto",
    split: Split = "val",
    scale: Scale = "scaled",
    batch_size: int = 16,
) -> LatentsMMD:
    """MMD² × 100 between a model's latents and N(0, I), for each width of the RBF kernel.

    Unlike those of `analyze_mmd`, all draws take the same images, so that the error over images is
    known however few there are, and two models are compared over the same ones.

    Under a distributed launch every image is encoded on one process.

    Args:
        model: a stage-one file or folder, as `load_autoencoder` takes it.
        data: `photos`, a folder, a zip, or shards, or how it is split, too; None: what it was
            trained on.
        n: images, and as many samples of N(0, I); all there are where these are fewer.
        sigmas: the kernel's widths.
        draws: of noise for the posteriors, and of samples of N(0, I).
        resolution: side of the images, pixels; None: what the training ended at.
        scale: of the latents, see `SCALES`.

    Raises:
        UsageError: a number is out of its range, or left out where the file does not say it.
        LdmError: the model or the data cannot be read, or there are fewer than three images.
    """
    plan = make_plan(sigmas, draws, scale, n, batch_size)
    ranks, where = join_processes(device)
    with fail_together(ranks):
        subjects = load_subjects([model], where)
        images = open_images(subjects, data, split, resolution)
    drawn = images._replace(source=draw_images(images.source, n))
    ks, posterior = _encode(subjects[0], drawn, batch_size, ranks, where)
    if len(ks) < 3:
        raise LdmError(f"{images.what}: an MMD's error needs three images, give other --data")
    return from_main(ranks, lambda: _with_errors(posterior, ks.tolist(), plan, where))


# --------------------------------------------------------------------------------- measuring
def make_plan(sigmas: Sequence[float], draws: int, scale: Scale, n: int, batch_size: int) -> Plan:
    for name, value, least in (
        ("--draws", draws, 1),
        ("--n", n, 2),
        ("--batch-size", batch_size, 1),
    ):
        if value < least:
            raise UsageError(f"{name} {value}: it must be at least {least}")
    if scale not in SCALES:
        raise UsageError(f"--latents {scale}: it must be one of {', '.join(SCALES)}")
    if not sigmas or not all(0 < sigma < math.inf for sigma in sigmas):
        raise UsageError(f"--sigmas {', '.join(map(str, sigmas))}: widths must be above 0")
    widths = tuple(dict.fromkeys(map(float, sigmas)))
    return Plan(widths, draws, scale, n, batch_size)


def measure_draws(
    subject: Subject, images: Images, plan: Plan, ranks: PartialState, where: torch.device
) -> Distances:
    """Mean and standard deviation over draws, the same on every process."""
    if len(images.source) < 2:
        raise LdmError(f"{images.what}: MMD needs two images or more, give another --data")
    taken: list[dict[float, float]] = []
    ks, posterior = None, None
    for draw in range(plan.draws):
        if posterior is None or plan.n < len(images.source):
            drawn = images._replace(source=draw_images(images.source, plan.n, draw))
            ks, posterior = _encode(subject, drawn, plan.batch_size, ranks, where)
            if len(ks) < 2:
                raise LdmError(f"{images.what}: fewer than two images can be read: MMD needs two")
        compare = partial(_compare, posterior, ks.tolist(), draw, plan, where)
        taken.append(from_main(ranks, compare))
    of = {s: [HUNDREDTHS * distances[s] for distances in taken] for s in plan.sigmas}
    return {
        s: (statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        for s, values in of.items()
    }


def _with_errors(
    posterior: DiagonalGaussian, ks: list[int], plan: Plan, where: torch.device
) -> LatentsMMD:
    """Means over draws, and their errors: an image is left out with its noise and its Gaussians,
    so that what these would move counts, too."""

    def measure(chosen: NDArray[np.intp]) -> NDArray:
        some = DiagonalGaussian(posterior.mean[chosen], posterior.logvar[chosen])
        numbers = [ks[i] for i in chosen]
        found = [_compare(some, numbers, draw, plan, where) for draw in range(plan.draws)]
        return HUNDREDTHS * np.mean([[each[s] for s in plan.sigmas] for each in found], 0)

    means, shares = image_shares(measure, len(ks))
    errors = shares.std(0, ddof=1) / math.sqrt(len(shares))
    pairs = zip(means.tolist(), errors.tolist(), strict=True)
    by_sigma = dict(zip(plan.sigmas, shares.T, strict=True))
    return LatentsMMD(
        dict(zip(plan.sigmas, pairs, strict=True)), len(ks), ks[: len(shares)], by_sigma
    )


def _encode(
    subject: Subject, images: Images, batch_size: int, ranks: PartialState, where: torch.device
) -> tuple[Tensor, DiagonalGaussian]:
    """Numbers (n,) and posteriors of all images, on the CPU, on every process."""
    with fail_together(ranks):
        share = [
            (k, posterior.mean.cpu(), posterior.logvar.cpu())
            for k, _, posterior in encode_share(subject, images, batch_size, ranks, where)
        ]
    parts = [part for share in gather(ranks, share) for part in share]
    if not parts:
        raise LdmError(f"{images.what}: no image can be read")
    ks, mean, logvar = (torch.cat(parts) for parts in zip(*parts, strict=True))
    order = ks.argsort()
    return ks[order], DiagonalGaussian(mean[order], logvar[order])


def _compare(
    posterior: DiagonalGaussian, ks: list[int], draw: int, plan: Plan, where: torch.device
) -> dict[float, float]:
    """MMD² between one draw of the latents of images `ks` and as many of N(0, I), for each σ.

    The noise and the samples belong to the images' numbers.
    """
    noise = normal(SEED, f"mmd posterior {draw}", ks, posterior.mean.shape[1:])
    latents = _scale(posterior, noise, plan.scale).flatten(1)  # (n, d)
    gaussian = normal(SEED, f"mmd gaussian {draw}", ks, latents.shape[1:])
    return rbf_mmd(latents.to(where), gaussian.to(where), plan.sigmas)


def _scale(posterior: DiagonalGaussian, noise: Tensor, scale: Scale) -> Tensor:
    """A draw of latents (n, n_z, h, w), scaled as asked for by their own statistics."""
    latents = posterior.sample(noise=noise)
    if scale == "raw":
        return latents
    mean, std = (t.view(1, -1, 1, 1) for t in measure_latents([posterior]))  # (1, n_z, 1, 1)
    if scale == "standardised":
        return ((latents - mean) / std.clamp_min(1e-12)).float()
    # Rombach et al. 2022, Appendix G: one factor for all channels, and no shift
    variance = (std.square() + mean.square()).mean() - mean.mean().square()
    return (latents / variance.sqrt().clamp_min(1e-12)).float()


def analyze_mmd(
    models: Sequence[str | Path] = (),
    data: str | None = None,
    n: int = 1000,
    sigmas: Sequence[float] = SIGMAS,
    draws: int = 5,
    resolution: int | None = None,
    device: str = "auto",
    split: Split = "val",
    scale: Scale = "scaled",
    batch_size: int = 16,
    out: Path | None = None,
) -> Analysis | None:
    """MMD² × 100 to N(0, I) of one or several models' latents, as Table 6 has it, and a picture.

    Args:
        models: PATH or NAME=PATH, each; none: the newest run.
        n: images a draw takes, and as many samples of N(0, I); all there are where these are fewer.
        out: folder of the files; None: `analysis/` beside the first model.
        data, sigmas, resolution, scale: as `latents_mmd` takes them.

    Returns:
        What was found; None on all processes but the main one.

    Raises:
        UsageError: a number is out of its range, or left out where the files do not say it.
        LdmError: a model or the data cannot be read, or there are fewer than two images.
    """
    plan = make_plan(sigmas, draws, scale, n, batch_size)
    ranks, where = join_processes(device)
    with fail_together(ranks):
        subjects = load_subjects(models, where)
        images = open_images(subjects, data, split, resolution)
    found = {s.name: measure_draws(s, images, plan, ranks, where) for s in subjects}
    if not ranks.is_main_process:
        return None
    used = min(n, len(images.source))
    dims = {
        s.name: s.autoencoder.config.latent_channels
        * math.ceil(images.resolution / s.autoencoder.downsampling) ** 2
        for s in subjects
    }
    folder = analysis_folder(out, subjects[0].path)
    rows = [
        (name, dims[name], sigma, *numbers, draws, used, images.what, scale)
        for name, distances in found.items()
        for sigma, numbers in distances.items()
    ]
    header = ("model", "d", "sigma", "mmd2_x100", "std", "draws", "images", "data", "latents")
    table = write_csv(folder / "mmd.csv", header, rows)
    picture = folder / "mmd.png"
    _draw(picture, found, dims, f"{used:,} images of {images.what}", plan)
    return Analysis(
        f"MMD² × 100 to N(0, I), {used:,} images of {images.what}",
        ("σ", *found),
        [
            (f"{sigma:g}", *(f"{d[sigma][0]:.2f} ± {d[sigma][1]:.2f}" for d in found.values()))
            for sigma in plan.sigmas
        ],
        (picture, table),
        tuple(_notes(dims, plan, used)),
    )


# ---------------------------------------------------------------------------------- showing
def _notes(dims: dict[str, int], plan: Plan, used: int) -> list[str]:
    notes = []
    if used < plan.n:
        notes.append(f"{used:,} images are all there are: every draw takes the same")
    if len(set(dims.values())) > 1:
        each = ", ".join(f"{name} {d:,}" for name, d in dims.items())
        notes.append(
            f"the models' latents differ in number ({each}): their distances do not compare"
        )
    low, high = min(plan.sigmas), max(plan.sigmas)
    outside = [d for d in dict.fromkeys(dims.values()) if not low <= math.sqrt(d) <= high]
    if outside:
        side = ", ".join(f"√{d:,} = {math.sqrt(d):.0f}" for d in outside)
        notes.append(
            f"a shift of the mean shows most at σ = √d, here {side}: outside of the σ measured, "
            "which the paper chose for d of about 4,096"
        )
    return notes


def _draw(
    path: Path, found: dict[str, Distances], dims: dict[str, int], what: str, plan: Plan
) -> None:
    many = f"{plan.draws} draw{'s' if plan.draws > 1 else ''}"
    under = (
        f"{what[0].upper()}{what[1:]}; latents {SCALES[plan.scale]}. Maximum mean discrepancy "
        "with an RBF kernel of width σ; lower is closer to the noise that diffusion starts at. "
        f"Mean\u00a0±\u00a0standard deviation of {many}."
    )
    with drawing(path, "How far are the latents from Gaussian noise?", under, 3.9) as figure:
        axes = figure.subplots()
        for i, (name, distances) in enumerate(found.items()):
            widths = sorted(distances)  # a line goes from point to point
            means, stds = zip(*(distances[sigma] for sigma in widths), strict=True)
            axes.errorbar(
                widths, means, stds, color=colour(i), marker=marker(i), capsize=4,
                label=f"{name} (d = {dims[name]:,})",
            )  # fmt: skip
        axes.set(xscale="log", xlabel="kernel width σ, in standard deviations of the noise",
                 ylabel="MMD² × 100")  # fmt: skip
        axes.set_xticks(sorted(plan.sigmas), [f"{s:g}" for s in sorted(plan.sigmas)])
        axes.minorticks_off()
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.grid(axis="y")
        axes.legend()
