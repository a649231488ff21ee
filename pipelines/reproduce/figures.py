"""The paper's figures that show measurements or trained rows, drawn by `pipelines.analysis`."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from ldm.errors import UsageError
from ldm.tables import text_table
from pipelines.reproduce.plan import BuildPlan, Target, check_settings
from pipelines.reproduce.rows import check_images, is_main, make_model
from pipelines.reproduce.tables import all_tables

IMAGES = 64
"""Samples in a grid."""


class Figure(NamedTuple):
    """A figure of the paper."""

    title: str
    rows: dict[str, str]
    """Its labels, and the presets of the rows whose models they are."""
    drawn_by: Literal["latents", "features", "scale", "gradients", "samples"]


# The paper does not say on which data and latent width its figures are; these rows are Table 1's
# ImageNet-256, n_z 4, and the ablations'.
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


class Drawing(NamedTuple):
    """A drawn figure."""

    files: tuple[Path, ...]
    lines: tuple[str, ...]
    """Its title, numbers and notes."""

    def summary(self) -> tuple[str, ...]:
        """Return the lines to print."""
        return self.lines


def find_figure(word: str) -> str | None:
    """Find the figure that a word names (f5, F5, figure 5); None if it names none."""
    match = re.fullmatch(r"f(?:ig(?:ure)?[ .-]*)?0*(\d)", word.strip().lower())
    name = f"f{match[1]}" if match else ""
    return name if name in FIGURES else None


def draw_figure(name: str, plan: BuildPlan) -> Drawing:
    """Train the rows of a figure that are not trained yet, and draw it."""
    figure, published = FIGURES[name], plan.scale.protocol.published
    if figure.drawn_by == "scale" and not published:
        raise UsageError(f"{name} measures LPIPS: use --scale small or paper")
    targets = {label: _find_target(plan, preset) for label, preset in figure.rows.items()}
    check_settings(plan.settings, [*{type(t.training.recipe): None for t in targets.values()}])
    for target in targets.values():  # before hours of training the first of them
        check_images(target)
    models = {
        label: make_model(target, substitutes=not published).path
        for label, target in targets.items()
    }
    first, folder = next(iter(targets.values())), plan.folder(name)
    files: tuple[Path, ...]
    if figure.drawn_by == "samples":
        from pipelines.sample import sample_images
        from pipelines.sampling.sample_folder import GRID

        [model] = models.values()
        count, steps = min(IMAGES, plan.scale.protocol.samples), plan.scale.protocol.sampler_steps
        seed = int(name == "f9")  # F9 shows other samples than F6
        sample_images(model, count, folder, seed, steps=steps, device=first.device)
        files, lines = (folder / GRID,), [f"{count} samples, seed {seed}"]
    else:
        files, lines = _analyze(figure.drawn_by, models, first, folder, plan)
    return Drawing(files, (f"# {name.upper()}: {figure.title}", "", *lines))


def _find_target(plan: BuildPlan, preset: str) -> Target:
    [table] = [table for table in all_tables() if preset.startswith(f"{table.name}-")]
    return next(target for target in plan.targets(table) if target.row.preset == preset)


def _analyze(
    kind: str, models: dict[str, Path], target: Target, folder: Path, plan: BuildPlan
) -> tuple[tuple[Path, ...], list[str]]:
    given, device = [f"{label}={path}" for label, path in models.items()], target.device
    if kind == "gradients":
        from pipelines.analysis.gradients import analyze_gradients

        runs = [f"{label}={path.parent}" for label, path in models.items()]
        found = analyze_gradients(runs, folder) if is_main() else None
    elif kind == "scale":
        from pipelines.analysis.scale import analyze_scale

        found = analyze_scale(
            given, weights=plan.weights, device=device, force=plan.force, out=folder
        )
    else:
        from pipelines.analysis.features import analyze_features
        from pipelines.analysis.latents import analyze_latents
        from pipelines.analysis.subjects import open_analysis

        analyze = analyze_latents if kind == "latents" else analyze_features
        opened = open_analysis(given, resolution=target.resolution, device=device)
        found = analyze(*opened, out=folder)
    if found is None:  # the main process reports it
        return (), []
    return found.files, [found.title, *text_table(found.header, found.rows), *found.notes]
