"""Two processes are one run: the same data, in the same order, and equal weights on both."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from ldm.checkpoint import load_model
from ldm.run_folder import latest_state, load_state
from tests.small import AUTOENCODER, DIFFUSION, ROOT, ldm, sdvae

# A process prints what it holds when it is done: the fingerprint of its networks and averages,
# buffers included, and the images it saw.
SPY = """
import sys
from pathlib import Path
from torch import nn
import pipelines.{stage} as job
from ldm.checkpoint import fingerprint
seen, original = [], job.train_step
def spy(run, *rest):
    result = original(run, *rest)
    spy.run, spy.parts = run, rest[0].parts
    return result
job.train_step = spy
batches = job.batches
def watched(*args, **kwargs):
    for batch in batches(*args, **kwargs):
        seen.extend(batch.k.tolist())
        yield batch
job.batches = watched
from ldm.cli import main
try:
    main()
finally:
    modules = {{n: part for n, part in spy.parts.items() if isinstance(part, nn.Module)}}
    weights = fingerprint(nn.ModuleDict(modules).state_dict())
    path = Path(f"rank{{spy.run.rank}}-of-{{spy.run.world}}")
    path.write_text(weights + " " + " ".join(map(str, seen)))
"""


def launch(folder, stage: str, words: list, processes: int) -> list[tuple[str, list[int]]]:
    """(fingerprint of the weights, images seen) of every process."""
    script = folder / "spy.py"
    script.write_text(SPY.format(stage=stage))
    env = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={processes}", str(script), "--", *map(str, words),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [
        (folder / f"rank{rank}-of-{processes}").read_text().split() for rank in range(processes)
    ]
    return [(weights, list(map(int, seen))) for weights, *seen in found]


def weights_of(run, name: str) -> torch.Tensor:
    state = load_state(latest_state(run / "state"))[name]
    return torch.cat([t.flatten().float() for t in state.values()])


def compare(one, two, folder, name: str, skip: int = 0) -> None:
    (_, alone), ((weights_a, seen_a), (weights_b, seen_b)) = one[0], two
    assert weights_a == weights_b
    # of every batch of four, each takes every second
    merged = [k for pair in zip(seen_a, seen_b, strict=True) for k in pair]
    assert merged == alone
    # and the update is the same up to the order of a sum
    a, b = (weights_of(folder / run, name) for run in ("one", "two"))
    assert (a - b).norm() / a.norm() < 0.02


@pytest.mark.slow
def test_stage_one_and_two_on_two_processes(tmp_path):
    words = ["train-ae", "tiny", *AUTOENCODER]
    one = launch(tmp_path, "train_autoencoder", [*words, "--out", "one"], 1)
    two = launch(tmp_path, "train_autoencoder", [*words, "--out", "two"], 2)
    compare(one, two, tmp_path, "autoencoder")

    (tmp_path / "ldm").mkdir()
    words = ["train-diffusion", "tiny", "--ae", tmp_path / "one", *DIFFUSION]
    # dropout is drawn per process: without it one process and two compute the same
    words.append("network.dropout=0")
    one = launch(tmp_path / "ldm", "train_diffusion", [*words, "--out", "one"], 1)
    two = launch(tmp_path / "ldm", "train_diffusion", [*words, "--out", "two"], 2)
    compare(one, two, tmp_path / "ldm", "objective")

    # sampling shares the images out, and makes the same ones
    for run, processes in (("a", 1), ("b", 2)):
        done = ldm(
            "sample", "ldm/one", "--n", "6", "--batch-size", "2", "--steps", "3",
            "--precision", "fp32", "--out", run, cwd=tmp_path, processes=processes,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    pictures = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("img*.png"))
    assert len(pictures) == 6
    for picture in pictures:
        assert (tmp_path / "a" / picture).read_bytes() == (tmp_path / "b" / picture).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--from", "--teacher"])
def test_given_weights_on_two_processes(how, tmp_path):
    sdvae().save_pretrained(tmp_path / "vae")
    small = [word for word in AUTOENCODER if not word.startswith(("decoder", "adversarial"))]
    if how == "--from":
        small = [word for word in small if not word.startswith("encoder")]
    # a rate so high that a difference between the processes would show
    small += ["loss.lpips=0", "data.source=photos", "lr=1e-3", "teacher.statistics_images=8"]
    words = ["train-ae", how, tmp_path / "vae", *small]
    words += ["encoder.depth=1"] if how == "--teacher" else ["adversarial.start=0"]
    one = launch(tmp_path, "train_autoencoder", [*words, "--out", "one"], 1)
    two = launch(tmp_path, "train_autoencoder", [*words, "--out", "two"], 2)
    compare(one, two, tmp_path, "autoencoder")
    stds = [
        load_model(tmp_path / run, "autoencoder").provenance.get("teacher_latent_std")
        for run in ("one", "two")
    ]
    assert stds[0] == pytest.approx(stds[1], rel=1e-5) if how == "--teacher" else stds == [None] * 2


@pytest.mark.slow
def test_resume_on_three_processes_is_bit_exact(tmp_path):
    """Three, because two numbers add up the same in either order."""
    words = ["train-ae", "tiny", *AUTOENCODER, "batch_size=6", "run.keep_states=9"]
    for run in ("whole", "again"):
        done = ldm(*words, "--out", run, cwd=tmp_path, processes=3)
        assert done.returncode == 0, done.stderr[-3000:]
        if run == "whole":
            # as a kill after the first state would have left it
            shutil.copytree(tmp_path / "whole", tmp_path / "again")
            for left in ("result.json", "ckpt.pt", "ckpt.safetensors"):
                (tmp_path / "again" / left).unlink()
            states = (tmp_path / "again" / "state").iterdir()
            first, *later = sorted(states, key=lambda state: int(state.name))
            for state in later:
                shutil.rmtree(state)
    assert f"resuming from again/state/{first.name}" in done.stdout
    ours, theirs = (load_model(tmp_path / run, "autoencoder") for run in ("again", "whole"))
    assert ours.sha256 == theirs.sha256


@pytest.mark.slow
def test_batch_that_does_not_divide_is_a_one_line_error(tmp_path):
    done = ldm("train-ae", "tiny", *AUTOENCODER, "batch_size=3", cwd=tmp_path, processes=2)
    assert done.returncode != 0
    assert re.search(r"error: batch_size=3 does not divide", done.stderr)
