"""`ldm sample`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ldm.cli.say import say


def sample(
    model: Annotated[
        Path | None,
        typer.Argument(help="A stage-two ckpt.pt or run folder. Left out: the newest."),
    ] = None,
    n: Annotated[int, typer.Option(help="How many images.")] = 64,
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) alone.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of Heun's sampler.")] = 18,
    batch_size: Annotated[int, typer.Option(help="Images at a time, per process.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="auto: bf16 where the device has it.")
    ] = "auto",
) -> None:
    """Sample images to PNG files. Stopped, the same command goes on.

    ldm sample --n 50000
    """
    from ldm.run_folder import newest_run
    from pipelines.sample import sample_images

    if model is None:
        model = newest_run("diffusion")
        say(f"model: {model}")
    folder = sample_images(model, n, out, seed, steps, batch_size, device, precision)
    say(
        f"done: {n:,} images in {folder}, the first of them in {folder}/grid.png",
        f"next: ldm fid {folder}",
    )
