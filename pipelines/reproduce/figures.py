"""The paper's figures, drawn of models that rows of its tables train."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from ldm.errors import UsageError
from ldm.tables import text_table
from pipelines.analysis.subjects import open_analysis
from pipelines.reproduce.plan import BuildPlan, Target, check_settings
from pipelines.reproduce.rows import check_images, is_main, make_model
from pipelines.reproduce.tables import find_tables
from pipelines.sample import sample_images
from pipelines.sampling.sample_folder import GRID


class Figure(NamedTuple):
    """A figure of the paper."""

    title: str
    rows: dict[str, str]
    """Its labels, and the presets of their rows."""
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
SAMPLES = 64
"""Samples in a figure."""


class Drawing(NamedTuple):
    """A drawn figure."""

    files: tuple[Path, ...]
    lines: list[str]
    """Its title, numbers and notes."""


def find_figure(word: str) -> str | None:
    """Find the figure that a word names (f5, F5, figure 5), if any."""
    match = re.fullmatch(r"f(?:ig(?:ure)?[ .-]*)?0*(\d)", word.strip().lower())
    name = f"f{match[1]}" if match else ""
    return name if name in FIGURES else None


def draw_figure(name: str, plan: BuildPlan) -> Drawing:
    """Train a figure's rows where needed, and draw it."""
    figure, protocol = FIGURES[name], plan.scale.protocol
    if figure.drawn_by == "scale" and not protocol.published:
        raise UsageError(f"{name} measures LPIPS: use --scale small or paper")
    targets = {label: _find_target(plan, preset) for label, preset in figure.rows.items()}
    check_settings(plan.settings, [*{type(t.training.recipe): None for t in targets.values()}])
    for target in targets.values():  # before hours of training the first of them
        check_images(target)
    models = {
        label: make_model(target, substitutes=not protocol.published).path
        for label, target in targets.items()
    }
    files, lines = _draw(name, models, next(iter(targets.values())), plan)
    return Drawing(files, [f"# {name.upper()}: {figure.title}", "", *lines])


def _find_target(plan: BuildPlan, preset: str) -> Target:
    [table] = find_tables(preset.partition("-")[0])
    return next(target for target in plan.targets(table) if target.row.preset == preset)


def _draw(
    name: str, models: dict[str, Path], target: Target, plan: BuildPlan
) -> tuple[tuple[Path, ...], list[str]]:
    given, kind = [f"{label}={path}" for label, path in models.items()], FIGURES[name].drawn_by
    folder, device = plan.folder(name), target.device
    if kind == "samples":
        [model] = models.values()
        protocol = plan.scale.protocol
        count, steps = min(SAMPLES, protocol.samples), protocol.sampler_steps
        seed = int(name == "f9")  # F9 shows other samples than F6
        sample_images(model, count, folder, seed, steps=steps, device=device)
        return (folder / GRID,), [f"{count} samples, seed {seed}"]
    if kind == "gradients":
        from pipelines.analysis.gradients import analyze_gradients

        found = analyze_gradients(given, folder) if is_main() else None
    elif kind == "scale":
        from pipelines.analysis.scale import analyze_scale

        found = analyze_scale(
            given, weights=plan.weights, device=device, force=plan.force, out=folder
        )
    else:
        from pipelines.analysis.features import analyze_features
        from pipelines.analysis.latents import analyze_latents

        analyze = analyze_latents if kind == "latents" else analyze_features
        opened = open_analysis(given, resolution=target.resolution, device=device)
        found = analyze(*opened, out=folder)
    if found is None:  # the main process reports it
        return (), []
    return found.files, [found.title, *text_table(found.header, found.rows), *found.notes]
