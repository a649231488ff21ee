"""`ldm train-ae` and `ldm train-diffusion`.

`ldm presets` and `ldm show`: what there is to train, and every setting of it.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.options import KINDS, STAGE_ONE, STAGE_TWO, find_preset, find_presets, say

Settings = Annotated[
    list[str] | None, typer.Argument(metavar="key=value …", help="Settings; see `ldm show`.")
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Folder of the run. Left out: the newest unfinished run of the very same settings, "
        "else a new one under runs/.",
    ),
]


def train_ae(
    preset: Annotated[
        str, typer.Argument(help="An autoencoder, or a row of the paper; see `ldm presets`.")
    ],
    settings: Settings = None,
    run: Folder = None,
) -> None:
    """Train an autoencoder (stage one). The same command resumes.

    ldm train-ae litevae-b data.source=data/ffhq256
    """
    from ldm.config import load_preset, resolve
    from pipelines.recipes import AutoencoderRecipe
    from pipelines.train_autoencoder import train_autoencoder

    kind, preset = find_preset(preset, STAGE_ONE)
    recipe = resolve(AutoencoderRecipe, load_preset(kind, preset), settings or [])
    folder = train_autoencoder(recipe, preset, run)
    say(f"done: {folder}/ckpt.pt", f"next: ldm train-diffusion --ae {folder}/ckpt.pt")


def train_diffusion(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PRESET] key=value …", help="A preset (left out: ffhq256), then settings."
        ),
    ] = None,
    ae: Annotated[
        Path | None,
        typer.Option(
            help="Stage one: a ckpt.pt, a run folder, a third-party SD-VAE, or a preset, such as "
            "dwt: its newest run. Left out: the newest of all."
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder of latents: encoded once, then trained from. Left out: on the fly."
        ),
    ] = None,
    run: Folder = None,
) -> None:
    """Train a latent diffusion model (stage two) on pixels encoded on the fly.

    The same command resumes.

    ldm train-diffusion --ae runs/x/ckpt.pt
    """
    from ldm.config import load_preset, resolve
    from ldm.errors import UsageError
    from pipelines.recipes import DiffusionRecipe, find_stage_one
    from pipelines.train_diffusion import train_diffusion

    words = list(words or [])
    preset = words.pop(0) if words and "=" not in words[0] else "ffhq256"
    _, preset = find_preset(preset, STAGE_TWO)
    if cache is not None:
        words.append(f"cache={json.dumps(str(cache))}")
    if ae is not None:
        if any(word.partition("=")[0].strip() == "autoencoder" for word in words):
            raise UsageError("the autoencoder is given twice: --ae and autoencoder= are the same")
        words.append(f"autoencoder={json.dumps(str(ae))}")
    recipe = resolve(DiffusionRecipe, load_preset("diffusion", preset), words)
    file = find_stage_one(recipe, preset, run)
    say(f"autoencoder: {file}")
    recipe = recipe.model_copy(update={"autoencoder": str(file)})
    folder = train_diffusion(recipe, preset, run)
    say(f"done: {folder}/ckpt.pt", f"next: ldm sample {folder} --n 50000")


def presets() -> None:
    """List the presets of both stages, and of the paper's tables."""
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
    settings: Annotated[list[str] | None, typer.Argument(metavar="key=value …")] = None,
) -> None:
    """Print the resolved settings of a preset, each with what it means."""
    from ldm.config import describe, load_preset, published, resolve
    from ldm.errors import UsageError
    from ldm.logbook import console

    found = find_presets(preset)
    if len(found) > 1 and settings:
        choices = " or ".join("/".join(one) for one in found)
        raise UsageError(f"'{preset}' is a preset of both stages: say {choices}")
    for kind, name in found:
        config = resolve(_recipe_class(kind), load_preset(kind, name), settings or [])
        console.print(f"# {kind}/{name}", style="bold", markup=False)
        if paper := published(kind, name):
            numbers = ", ".join(f"{key} {value}" for key, value in paper.items())
            console.print(f"# the paper: {numbers}", style="bold", markup=False)
        for line, doc in describe(config):
            console.print(f"{line:<44}", end="", markup=False)
            console.print(f" # {doc}" if doc else "", style="dim", markup=False)


def _recipe_class(kind: str) -> type:
    if kind in STAGE_ONE:
        from pipelines.recipes import AutoencoderRecipe

        return AutoencoderRecipe
    from pipelines.recipes import DiffusionRecipe

    return DiffusionRecipe
