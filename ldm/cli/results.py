"""`ldm demo`, `ldm report`, `ldm reproduce`: results as pages and tables."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from ldm.cli import options
from ldm.errors import UsageError


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
