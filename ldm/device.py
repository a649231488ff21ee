"""The device: its choice, memory layout, precision, compiler, name and peak; copies and frozen
modules; interleaved timing, and traces."""

import ctypes
import gzip
import os
import platform
import re
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain, pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import MethodType
from typing import IO, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils._triton import has_triton

from ldm.errors import LdmError
from ldm.files import write_atomically

T = TypeVar("T")

PEAKS: dict[str, tuple[float | None, float | None, float]] = {
    "A100": (312, 156, 19.5), "A30": (165, 82, 10.3), "A40": (149.7, 74.8, 37.4),
    "A10": (125, 62.5, 31.2), "RTX A6000": (154.8, 77.4, 38.7),
    "H100": (989.4, 494.7, 66.9), "H100 PCIe": (756, 378, 51), "H100 NVL": (835, 417.5, 60),
    "H200": (989.4, 494.7, 66.9), "H200 NVL": (835, 417.5, 60), "GH200": (989.4, 494.7, 66.9),
    "B200": (2250, 1125, 75), "L4": (121, 60, 30.3), "L40": (181, 90.5, 90.5),
    "L40S": (362, 183, 91.6), "T4": (None, None, 8.1), "V100": (None, None, 15.7),
    "V100-PCIE": (None, None, 14), "RTX 3090": (71, 35.6, 35.6), "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 5090": (209.5, 104.8, 104.8),
}  # fmt: skip
"""By model of GPU, 10¹² operations a second in bf16, TF32 and float32, by the vendor's data sheets:
of dense matrices, and of GeForce cards with sums in float32."""


def resolve_device(device: str = "auto") -> torch.device:
    """Resolve `auto`, `cpu`, `cuda` or `cuda:1`; an LdmError if there is no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise LdmError(f"device '{device}' is not one of auto, cpu, cuda, cuda:1") from error
    if found.type not in ("cpu", "cuda"):
        raise LdmError(f"device '{device}' is not supported: use auto, cpu, cuda or cuda:1")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            seen = f"{count} CUDA device(s)" if count else "no CUDA device"
            raise LdmError(f"device '{device}' requested, but PyTorch sees {seen}: use cpu")
    return found


def memory_format(device: torch.device) -> torch.memory_format:
    """Return the layout of images and weights: channels last on a GPU.

    On a CPU PyTorch's GroupNorm is slow in that layout, especially its backward pass: a step of
    `tiny` takes 1.8 times as long.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve `auto`: bf16 if the device computes in it natively, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if native() else "fp32"


def cast_for_autocast(module: nn.Module) -> nn.Module:
    """Copy a frozen module, with the weights in bf16 that autocast would cast at every call.

    It caches the casts of weights that want gradients, and no others. Under autocast the copy
    computes the same bits: norms, and layers that first compute with their weights, keep float32,
    as does the first layer, in whose type networks take their input.
    """
    copy = deepcopy(module).requires_grad_(False)
    layers = [part for part in copy.modules() if [*part.parameters(recurse=False)]]
    for layer in layers[1:]:
        if type(layer) in (nn.Conv2d, nn.Linear):  # a subclass may compute with its weight
            layer.to(torch.bfloat16)
    return copy


def missing_compiler(device: torch.device) -> str | None:
    """Name what torch.compile lacks on this machine; None if nothing."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))):
        return "a C++ compiler"
    if device.type != "cuda":
        return None
    # Triton compiles the code that launches its kernels, for this Python
    given = os.environ.get("CC")
    if not any(map(shutil.which, [given] if given else ["gcc", "clang"])):
        return "a C compiler"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python's headers (Python.h)"
    return None if has_triton() else "Triton, on a GPU that it supports"


def compile_in_place(parts: Iterable[nn.Module | Callable[..., Any]]) -> None:
    """Compile modules and methods, each with a graph for every shape and set of gradients."""
    import torch._dynamo.config
    from torch._functorch import config

    # the ratio of two gradients runs backward twice: the graph's buffers must not be reused
    config.donated_buffer = False
    # inside of DDP, releases of PyTorch split graphs, and some refuse those with checkpoints
    torch._dynamo.config.optimize_ddp = False
    # A discriminator has two graphs for each resolution: frozen, for the generator's update,
    # and trained. Beyond the limit, 8 by default, PyTorch silently stops compiling.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for part in parts:
        # static: shapes change with the resolution alone, and symbolic ones make slower code
        if isinstance(part, nn.Module):
            part.compile(dynamic=False)
        else:
            owner = cast(MethodType, part).__self__
            setattr(owner, part.__name__, torch.compile(part, dynamic=False))


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Let PyTorch compute by deterministic algorithms only inside the `with`.

    Raises:
        LdmError: this process uses CUDA already, whose cuBLAS reads its setting when it starts; or
            an operation inside has no deterministic algorithm.
    """
    name, cudnn = "CUBLAS_WORKSPACE_CONFIG", torch.backends.cudnn
    given = name in os.environ
    if torch.cuda.is_initialized() and not given:
        raise LdmError(
            f"run.deterministic=true, and this process uses CUDA already: set {name}=:4096:8 "
            "before it starts"
        )
    before = torch.get_deterministic_debug_mode(), cudnn.benchmark
    os.environ.setdefault(name, ":4096:8")
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "a deterministic implementation" not in str(error):
            raise
        raise LdmError(
            f"run.deterministic=true: PyTorch's {str(error).split()[0]} is not deterministic: "
            "omit that setting, or the one that needs this operation"
        ) from error
    finally:
        torch.set_deterministic_debug_mode(before[0])
        cudnn.benchmark = before[1]
        if not (given or torch.cuda.is_initialized()):  # which has read it
            del os.environ[name]


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 in full on a CUDA GPU inside the `with`, or the decorated function.

    By default PyTorch lets convolutions round their factors to the 10 bits of TF32, and a setting
    of the user's may let matrix products do so, too. Since PyTorch 2.9 its `allow_tf32` cannot be
    read inside, and a setting inherited from `torch.backends` is the part's own afterwards.
    """
    switches = _tf32_switches()
    before = [getattr(owner, name) for owner, name, _ in switches]
    for owner, name, off in switches:
        setattr(owner, name, off)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def allows_tf32() -> bool:
    """Return True if float32 on this machine's GPU may be computed in TF32 now."""
    settings = (getattr(owner, name) for owner, name, _ in _tf32_switches())
    return torch.cuda.is_available() and any(value in (True, "tf32") for value in settings)


def _tf32_switches() -> list[tuple[Any, str, Any]]:
    """Settings of TF32: where they are, their name, and the value that turns TF32 off."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # since PyTorch 2.9, which refuses a mixture of both kinds
        return [(part, "fp32_precision", "ieee") for part in (matmul, cudnn.conv, cudnn.rnn)]
    return [(part, "allow_tf32", False) for part in (matmul, cudnn)]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device without a wait: from the CPU through pinned memory."""
    can_pin = not (isinstance(tensor, FakeTensor) or torch.compiler.is_compiling())
    if device.type == "cuda" and not tensor.is_cuda and can_pin:
        tensor = tensor.pin_memory()
    # what arrives on a CPU is read at once
    return tensor.to(device, non_blocking=device.type == "cuda")


def one_ahead(
    raw: Iterable[Any], prepare: Callable[[Any], Any], device: torch.device
) -> Iterator[Any]:
    """Yield `prepare` of every item; on a CUDA GPU the next on a side stream meanwhile.

    The next begins before the current one is yielded, after which the consumer may wait.

    Args:
        prepare: enqueues work on the current stream; returns tensors in nested tuples.
    """
    if device.type != "cuda":
        yield from map(prepare, raw)
        return
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(main)  # weights and statistics may still be on their way

    def begin(item: Any) -> tuple[Any, torch.cuda.Event]:
        with torch.cuda.stream(side):
            return prepare(item), side.record_event()

    begun: Iterator[Any] = chain(map(begin, raw), [None])  # the last one has no next
    for (prepared, ready), _ in pairwise(begun):
        main.wait_event(ready)
        for leaf in tree_leaves(prepared):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(main)  # its memory is not reused before main has read it
        yield prepared


class HostCopy:
    """A copy of a tensor on its way to the CPU, to be read later.

    Reading it at once would wait until the device has finished everything begun before.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.detach().to("cpu", non_blocking=True)  # from a GPU to pinned memory
        stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
        self._copied = stream and stream.record_event()

    def values(self) -> list[float]:
        """The tensor's values, once they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._copy.tolist()


def to_host(tree: Any) -> Any:
    """Copy the tensors in nested dicts, lists and tuples to the CPU, also those already on it.

    A tensor that occurs twice, such as a frozen weight and its average, is copied once.
    """
    copies: dict[Any, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        key = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        return copies[key]

    return tree_map_only(Tensor, copy, tree)


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Put a module into eval mode, and its parameters out of autograd, inside the `with`."""
    training, before = module.training, [p.requires_grad for p in module.parameters()]
    module.eval().requires_grad_(False)
    try:
        yield module
    finally:
        module.train(training)
        for parameter, required in zip(module.parameters(), before, strict=True):
            parameter.requires_grad_(required)


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU, let this process keep freed memory for its next tensors.

    By default glibc returns the memory of large tensors to the system, and every training step
    requests it again, page by page: a step of LiteVAE-B at 128² took 1.4 times as long, in a tenth
    less memory. With another C library this does nothing.
    """
    if device.type != "cpu":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
    mallopt(M_MMAP_MAX, 0)  # allocate large blocks on the heap
    mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each call, after one unmeasured round.

    All are called in turn, repeatedly, so that other load on the machine affects them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values[1:]) for name, values in seconds.items()}


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def name_device(device: torch.device) -> str:
    """The vendor's name of the device; for a CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations a second that a GPU does at best in bf16 or fp32; None where they are not known.

    For fp32, those of TF32 where the GPU may compute in it.
    """
    if device.type != "cuda":
        return None
    name = name_device(device)
    # other chips, or a part of one: RTX 4090 Laptop GPU, RTX 3090 Ti, A100-SXM4-40GB MIG 1g.5gb
    if re.search(r"\b(Laptop|Mobile|Max-Q|Ti|SUPER|D|MIG)\b", name):
        return None
    found = [model for model in PEAKS if re.search(rf"\b{model}\b", name)]
    bf16, tf32, fp32 = PEAKS[max(found, key=len)] if found else (None, None, None)
    peak = bf16 if precision == "bf16" else tf32 if tf32 and allows_tf32() else fp32
    return peak and peak * 1e12


def trace_steps(
    stream: Iterable[T], step: Callable[[], int], window: str, path: Path,
    say: Callable[[str], None],
) -> Iterator[T]:  # fmt: skip
    """Yield from a stream of batches; write a trace of some of the steps on them.

    Args:
        step: returns the number of steps taken.
        window: "START:STOP", the steps after step START, up to step STOP.
        path: the .json.gz, a trace in Chrome's format, as torch.profiler writes it.
    """
    start, stop = map(int, window.split(":"))
    items = iter(stream)
    profiler: torch.profiler.profile | None = None
    if step() > start and not path.exists():
        say(f"run.profile={window}: not traced, for the run resumes after step {step()}")
    try:
        while True:
            if profiler is None and step() == start:
                profiler = torch.profiler.profile()  # of the CPU, and of a CUDA GPU
                profiler.start()
            elif profiler is not None and step() == stop:
                profiler.stop()
                finished, profiler, start = profiler, None, -1
                say(_write_trace(finished, path))
            try:
                item = next(items)
            except StopIteration:
                return
            yield item
    finally:
        if profiler is not None:  # the run has stopped
            profiler.stop()
            say(f"run.profile={window}: not traced, for the run stopped at step {step()}")


def _write_trace(profiler: torch.profiler.profile, path: Path) -> str:
    """Write a trace; return the line to print: an error is no reason to end a run."""
    try:
        with TemporaryDirectory() as folder:
            plain = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(plain))
            with plain.open("rb") as trace:
                write_atomically(path, lambda file: _compress(trace, file))
    except (LdmError, OSError) as error:
        return f"warning: no trace written: {error}"
    return f"trace: {path}: open it at https://ui.perfetto.dev"


def _compress(plain: IO[bytes], file: IO[bytes]) -> None:
    with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
        shutil.copyfileobj(plain, packed)
