import os
import platform
import subprocess
import sys

import pytest
import torch

from ldm.device import keep_freed_memory, resolve_device, resolve_precision
from ldm.errors import LdmError


def test_a_gpu_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LdmError, match="sees no CUDA device here: use cpu"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x"])
def test_a_device_that_means_nothing(name):
    with pytest.raises(LdmError, match=f"device '{name}'"):
        resolve_device(name)


def test_precision_as_asked():
    assert resolve_precision("fp32", torch.device("cpu")) == "fp32"
    assert resolve_precision("auto", torch.device("cpu")) in ("fp32", "bf16")


# Memory of 64 MiB, freed and asked for again: how many pages does the system hand out anew? Asked
# often, since the splinters left by aligning a tensor come between the first few.
ASK_AGAIN = """
import resource, sys, torch
from ldm.device import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory(torch.device("cpu"))
for _ in range(20):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back")
def test_freed_memory_is_kept_for_the_next_tensor():
    def faults(how: str) -> int:
        command = [sys.executable, "-c", ASK_AGAIN, how]
        plain = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        return int(subprocess.run(command, check=True, capture_output=True, env=plain).stdout)

    assert faults("kept") < faults("given back") / 4


def test_a_gpus_process_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("no need of it"))
    keep_freed_memory(torch.device("cuda"))


def test_a_system_without_that_library_is_left_alone(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    keep_freed_memory(torch.device("cpu"))
