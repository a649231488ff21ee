"""`ldm demo`, `ldm report`, `ldm reproduce`, `ldm analyze`: results as pages, figures, tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

from ldm.cli import options
from ldm.errors import UsageError

if TYPE_CHECKING:
    from pipelines.analysis.subjects import Analysis


def report(
    runs: Annotated[
        list[str],
        Argument(
            metavar="[NAME=]RUN …",
            help="Run folders of either stage, or a folder of several runs, such as a demo's; NAME "
            "is the label on the page.",
        ),
    ],
    out: Annotated[Path, Option(help="The HTML file to write.")] = Path("report.html"),
    images: Annotated[int, Option(help="Number of reconstructions and of samples to show.")] = 8,
    seed: options.Seed = 0,
    steps: options.Steps = 18,
    data: options.Data = None,
    resolution: options.Resolution = None,
    device: options.Device = "auto",
) -> None:
    """Write an HTML page about one or several runs: settings, curves, pictures, numbers.

    The page is one self-contained file.

    ldm report GroupNorm=runs/a SMC=runs/b --out a-and-b.html
    """
    from pipelines.report.report import write_report

    size = options.parse_size("resolution", resolution)
    page = write_report(runs, out, images, seed, steps, data, size, device)
    options.echo(f"done: open {page} in a browser")


def demo(
    out: Annotated[Path, Option(help="Folder of the demo.")] = Path("runs/demo"),
    fresh: Annotated[bool, Option("--fresh", help="Start over.")] = False,
    data: Annotated[
        str, Option(help="Images: `photos` (built in), a folder, a zip or shards.")
    ] = "photos",
) -> None:
    """Train both stages in a few minutes on a CPU, and show the results.

    On built-in photographs, without data or downloads, or on your own images. Writes report.html,
    a page of pictures and numbers.
    """
    from pipelines.demo import run_demo

    page = run_demo(out, fresh, data)
    options.echo(f"done: open {page} in a browser")


def reproduce(
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="TABLE [key=value …]",
            help="A table, t1 to t22, or a figure, f2 to f9; then settings for all its recipes.",
        ),
    ] = None,
    scale: Annotated[
        Literal["smoke", "small", "paper"],
        Option(
            help="smoke: a test run, about a minute on a CPU. small: about an hour on a GPU or a "
            "night on a CPU. paper: the full recipes."
        ),
    ] = "small",
    data: Annotated[
        list[str] | None,
        Option(
            help="A folder, a zip or shards; or NAME=PATH for one of ffhq, imagenet, celebahq, "
            "deepfashion. Default: the built-in photographs; with --scale paper the recipes' data."
        ),
    ] = None,
    take: Annotated[
        list[str] | None,
        Option(metavar="ROW=PATH", help="Use this checkpoint instead of training the row."),
    ] = None,
    seeds: Annotated[
        int, Option(min=1, help="Train every row with seeds 0, 1 …; print means and their spread.")
    ] = 1,
    ours: Annotated[
        bool, Option("--ours", help="Add the rows of our own presets, litevae-*-plus.")
    ] = False,
    out: Annotated[Path, Option(help="Folder of all tables.")] = Path("reproduce"),
    weights: options.InceptionWeights = None,
    force: options.Force = False,
    listing: Annotated[
        bool, Option("--list", help="List all tables, and the states of rows.")
    ] = False,
) -> None:
    """Reproduce a table of the paper: train, measure, compare, and check its claims.

    The same command resumes; finished rows are reused.

    ldm reproduce t9 --scale small --data my-images/ loss.lpips=0
    """
    words = list(words or [])
    if listing:
        if words:
            raise UsageError("--list shows all tables: omit the other arguments")
        return _list(out)
    table = words.pop(0) if words and "=" not in words[0] else ""

    from pipelines.reproduce.runner import reproduce as run

    given = (data or (), take or (), words, out, weights, force, seeds, ours)
    for result in run(table, scale, *given):
        options.say("", *result.lines, "", f"done: {', '.join(map(str, result.files))}")


def _list(out: Path) -> None:
    """List every table with the state of its rows at each scale."""
    from pipelines.reproduce.plan import SCALES, load_scale
    from pipelines.reproduce.runner import row_states
    from pipelines.reproduce.tables import all_tables

    tables = [table.with_ours() for table in all_tables()]
    width = max(len(row.name) for table in tables for row in table.rows)
    for table in tables:
        options.echo(f"{table.number:<4} {table.title}", bold=True)
        for row in table.rows:
            states = "  ".join(f"{scale} {s:<5}" for scale, s in row_states(out, row).items())
            options.echo(f"     {row.name:<{width}}  {states.rstrip()}")
    for scale in map(load_scale, SCALES):
        options.echo(f"{scale.name}: {scale.summary}")


# --------------------------------------------------------------------------------- analyze
analyze = typer.Typer(
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


@analyze.command()
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


@analyze.command()
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


@analyze.command()
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


@analyze.command()
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


@analyze.command()
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
