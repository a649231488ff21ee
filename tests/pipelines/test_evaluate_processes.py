"""Several processes measure together, and none waits for one that has failed."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from ldm.config import to_tree
from ldm.data import DataConfig
from tests.pipelines.measuring.reconstructed import crops, save_images, save_run
from tests.pipelines.measuring.two_processes import GOOD, ONE_SMALL
from tests.small import ROOT


@pytest.mark.slow
def test_what_goes_wrong_in_one_process_ends_it_in_both(tmp_path):
    """Without a launcher that would end the other one."""
    images = crops(16)
    save_images(tmp_path / GOOD, images)
    images[5] = np.zeros((16, 16, 3), np.uint8)
    small = save_images(tmp_path / ONE_SMALL, images)
    save_run(tmp_path / "run")
    trained_on = to_tree(DataConfig(source=str(small), workers=0))
    run = save_run(tmp_path / "trained_on_small", {"data": trained_on})

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.pipelines.measuring.two_processes", str(tmp_path)]
    both = [
        subprocess.Popen(
            command, cwd=tmp_path, env=env | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        for process in both:
            _, said = process.communicate(timeout=180)
            assert process.returncode == 0, said
    finally:
        for process in both:
            process.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in "01")

    assert first.pop("main") == "KeyError: 'a bug'"
    assert second.pop("main") == "RuntimeError: process 0 failed: KeyError: 'a bug'"
    assert first.pop("model") == "RuntimeError: process 1 failed: KeyError: 'a bug'"
    assert second.pop("model") == "KeyError: 'a bug'"
    assert first == second
    too_small = f"{small}/005.png is 16×16, smaller than the 32×32"
    assert first["measure"].startswith(f"LdmError: {too_small}")
    assert first["survey"] == "LdmError: one is gone"
    unknown = f"not known whether {run} was trained on these images: "
    assert first["overlap"].startswith(unknown + too_small)
    assert first["training data"] == f"{unknown}not on this machine"
    assert first["data"] == "LdmError: not on this machine"
    assert first["at last"] == 16
