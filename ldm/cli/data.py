"""`ldm data`: prepare images for training, and check what was prepared."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from ldm.cli import options

app = typer.Typer(no_args_is_help=True, help="Prepare images for training, and check them.")


Size = Annotated[
    str, Option(metavar="R|HxW", help="Image size in pixels, R for R×R, or HEIGHTxWIDTH.")
]
Filter = Annotated[
    Literal["lanczos", "box", "bicubic"], Option(help="Resize filter. FID depends on it.")
]
HeldOut = Annotated[
    int | None,
    Option(
        min=0,
        show_default="FFHQ 10,000; CelebA-HQ 5,000; else 5 %, at most 10,000",
        help="Images for validation: the last by name, or every n-th with --labels.",
    ),
]
Small = Annotated[
    Literal["error", "skip", "enlarge"],
    Option(help="Images with a side below --size: an error, left out, or enlarged."),
]
Labels = Annotated[
    bool,
    Option(
        "--labels",
        help="Keep class labels: top-level folders, EDM's dataset.json, .cls or .json in a .tar, "
        "a column of a table.",
    ),
]
LabelFile = Annotated[
    Path | None, Option(metavar="FILE.csv", help="Keep class labels, from a CSV: image, class.")
]


@app.command()
def prepare(
    source: Annotated[
        str,
        Argument(
            metavar="SRC",
            help="A folder of images or .npy arrays, a .zip, a .tar, a folder of .parquet, "
            "hf:OWNER/NAME of the Hugging Face Hub, or shards elsewhere, as s3://BUCKET/FOLDER.",
        ),
    ],
    destination: Annotated[
        Path, Argument(metavar="DST", help="Folder for the shards; created if missing.")
    ],
    size: Size = "256",
    filter: Filter = "lanczos",
    held_out: HeldOut = None,
    shard_size: Annotated[int, Option(min=1, help="Images per shard.")] = 1000,
    workers: Annotated[
        int | None,
        Option(min=0, show_default="one per CPU core", help="Worker processes; 0: none."),
    ] = None,
    small: Small = "error",
    labels: Labels = False,
    label_file: LabelFile = None,
    image_column: Annotated[str, Option(help="Column of images in a table.")] = "",
    label_column: Annotated[str, Option(help="Column of classes in a table.")] = "",
    channels: Annotated[int, Option(min=1, help="Channels of the images: 1 for grey.")] = 3,
) -> None:
    """Convert a folder, zip or tar of images into tar shards of PNGs of one size.

    Images are centre-cropped and downsized. Corrupt images are skipped and listed in the manifest;
    more than 1 % of them is an error.

    The same command resumes an interrupted one; the result is identical to the byte.

    ldm data prepare ffhq.zip data/ffhq256 --size 256
    """
    from ldm.config import format_size
    from ldm.data.prepare import prepare
    from ldm.data.shards import MANIFEST

    shape = options.parse_size("size", size) or 0
    manifest = prepare(
        source, destination, shape, filter, held_out, shard_size, workers, labels, label_file or "",
        small, image_column, label_column, channels,
    )  # fmt: skip
    train, val = (manifest["splits"][split] for split in ("train", "val"))
    classes = f", {len(manifest['classes']):,} classes" if "classes" in manifest else ""
    dtype, own = manifest.get("dtype", "uint8"), channels
    kind_of = "" if (dtype, own) == ("uint8", 3) else f"; {dtype}, {options.many(own, 'channel')}"
    shards = options.many(len(train["shards"]) + len(val["shards"]), "shard")
    options.echo(
        f"{manifest['count']:,} images of {format_size(shape)} in {shards}: "
        f"{train['count']:,} for training, {val['count']:,} for validation{classes}{kind_of}"
    )
    _echo_skipped([one["reason"] for one in manifest["skipped"]])
    options.echo(f"manifest: {destination / MANIFEST}")
    more = "" if channels == 3 else f" image_channels={channels}"
    more += " data.range=measured" if dtype == "float32" else ""
    options.echo(options.next_step(f"ldm train-ae litevae-b data.source={{}}{more}", destination))


def _echo_skipped(reasons: list[str]) -> None:
    """Say how many images were skipped, by their kind."""
    from ldm.data.transforms import LARGE, SMALL

    small, large = (sum(r.startswith(word) for r in reasons) for word in (SMALL, LARGE))
    kinds = {"corrupt": len(reasons) - small - large, "small": small, "too large": large}
    for kind, count in kinds.items():
        if count:
            options.echo(f"skipped {options.many(count, f'{kind} image')}, listed in the manifest")


@app.command()
def check(
    folder: Annotated[
        Path, Argument(help="A folder of shards that `ldm data prepare` or `ldm sample` wrote.")
    ],
) -> None:
    """Compare every shard with the manifest: its size, number of images and SHA-256.

    One line is printed for each fault; the exit status is 1 if there is any. Nothing is decoded.

    ldm data check data/ffhq256
    """
    from ldm.data.shards import check

    manifest, faults = check(folder)
    for fault in faults:
        options.echo(fault)
    if faults:
        raise typer.Exit(1)
    shards = options.many(sum(len(s["shards"]) for s in manifest["splits"].values()), "shard")
    options.echo(f"all {manifest['count']:,} images in {shards} are as they were written")
