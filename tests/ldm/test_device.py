import gzip
import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.device import (
    deterministic_algorithms,
    frozen,
    keep_freed_memory,
    name_device,
    peak_flops,
    resolve_device,
    resolve_precision,
    time_interleaved,
    to_device,
    trace_steps,
)
from ldm.errors import LdmError


def test_a_missing_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LdmError, match="sees no CUDA device: use cpu"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"


def test_tensors_without_values_are_not_pinned():
    with FakeTensorMode():  # as in the doctor's dry run
        moved = to_device(torch.zeros(3), torch.device("cuda:0"))
    assert moved.device == torch.device("cuda:0")


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(LdmError, match=f"device '{name}'"):
        resolve_device(name)


def test_requested_precision_is_kept():
    assert resolve_precision("fp32", torch.device("cpu")) == "fp32"
    assert resolve_precision("auto", torch.device("cpu")) in ("fp32", "bf16")


# Count the pages that the system provides for 64 MiB of freed memory that is requested again, after
# 20 requests: the splinters left by aligning a tensor come between the first few.
COUNT_FAULTS = """
import resource, torch
from ldm.device import keep_freed_memory

def faults():
    for _ in range(20):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = faults()
keep_freed_memory(torch.device("cpu"))
print(returned, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns memory")
def test_freed_memory_is_kept_for_the_next_tensor():
    plain = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    command = [sys.executable, "-c", COUNT_FAULTS]
    done = subprocess.run(command, check=True, capture_output=True, env=plain)
    returned, kept = map(int, done.stdout.split())
    assert kept < returned / 4


def test_memory_is_not_kept_for_a_gpu(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("no need of it"))
    keep_freed_memory(torch.device("cuda"))


def test_memory_is_not_kept_without_glibc(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    keep_freed_memory(torch.device("cpu"))


def test_calls_alternate_and_the_first_round_does_not_count(monkeypatch):
    order, clock = [], iter([0, 100, 0, 200, 0, 1, 0, 4, 0, 3, 0, 6, 0, 2, 0, 5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert time_interleaved(calls, 3, torch.device("cpu")) == {"a": 2, "b": 5}
    assert order == list("abababab")


def test_a_cpu_is_named_with_its_threads():
    threads = torch.get_num_threads()
    name = name_device(torch.device("cpu"))
    assert name.endswith(", 1 thread" if threads == 1 else f", {threads} threads")


def test_deterministic_algorithms_leave_the_settings_as_they_were(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(ZeroDivisionError), deterministic_algorithms():
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        1 / 0  # noqa: B018
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_deterministic_algorithms_come_before_cuda(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(LdmError, match="set CUBLAS_WORKSPACE_CONFIG"), deterministic_algorithms():
        pass
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A10", 125e12, 62.5e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H200", 989.4e12, 494.7e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("Tesla T4", None, 8.1e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),
        # other chips, or a part of one
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 3090 Ti", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("Some GPU of 2031", None, None),
    ],
)
def test_peak_of_a_gpu_by_its_name(name, bf16, fp32, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr("ldm.device.allows_tf32", lambda: True)
    device = torch.device("cuda")
    assert (peak_flops(device, "bf16"), peak_flops(device, "fp32")) == (bf16, fp32)


def test_without_tf32_the_peak_is_that_of_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr("ldm.device.allows_tf32", lambda: False)
    assert peak_flops(torch.device("cuda"), "fp32") == 19.5e12
    assert peak_flops(torch.device("cpu"), "fp32") is None


def train(steps, window, path, begin=0, stop=None):
    """Steps of a loop of two micro-batches each; return what it says."""
    said, taken = [], [begin]
    stream = trace_steps(range(2 * (steps - begin)), lambda: taken[0], window, path, said.append)
    for number, _ in enumerate(stream, 1):
        with torch.profiler.record_function(f"step {taken[0]}"):
            torch.ones(3) + 1
        taken[0] += number % 2 == 0
        if taken[0] == stop:
            stream.close()
            break
    return said


@pytest.mark.parametrize("window", ["0:2", "2:3", "1:4"])
def test_the_steps_of_the_window_are_traced(window, tmp_path):
    path = tmp_path / "profile.json.gz"
    [line] = train(4, window, path)
    assert line == f"trace: {path}: open it at https://ui.perfetto.dev"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    start, stop = map(int, window.split(":"))
    assert sorted(named) == sorted([f"step {step}" for step in range(start, stop)] * 2)


def test_a_run_that_resumes_after_the_beginning_is_not_traced(tmp_path):
    [line] = train(4, "1:3", tmp_path / "profile.json.gz", begin=2)
    assert line == "run.profile=1:3: not traced, for the run resumes after step 2"
    assert not any(tmp_path.iterdir())


def test_a_run_that_stops_in_the_window_ends_its_trace(tmp_path):
    assert train(4, "1:3", tmp_path / "profile.json.gz", stop=2) == [
        "run.profile=1:3: not traced, for the run stopped at step 2"
    ]
    assert not any(tmp_path.iterdir())
    assert len(train(4, "1:3", tmp_path / "profile.json.gz")) == 1  # another can begin


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "profile.json.gz").mkdir()
    [line] = train(4, "1:3", tmp_path / "profile.json.gz")
    assert line.startswith("warning: no trace written: could not write")


def test_frozen_disables_gradients_of_weights_only():
    judge = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))
    judge[0].bias.requires_grad_(False)
    x = torch.ones(1, 2, requires_grad=True)
    with frozen(judge) as still:
        assert not still.training
        still(x).sum().backward()
    assert x.grad is not None and judge[0].weight.grad is None
    assert judge.training and judge[0].weight.requires_grad and not judge[0].bias.requires_grad
