"""`ldm train-ae` and `ldm train-diffusion`."""

from pathlib import Path
from typing import Annotated

import typer

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
    preset: Annotated[str, typer.Argument(help="An autoencoder preset; see `ldm presets`.")],
    settings: Settings = None,
    run: Folder = None,
) -> None:
    """Train an autoencoder (stage one). The same command resumes.

    ldm train-ae litevae-b data.source=data/ffhq256
    """
    from ldm.config import load_preset, resolve
    from pipelines.train_autoencoder import AutoencoderRecipe, train_autoencoder

    recipe = resolve(AutoencoderRecipe, load_preset("ae", preset), settings or [])
    folder = train_autoencoder(recipe, preset, run)
    _say(f"{folder}/ckpt.pt", f"ldm train-diffusion --ae {folder}/ckpt.pt")


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
    from ldm.run_folder import newest_run
    from pipelines.train_diffusion import DiffusionRecipe, train_diffusion

    words = list(words or [])
    preset = words.pop(0) if words and "=" not in words[0] else "ffhq256"
    if ae is None:
        ae = newest_run("autoencoder") / "ckpt.pt"
        typer.echo(f"autoencoder: {ae}")
    words.append(f"autoencoder={str(ae)!r}")
    recipe = resolve(DiffusionRecipe, load_preset("diffusion", preset), words)
    folder = train_diffusion(recipe, preset, run)
    _say(f"{folder}/ckpt.pt", f"ldm sample {folder} --n 50000")


def _say(made: str, then: str) -> None:
    import os

    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"done: {made}\nnext: {then}")
