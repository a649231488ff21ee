"""The paper's figures that are measured or drawn from trained rows, by `pipelines.analysis`.

<out>/<scale>/<figure>/    the pictures and their numbers
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldm.errors import UsageError
from pipelines.reproduce.plan import Job, Plan
from pipelines.reproduce.rows import Model, check_images, is_main, make_model
from pipelines.reproduce.tables import all_tables

IMAGES = 64
"""Samples in a grid."""


@dataclass(frozen=True)
class Figure:
    """A figure of the paper."""

    title: str
    rows: dict[str, str]
    """What it shows: names, and the rows whose models they are."""
    drawn_by: Literal["latents", "features", "scale", "gradients", "samples"]


# Of which data and latent width the paper's are it does not say; these are Table 1's ImageNet-256,
# n_z 4, and the ablations'.
BOTH = {"VAE": "t01-imagenet256-nz4-vae", "LiteVAE": "t01-imagenet256-nz4-litevae"}
NORMS = {"GroupNorm": "t04-group", "SMC": "t04-smc"}
WEIGHTS = {"constant": "t08-constant", "adaptive": "t08-adaptive"}
FFHQ = {"FFHQ": "t07-ffhq-litevae"}
FIGURES = {
    "f2": Figure("SD-VAE's latents as colours", {"VAE": BOTH["VAE"]}, "latents"),
    "f3": Figure("feature maps of the decoder, GroupNorm beside SMC", NORMS, "features"),
    "f4": Figure("LiteVAE's latents as colours", {"LiteVAE": BOTH["LiteVAE"]}, "latents"),
    "f5": Figure("metrics over resolutions, LiteVAE beside the VAE", BOTH, "scale"),
    "f6": Figure("samples of FFHQ", FFHQ, "samples"),
    "f7": Figure("adversarial against reconstruction gradient", WEIGHTS, "gradients"),
    "f8": Figure("metrics over resolutions, SMC beside GroupNorm", NORMS, "scale"),
    "f9": Figure("more samples of FFHQ", FFHQ, "samples"),
}


@dataclass(frozen=True)
class Drawing:
    """A figure, drawn."""

    name: str
    figure: Figure
    files: tuple[Path, ...]
    lines: tuple[str, ...] = ()
    """Its numbers, and what to know of them."""

    def summary(self) -> list[str]:
        """What was drawn, as lines."""
        return [f"# {self.name.upper()}: {self.figure.title}", "", *self.lines]


def find_figure(word: str) -> str | None:
    """The name of the figure that a word means (f5, F5, figure 5); None if it means none."""
    match = re.fullmatch(r"f(?:ig(?:ure)?[ .-]*)?0*(\d)", word.strip().lower())
    name = f"f{match[1]}" if match else ""
    return name if name in FIGURES else None


def draw_figure(name: str, plan: Plan, weights: Path | None = None, force: bool = False) -> Drawing:
    """Train what a figure shows, as far as it is not, and draw it.

    Raises:
        UsageError: the scale is too small for it.
        LdmError: as training and the analysis; or a run learnt from other images than its data
            holds now.
        Interrupted: asked to stop while training.
    """
    figure, how = FIGURES[name], plan.scale.measuring
    if figure.drawn_by == "scale" and not how.published:
        raise UsageError(f"{name} measures LPIPS: give --scale small, or paper")
    jobs = {label: _find_job(plan, preset) for label, preset in figure.rows.items()}
    for job in jobs.values():  # before hours of training the first of them
        check_images(job)
    models = {label: make_model(job, stand_in=not how.published) for label, job in jobs.items()}
    first = next(iter(jobs.values()))
    folder, device = plan.folder(name), first.training.recipe.run.device
    if figure.drawn_by == "samples":
        return _draw_samples(name, first, models, plan)
    given = [f"{label}={model.path}" for label, model in models.items()]
    if figure.drawn_by == "gradients":
        from pipelines.analysis.gradients import analyze_gradients

        runs = [f"{label}={model.path.parent}" for label, model in models.items()]
        found = analyze_gradients(runs, folder) if is_main() else None
    elif figure.drawn_by == "latents":
        from pipelines.analysis.latents import analyze_latents
        from pipelines.analysis.subjects import open_analysis

        opened = open_analysis(given, resolution=first.resolution, device=device)
        found = analyze_latents(*opened, out=folder)
    elif figure.drawn_by == "features":
        from pipelines.analysis.features import analyze_features
        from pipelines.analysis.subjects import open_analysis

        opened = open_analysis(given, resolution=first.resolution, device=device)
        found = analyze_features(*opened, out=folder)
    else:
        from pipelines.analysis.scale import analyze_scale

        found = analyze_scale(given, weights=weights, device=device, force=force, out=folder)
    if found is None:  # another process tells it
        return Drawing(name, figure, ())
    lines = (found.title, *(" · ".join(row) for row in (found.header, *found.rows)), *found.notes)
    return Drawing(name, figure, found.files, lines)


def _find_job(plan: Plan, preset: str) -> Job:
    [table] = [table for table in all_tables() if preset.startswith(f"{table.name}-")]
    return next(job for job in plan.jobs(table) if job.row.preset == preset)


def _draw_samples(name: str, job: Job, models: dict[str, Model], plan: Plan) -> Drawing:
    from pipelines.sample import sample_images
    from pipelines.sampling.sample_folder import GRID

    how, device = plan.scale.measuring, job.training.recipe.run.device
    [model] = models.values()
    count = min(IMAGES, how.samples)
    seed = int(name == "f9")  # more of them: other ones
    folder = plan.folder(name)
    sample_images(model.path, count, folder, seed, steps=how.sampler_steps, device=device)
    return Drawing(name, FIGURES[name], (folder / GRID,), (f"{count} samples, seed {seed}",))
