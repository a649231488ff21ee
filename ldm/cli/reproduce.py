"""`ldm reproduce`: the paper's tables, re-run next to the published numbers."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ldm.cli.options import InceptionWeights, say


def reproduce(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TABLE [key=value …]",
            help="A table, t1 to t22, or a figure, f2 to f9; then settings for all its recipes.",
        ),
    ] = None,
    scale: Annotated[
        Literal["smoke", "small", "paper"],
        typer.Option(
            help="smoke: a test run, about a minute on a CPU. small: about an hour on a GPU or a "
            "night on a CPU. paper: the full recipes."
        ),
    ] = "small",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder, a zip or shards; or NAME=PATH for one of ffhq, imagenet, celebahq, "
            "deepfashion. Default: the built-in photographs; with --scale paper the recipes' data."
        ),
    ] = None,
    take: Annotated[
        list[str] | None,
        typer.Option(metavar="ROW=PATH", help="Use this checkpoint instead of training the row."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of all tables.")] = Path("reproduce"),
    weights: InceptionWeights = None,
    force: Annotated[
        bool, typer.Option("--force", help="Measure images that were trained on, too.")
    ] = False,
    listing: Annotated[
        bool, typer.Option("--list", help="List all tables and the state of their rows.")
    ] = False,
) -> None:
    """Reproduce a table of the paper: train, measure, compare, and check its claims.

    The same command resumes; finished rows are reused.

    ldm reproduce t9 --scale small --data my-images/ loss.lpips=0
    """
    from ldm.errors import UsageError

    words = list(words or [])
    if listing:
        if words:
            raise UsageError("--list shows all tables: omit the other arguments")
        return _list(out)
    table = words.pop(0) if words and "=" not in words[0] else ""

    from pipelines.reproduce.runner import reproduce as run

    for result in run(table, scale, data or (), take or (), words, out, weights, force):
        say("", *result.summary(), "", f"done: {', '.join(map(str, result.files))}")
    return None


def _list(out: Path) -> None:
    """List every table with the state of its rows at each scale."""
    from pipelines.reproduce.plan import SCALES
    from pipelines.reproduce.runner import row_states
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
