"""`ldm sample`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ldm.cli.options import say


def sample(
    model: Annotated[
        Path | None,
        typer.Argument(help="A stage-two ckpt.pt or run folder. Left out: the newest."),
    ] = None,
    n: Annotated[int, typer.Option(help="How many images.")] = 64,
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) alone.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 18,
    sampler: Annotated[
        Literal["heun", "euler", "dpmpp-2m"],
        typer.Option(help="How a step is taken; heun calls the network twice."),
    ] = "heun",
    schedule: Annotated[
        Literal["karras", "cosine", "linear"], typer.Option(help="How noise levels are spaced.")
    ] = "karras",
    guidance: Annotated[
        float | None,
        typer.Option(help="Scale: classifier-free, or away from --weaker; 1 changes nothing."),
    ] = None,
    interval: Annotated[
        str | None, typer.Option(help="Noise levels σ at which guidance acts, such as 0.2,3.")
    ] = None,
    weaker: Annotated[
        Path | None, typer.Option(help="A model to be guided away from (autoguidance).")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="A class, or several in turn: 3 or cat,dog. Left out: drawn."),
    ] = None,
    churn: Annotated[
        str | None,
        typer.Option(
            help="Fresh noise, EDM's: S_churn, or S_churn,S_min,S_max,S_noise. Left out: none."
        ),
    ] = None,
    files: Annotated[
        Literal["png", "zip", "shards"],
        typer.Option("--format", help="PNGs in folders, one zip, or tar shards to train on."),
    ] = "png",
    batch_size: Annotated[int, typer.Option(help="Images at a time, per process.")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the images. Left out: samples/ beside the model.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="auto: bf16 where the device has it.")
    ] = "auto",
) -> None:
    """Sample images to files. Stopped, the same command goes on.

    ldm sample --n 50000

    ldm sample --n 50000 --guidance 1.5 --interval 0.2,3 --format zip
    """
    from ldm.run_folder import newest_run
    from pipelines.sample import sample_images

    given = {}
    if interval is not None:
        given["interval"] = _numbers("interval", interval, (2,))
    if churn is not None:
        names = ("S_churn", "S_min", "S_max", "S_noise")
        given["churn"] = dict(zip(names, _numbers("churn", churn, (1, 4)), strict=False))
    if model is None:
        model = newest_run("diffusion")
        say(f"model: {model}")
    folder = sample_images(
        model, n, out, seed, labels=labels.split(",") if labels is not None else None,
        weaker=weaker, files=files, batch_size=batch_size, device=device, precision=precision,
        steps=steps, sampler=sampler, schedule=schedule, guidance=guidance, **given,
    )  # fmt: skip
    say(
        f"done: {n:,} images in {folder}, the first of them in {folder}/grid.png",
        f"next: ldm fid {folder}",
    )


def _numbers(option: str, text: str, counts: tuple[int, ...]) -> list[float]:
    """Numbers with commas between them.

    Raises:
        UsageError: they are none, or not as many as there may be.
    """
    from ldm.errors import UsageError

    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in counts:
        wanted = " or ".join(map(str, counts))
        raise UsageError(f"--{option} {text}: it must be {wanted} number(s), with commas between")
    return numbers
