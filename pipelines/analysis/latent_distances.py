"""MMD² × 100 between latents and N(0, I): over draws of images, or of one set with its error."""

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
from ldm.data import DataConfig
from ldm.data.split import Split
from ldm.errors import LdmError, UsageError
from ldm.metrics.mmd import rbf_mmd
from ldm.processes import fail_together, from_main, join_processes
from ldm.seeds import normal
from pipelines.analysis.jackknife import image_shares
from pipelines.analysis.subjects import (
    SEED,
    Images,
    Subject,
    draw_images,
    encode_share,
    gather,
    load_subjects,
    open_images,
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
