"""`ldm reproduce`: the paper's tables, ours beside theirs."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ldm.cli.options import say


def reproduce(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TABLE [key=value …]",
            help="t1 to t22, or a figure, f2 to f9; then settings over all its recipes.",
        ),
    ] = None,
    scale: Annotated[
        Literal["smoke", "small", "paper"],
        typer.Option(
            help="smoke: a minute on a CPU, to see that it runs. small: meant for an hour on a "
            "GPU, a night on a CPU. paper: the full recipe."
        ),
    ] = "small",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder, a zip, or shards; or NAME=PATH for one of ffhq, imagenet, celebahq, "
            "deepfashion. Left out: the built-in photographs; at scale paper the recipes' own."
        ),
    ] = None,
    take: Annotated[
        list[str] | None,
        typer.Option(metavar="ROW=PATH", help="A checkpoint to measure in place of training."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of all tables.")] = Path("reproduce"),
    weights: Annotated[
        Path | None,
        typer.Option(help="Path of inception-2015-12-05.pt. Left out: the cache, or fetched."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure held-out images that were trained on, too.")
    ] = False,
    listing: Annotated[
        bool, typer.Option("--list", help="List all tables and how far their rows are.")
    ] = False,
) -> None:
    """Run a table of the paper: train, measure, print ours beside theirs, and judge its claims.

    The same command goes on where it was stopped; finished rows are not redone.

    ldm reproduce t9 --scale small --data my-images/ loss.lpips=0
    """
    from ldm.errors import UsageError

    words = list(words or [])
    if listing:
        if words:
            raise UsageError("--list shows all tables: leave out the rest")
        return _list(out)
    table = words.pop(0) if words and "=" not in words[0] else ""

    from pipelines.reproduce.runner import reproduce as run

    for result in run(table, scale, data or (), take or (), words, out, weights, force):
        say("", *result.summary(), "", f"done: {', '.join(map(str, result.files))}")
    return None


def _list(out: Path) -> None:
    """Every table, its rows, and how far each is at each scale."""
    from pipelines.reproduce.plan import SCALES
    from pipelines.reproduce.rows import row_states
    from pipelines.reproduce.tables import all_tables

    tables = all_tables()
    width = max(len(row.name) for table in tables for row in table.rows)
    for table in tables:
        typer.secho(f"{table.number:<4} {table.config.title}", bold=True)
        for row in table.rows:
            states = "  ".join(f"{scale} {s:<5}" for scale, s in row_states(out, row).items())
            typer.echo(f"     {row.name:<{width}}  {states.rstrip()}")
    for scale in SCALES.values():
        typer.echo(f"{scale.name}: {scale.summary}")
