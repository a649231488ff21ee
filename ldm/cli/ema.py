"""`ldm ema`."""

from pathlib import Path
from typing import Annotated

import typer

from ldm.cli.say import say


def ema(
    std: Annotated[
        float,
        typer.Option(
            help="Width of the average as a share of the run, such as 0.07; at most 0.2886."
        ),
    ],
    run: Annotated[
        Path | None,
        typer.Argument(help="The folder of a stage-two run. Left out: the newest with snapshots."),
    ] = None,
    at: Annotated[
        int | None,
        typer.Option(help="Images seen at the snapshot it ends with. Left out: the newest."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The .pt to write. Left out: ckpt-ema<STD>.pt in the run's folder."),
    ] = None,
) -> None:
    """Average a model's weights over more or less of its training, after it.

    A run with ema_stds=[0.05, 0.1] has kept what is needed.

    ldm ema --std 0.07
    """
    from ldm.run_folder import newest_run
    from pipelines.ema import synthesize_ema

    if run is None:
        run = newest_run("diffusion", needs="ema")
        say(f"run: {run}")
    path = synthesize_ema(run, std, at, out)
    say(f"wrote {path}", f"next: ldm sample {path}")
