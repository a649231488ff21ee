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
    from pipelines.autoencoder_recipe import AutoencoderRecipe
    from pipelines.train_autoencoder import train_autoencoder

    kind, preset = find_preset(preset, STAGE_ONE)
    recipe = resolve(AutoencoderRecipe, load_preset(kind, preset), settings or [])
    folder = train_autoencoder(recipe, preset, run)
    say(f"done: {folder}/ckpt.pt", f"next: ldm train-diffusion --ae {folder}/ckpt.pt")


def train_diffusion(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PRESET] key=value …", help="A preset (ffhq256) and settings."),
    ] = None,
    ae: Annotated[
        Path | None,
        typer.Option(help="Stage one: a ckpt.pt or run folder. Left out: the newest."),
    ] = None,
    run: Folder = None,
) -> None:
    """Train a latent diffusion model (stage two) on pixels encoded on the fly.

    The same command resumes.

    ldm train-diffusion --ae runs/x/ckpt.pt
    """
    from ldm.config import load_preset, resolve
    from ldm.errors import UsageError
    from ldm.run_folder import newest_run
    from pipelines.train_diffusion import DiffusionRecipe, train_diffusion

    words = list(words or [])
    preset = words.pop(0) if words and "=" not in words[0] else "ffhq256"
    _, preset = find_preset(preset, STAGE_TWO)
    named = any(word.partition("=")[0].strip() == "autoencoder" for word in words)
    if named and ae is not None:
        raise UsageError("the autoencoder is given twice: --ae and autoencoder= are the same")
    if not named:
        ae = ae or _carried_on(preset, words) or newest_run("autoencoder")
        file = ae / "ckpt.pt" if (ae / "ckpt.pt").is_file() else ae
        say(f"autoencoder: {file}")
        words.append(f"autoencoder={json.dumps(str(file))}")
    recipe = resolve(DiffusionRecipe, load_preset("diffusion", preset), words)
    folder = train_diffusion(recipe, preset, run)
    say(f"done: {folder}/ckpt.pt", f"next: ldm sample {folder} --n 50000")


def _carried_on(preset: str, words: list[str]) -> Path | None:
    """The autoencoder of the newest unfinished run of the very same settings: the same command goes
    on with it, whatever has been trained since."""
    from ldm.config import load_preset, resolve
    from ldm.run_folder import differences, read_config, unfinished_runs
    from pipelines.train_diffusion import DiffusionRecipe

    for folder in unfinished_runs("diffusion"):
        path = (read_config(folder) or {}).get("autoencoder")
        if not isinstance(path, str):  # a folder that was damaged, or is not ours
            continue
        given = [*words, f"autoencoder={json.dumps(path)}"]
        recipe = resolve(DiffusionRecipe, load_preset("diffusion", preset), given)
        if not differences(folder, recipe):
            return Path(path)
    return None
