"""`ldm report`.

`ldm demo`.
"""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RUN …",
            help="Folders of runs, of either stage, or of several, such as a demo's; NAME is what "
            "the page calls it.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    images: Annotated[
        int, typer.Option(help="Held-out images to reconstruct, and samples to draw.")
    ] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 18,
    data: Annotated[
        str | None,
        typer.Option(
            help="What to reconstruct: `photos` (built in), a folder, … Left out: each run's own."
        ),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(help="Side of what is reconstructed, pixels. Left out: the runs' highest."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
) -> None:
    """Write a page over one run, or several side by side: settings, curves, pictures, numbers.

    One file that needs nothing else, readable on a phone, in dark and in light.

    ldm report GroupNorm=runs/a SMC=runs/b --out a-and-b.html
    """
    from pipelines.report.report import write_report

    page = write_report(runs, out, images, seed, steps, data, resolution, device)
    typer.echo(f"done: open {page} in a browser")


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
