"""`ldm import` and `ldm export`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Force = Annotated[bool, typer.Option("--force", help="Write over what is there.")]


def import_model(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A diffusers AutoencoderKL folder, a CompVis .ckpt or .safetensors, a folder of "
            "`ldm export`, or a Hugging Face Hub repository (owner/name).",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.pt", help="The .pt to write.")],
    subfolder: Annotated[
        str | None, typer.Option(help="Where in SRC the autoencoder is, such as vae.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")
    ] = None,
    force: Force = False,
) -> None:
    """Make a model file of ours of a pretrained SD-VAE, ready for stage two.

    ldm import stabilityai/sd-vae-ft-mse sd-vae.pt
    """
    from pipelines.exchange import import_autoencoder

    _told(import_autoencoder(source, out, subfolder, revision, force))
    typer.echo(f"next: ldm train-diffusion --ae {out}")


def export_model(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[MODEL] OUT",
            help="A stage-one ckpt.pt or run folder (left out: the newest), and what to write: a "
            "folder, or for compvis a .safetensors or .ckpt.",
        ),
    ],
    form: Annotated[
        Literal["diffusers", "compvis", "hub"],
        typer.Option("--format", help="hub takes any autoencoder, the others an SD-VAE."),
    ] = "diffusers",
    scaling_factor: Annotated[
        float | None,
        typer.Option(
            help="diffusers: 1 ÷ the latents' standard deviation. Left out: what the model came "
            "with, else SD-VAE's 0.18215."
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write an autoencoder as other programs open it.

    ldm export runs/x/ckpt.pt my-vae --format diffusers
    """
    from ldm.errors import UsageError
    from pipelines.exchange import export_autoencoder

    if len(paths) > 2:
        raise UsageError(f"{len(paths)} paths: MODEL and OUT are two")
    *model, out = paths
    _told(export_autoencoder(out, form, model[0] if model else None, scaling_factor, force))
    if form == "diffusers":
        typer.echo(f"next: diffusers.AutoencoderKL.from_pretrained({str(out)!r})")
    elif form == "hub":
        typer.echo(f"next: hf upload OWNER/NAME {out}")


def _told(paths: list[Path]) -> None:
    for path in paths:
        typer.echo(f"wrote {path} ({_size(path)})")


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
