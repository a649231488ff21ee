"""`ldm import` and `ldm export`.

`ldm ema`.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ldm.cli.options import say

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
    diffusion: Annotated[
        bool,
        typer.Option(
            "--diffusion",
            help="Take the whole latent diffusion model, not its autoencoder alone, of a CompVis "
            "checkpoint or a diffusers pipeline's folder (unet/, vae/, scheduler/).",
        ),
    ] = False,
    resolution: Annotated[
        int | None,
        typer.Option(help="--diffusion: side of its images. Left out: what SRC says, else 256."),
    ] = None,
    head_width: Annotated[
        int | None,
        typer.Option(
            help="--diffusion, CompVis: channels of an attention head, num_head_channels in its "
            "yaml. Left out: 32."
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(help="--diffusion, CompVis: attention heads instead, num_heads in its yaml."),
    ] = None,
    scale_factor: Annotated[
        float | None,
        typer.Option(
            help="--diffusion: what its latents are multiplied by. Left out: what SRC says."
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Convert a pretrained SD-VAE or latent diffusion model to our format.

    ldm import stabilityai/sd-vae-ft-mse sd-vae.pt

    ldm import lsun-churches.ckpt churches.pt --diffusion --heads 8
    """
    if diffusion:
        from pipelines.exchange.diffusion import import_diffusion

        _refuse_given("is for autoencoders", subfolder=subfolder, revision=revision)
        done = import_diffusion(source, out, resolution, head_width, heads, scale_factor, force)
        _told(done.paths)
        for line in (*done.notes, f"next: ldm sample {out}"):
            typer.echo(line)
        return
    from pipelines.exchange.autoencoders import import_autoencoder

    _refuse_given(
        "goes with --diffusion", resolution=resolution, head_width=head_width, heads=heads,
        scale_factor=scale_factor,
    )  # fmt: skip
    _told(import_autoencoder(source, out, subfolder, revision, force))
    typer.echo(f"next: ldm train-diffusion --ae {out}")


def export_model(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[MODEL] OUT",
            help="A ckpt.pt or run folder (left out: the newest), of stage one, or for unet of "
            "stage two; and what to write: a folder, or for compvis a .safetensors or .ckpt.",
        ),
    ],
    form: Annotated[
        Literal["diffusers", "compvis", "hub", "unet"],
        typer.Option(
            "--format",
            help="hub takes any autoencoder, diffusers and compvis an SD-VAE; unet a stage-two "
            "model's network, as a diffusers UNet2DModel.",
        ),
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
    """Write a model as other programs open it.

    ldm export runs/x/ckpt.pt my-vae --format diffusers

    ldm export runs/y/ckpt.pt my-unet --format unet
    """
    from ldm.errors import UsageError

    if len(paths) > 2:
        raise UsageError(f"{len(paths)} paths: MODEL and OUT are two")
    *model, out = paths
    named = model[0] if model else None
    if form == "unet":
        from pipelines.exchange.diffusion import export_network

        _refuse_given("is for --format diffusers", scaling_factor=scaling_factor)
        _told(export_network(out, named, force))
        typer.echo(
            f"{out}/ldm.json says what the network takes as its timestep, how its answer is read, "
            "and the latents' mean and standard deviation"
        )
        typer.echo(f"next: diffusers.UNet2DModel.from_pretrained({str(out)!r})")
        return
    from pipelines.exchange.autoencoders import export_autoencoder

    _told(export_autoencoder(out, form, named, scaling_factor, force))
    if form == "diffusers":
        typer.echo(f"next: diffusers.AutoencoderKL.from_pretrained({str(out)!r})")
    elif form == "hub":
        typer.echo(f"next: hf upload OWNER/NAME {out}")


def _refuse_given(why: str, **options: object) -> None:
    """Refuse options that do not go with what is asked for."""
    from ldm.errors import UsageError

    for name, value in options.items():
        if value is not None:
            raise UsageError(f"--{name.replace('_', '-')} {why}: leave it out")


def _told(paths: list[Path]) -> None:
    for path in paths:
        typer.echo(f"wrote {path} ({_size(path)})")


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def ema(
    std: Annotated[
        float,
        typer.Option(
            help="Width of the average as a share of the run, such as 0.07; at most 0.2886."
        ),
    ],
    run: Annotated[
        Path | None,
        typer.Argument(help="The folder of a stage-two run. Left out: the newest with snapshots."),
    ] = None,
    at: Annotated[
        int | None,
        typer.Option(help="Images seen at the snapshot it ends with. Left out: the newest."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The .pt to write. Left out: ckpt-ema<STD>.pt in the run's folder."),
    ] = None,
) -> None:
    """Average a model's weights over more or less of its training, after it.

    A run with ema_stds=[0.05, 0.1] has kept what is needed.

    ldm ema --std 0.07
    """
    from ldm.run_folder import newest_run
    from pipelines.ema import synthesize_ema

    if run is None:
        run = newest_run("diffusion", needs="ema")
        say(f"run: {run}")
    path = synthesize_ema(run, std, at, out)
    say(f"wrote {path}", f"next: ldm sample {path}")
