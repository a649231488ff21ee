"""How far latents are from N(0, I), the noise diffusion starts at (Sadat et al. 2024, Table 6).

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
from collections.abc import Sequence
from pathlib import Path

from ldm.data.split import Split
from ldm.processes import fail_together, join_processes
from pipelines.analysis.latent_distances import (
    SCALES,
    SIGMAS,
    Distances,
    Plan,
    Scale,
    make_plan,
    measure_draws,
)
from pipelines.analysis.output import Analysis, analysis_folder, write_csv
from pipelines.analysis.plots import colour, drawing, marker
from pipelines.analysis.subjects import load_subjects, open_images


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
