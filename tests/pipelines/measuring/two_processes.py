"""Two processes of which only one meets an error: each is run with RANK=0 or 1.

Every attempt is followed by the next in the same processes, so that one that left the other waiting
would never end.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm.data import DataConfig
from ldm.distributed import from_main, join_processes
from ldm.errors import LdmError
from ldm.files import write_json
from pipelines import evaluate
from pipelines.measuring import evaluation
from pipelines.measuring.reference import ImageReference
from pipelines.measuring.statistics import MeasureOptions, accumulate

GOOD, ONE_SMALL = "good", "one_small"
"""Folders of images, all of 32×32, and one of 16×16 among those that the second process reads."""


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def main(folder: Path) -> None:
    """Write `<rank>.json`: what became of each attempt in this process."""
    ranks, where = join_processes("cpu")
    second = ranks.process_index == 1
    evaluate.load_lpips = failing(LdmError("no weights"))
    evaluation.BATCH = 4
    found = {}

    def attempt(name: str, make: Callable[[], Any]) -> None:
        try:
            found[name] = make()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    def data(name: str) -> DataConfig:
        return DataConfig(source=str(folder / name), workers=0)

    def measure(name: str) -> int:
        (done,) = evaluate.evaluate_checkpoints(
            [folder / "run"], data(name), "all", [32], batch_size=4, device="cpu", fid=False
        )
        return done.count

    def note(run: str) -> str:
        (job,) = evaluation.plan_jobs(
            [folder / run], data(GOOD), "all", [32], MeasureOptions(), ranks
        )
        return job.seen["note"]

    attempt("main", lambda: from_main(ranks, failing(KeyError("a bug"))))
    attempt("measure", lambda: measure(ONE_SMALL))
    reference = ImageReference(data(GOOD), "all", 32, samples=9)
    if second:
        reference.batches = failing(LdmError("one is gone"))
    how = {"device": where, "batch_size": 8, "swd_images": 4}
    attempt("pass", lambda: accumulate(reference, ranks, **how))
    attempt("overlap", lambda: note("trained_on_small"))
    opened = evaluation.open_source
    if second:
        evaluation.open_source = lambda config, split, resolution: (
            failing(LdmError("not on this machine"))() if split == "train" else
            opened(config, split, resolution)
        )  # fmt: skip
    attempt("training data", lambda: note("trained_on_small"))
    if second:
        evaluation.open_source = failing(LdmError("not on this machine"))
    attempt("data", lambda: measure(GOOD))
    evaluation.open_source = opened
    loaded = evaluate.load_autoencoder
    if second:
        evaluate.load_autoencoder = failing(KeyError("a bug"))
    attempt("model", lambda: measure(GOOD))
    evaluate.load_autoencoder = loaded
    attempt("at last", lambda: measure(GOOD))
    write_json(folder / f"{ranks.process_index}.json", found)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
