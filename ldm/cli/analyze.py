"""`ldm analyze`: what the paper says of autoencoders beyond their scores, in pictures."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from pipelines.analysis.subjects import Analysis

app = typer.Typer(no_args_is_help=True)

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME=]MODEL …",
        help="Stage-one files or run folders, or third-party SD-VAEs, side by side; NAME is what "
        "legends say. Left out: the newest run.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(help="`photos` (built in), a folder, a zip, or shards. Left out: the run's own."),
]
Split = Annotated[Literal["train", "val", "all"], typer.Option(help="Which part of the data.")]
Resolution = Annotated[
    int | None, typer.Option(help="Side of the images, pixels. Left out: where training ended.")
]
BatchSize = Annotated[int, typer.Option(help="Images at a time, over all processes.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder to write to. Left out: analysis/ beside the first.")
]


@app.callback()
def analyze() -> None:
    """Look into autoencoders as the paper does; each command leaves a PNG and a CSV."""


@app.command()
def mmd(
    models: Models = None,
    data: Data = None,
    n: Annotated[int, typer.Option(help="Images of a draw, and samples of N(0, I).")] = 1000,
    sigmas: Annotated[
        str, typer.Option(help="Widths of the RBF kernel, with commas between.")
    ] = "25,50,100,250,500",
    draws: Annotated[int, typer.Option(help="How often it is measured, for mean ± std.")] = 5,
    latents: Annotated[
        Literal["scaled", "standardised", "raw"],
        typer.Option(
            help="scaled: by one standard deviation, as for stage two; standardised: each channel "
            "to mean 0 and standard deviation 1; raw."
        ),
    ] = "scaled",
    split: Split = "val",
    resolution: Resolution = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """How far latents are from Gaussian noise: MMD with RBF kernels (Table 6).

    ldm analyze mmd LiteVAE=runs/a VAE=runs/b --data data/ffhq256
    """
    from pipelines.analysis.mmd import analyze_mmd

    widths = _numbers("sigmas", sigmas, float)
    _print(
        analyze_mmd(
            models or (), data, n, widths, draws, resolution, device, split, latents, batch_size,
            out,
        )
    )  # fmt: skip


@app.command()
def scale(
    models: Models = None,
    data: Data = None,
    resolutions: Annotated[
        str | None,
        typer.Option(
            help="Sides of the images, pixels, with commas between. Left out: those of 32, 64, "
            "128, 256 and 512 that the images are large enough for."
        ),
    ] = None,
    split: Split = "val",
    fid: Annotated[bool, typer.Option(help="Measure rFID, where Inception is to be had.")] = True,
    weights: Annotated[
        Path | None,
        typer.Option(help="Path of inception-2015-12-05.pt. Left out: the cache, or fetched."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many images.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time, per process.")] = 16,
    force: Annotated[
        bool, typer.Option("--force", help="Measure rFID over few images, or seen ones, too.")
    ] = False,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """How reconstructions fare from 32² to 512² (Figures 5 and 8).

    ldm analyze scale GroupNorm=runs/a SMC=runs/b --data photos --split all
    """
    from pipelines.analysis.scale import analyze_scale

    sides = None if resolutions is None else _numbers("resolutions", resolutions, int)
    _print(
        analyze_scale(
            models or (),
            data,
            sides,
            split,
            fid,
            weights,
            limit,
            batch_size,
            device,
            force,
            out,
        )
    )


@app.command()
def latents(
    models: Models = None,
    data: Data = None,
    n: Annotated[int, typer.Option(help="Images measured.")] = 256,
    images: Annotated[int, typer.Option(help="Images shown.")] = 4,
    split: Split = "val",
    resolution: Resolution = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """What latents look like, and their statistics, channel by channel (Figures 2 and 4)."""
    from pipelines.analysis.latents import analyze_latents

    _print(analyze_latents(models or (), data, n, images, resolution, device, split, batch_size,
                           out))  # fmt: skip


@app.command()
def features(
    models: Models = None,
    data: Data = None,
    images: Annotated[int, typer.Option(help="Images shown and measured.")] = 2,
    split: Split = "val",
    resolution: Resolution = None,
    device: Device = "auto",
    out: Out = None,
) -> None:
    """Whether the decoder's feature maps are balanced (Figure 3).

    ldm analyze features GroupNorm=runs/a SMC=runs/b
    """
    from pipelines.analysis.features import analyze_features

    _print(analyze_features(models or (), data, images, resolution, device, split, out))


@app.command()
def gradients(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=]RUN …", help="Run folders of stage one. Left out: the newest."
        ),
    ] = None,
    out: Out = None,
) -> None:
    """How strong the adversarial gradient was over training, from runs' logs (Figure 7).

    ldm analyze gradients constant=runs/a adaptive=runs/b
    """
    from pipelines.analysis.gradients import analyze_gradients

    _print(analyze_gradients(runs or (), out))


def _print(analysis: "Analysis | None") -> None:
    """The table, its notes, and where the files are; once however many processes were launched."""
    if analysis is None or os.environ.get("RANK", "0") != "0":
        return
    from ldm.logbook import console

    console.print(analysis.title, style="bold", markup=False)  # names may hold [brackets]
    rows = [analysis.header, *analysis.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, (name, *cells) in enumerate(rows):
        # no table of rich's, which cuts what a narrow terminal has no room for
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        line = "  ".join([name.ljust(widths[0]), *numbers])
        console.print(line, style="" if number else "dim", markup=False)
    for note in analysis.notes:
        console.print(f"note: {note}", style="dim", markup=False)
    for path in analysis.files:
        typer.echo(f"wrote {path}")


def _numbers(option: str, text: str, kind: type) -> list:
    """Numbers with commas between them.

    Raises:
        UsageError: they are none.
    """
    from ldm.errors import UsageError

    try:
        return [kind(word) for word in text.split(",")]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"--{option} {text}: it must be {what}, with commas between") from error
