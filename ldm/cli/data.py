"""`ldm data`: prepare images for training."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def data() -> None:
    """Prepare images for training."""


@app.command()
def prepare(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder of images or .npy arrays, .zip, or .tar.")
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder for the shards; made if need be.")
    ],
    size: Annotated[int, typer.Option(min=1, help="Side of the images, in pixels.")] = 256,
    filter: Annotated[
        Literal["lanczos", "box", "bicubic"],
        typer.Option(help="How images are resized. FID depends on it."),
    ] = "lanczos",
    held_out: Annotated[
        int | None,
        typer.Option(
            min=0,
            show_default="FFHQ 10,000; CelebA-HQ 5,000; else one in twenty, at most 10,000",
            help="Images for validation, the last by name; with --labels every so many-th.",
        ),
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Images per shard.")] = 1000,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            show_default="one per CPU core",
            help="Processes; 0 works in this one.",
        ),
    ] = None,
    labels: Annotated[
        bool,
        typer.Option(
            "--labels",
            help="Keep class labels: the first folder an image lies in, or .cls in a .tar.",
        ),
    ] = False,
) -> None:
    """Turn a folder, zip or tar of images into square PNGs in tar shards.

    The central square of each image is cut out and resized; nothing is
    enlarged. Corrupt images are named and left out; more than 1 % stop it.

    Interrupt it whenever you like: the same command goes on where it stopped,
    and the result is the same to the byte.
    """
    from ldm.data.prepare import prepare
    from ldm.data.shards import MANIFEST

    manifest = prepare(source, destination, size, filter, held_out, shard_size, workers, labels)
    train, val = (manifest["splits"][split] for split in ("train", "val"))
    classes = f", {len(manifest['classes']):,} classes" if labels else ""
    shards = len(train["shards"]) + len(val["shards"])
    typer.echo(
        f"{manifest['count']:,} images of {size}×{size} in "
        f"{shards} shard{'s' * (shards != 1)}: "
        f"{train['count']:,} to train on, {val['count']:,} held out{classes}"
    )
    if skipped := len(manifest["skipped"]):
        them = "1 corrupt image" if skipped == 1 else f"{skipped:,} corrupt images"
        typer.echo(f"{them} left out: the manifest names {'it' if skipped == 1 else 'them'}")
    typer.echo(f"manifest: {destination / MANIFEST}")
    typer.echo(f"next: ldm train-ae litevae-b data.source={destination}")
