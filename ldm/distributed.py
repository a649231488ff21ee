"""The processes that were launched together: how they meet, and how one of them speaks for all."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)

from ldm.device import keep_freed_memory, resolve_device
from ldm.errors import LdmError

PATIENCE = timedelta(hours=1)
"""How long processes wait for one that still samples, or compares what all have measured."""


def join_processes(device: str) -> tuple[PartialState, torch.device]:
    """This process among those launched together, alone or not, and the device it works on.

    Raises:
        LdmError: the device is not there.
    """
    where = resolve_device(device)
    ranks = PartialState(cpu=where.type == "cpu", timeout=PATIENCE)
    return ranks, ranks.device if ranks.num_processes > 1 else where


def make_accelerator(device: str = "auto", accumulate: int = 1) -> Accelerator:
    """The Accelerate object for a device named as in `RunConfig.device`."""
    where = resolve_device(device)
    keep_freed_memory(where)
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)
    accelerator = Accelerator(
        cpu=where.type == "cpu",
        # said outright, for the launcher's environment would have its way where nothing is
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate),
        # DDP otherwise lays its buckets out anew after the first step, so that a resumed run would
        # add gradients in another order than an unbroken one, from three processes on
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    if accelerator.device.type != where.type:
        raise LdmError(
            f"this Python process has worked on {accelerator.device.type} and cannot change to "
            f"{where.type}: restart it"
        )
    return accelerator


def from_main(accelerator: Accelerator | PartialState, make: Callable[[], Any]) -> Any:
    """What `make` returns on the main process, on all; what it raises ends all together."""
    made: list[Any] = [None]
    with fail_together(accelerator):
        if accelerator.is_main_process:
            made = [make()]
    if accelerator.num_processes > 1:
        broadcast_object_list(made)
    return made[0]


@contextmanager
def fail_together(ranks: Accelerator | PartialState) -> Iterator[None]:
    """What all processes do, each for itself: where one of them fails, all do, once all are done;
    it says so at once.

    One that left alone would keep the others waiting where they meet next. They are not to meet
    inside.

    Raises:
        Exception: its own.
        LdmError: another process has raised it.
        RuntimeError: another process has raised anything else; it says what.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    told = [_told(failed, ranks.process_index)] if failed is not None else []
    if failed is not None and ranks.num_processes > 1:
        # the others may take long, or never come
        print(f"process {ranks.process_index} failed, and waits for the others to say so: "
              f"{type(failed).__name__}: {failed}", file=sys.stderr, flush=True)  # fmt: skip
    errors = gather_object(told) if ranks.num_processes > 1 else told
    # What is no LdmError first: one that lived with its own would be left by the others.
    errors = sorted(errors, key=lambda error: isinstance(error, LdmError))
    if failed is not None and isinstance(failed, LdmError) == isinstance(errors[0], LdmError):
        raise failed  # with its traceback
    if errors:
        raise errors[0]


def _told(error: Exception, rank: int) -> Exception:
    """An error as the other processes get it: what is no LdmError may not travel, and stays none,
    so that nobody takes it for one that can be lived with."""
    if isinstance(error, LdmError):
        return error
    text = str(error).strip().partition("\n")[0]
    return RuntimeError(f"process {rank} failed: {type(error).__name__}: {text}")
