"""`ldm sample`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ldm.cli.options import BatchSize, Device, Guide, Precision, Seed, Steps, parse_numbers, say

CHURN = ("S_churn", "S_min", "S_max", "S_noise")

Labels = Annotated[
    str | None,
    typer.Option(help="Classes to cycle through: 3, or cat,dog. Default: drawn at random."),
]
Churn = Annotated[
    str | None,
    typer.Option(help="EDM's stochastic sampling: S_churn, or S_churn,S_min,S_max,S_noise."),
]
Format = Annotated[
    Literal["png", "zip", "shards"],
    typer.Option("--format", help="PNG files, one zip, or tar shards for training."),
]
Interval = Annotated[
    str | None, typer.Option(help="Range of noise levels σ to guide in, such as 0.2,3.")
]


def sample(
    model: Annotated[
        Path | None,
        typer.Argument(help="A stage-two ckpt.pt or run folder. Default: the newest run."),
    ] = None,
    n: Annotated[int, typer.Option(help="Number of images.")] = 64,
    seed: Seed = 0,
    steps: Steps = 18,
    sampler: Annotated[
        Literal["heun", "euler", "dpmpp-2m"],
        typer.Option(help="Sampler; heun evaluates the network twice per step."),
    ] = "heun",
    schedule: Annotated[
        Literal["karras", "cosine", "linear"], typer.Option(help="Spacing of the noise levels.")
    ] = "karras",
    guidance: Annotated[
        float | None,
        typer.Option(help="Guidance scale, classifier-free or with --guide; 1 is no guidance."),
    ] = None,
    interval: Interval = None,
    guide: Guide = None,
    labels: Labels = None,
    churn: Churn = None,
    files: Format = "png",
    batch_size: BatchSize = 64,
    out: Annotated[
        Path | None, typer.Option(help="Output folder. Default: samples/ next to the model.")
    ] = None,
    device: Device = "auto",
    precision: Annotated[
        Precision, typer.Option(help="auto: bf16 where the device supports it.")
    ] = "auto",
) -> None:
    """Generate images. The same command resumes an interrupted one.

    ldm sample --n 50000

    ldm sample --n 50000 --guidance 1.5 --interval 0.2,3 --format zip
    """
    from ldm.run_folder import newest_run
    from pipelines.sample import sample_images

    given: dict[str, Any] = {}
    if interval is not None:
        given["interval"] = parse_numbers("interval", interval, counts=(2,))
    if churn is not None:
        numbers = parse_numbers("churn", churn, counts=(1, 4))
        given["churn"] = dict(zip(CHURN, numbers, strict=False))
    if model is None:
        model = newest_run("diffusion")
        say(f"model: {model}")
    folder = sample_images(
        model, n, out, seed, labels=labels.split(",") if labels is not None else None,
        guide=guide, files=files, batch_size=batch_size, device=device, precision=precision,
        steps=steps, sampler=sampler, schedule=schedule, guidance=guidance, **given,
    )  # fmt: skip
    say(
        f"done: {n:,} images in {folder}, an overview in {folder}/grid.png",
        f"next: ldm fid {folder}",
    )
