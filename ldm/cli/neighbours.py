"""`ldm neighbours`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def neighbours(
    samples: Annotated[
        Path | None,
        typer.Argument(help="A folder of images, as `ldm sample` writes it. Left out: the newest."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="`photos` (built in), a folder, a zip, or shards. Left out: what was learnt from."
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="How many samples, the first ones.")] = 8,
    nearest: Annotated[int, typer.Option(help="How many training images for each.")] = 5,
    space: Annotated[
        Literal["latents", "pixels"],
        typer.Option(help="Distances between latents (needs the model), or 64×64 pixels."),
    ] = "latents",
    model: Annotated[
        Path | None, typer.Option(help="The samples' model. Left out: as the samples say.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
) -> None:
    """Show the training images nearest to samples: has the model learnt them by heart?

    ldm neighbours runs/x/samples/seed0-steps18
    """
    from pipelines.neighbours import find_neighbours

    result = find_neighbours(samples, data, count, nearest, space, model, batch_size, device)
    ours, theirs = result["median_nearest"]["samples"], result["median_nearest"]["held_out"]
    compared = "" if theirs is None else f"; held-out images': {theirs:.3f}"
    typer.echo(f"samples' nearest training image, median: {ours:.3f} {result['unit']}{compared}")
    typer.echo(f"done: {result['folder']}/neighbours.png, neighbours.json")
