"""Which device, in which layout, in which precision; and the memory of a CPU."""

import ctypes

import torch

from ldm.errors import LdmError


def resolve_device(device: str = "auto") -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` as a device that is there.

    Raises:
        LdmError: a GPU is asked for where there is none, or the name means nothing.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise LdmError(f"device '{device}' is not one of auto, cpu, cuda, cuda:1") from error
    if where.type not in ("cpu", "cuda"):
        raise LdmError(f"device '{device}' is not supported: use auto, cpu, cuda or cuda:1")
    if where.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (where.index or 0) >= count:
            there = f"{count} CUDA device(s)" if count else "no CUDA device"
            raise LdmError(f"device '{device}' asked for, but PyTorch sees {there} here: use cpu")
    return where


def memory_format(device: torch.device) -> torch.memory_format:
    """The layout of images and weights: channels last on a GPU.

    On a CPU PyTorch's GroupNorm is slow in that layout, its backward pass most of all: a step of
    `tiny` takes 1.8 times as long.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` as fp32 or bf16: bf16 where the device computes in it, not where it is emulated."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if native() else "fp32"


def keep_freed_memory(device: torch.device) -> None:
    """Where the CPU computes, let this process keep the memory it frees, for its next tensors.

    The C library of most Linux systems gives a large tensor's memory back at once, and every step
    of training asks for the same again, page by page: a training step of LiteVAE-B at 128² took 1.4
    times as long, and the process a tenth less memory. Elsewhere, or under another allocator, this
    does nothing.
    """
    if device.type != "cpu":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another system, or another C library
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
    mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap, too
    mallopt(M_TRIM_THRESHOLD, -1)  # which never shrinks
