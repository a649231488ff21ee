"""`ldm import` and `ldm export`."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from ldm.cli import options
from ldm.errors import UsageError

Force = Annotated[bool, Option("--force", help="Overwrite existing files.")]
Diffusion = Annotated[
    bool,
    Option(
        "--diffusion",
        help="Import the whole latent diffusion model of a CompVis checkpoint, a DiT checkpoint "
        "with its --ae, or a diffusers pipeline folder (unet/ or transformer/, vae/ or vqvae/, "
        "scheduler/), not only an autoencoder.",
    ),
]
OfDiT = Annotated[
    str | None,
    Option(help="With --diffusion: autoencoder of a DiT checkpoint, a path or a Hub repository."),
]
DenoiserType = Annotated[
    str | None,
    Option(
        help="With --diffusion, DiT: discrete, or flow, for velocities along SiT's linear path. "
        "Default: discrete; flow for LightningDiT's options."
    ),
]
HeadWidth = Annotated[
    int | None,
    Option(help="With --diffusion, CompVis: channels per head (num_head_channels). Default: 32."),
]
Heads = Annotated[
    int | None,
    Option(help="With --diffusion, a file: attention heads (num_heads in CompVis' yaml)."),
]


def import_model(
    source: Annotated[
        str,
        Argument(
            metavar="SRC",
            help="A diffusers autoencoder folder, a CompVis .ckpt or .safetensors, a folder of "
            "`ldm export`, or a Hugging Face Hub repository (owner/name).",
        ),
    ],
    out: Annotated[Path, Argument(metavar="OUT.pt", help="The .pt file to write.")],
    subfolder: Annotated[
        str | None, Option(help="Subfolder of SRC with the autoencoder, such as vae.")
    ] = None,
    revision: Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")] = None,
    diffusion: Diffusion = False,
    resolution: Annotated[
        str | None,
        Option(
            metavar="R|HxW", help="With --diffusion: image size. Default: the one in SRC, or 256."
        ),
    ] = None,
    head_width: HeadWidth = None,
    heads: Heads = None,
    scale_factor: Annotated[
        float | None,
        Option(help="With --diffusion: factor of the latents. Default: the one in SRC."),
    ] = None,
    ae: OfDiT = None,
    denoiser: DenoiserType = None,
    force: Force = False,
) -> None:
    """Convert a pretrained SD-VAE or latent diffusion model to this toolkit's format.

    ldm import stabilityai/sd-vae-ft-mse sd-vae.pt

    ldm import lsun-churches.ckpt churches.pt --diffusion --heads 8

    ldm import DiT-XL-2-256x256.pt dit.pt --diffusion --ae stabilityai/sd-vae-ft-ema
    """
    if diffusion:
        from pipelines.exchange import import_diffusion

        _refuse("applies to autoencoders only", subfolder=subfolder, revision=revision)
        size = options.parse_size("resolution", resolution)
        how = (size, head_width, heads, scale_factor, force, ae, denoiser)
        written, notes = import_diffusion(source, out, *how)
        return _print(written, *notes, options.next_step("ldm sample {}", out))
    from pipelines.exchange import import_autoencoder

    _refuse(
        "needs --diffusion", resolution=resolution, head_width=head_width, heads=heads,
        scale_factor=scale_factor, ae=ae, denoiser=denoiser,
    )  # fmt: skip
    written = import_autoencoder(source, out, subfolder, revision, force)
    _print(written, options.next_step("ldm train-diffusion --ae {}", out))


def export_model(
    paths: Annotated[
        list[Path],
        Argument(
            metavar="[MODEL] OUT",
            help="MODEL: a ckpt.pt or run folder of stage one, or of stage two with --format unet "
            "or transformer (default: the newest run). OUT: a folder; for compvis a .safetensors "
            "or .ckpt file.",
        ),
    ],
    form: Annotated[
        Literal["diffusers", "compvis", "hub", "unet", "transformer"],
        Option(
            "--format",
            help="diffusers: an SD-VAE. compvis: an SD-VAE or VQ model. hub: any autoencoder. "
            "unet, transformer: the network of a stage-two model, as a diffusers UNet2DModel or "
            "DiTTransformer2DModel.",
        ),
    ] = "diffusers",
    scaling_factor: Annotated[
        float | None,
        Option(
            help="For diffusers: 1 / standard deviation of the latents. Default: as imported, "
            "or SD-VAE's 0.18215."
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write a model in the format of another library.

    ldm export runs/x/ckpt.pt my-vae --format diffusers

    ldm export runs/y/ckpt.pt my-unet --format unet
    """
    if len(paths) > 2:
        raise UsageError(f"expected [MODEL] OUT, got {len(paths)} paths")
    *model, out = paths
    named = model[0] if model else None
    if form == "unet" or form == "transformer":
        from pipelines.exchange import export_network

        _refuse("needs --format diffusers", scaling_factor=scaling_factor)
        theirs = "UNet2DModel" if form == "unet" else "DiTTransformer2DModel"
        return _print(
            export_network(out, named, force, form),
            f"{out}/ldm.json documents the timestep input, the prediction type, and the mean and "
            "standard deviation of the latents",
            f"next: diffusers.{theirs}.from_pretrained({str(out)!r})",
        )
    from pipelines.exchange import export_autoencoder

    usage = {
        "diffusers": [f"next: diffusers.AutoencoderKL.from_pretrained({str(out)!r})"],
        "hub": [options.next_step("hf upload OWNER/NAME {}", out)],
    }
    _print(export_autoencoder(out, form, named, scaling_factor, force), *usage.get(form, []))


def _refuse(why: str, **options: object) -> None:
    """Refuse options that do not apply and were given."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"--{name.replace('_', '-')} {why}")


def _print(paths: list[Path], *notes: str) -> None:
    for path in paths:
        size = path.stat().st_size
        many = f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
        options.echo(f"wrote {path} ({many})")
    for note in notes:
        options.echo(note)
