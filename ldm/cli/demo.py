"""`ldm demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again from nothing.")] = False,
) -> None:
    """Train both stages on built-in photographs and show what they make: minutes, on a CPU.

    Needs no network and no data. Writes a page of pictures and numbers, report.html.
    """
    from pipelines.demo import run_demo

    page = run_demo(out, fresh)
    typer.echo(f"done: open {page} in a browser")
