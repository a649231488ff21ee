"""`ldm train-ae` and `ldm train-diffusion`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.names import STAGE_ONE, STAGE_TWO, find_preset
from ldm.cli.say import say

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
    from pipelines.train_autoencoder import train_autoencoder
    from pipelines.training.autoencoder_recipe import AutoencoderRecipe

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
    from pipelines.train_diffusion import train_diffusion
    from pipelines.training.diffusion_recipe import DiffusionRecipe
    from pipelines.training.stage_one import find_stage_one

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
