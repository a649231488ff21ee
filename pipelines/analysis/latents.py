"""What latents look like, and their statistics (Sadat et al. 2024, Figures 2 and 4).

latents.png              images, reconstructions, latents as RGB: by channels 1-3, by PCA
latents-statistics.png   per channel: mean, standard deviation, KL; spectrum; correlations
latents.csv              the same for every model and channel
latents-spectrum.csv     power for every model, channel and frequency, and of the images themselves
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.data import sheet_images
from ldm.data.split import Split
from ldm.errors import UsageError
from ldm.images import latents_as_rgb, to_float
from ldm.processes import fail_together, join_processes
from pipelines.analysis.latent_plots import Rows, draw_sheet, draw_statistics
from pipelines.analysis.latent_statistics import LatentStatistics, measure
from pipelines.analysis.output import Analysis, analysis_folder, write_csv
from pipelines.analysis.subjects import (
    Images,
    Subject,
    draw_images,
    load_subjects,
    open_images,
)

LEAST = 4  # latents a side: a spectrum of fewer says nothing


def analyze_latents(
    models: Sequence[str | Path] = (),
    data: str | None = None,
    n: int = 256,
    count: int = 4,
    resolution: int | None = None,
    device: str = "auto",
    split: Split = "val",
    batch_size: int = 16,
    out: Path | None = None,
) -> Analysis | None:
    """Show a few images' latents, and measure those of many.

    Under a distributed launch every image is measured on one process.

    Args:
        models: PATH or NAME=PATH, each; none: the newest run.
        data: `photos`, a folder, a zip, or shards; None: what they were trained on.
        n: images measured; all there are where these are fewer.
        count: images shown, the first of the split.
        resolution: side of the images, pixels; None: what the training ended at.
        out: folder of the files; None: `analysis/` beside the first model.

    Returns:
        What was found; None on all processes but the main one.

    Raises:
        UsageError: a number is out of its range, or left out where the file does not say it.
        LdmError: a model or the data cannot be read, or a latent is not finite.
    """
    for name, value in (("--n", n), ("--images", count), ("--batch-size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} {value}: it must be at least 1")
    ranks, where = join_processes(device)
    with fail_together(ranks):
        subjects = load_subjects(models, where)
        whole = open_images(subjects, data, split, resolution)
    for s in subjects:
        f = s.autoencoder.downsampling
        if whole.resolution < LEAST * f:
            raise UsageError(
                f"--resolution {whole.resolution}: {s.name} makes latents of {f}×{f} pixels, too "
                f"few of them for a spectrum; give {LEAST * f} or more"
            )
    drawn = whole._replace(source=draw_images(whole.source, n))
    found = {s.name: measure(s, drawn, batch_size, ranks, where) for s in subjects}
    if not ranks.is_main_process:
        return None
    folder = analysis_folder(out, subjects[0].path)
    sheet, statistics = folder / "latents.png", folder / "latents-statistics.png"
    draw_sheet(sheet, _rows(subjects, found, whole, count), whole.what)
    measured = max(stats.count for stats in found.values())
    what = f"{measured:,} images of {whole.what}"
    draw_statistics(statistics, found, what)
    tables = _write(folder, found)
    return Analysis(
        f"latents of {what}",
        ("model", "n_z", "mean", "std", "KL, nats/value", "|r| up to", "PCA 1-3", "slope"),
        [(name, *_summary(stats)) for name, stats in found.items()],
        (sheet, statistics, *tables),
        (
            "mean, std, KL: lowest to highest channel; r: correlation of two channels; "
            "PCA: variance in three components; slope α: power falls as frequency^−α "
            f"(the images themselves: {next(iter(found.values())).image_slope:.2f})",
        ),
    )


@torch.no_grad()
def _rows(
    subjects: Sequence[Subject], found: dict[str, LatentStatistics], images: Images, count: int
) -> Rows:
    """For each model the images, reconstructions, and latents as RGB in two ways."""
    rows = {}
    for s in subjects:
        where = next(s.autoencoder.parameters()).device
        shown = to_float(sheet_images(images.source, images.resolution, count).to(where))
        latents = s.autoencoder.encode(shown).mode()  # (B, n_z, h, w)
        recon = s.autoencoder.decode(latents, shown.shape[-2:]).clamp(-1, 1)
        components = project(latents.cpu(), found[s.name])
        rows[s.name] = [
            shown.cpu(),
            recon.cpu(),
            latents_as_rgb(latents).cpu(),
            latents_as_rgb(components),
        ]
    return rows


def project(latents: Tensor, statistics: LatentStatistics) -> Tensor:
    """Latents (B, n_z, h, w) → their first three principal components (B, min(3, n_z), h, w).

    The components are those of all latents measured, whose mean is taken off.
    """
    centred = latents.double() - statistics.mean.view(1, -1, 1, 1)
    _, vectors = statistics.principal_components()
    return F.conv2d(centred, vectors[:3, :, None, None]).float()


def _write(folder: Path, found: dict[str, LatentStatistics]) -> list[Path]:
    """All numbers: a row a channel, and a row a channel and frequency."""
    widest = max(len(stats.mean) for stats in found.values())
    header = ("model", "channel", "mean", "std", "posterior_std", "kl_nats_per_value",
              "component_variance", *(f"correlation_{i + 1}" for i in range(widest)))  # fmt: skip
    rows = []
    for name, s in found.items():
        variances, _ = s.principal_components()
        columns = (s.mean, s.std, s.posterior_std, s.kl, variances)
        for channel, numbers in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            correlations = s.correlation[channel].tolist()
            gap = [None] * (widest - len(correlations))
            rows.append((name, channel + 1, *numbers, *correlations, *gap))
    spectra = [
        (name, channel, frequency, power)
        for name, s in found.items()
        for channel, spectrum in [*enumerate(s.spectrum, 1), ("image", s.image_spectrum)]
        for frequency, power in zip(s.frequencies.tolist(), spectrum.tolist(), strict=True)
    ]
    spectrum_header = ("model", "channel", "cycles_per_latent", "power")
    return [
        write_csv(folder / "latents.csv", header, rows),
        write_csv(folder / "latents-spectrum.csv", spectrum_header, spectra),
    ]


def _summary(s: LatentStatistics) -> tuple[str, ...]:
    variances, _ = s.principal_components()
    off = s.correlation - torch.eye(len(s.correlation))
    ranges = (f"{values.min():.2f} … {values.max():.2f}" for values in (s.mean, s.std, s.kl))
    share = variances[:3].sum() / variances.sum().clamp_min(1e-300)
    return (str(len(s.mean)), *ranges, f"{off.abs().max():.2f}", f"{share:.0%}", f"{s.slope:.2f}")
