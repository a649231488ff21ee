"""Train in forked children that are killed at a change of the run's folder, then resumed.

    OMP_NUM_THREADS=1 python -m tests.pipelines.killed {autoencoder,diffusion} FOLDER FIRST EVERY

Runs are FOLDER/whole, which nothing stopped, and FOLDER/<n>, whose process left at once before the
n-th change: n = FIRST, FIRST + EVERY … to the run's end. In FOLDER/stopped-<n>, a SIGTERM came
first, in the step before a validation, and the process that resumed was killed.
"""

import os
import signal
import sys
from itertools import count
from pathlib import Path

from ldm.run_folder import TrainingState
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_diffusion import train_diffusion
from tests.small import autoencoder_recipe, diffusion_recipe

# validations, rows, snapshots and saved states coincide, fall between each other, and on the end
EVERY = ["run.validate_every_steps=2", "run.save_every_steps=4", "run.log_every_steps=3"]
SIZES = {
    "autoencoder": ["phases=[{resolution: 32, steps: 7}]", "ema_half_life_images=8"],
    "diffusion": ["steps=7", "ema_stds=[0.05, 0.1]", "snapshots=3", "accumulate=2"],
}
KILLED, STOPPED_AT = 99, 2


def train(stage: str, folder: Path) -> Path:
    settings = EVERY + SIZES[stage]
    if stage == "autoencoder":
        return train_autoencoder(autoencoder_recipe(*settings), "tiny", folder)
    recipe = diffusion_recipe(folder.parent / "ae" / "ckpt.pt", *settings)
    return train_diffusion(recipe, "tiny", folder)


def kill_at_change(folder: Path, number: int) -> None:
    """Leave before the `number`-th rename, removal of a folder, or addition to a file."""
    changes = count(1)

    def hook(event: str, arguments: tuple) -> None:
        changing = event in ("os.rename", "os.rmdir") or (
            event == "open" and arguments[1] in ("a", "ab")
        )
        if changing and str(arguments[0]).startswith(str(folder)) and next(changes) == number:
            os._exit(KILLED)

    sys.addaudithook(hook)


def stop_after(step: int) -> None:
    advance = TrainingState.advance

    def stopping(state: TrainingState) -> None:
        advance(state)
        if state.step == step:
            signal.raise_signal(signal.SIGTERM)

    TrainingState.advance = stopping


def forked(stage: str, folder: Path, kill_at: int = 0, stop_at: int = 0) -> int:
    """Train in a child; return its exit status."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        kill_at_change(folder, kill_at)
        stop_after(stop_at)
        train(stage, folder)
        status = 0
    finally:
        os._exit(status)


def main(stage: str, root: Path, first: int, every: int) -> None:
    if stage == "diffusion":
        train("autoencoder", root / "ae")
    train(stage, root / "whole")
    for stop_at, name in ((0, ""), (STOPPED_AT, "stopped-")):
        for number in count(first, every):
            folder = root / f"{name}{number}"
            if stop_at:
                assert forked(stage, folder, stop_at=stop_at) == 1
            status = forked(stage, folder, number)
            assert status in (0, KILLED), f"{folder} ended with {status}"
            if status == 0:  # it makes no more changes
                break
            assert forked(stage, folder) == 0, f"{folder} did not resume"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
