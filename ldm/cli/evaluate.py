"""`ldm fid` and `ldm eval-ae`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Split = Annotated[Literal["train", "val", "all"], typer.Option(help="Which part of the data.")]
Data = Annotated[
    str | None, typer.Option(help="`photos`, a folder, a zip, or shards. Left out: the run's own.")
]


def fid(
    samples: Annotated[
        Path | None,
        typer.Argument(help="A folder of images, as `ldm sample` writes it. Left out: the newest."),
    ] = None,
    data: Data = None,
    split: Split = "train",
    weights: Annotated[
        Path | None, typer.Option(help="inception-2015-12-05.pt, if you have it.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 64,
    limit: Annotated[
        int | None, typer.Option(help="At most this many images of either side.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Measure samples against data: FID, and sliced Wasserstein distance (needs no weights).

    ldm fid runs/x/samples/seed0-steps18 --data data/ffhq256
    """
    from pipelines.fid import fid_of_samples

    result = fid_of_samples(samples, data, split, weights, device, batch_size, limit)
    typer.echo(f"FID {result['fid']:.3f}, SWD {result['swd']['mean']:.3f} (×10³)")


def eval_ae(
    model: Annotated[
        Path | None,
        typer.Argument(
            help="A stage-one ckpt.pt or run folder, or an SD-VAE of others. Left out: the newest."
        ),
    ] = None,
    data: Data = None,
    split: Split = "val",
    resolution: Annotated[int | None, typer.Option(help="Side of the images, pixels.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 16,
    limit: Annotated[int | None, typer.Option(help="At most this many images.")] = None,
    device: Device = "auto",
) -> None:
    """Measure an autoencoder's reconstructions: PSNR, SSIM, and LPIPS where its weights are."""
    from pipelines.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(model, data, split, resolution, batch_size, limit, device)
    numbers = [f"{name} {value:.4g}" for name, value in result.items() if name != "count"]
    typer.echo(f"{', '.join(numbers)} over {result['count']:,} images")
