"""Every signal that stops a job leaves whole files, and is the job's exit status."""

import os
import signal
import subprocess
import sys
import time
from signal import SIGHUP, SIGINT, SIGTERM

import numpy as np
import pytest
from PIL import Image

from ldm.checkpoint import load_model, save_model
from ldm.run_folder import load_state
from tests.pipelines.untrained import make_model
from tests.small import AUTOENCODER, DIFFUSION, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="signals of POSIX"),
]

# the job sends itself signals: `first` at a step or file, `again` in the middle of a save
SCRIPT = """
import ast, os, sys, time
from pathlib import Path
import torch
import ldm.run, ldm.run_folder
from ldm.cli import main
from ldm.data import prepare
from pipelines import train_autoencoder, train_diffusion
from pipelines.sampling.sample_folder import SampleStore

if __name__ == "__main__":
    job, first, again, words = sys.argv[1], *map(ast.literal_eval, sys.argv[2:])
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    owner, name = {
        "train-ae": (train_autoencoder, "train_step"),
        "train-diffusion": (train_diffusion, "train_step"),
        "sample": (SampleStore, "write"),
        "data": (prepare, "write_shard"),
    }[job]
    inner, save, calls = getattr(owner, name), ldm.run_folder.torch.save, []

    def interrupted(*arguments):
        result = inner(*arguments)
        calls.append(1)
        if len(calls) == 3 and int(rank) == int(world) - 1:
            if first == "lost":
                full = os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, 1)
                print("into nothing", flush=True)
            elif first == "wait":
                Path("step").touch()
                time.sleep(1)
            else:
                os.kill(os.getpid(), first)
        return result

    def interrupted_save(tree, file, **how):
        # the state of the third step; the one before may still be written then
        if tree.get("images_seen") == 12:
            for number in again:
                os.kill(os.getpid(), number)
                until = time.monotonic() + 1  # the main thread takes signals one at a time
                while time.monotonic() < until:
                    save(torch.zeros(2**24), os.devnull)
        save(tree, file, **how)

    setattr(owner, name, interrupted)
    ldm.run_folder.torch.save = interrupted_save
    sys.argv = ["ldm", *words]
    try:
        main()
    except SystemExit as end:
        Path(f"status-{rank}").write_text(str(end.code))
        raise
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model to sample, its autoencoder, and images to prepare."""
    folder = tmp_path_factory.mktemp("inputs")
    model = load_model(make_model(folder / "model", 0), "diffusion")
    save_model(folder / "ae.pt", model.autoencoder)
    (folder / "images").mkdir()
    for i, pixels in enumerate(
        np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    ):
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    return folder


def command(job: str, inputs) -> list[str]:
    return {
        "train-ae": ["train-ae", "tiny", "--out", "out", *AUTOENCODER],
        "train-diffusion": [
            "train-diffusion", "tiny", "--ae", inputs / "ae.pt", "--out", "out", *DIFFUSION,
        ],
        "sample": [
            "sample", inputs / "model", "--n", "9", "--batch-size", "2", "--steps", "2",
            "--out", "out",
        ],
        "data": ["data", "prepare", inputs / "images", "out", "--size", "32", "--shard-size", "2"],
    }[job]  # fmt: skip


def start(job: str, first, again, inputs, cwd, processes: int = 1) -> subprocess.Popen:
    (cwd / "job.py").write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = list(map(str, command(job, inputs)))
    arguments = [job, repr(first), repr([*map(int, again)]), repr(words)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), "job.py", *arguments],
        cwd=cwd, env=os.environ | environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def saved(folder) -> list[int]:
    """The whole states in a run's folder, by images seen."""
    files = folder.glob("state/[0-9]*/state.pt")
    states = sorted((file.parent for file in files), key=lambda state: int(state.name))
    assert [load_state(state)["images_seen"] for state in states] == [int(s.name) for s in states]
    return [int(state.name) for state in states]


@pytest.mark.parametrize(
    ("job", "first", "again", "status"),
    [
        ("train-ae", SIGINT, [SIGINT], 130),
        ("train-ae", SIGTERM, [SIGTERM, SIGTERM, SIGINT, SIGHUP], 143),
        ("train-ae", SIGHUP, [SIGHUP, SIGTERM, SIGINT, SIGINT], 129),
        ("train-ae", "lost", [SIGTERM], 129),
        ("train-diffusion", SIGINT, [SIGINT, SIGTERM], 130),
        ("train-diffusion", SIGTERM, [SIGTERM], 143),
        ("train-diffusion", "lost", [SIGINT], 129),
    ],
)
def test_the_state_is_saved_whatever_signals_follow(job, first, again, status, inputs, tmp_path):
    process = start(job, first if first == "lost" else int(first), again, inputs, tmp_path)
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == status, errors
    assert errors.splitlines()[-1].endswith("run the same command to resume"), errors
    assert saved(tmp_path / "out") == [8, 12]
    load_model(tmp_path / "out", "autoencoder" if job == "train-ae" else "diffusion")
    assert not list((tmp_path / "out").rglob(".*.partial"))


def test_a_third_ctrl_c_aborts_the_saving_and_leaves_the_state_before_it(inputs, tmp_path):
    process = start("train-ae", int(SIGINT), [SIGINT, SIGINT], inputs, tmp_path)
    errors = process.communicate(timeout=240)[1]
    assert (process.returncode, errors.splitlines()[-1]) == (130, "interrupted")
    assert saved(tmp_path / "out") == [8]


@pytest.mark.parametrize("job", ["sample", "data"])
@pytest.mark.parametrize(
    ("first", "status"), [(SIGINT, 130), (SIGTERM, 143), (SIGHUP, 129), ("lost", 129)]
)
def test_other_jobs_keep_their_finished_files(job, first, status, inputs, tmp_path):
    process = start(job, first if first == "lost" else int(first), [], inputs, tmp_path)
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == status, errors
    assert errors.splitlines()[-1:] in ([], ["interrupted"]) or first == "lost"
    pattern = {"sample": "img*.png", "data": "*.tar"}[job]
    assert 3 <= len(list((tmp_path / "out").rglob(pattern))) < 9
    assert not list((tmp_path / "out").rglob(".*.partial"))


@pytest.mark.parametrize("to", ["one process", "all"])
def test_all_processes_of_torchrun_exit_alike(to, inputs, tmp_path):
    """A terminal's Ctrl-C reaches every process, and then torchrun sends it once more."""
    first, number = (int(SIGTERM), SIGTERM) if to == "one process" else ("wait", SIGINT)
    process = start("train-ae", first, [], inputs, tmp_path, processes=2)
    if to == "all":
        until = time.monotonic() + 240
        while not (tmp_path / "step").exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=240)[1]
    statuses = [(tmp_path / f"status-{rank}").read_text() for rank in range(2)]
    assert statuses == [str(128 + number)] * 2, errors[-3000:]
    assert saved(tmp_path / "out")[-1] % 4 == 0 and saved(tmp_path / "out")[-1] >= 12
    assert not (tmp_path / "out" / "result.json").exists()
