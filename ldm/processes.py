"""The processes that were launched together: how they meet, and how one of them speaks for all."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
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
    """What `make` returns on the main process, on all; or the LdmError it raises there, on all."""
    made: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            made = [make()]
        except LdmError as error:
            made = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(made)
    if isinstance(made[0], LdmError):
        raise made[0]
    return made[0]
