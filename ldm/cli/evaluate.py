"""`ldm eval-ae`."""

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Literal

import typer

from ldm.cli.say import say


def eval_ae(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[CKPT …]",
            help="Stage-one ckpt.pt files or run folders, or third-party SD-VAEs; several give a "
            "table. Left out: the newest.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="`photos` (built in), a folder, a zip, or shards. Left out: what each was trained "
            "on."
        ),
    ] = None,
    split: Annotated[
        Literal["train", "val", "all"], typer.Option(help="Which part of the data.")
    ] = "val",
    resolution: Annotated[
        list[str] | None,
        typer.Option(
            help="Side of the images, pixels; several as 128,256. Left out: that at which each "
            "one's training ended."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time, per process.")] = 16,
    limit: Annotated[int | None, typer.Option(help="At most this many images.")] = None,
    fid: Annotated[
        bool,
        typer.Option(
            " /--no-fid", help="Leave out rFID, KID, precision and recall.", show_default=False
        ),
    ] = True,
    weights: Annotated[
        Path | None,
        typer.Option(help="Path of inception-2015-12-05.pt. Left out: the cache, or fetched."),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="module:function",
            help="A network of your own, for Inception: function(device) gives a callable of uint8 "
            "images (B, 3, H, W) that gives (B, dim).",
        ),
    ] = None,
    mode: Annotated[
        Literal["clean", "legacy-tensorflow"],
        typer.Option(help="How Inception's images are resized."),
    ] = "clean",
    layout: Annotated[
        Literal["table", "markdown", "latex", "json"],
        typer.Option("--format", help="What is printed; all but table is fit for a pipe."),
    ] = "table",
    out: Annotated[
        Path | None,
        typer.Option(
            help="One JSON for all. Left out: one of each in eval/ beside its checkpoint."
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Measure held-out images that were trained on, and rFID over fewer images than "
            "features; both are noted.",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
) -> None:
    """Measure autoencoders' reconstructions: rFID, LPIPS, PSNR, SSIM, KID, precision, recall, SWD.

    What needs unavailable weights is left out.

    ldm eval-ae runs/x --data data/ffhq256 --resolution 128,256

    ldm eval-ae runs/x runs/y sd-vae.pt --data data/ffhq256 --resolution 256 --format latex
    """
    from pipelines.evaluate import evaluate_checkpoints
    from pipelines.measuring.evaluation_table import format_evaluations

    sides = _sides(resolution) if resolution else None
    # what a pipe takes is the table alone
    with nullcontext() if layout == "table" else redirect_stdout(sys.stderr):
        evaluations = evaluate_checkpoints(
            models or (), data, split, sides, batch_size, limit, device, fid, weights, features,
            mode, out, force,
        )  # fmt: skip
    say(format_evaluations(evaluations, layout))
    if layout == "table":
        say(*(f"done: {path}" for path in dict.fromkeys(each.path for each in evaluations)))


def _sides(words: list[str]) -> list[int]:
    """Whole numbers, with commas between them or each given by itself.

    Raises:
        UsageError: a word is none.
    """
    from ldm.errors import UsageError

    given = ",".join(words)
    try:
        return [int(word) for word in given.split(",")]
    except ValueError:
        raise UsageError(
            f"--resolution {given}: it must be a whole number, or several with commas between"
        ) from None
