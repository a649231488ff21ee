"""Helpers for several processes: join them, divide a batch, share a result, fail together."""

import sys
import time
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
from ldm.errors import LdmError, UsageError, brief, escape

PATIENCE = timedelta(hours=1)
"""Time that processes wait for the others, such as while the main one computes metrics."""

SHOWN_WITHIN = 60.0
"""Seconds after which a shared disk shows all machines what one has written."""


def join_processes(device: str) -> tuple[PartialState, torch.device]:
    """Join the processes launched together, if any; return their state and this one's device."""
    resolved = resolve_device(device)
    ranks = PartialState(cpu=resolved.type == "cpu", timeout=PATIENCE)
    return ranks, ranks.device if ranks.num_processes > 1 else resolved


def make_accelerator(device: str = "auto", accumulate: int = 1) -> Accelerator:
    """Create the Accelerator for a device named as in `RunConfig.device`."""
    resolved = resolve_device(device)
    keep_freed_memory(resolved)
    if resolved.type == "cuda" and resolved.index is not None:
        torch.cuda.set_device(resolved)
    accelerator = Accelerator(
        cpu=resolved.type == "cpu",
        mixed_precision="no",  # else the launcher's environment decides
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate),
        # find_unused_parameters keeps DDP from rebuilding its buckets after the first step: a
        # resumed run of three or more processes would then sum gradients in another order.
        # Buffers are constants or functions of the weights alone (spectral norm's vectors), and so
        # the same on all processes: no need to send them at every step.
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=True, gradient_as_bucket_view=True, broadcast_buffers=False
            ),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    if accelerator.device.type != resolved.type:
        raise LdmError(
            f"this Python process already uses {accelerator.device.type} and cannot change to "
            f"{resolved.type}: restart it"
        )
    return accelerator


def check_batch(batch_size: int, accumulate: int, processes: int) -> None:
    """Raise a UsageError unless a batch divides into micro-batches and over processes."""
    whole = accumulate * processes
    if batch_size % whole == 0:
        return
    near = [n for n in (batch_size // whole * whole, -(-batch_size // whole) * whole) if n]
    counts = [str(n) for n in range(1, 65) if batch_size % (accumulate * n) == 0]
    on = f", or {', '.join(counts)} process(es)" if counts else ""
    raise UsageError(
        f"batch_size={batch_size} does not divide into {accumulate} micro-batch(es) on "
        f"{processes} process(es): use batch_size={' or '.join(map(str, near))}{on}"
    )


def from_main(accelerator: Accelerator | PartialState, make: Callable[[], Any]) -> Any:
    """Call `make` on the main process and return its result, or raise its error, on all."""
    result: list[Any] = [None]
    with fail_together(accelerator):
        if accelerator.is_main_process:
            result = [make()]
    if accelerator.num_processes > 1:
        broadcast_object_list(result)
    return result[0]


def wait_for_files(missing: Callable[[], list[Any]], processes: int) -> list[Any]:
    """Call `missing` until nothing is, for a minute at most; return what is missing still.

    A shared disk (NFS) may show the files of another machine late, one that is not shared never.
    """
    end = time.monotonic() + SHOWN_WITHIN
    while (found := missing()) and processes > 1 and time.monotonic() < end:
        time.sleep(1)
    return found


@contextmanager
def fail_together(ranks: Accelerator | PartialState) -> Iterator[None]:
    """Run a block on every process; when all are done, raise on all if one has failed.

    A process that fails alone would leave the others waiting at their next collective. It raises
    its own error, the others an LdmError or, for any other type, a RuntimeError with the message.
    The block must not contain collectives.
    """
    failed: Exception | None = None
    errors: list[Exception] = []
    try:
        yield
    except LdmError as error:
        failed, errors = error, [error]
    except Exception as error:
        failed = error
        text = f"process {ranks.process_index} failed: {type(error).__name__}: {brief(error)}"
        errors = [RuntimeError(text)]  # picklable, and no other process takes it for an LdmError
    if ranks.num_processes > 1:
        if failed is not None:  # the others may take long, or never arrive
            text = f"{type(failed).__name__}: {escape(failed)}"
            print(f"process {ranks.process_index} failed and waits for the others: {text}",
                  file=sys.stderr, flush=True)  # fmt: skip
        errors = gather_object(errors)
    # Errors of other types first: the caller of a rank with an LdmError may handle it and go on.
    errors = sorted(errors, key=lambda error: isinstance(error, LdmError))
    if failed is not None and isinstance(failed, LdmError) == isinstance(errors[0], LdmError):
        raise failed  # with its traceback
    if errors:
        raise errors[0]
