"""`ldm report` and `ldm demo`."""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.options import Data, Device, Resolution, Seed, Steps


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RUN …",
            help="Run folders of either stage, or a folder of several runs, such as a demo's; NAME "
            "is the label on the page.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    images: Annotated[
        int, typer.Option(help="Number of reconstructions and of samples to show.")
    ] = 8,
    seed: Seed = 0,
    steps: Steps = 18,
    data: Data = None,
    resolution: Resolution = None,
    device: Device = "auto",
) -> None:
    """Write an HTML page about one or several runs: settings, curves, pictures, numbers.

    The page is one self-contained file.

    ldm report GroupNorm=runs/a SMC=runs/b --out a-and-b.html
    """
    from pipelines.report.report import write_report

    page = write_report(runs, out, images, seed, steps, data, resolution, device)
    typer.echo(f"done: open {page} in a browser")


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False,
) -> None:
    """Train both stages on built-in photographs in a few minutes on a CPU, and show the results.

    Needs neither network nor data. Writes report.html, a page of pictures and numbers.
    """
    from pipelines.demo import run_demo

    page = run_demo(out, fresh)
    typer.echo(f"done: open {page} in a browser")
