"""`ldm analyze`: the paper's analyses of autoencoders, as figures and tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from ldm.cli import options

if TYPE_CHECKING:
    from pipelines.analysis.subjects import Analysis

app = typer.Typer(
    no_args_is_help=True,
    help="Analyze autoencoders as the paper does; each command writes a PNG and a CSV.",
)

Models = Annotated[
    list[str] | None,
    Argument(
        metavar="[NAME=]MODEL …",
        help="Stage-one files, run folders or pretrained autoencoders to compare; NAME is the "
        "label in the legend. Default: the newest run.",
    ),
]
Out = Annotated[Path | None, Option(help="Folder. Default: analysis/ next to the first model.")]


@app.command()
def mmd(
    models: Models = None,
    data: options.Data = None,
    n: Annotated[int, Option(help="Images per draw, and as many samples of N(0, I).")] = 1000,
    sigmas: Annotated[str, Option(help="Widths of the RBF kernel.")] = "25,50,100,250,500",
    draws: Annotated[int, Option(help="Repetitions, for mean ± std.")] = 5,
    latents: Annotated[
        Literal["scaled", "standardised", "raw"],
        Option(
            help="scaled: divided by one standard deviation, as for stage two. standardised: each "
            "channel to mean 0 and std 1. raw: as encoded."
        ),
    ] = "scaled",
    split: options.Split = "val",
    resolution: options.Resolution = None,
    batch_size: options.BatchSize = 16,
    device: options.Device = "auto",
    out: Out = None,
) -> None:
    """Measure the MMD between latents and Gaussian noise, with RBF kernels (Table 6).

    ldm analyze mmd LiteVAE=runs/a VAE=runs/b --data data/ffhq256
    """
    from pipelines.analysis.mmd import MmdSettings, analyze_mmd
    from pipelines.analysis.subjects import open_analysis

    settings = MmdSettings(n, options.parse_numbers("sigmas", sigmas), draws, latents)
    size = options.parse_size("resolution", resolution)
    opened = open_analysis(models or (), data, split, size, device, batch_size)
    _print(analyze_mmd(*opened, settings, out))


@app.command()
def scale(
    models: Models = None,
    data: options.Data = None,
    resolutions: Annotated[
        str | None,
        Option(
            help="Image sizes in pixels. Default: 32,64,128,256,512, up to the size of the images."
        ),
    ] = None,
    split: options.Split = "val",
    fid: Annotated[bool, Option(help="Measure rFID if Inception is available.")] = True,
    weights: options.InceptionWeights = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 16,
    force: options.Force = False,
    device: options.Device = "auto",
    out: Out = None,
) -> None:
    """Measure reconstructions from 32² to 512² (Figures 5 and 8).

    ldm analyze scale GroupNorm=runs/a SMC=runs/b --data photos --split all
    """
    from pipelines.analysis.scale import analyze_scale

    sizes = None if resolutions is None else options.parse_numbers("resolutions", resolutions, int)
    found = analyze_scale(
        models or (), data, sizes, split, out, fid=fid, weights=weights, limit=limit,
        batch_size=batch_size, device=device, force=force,
    )  # fmt: skip
    _print(found)


@app.command()
def latents(
    models: Models = None,
    data: options.Data = None,
    n: Annotated[int, Option(help="Number of images to measure.", min=1)] = 256,
    images: Annotated[int, Option(help="Number of images to show.", min=1)] = 4,
    split: options.Split = "val",
    resolution: options.Resolution = None,
    batch_size: options.BatchSize = 16,
    device: options.Device = "auto",
    out: Out = None,
) -> None:
    """Show latents and the statistics of their channels (Figures 2 and 4)."""
    from pipelines.analysis.latents import analyze_latents
    from pipelines.analysis.subjects import open_analysis

    size = options.parse_size("resolution", resolution)
    opened = open_analysis(models or (), data, split, size, device, batch_size)
    _print(analyze_latents(*opened, n, images, out))


@app.command()
def features(
    models: Models = None,
    data: options.Data = None,
    images: Annotated[int, Option(help="Number of images to show and measure.", min=1)] = 2,
    split: options.Split = "val",
    resolution: options.Resolution = None,
    device: options.Device = "auto",
    out: Out = None,
) -> None:
    """Compare the magnitudes of the decoder's feature maps (Figure 3).

    ldm analyze features GroupNorm=runs/a SMC=runs/b
    """
    from pipelines.analysis.features import analyze_features
    from pipelines.analysis.subjects import open_analysis

    size = options.parse_size("resolution", resolution)
    opened = open_analysis(models or (), data, split, size, device)
    _print(analyze_features(*opened, images, out))


@app.command()
def gradients(
    runs: Annotated[
        list[str] | None,
        Argument(metavar="[NAME=]RUN …", help="Stage-one run folders. Default: the newest run."),
    ] = None,
    out: Out = None,
) -> None:
    """Plot the ratio of adversarial and reconstruction gradients over training (Figure 7).

    ldm analyze gradients constant=runs/a adaptive=runs/b
    """
    from pipelines.analysis.gradients import analyze_gradients

    _print(analyze_gradients(runs or (), out))


def _print(analysis: "Analysis | None") -> None:
    """Print the table, its notes and the files written, on the first process only."""
    if analysis is None or not options.is_first_process():
        return
    from ldm.tables import text_table

    header, *rows = text_table(analysis.header, analysis.rows)
    options.echo(analysis.title, bold=True)
    options.echo(header, dim=True)
    for row in rows:
        options.echo(row)
    for note in analysis.notes:
        options.echo(f"note: {note}", dim=True)
    for path in analysis.files:
        options.echo(f"wrote {path}")
