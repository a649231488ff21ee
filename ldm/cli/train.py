"""`ldm train-ae`, `ldm train-diffusion`, `ldm ema`; `ldm presets` and `ldm show`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.options import (
    KINDS,
    STAGE_ONE,
    STAGE_TWO,
    RunFolder,
    Settings,
    add_autoencoder,
    find_preset,
    find_presets,
    resolve_recipe,
    say,
)
from ldm.errors import UsageError


def train_ae(
    preset: Annotated[
        str, typer.Argument(help="An autoencoder or a row of the paper's tables: `ldm presets`.")
    ],
    settings: Settings = None,
    run: RunFolder = None,
) -> None:
    """Train an autoencoder (stage one). The same command resumes an interrupted run.

    ldm train-ae litevae-b data.source=data/ffhq256
    """
    from pipelines.train_autoencoder import train_autoencoder

    kind, preset = find_preset(preset, STAGE_ONE)
    folder = train_autoencoder(resolve_recipe(kind, preset, settings or []), preset, run)
    say(f"done: {folder}/ckpt.pt", f"next: ldm train-diffusion --ae {folder}/ckpt.pt")


def train_diffusion(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PRESET] key=value …", help="A preset (default: ffhq256), then settings."
        ),
    ] = None,
    ae: Annotated[
        Path | None,
        typer.Option(
            help="Stage one: a ckpt.pt, a run folder, a pretrained SD-VAE, or the name of a preset "
            "for its newest run. Default: the newest run of stage one."
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Encode the data once, into this folder. Default: encode on the fly."),
    ] = None,
    run: RunFolder = None,
) -> None:
    """Train a latent diffusion model (stage two) on images that are encoded on the fly.

    The same command resumes an interrupted run.

    ldm train-diffusion --ae runs/x/ckpt.pt
    """
    from pipelines.recipes import find_stage_one
    from pipelines.train_diffusion import train_diffusion

    words = list(words or [])
    preset = words.pop(0) if words and "=" not in words[0] else "ffhq256"
    _, preset = find_preset(preset, STAGE_TWO)
    if cache is not None:
        words.append(f"cache={json.dumps(str(cache))}")
    add_autoencoder(words, ae)
    recipe = resolve_recipe("diffusion", preset, words)
    file = find_stage_one(recipe, preset, run)
    say(f"autoencoder: {file}")
    recipe = recipe.model_copy(update={"autoencoder": str(file)})
    folder = train_diffusion(recipe, preset, run)
    say(f"done: {folder}/ckpt.pt", f"next: ldm sample {folder} --n 50000")


def ema(
    std: Annotated[
        float,
        typer.Option(
            help="Width of the average as a fraction of the training, such as 0.07; at most 0.2886."
        ),
    ],
    run: Annotated[
        Path | None,
        typer.Argument(help="A stage-two run folder. Default: the newest with snapshots."),
    ] = None,
    at: Annotated[
        int | None,
        typer.Option(help="Average up to the snapshot at this many images. Default: the newest."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The .pt to write. Default: ckpt-ema<STD>.pt in the run folder."),
    ] = None,
) -> None:
    """Compute an EMA of any width after training, from the snapshots of a run (EDM2).

    The run must have been trained with ema_stds, such as ema_stds=[0.05, 0.1].

    ldm ema --std 0.07
    """
    from ldm.ema import synthesize_ema
    from ldm.run_folder import newest_run

    if run is None:
        run = newest_run("diffusion", needs="ema")
        say(f"run: {run}")
    path = synthesize_ema(run, std, at, out)
    say(f"wrote {path}", f"next: ldm sample {path}")


def presets() -> None:
    """List the presets of both stages and of the paper's tables."""
    from rich.table import Table

    from ldm.config import list_presets, preset_summary
    from ldm.logbook import console

    for kind, title in KINDS.items():
        table = Table(title=title, title_justify="left", box=None, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for name in list_presets(kind):
            table.add_row(name, preset_summary(kind, name))
        console.print(table, "")


def show(
    preset: Annotated[str, typer.Argument(help="A preset, such as litevae-b or diffusion/tiny.")],
    settings: Settings = None,
) -> None:
    """Print every setting of a preset with its value and meaning.

    ldm show litevae-b batch_size=32
    """
    from ldm.config import describe, published
    from ldm.logbook import console

    found = find_presets(preset)
    if len(found) > 1 and settings:
        choices = " or ".join("/".join(one) for one in found)
        raise UsageError(f"'{preset}' is a preset of both stages: use {choices}")
    for kind, name in found:
        config = resolve_recipe(kind, name, settings or [])
        console.print(f"# {kind}/{name}", style="bold", markup=False)
        if paper := published(kind, name):
            numbers = ", ".join(f"{key} {value}" for key, value in paper.items())
            console.print(f"# the paper: {numbers}", style="bold", markup=False)
        for line, doc in describe(config):
            console.print(f"{line:<44}", end="", markup=False)
            console.print(f" # {doc}" if doc else "", style="dim", markup=False)
