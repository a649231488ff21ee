"""Train variants of LiteVAE and SD-VAE over several seeds, and compare how fast they learn.

    python -m benchmarks.learning photographs/ --held-out 100 --steps 2000
    python -m benchmarks.learning photographs/ --only sdvae --only plus --share 1/2

All have the same decoder and loss, and in each seed the same images in the same order. Every
training is a run of its own in --work, and the same command resumes. `--share 1/2` and
`--share 2/2` divide the runs between two processes. --channels is the base width of SD-VAE's
encoder and of the decoder, 128 in the paper; LiteVAE's is a quarter of it. More settings follow the
images: `'phases=[{resolution: 256, steps: 50000}]' batch_size=16`.

PSNR is that of the averaged weights on held-out images. The time of a training step, without
loading images, is measured at the end, interleaved. Writes <name>.json, <name>.md and <name>.png
to --out, of all variants and seeds that are finished, or with --no-training of those that are so
far. What <name>.json holds is not trained again, even where --work is gone.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from benchmarks.comparison import add_out, describe_machine, make_parser, spread
from ldm.charts import drawing, line_style
from ldm.device import resolve_device, resolve_precision, time_interleaved
from ldm.distributed import make_accelerator
from ldm.errors import Interrupted, LdmError, UsageError, listed
from ldm.files import write_atomically, write_json
from ldm.logbook import read_rows
from ldm.records import read_tree, schema
from ldm.run import Run
from ldm.run_folder import differences, is_finished
from ldm.tables import markdown_table
from pipelines.recipes import AutoencoderRecipe, load_recipe
from pipelines.train_autoencoder import (
    AutoencoderState,
    load_perceptual,
    train_autoencoder,
    train_step,
)

LITEVAE_GROUPS = ["encoder.extractor.group_channels=4", "encoder.aggregator.group_channels=4"]
SD_VAE_GROUPS = ["encoder.group_channels=4"]
LOGVAR = ["init.logvar=-5"]
GAIN = ["init.mean_gain=6"]
SHORTCUT = ["encoder.shortcut=wavelet"]
WHOLE = ["encoder.reduction=space_to_depth"]
VARIANTS = {
    "sdvae": ("sdvae-quarter", []),
    "sdvae, 4 a group": ("sdvae-quarter", SD_VAE_GROUPS),
    "sdvae, 4 a group, log-variance −5": ("sdvae-quarter", [*SD_VAE_GROUPS, *LOGVAR]),
    "sdvae, 4 a group, mean × 4": ("sdvae-quarter", [*SD_VAE_GROUPS, "init.mean_gain=4"]),
    "litevae": ("litevae-b-quarter", []),
    "litevae, 4 a group": ("litevae-b-quarter", LITEVAE_GROUPS),
    "litevae, log-variance −5": ("litevae-b-quarter", LOGVAR),
    "litevae, 4 a group, log-variance −5": ("litevae-b-quarter", [*LITEVAE_GROUPS, *LOGVAR]),
    "litevae, mean × 6": ("litevae-b-quarter", GAIN),
    "litevae, mean × 6, log-variance −5": ("litevae-b-quarter", [*GAIN, *LOGVAR]),
    "litevae, longer warm-up": ("litevae-b-quarter", ["warmup_images=4000"]),
    "litevae, shortcut": ("litevae-b-quarter", SHORTCUT),
    "litevae, shortcut, log-variance −5": ("litevae-b-quarter", [*SHORTCUT, *LOGVAR]),
    "litevae, space-to-depth": ("litevae-b-quarter", WHOLE),
    "plus": ("litevae-b-quarter", [*LITEVAE_GROUPS, *SHORTCUT, *LOGVAR]),
    "plus, mean × 6": ("litevae-b-quarter", [*LITEVAE_GROUPS, *SHORTCUT, *LOGVAR, *GAIN]),
    "plus, space-to-depth": ("litevae-b-quarter", [*LITEVAE_GROUPS, *SHORTCUT, *LOGVAR, *WHOLE]),
}
"""Preset and settings of each; `plus` is that of the presets litevae-*-plus."""

Curve = dict[int, float]
"""Held-out PSNR by step."""
Curves = dict[str, dict[int, Curve]]
"""By variant and seed."""
Seed = Step = Annotated[str, Field(pattern=r"^\d+$")]
RESULTS = schema(
    conditions=dict[str, Any],
    variants=dict[str, list[Any]],
    psnr=dict[str, dict[Seed, dict[Step, float]]],
)


def main() -> None:
    """Parse, train this process's share, write the results of all that is finished."""
    parser = make_parser(__doc__)
    parser.add_argument("images", help="folder of images, zip or shards")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of all recipes")
    parser.add_argument("--held-out", type=int, default=100, help="images that are only measured")
    parser.add_argument("--only", action="append", choices=VARIANTS, help="to train; repeatable")
    parser.add_argument("--seeds", type=int, default=3, help="to train: 0 to SEEDS − 1")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100, help="steps between measurements")
    parser.add_argument("--latent-channels", type=int, default=12)
    parser.add_argument("--channels", type=int, default=32, help="base width of the decoder")
    parser.add_argument("--share", default="1/1", metavar="I/N", help="runs of this process")
    parser.add_argument("--no-training", action="store_true", help="write what is finished")
    parser.add_argument("--name", default="learning", help="of the files written")
    add_out(parser)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/learning"), help="folder of the trainings"
    )
    given = parser.parse_intermixed_args()
    try:
        share = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", given.share)
        if share is None or int(share[1]) > int(share[2]):
            raise UsageError(
                f"--share {given.share}: give 1/2 for the first half, 2/2 for the other"
            )
        if given.every > given.steps:
            raise UsageError(f"--every {given.every} is more than --steps {given.steps}")
        if given.seeds < 1:
            raise UsageError(f"--seeds {given.seeds}: train one or more")
        cells = [(name, seed) for seed in range(given.seeds) for name in given.only or VARIANTS]
        kept = kept_curves(given)
        for name, seed in cells[int(share[1]) - 1 :: int(share[2])]:
            if not (given.no_training or seed in kept.get(name, {})):
                train_autoencoder(recipe_of(given, name, seed), folder=folder_of(given, name, seed))
        curves = finished_curves(given)
        left = sum(seed not in curves.get(name, {}) for name, seed in cells)
        advice = "omit --no-training" if given.no_training else "run the other share"
        if left:
            print(f"{left} of {len(cells)} trainings are not finished: {advice}")
        if curves and (given.no_training or not left):
            write_results(given, curves)
    except (Interrupted, LdmError) as error:
        sys.exit(str(error))


def recipe_of(given: argparse.Namespace, name: str, seed: int) -> AutoencoderRecipe:
    """The recipe of a variant: the preset's, at the sizes that were asked for."""
    preset, settings = VARIANTS[name]
    width, litevae = given.channels, given.channels // 4
    widths = {
        "sdvae-quarter": [f"encoder.channels={width}"],
        "litevae-b-quarter": [
            f"encoder.extractor.channels={litevae}", f"encoder.aggregator.channels={litevae}",
        ],
    }  # fmt: skip
    return load_recipe("ae", preset, [
        f"data.source={json.dumps(given.images)}", f"data.held_out={given.held_out}",
        "data.workers=0",
        f"phases=[{{resolution: 64, steps: {given.steps}}}]",
        f"latent_channels={given.latent_channels}", f"decoder.channels={width}",
        f"run={{seed: {seed}, validate_every_steps: {given.every}, save_every_steps: 250, "
        "keep_states: 1, log_every_steps: 50}",
        *widths[preset], *settings, *given.settings,
    ])  # fmt: skip


def folder_of(given: argparse.Namespace, name: str, seed: int) -> Path:
    """The folder of a variant's run."""
    file = name.replace(", ", "+").replace(" × ", "-").replace(" ", "-").replace("−", "minus-")
    size = f"{given.channels}-channels-{given.latent_channels}-latents-{given.steps}-steps"
    return Path(given.work) / size / f"{file}-seed-{seed}"


# -------------------------------------------------------------------------------- results
def conditions(given: argparse.Namespace) -> dict[str, Any]:
    """The settings that all trainings of a page share."""
    run = recipe_of(given, "litevae", 0).run
    return {
        "precision": resolve_precision(run.precision, resolve_device(run.device)),
        "images": given.images, "held_out": given.held_out, "steps": given.steps,
        "every": given.every, "latent_channels": given.latent_channels,
        "channels": given.channels, "settings": sorted(given.settings),
    }  # fmt: skip


def kept_curves(given: argparse.Namespace) -> Curves:
    """The curves in the file of results, if there is one; an LdmError if it is of others."""
    path, advice = given.out / f"{given.name}.json", "give another --name"
    tree = read_tree(path, RESULTS, advice)
    if tree is None:
        return {}
    ours, theirs = conditions(given), tree["conditions"]
    ours |= {name: list(VARIANTS.get(name, ())) for name in tree["variants"]}
    theirs |= tree["variants"]
    if changed := [key for key in ours if ours[key] != theirs.get(key)]:
        raise LdmError(f"{path} is of other trainings ({', '.join(changed)}): {advice}")
    return {
        name: {
            int(seed): measured({int(step): psnr for step, psnr in curve.items()}, given, path)
            for seed, curve in of_seeds.items()
        }
        for name, of_seeds in tree["psnr"].items()
    }


def finished_curves(given: argparse.Namespace) -> Curves:
    """The curves in the file of results, and those of the runs that have finished since."""
    kept, curves = kept_curves(given), {}
    for name in VARIANTS:
        found = kept.get(name, {})
        for seed in range(given.seeds):
            if seed not in found and is_finished(folder_of(given, name, seed)):
                found[seed] = curve_of(given, name, seed)
        if found:
            curves[name] = dict(sorted(found.items()))
    return curves


def curve_of(given: argparse.Namespace, name: str, seed: int) -> Curve:
    """Read a finished run's held-out PSNR by step."""
    folder, recipe = folder_of(given, name, seed), recipe_of(given, name, seed)
    if changed := differences(folder, recipe):
        raise LdmError(f"{folder} is of other settings ({listed(changed)}): give another --work")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "val_psnr" in row]
    curve = {round(row["images_seen"] / recipe.batch_size): row["val_psnr"] for row in rows}
    return measured(curve, given, folder)


def measured(curve: Curve, given: argparse.Namespace, path: Path) -> Curve:
    """The points of a curve at --every step; an LdmError if one is missing."""
    steps = range(given.every, given.steps + 1, given.every)
    if missing := [step for step in steps if step not in curve]:
        raise LdmError(f"{path} has no PSNR at step {missing[0]}: give --every as it was trained")
    return {step: curve[step] for step in steps}


def write_results(given: argparse.Namespace, curves: Curves) -> None:
    """Write the numbers, the table and the curves."""
    recipe = recipe_of(given, next(iter(curves)), 0)
    run = Run(given.work, recipe.run, make_accelerator(recipe.run.device))
    seconds = seconds_a_step({name: recipe_of(given, name, 0) for name in curves}, run)
    words = [word for word in sys.argv[1:] if word != "--no-training"]
    facts = {
        "machine": describe_machine(run.device, run.precision),
        "command": shlex.join(["python", "-m", "benchmarks.learning", *words]),
        "conditions": conditions(given),
        "variants": {name: VARIANTS[name] for name in curves},
        "psnr": curves,
        "seconds_a_step": seconds,
    }
    page = page_of(given, recipe, curves, seconds, facts)
    draw(given.out / f"{given.name}.png", given, curves, seconds)
    write_atomically(given.out / f"{given.name}.md", page.encode())
    write_json(given.out / f"{given.name}.json", facts)
    print(page)


def seconds_a_step(recipes: Mapping[str, AutoencoderRecipe], run: Run) -> dict[str, float]:
    """Time a training step of each variant, on the same images."""
    calls = {}
    for name, recipe in recipes.items():
        side, generator = recipe.phases[-1].resolution, torch.Generator().manual_seed(0)
        images = torch.rand(recipe.batch_size, 3, side, side, generator=generator) * 2 - 1
        state = AutoencoderState(recipe, run, load_perceptual(recipe))
        state.prepare(run)
        calls[name] = partial(step, run, state, run.place(images))
    return time_interleaved(calls, 10, run.device)


def step(run: Run, state: AutoencoderState, images: Tensor) -> None:
    """Take a step, with the discriminator if the recipe has one."""
    train_step(run, state, images, list(range(len(images))), ramp=1.0)
    state.advance()


def page_of(
    given: argparse.Namespace,
    recipe: AutoencoderRecipe,
    curves: Curves,
    seconds: Mapping[str, float],
    facts: Mapping[str, Any],
) -> str:
    """Format the page: PSNR at a few steps, with its spread over seeds, and time."""
    last = recipe.phases[-1]
    shown = [round(last.steps * share) for share in (0.05, 0.1, 0.2, 0.5, 1.0)]
    shown = sorted({max(given.every, step // given.every * given.every) for step in shown})
    rows = [
        (
            name, *(spread([c[step] for c in of_seeds.values()]) for step in shown),
            f"{len(of_seeds)}", f"{1000 * seconds[name]:.0f}",
        )
        for name, of_seeds in curves.items()
    ]  # fmt: skip
    header = ("encoder", *(f"{step:,} steps" for step in shown), "seeds", "ms a step")
    machine = ", ".join(f"{key} {value}" for key, value in facts["machine"].items())
    return "\n".join([
        f"# How fast encoders learn: {given.latent_channels} latent channels", "",
        f"Held-out PSNR in dB, mean ± standard deviation over seeds. {last.steps:,} steps of "
        f"{recipe.batch_size} images of {last.resolution}², in {facts['conditions']['precision']}; "
        f"the same decoder for all, base width {given.channels}.", "",
        *markdown_table(header, rows), "",
        f"![Held-out PSNR against steps and seconds]({given.name}.png)", "",
        f"Steps were timed on: {machine}.", "", f"    {facts['command']}", "",
    ])  # fmt: skip


def draw(
    path: Path,
    given: argparse.Namespace,
    curves: Curves,
    seconds: Mapping[str, float],
) -> None:
    """Draw the means over seeds, against steps and seconds, in bands of their extremes."""
    title = "Held-out PSNR while training, dB"
    under = f"{given.latent_channels} latent channels; mean over seeds, and the range of all"
    with drawing(path, title, under, 3.6 + 0.15 * len(curves)) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for i, (name, of_seeds) in enumerate(curves.items()):
            steps = list(next(iter(of_seeds.values())))
            values = [[curve[step] for curve in of_seeds.values()] for step in steps]
            style = line_style(i) | {"marker": None}
            for panel, unit in zip(axes, (1.0, seconds[name]), strict=True):
                x = [unit * step for step in steps]
                panel.plot(x, [fmean(each) for each in values], label=name, **style)
                panel.fill_between(
                    x, [min(each) for each in values], [max(each) for each in values],
                    color=style["color"], alpha=0.15, linewidth=0,
                )  # fmt: skip
        for panel, label in zip(axes, ("steps", "seconds of training"), strict=True):
            panel.set_xlabel(label)
            panel.grid()
        lines, names = axes[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=2)


if __name__ == "__main__":
    main()
