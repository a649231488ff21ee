"""A run killed at any step and resumed gives the bits of one that never stopped."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

from ldm import run as run_module
from ldm.checkpoint import load_model
from ldm.errors import Interrupted
from ldm.logbook import read_rows
from ldm.run import Run
from ldm.run_folder import load_state
from pipelines import train_autoencoder, train_diffusion
from tests.pipelines.kill import Killed, forget, kill, outcome
from tests.small import AUTOENCODER, DIFFUSION, ROOT, autoencoder_recipe, diffusion_recipe, ldm

LONG_AE = [*AUTOENCODER, "phases=[{resolution: 32, steps: 20}, {resolution: 64, steps: 12}]"]
LONG_LDM = [*DIFFUSION, "steps=40"]
# what stage two may do besides: each is killed and resumed as well
ON_THE_FLY = [
    *LONG_LDM, "augment.probability=0.3", "data={labels: true, flip: false}",
    "ema_stds=[0.05, 0.1]", "denoiser.uncertainty=true",
]  # fmt: skip
CACHED = [
    *LONG_LDM, "data={source: images, crop: center}", "--cache", "cache",
    "denoiser={type: flow, shift: 2, uncertainty: true}",
]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Both stages, trained without a stop."""
    folder = tmp_path_factory.mktemp("unbroken")
    noise = np.random.default_rng(0).integers(0, 256, (24, 40, 40, 3), np.uint8)
    (folder / "images").mkdir()
    for i, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / "images" / f"{i:02d}.png")
    for words in (
        ["train-ae", "tiny", "--out", "ae", *LONG_AE],
        ["train-diffusion", "tiny", "--ae", folder / "ae", "--out", "ldm", *LONG_LDM],
        ["train-diffusion", "tiny", "--ae", folder / "ae", "--out", "on-the-fly", *ON_THE_FLY],
        ["train-diffusion", "tiny", "--ae", folder / "ae", "--out", "cached", *CACHED],
    ):
        done = ldm(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def stage(name: str, unbroken) -> list:
    if name == "autoencoder":
        return ["train-ae", "tiny", *LONG_AE, "--out", "again"]
    words = {"diffusion": LONG_LDM, "on-the-fly": ON_THE_FLY, "cached": CACHED}[name]
    return ["train-diffusion", "tiny", *words, "--ae", unbroken / "ae", "--out", "again"]


def states(folder) -> set[int]:
    return {int(p.parent.name) for p in (folder / "state").glob("[0-9]*/state.pt")}


def same_as_unbroken(name: str, folder, unbroken) -> None:
    whole = unbroken / {"autoencoder": "ae", "diffusion": "ldm"}.get(name, name)
    kind = "autoencoder" if name == "autoencoder" else "diffusion"
    assert load_model(folder, kind).sha256 == load_model(whole, kind).sha256
    # the log too tells one story: what the lost part had written is written once
    ours, theirs = (read_rows(path / "metrics.jsonl") for path in (folder, whole))
    assert [row["images_seen"] for row in ours] == [row["images_seen"] for row in theirs]
    assert ours[-1].get("val_psnr") == theirs[-1].get("val_psnr")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("autoencoder", 0), ("autoencoder", 1), ("diffusion", 0), ("diffusion", 1),
        ("on-the-fly", 2), ("cached", 3),
    ],
)  # fmt: skip
def test_resume_is_bit_exact(name, seed, unbroken, tmp_path):
    (tmp_path / "images").symlink_to(unbroken / "images")
    process = ldm(*stage(name, unbroken), cwd=tmp_path, start=True)
    folder, patience = tmp_path / "again", time.monotonic() + 120
    while not (folder.is_dir() and states(folder)) and time.monotonic() < patience:
        time.sleep(0.02)
    time.sleep(random.Random(seed).uniform(0, 1.0))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert states(folder), "it was killed before its first state"
    done = ldm(*stage(name, unbroken), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    same_as_unbroken(name, folder, unbroken)
    if name == "on-the-fly":
        ours, theirs = (
            {path.name: path.read_bytes() for path in (run / "ema").iterdir()}
            for run in (folder, unbroken / "on-the-fly")
        )
        assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_saves_the_current_step(number, unbroken, tmp_path):
    # saved by the signal alone: no periodic state would be due before the end
    words = [*stage("autoencoder", unbroken), "run.save_every_steps=1000"]
    process = ldm(*words, cwd=tmp_path, start=True)
    folder, patience = tmp_path / "again", time.monotonic() + 120
    while not read_rows(folder / "metrics.jsonl") and time.monotonic() < patience:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert len(states(folder)) == 1 and (folder / "ckpt.pt").is_file()
    assert not (folder / "result.json").exists()
    done = ldm(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    same_as_unbroken("autoencoder", folder, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["autoencoder", "diffusion", "cached"])
@pytest.mark.parametrize("lost", ["pipe", "/dev/full"])
def test_lost_console_saves_the_work(name, lost, unbroken, tmp_path):
    (tmp_path / "images").symlink_to(unbroken / "images")
    words = [*stage(name, unbroken), "run.save_every_steps=1000"]
    output = subprocess.PIPE if lost == "pipe" else os.open(lost, os.O_WRONLY)
    process = ldm(*words, cwd=tmp_path, start=True, stdout=output)
    if lost == "pipe":  # after the last line before the first step
        next(line for line in process.stdout if "; lr " in line)
        process.stdout.close()
    else:
        os.close(output)
    assert process.wait(120) == 128 + signal.SIGHUP
    folder = tmp_path / "again"
    assert not (folder / "result.json").exists()
    # stage two prints a line before its first step, and then has nothing to save
    saved = states(folder)
    assert saved or (lost != "pipe" and name != "autoencoder")
    done = ldm(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout or not saved
    same_as_unbroken(name, folder, unbroken)


@pytest.mark.slow
def test_hangup_under_torchrun_saves_the_current_step(unbroken, tmp_path):
    words = [*stage("autoencoder", unbroken), "run.save_every_steps=1000"]
    process = ldm(*words, cwd=tmp_path, start=True, processes=2)
    folder, patience = tmp_path / "again", time.monotonic() + 120
    while not read_rows(folder / "metrics.jsonl") and time.monotonic() < patience:
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    process.wait(120)
    assert len(states(folder)) == 1 and not (folder / "result.json").exists()


@pytest.mark.slow
def test_finished_run_is_left_alone(unbroken):
    done = ldm("train-ae", "tiny", *LONG_AE, "--out", "ae", cwd=unbroken)
    assert done.returncode == 0 and "already finished" in done.stdout


@pytest.mark.slow
def test_unfinished_run_keeps_its_autoencoder(tmp_path):
    """Without --ae it is the newest, except for a run that was stopped."""
    stage_two = [
        "train-diffusion", "tiny", *DIFFUSION, "steps=4000", "run.save_every_steps=2",
        "data.labels=true",  # what the network is given of its own accord is no difference
    ]  # fmt: skip
    assert ldm("train-ae", "tiny", *AUTOENCODER, cwd=tmp_path).returncode == 0
    process = ldm(*stage_two, cwd=tmp_path, start=True)
    patience, begun = time.monotonic() + 60, None
    while not (begun and states(begun)) and time.monotonic() < patience:
        marks = (
            mark for mark in tmp_path.glob("runs/*/run.json") if "diffusion" in mark.read_text()
        )
        begun = next((mark.parent for mark in marks), None)
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ldm("train-ae", "tiny", *AUTOENCODER, "lr=1e-4", cwd=tmp_path).returncode == 0

    process = ldm(*stage_two, cwd=tmp_path, start=True)
    before, patience = max(states(begun)), time.monotonic() + 60
    while max(states(begun)) <= before and time.monotonic() < patience:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert max(states(begun)) > before
    assert len(list(tmp_path.glob("runs/*"))) == 3


# ------------------------------------------------------------ killed at every moment, in process
# validations fall on saved states, between them, and on the last step
EVERY = ["run.validate_every_steps=2", "run.save_every_steps=4", "run.log_every_steps=3"]


def train_one(folder):
    recipe = autoencoder_recipe(*EVERY, "ema_half_life_images=8")
    return train_autoencoder.train_autoencoder(recipe, "tiny", folder)


def train_two(folder, autoencoder=None):
    recipe = diffusion_recipe(autoencoder or folder.parent / "ae" / "ckpt.pt", *EVERY)
    return train_diffusion.train_diffusion(recipe, "tiny", folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Outcomes of both stages that never stopped, and the folder they are in."""
    folder = tmp_path_factory.mktemp("whole")
    one = outcome(train_one(folder / "ae"), "autoencoder")
    return folder, one, outcome(train_two(folder / "ldm"), "diffusion")


@pytest.mark.parametrize(
    ("owner", "name", "images_seen"),
    [
        (train_autoencoder, "save_grid", 8),
        *(
            (owner, name, images_seen)
            for images_seen in (16, 32)
            for owner, name in (
                (train_autoencoder, "save_grid"),
                (run_module, "save_model"),
                (Run, "save"),
            )
        ),
    ],
)
def test_stage_one_killed_at_any_moment_ends_alike(
    owner, name, images_seen, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, owner, name, images_seen)
        train_one(tmp_path / "ae")
    assert outcome(train_one(tmp_path / "ae"), "autoencoder") == whole[1]


@pytest.mark.parametrize("images_seen", [16, 32])
@pytest.mark.parametrize(
    ("owner", "name"),
    [(train_diffusion, "save_grid"), (run_module, "save_model"), (Run, "save")],
)
def test_stage_two_killed_at_any_moment_ends_alike(
    owner, name, images_seen, whole, tmp_path, monkeypatch
):
    (tmp_path / "ae").symlink_to(whole[0] / "ae")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, owner, name, images_seen)
        train_two(tmp_path / "ldm")
    assert outcome(train_two(tmp_path / "ldm"), "diffusion") == whole[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["autoencoder", "diffusion"])
def test_killed_at_any_change_of_the_folder_ends_alike(kind, tmp_path):
    """Also where a signal has stopped it first, before a validation that was due."""
    command = [sys.executable, "-m", "tests.pipelines.killed", kind, tmp_path, "1", "5"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(map(str, command), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = outcome(tmp_path / "whole", kind)
    names = {path.name for path in tmp_path.iterdir()} - {"whole", "ae"}
    assert len([name for name in names if name.startswith("stopped-")]) > 4 and len(names) > 10
    for name in names:
        assert outcome(tmp_path / name, kind) == expected, name


@pytest.mark.parametrize("stage", ["one", "two"])
def test_validation_skipped_by_a_stop_is_made_on_resume(stage, whole, tmp_path, monkeypatch):
    (tmp_path / "ae").symlink_to(whole[0] / "ae")
    train, folder = {"one": (train_one, "again"), "two": (train_two, "ldm")}[stage]
    steps = iter(range(1, 9))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Run, "stop_requested", lambda run: stage == "one" and next(steps) == 2)
        if stage == "two":  # statistics are measured first, over two batches
            patch.setattr(Run, "stop_requested", lambda run: next(steps) == 4)
        train(tmp_path / folder)
    picture = {"one": "recon", "two": "samples"}[stage] + "-00000008.png"
    assert not (tmp_path / folder / "pictures" / picture).exists()
    kind = {"one": "autoencoder", "two": "diffusion"}[stage]
    assert outcome(train(tmp_path / folder), kind) == whole[1 if stage == "one" else 2]


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_loaded_state_is_let_go_before_training(stage, whole, tmp_path, monkeypatch):
    (tmp_path / "ae").symlink_to(whole[0] / "ae")
    train, job, folder = {
        "one": (train_one, train_autoencoder, "again"),
        "two": (train_two, train_diffusion, "ldm"),
    }[stage]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, Run, "save", 16)
        train(tmp_path / folder)
    loaded, alive, maps = [], [], Path("/proc/self/maps")  # of Linux

    def load(path):
        state = load_state(path)
        loaded.extend(weakref.ref(leaf) for leaf in tree_leaves(state) if torch.is_tensor(leaf))
        return state

    def step(*arguments):
        mapped = maps.is_file() and "state.pt" in maps.read_text()
        alive.append(mapped or any(ref() is not None for ref in loaded))
        return train_step(*arguments)

    train_step = job.train_step
    monkeypatch.setattr("ldm.run.load_state", load)
    monkeypatch.setattr(job, "train_step", step)
    train(tmp_path / folder)
    assert loaded and alive and not any(alive)


def test_last_state_of_an_earlier_version_still_ends(whole, tmp_path):
    """Such states lack the numbers: stage one validates again, stage two reads its log."""
    new = ("validated_at", "held_out", "best", "row", "log")
    shutil.copytree(whole[0], tmp_path / "old")
    forget(tmp_path / "old" / "ae", *new)
    found = outcome(train_one(tmp_path / "old" / "ae"), "autoencoder")
    assert all(found[part] == whole[1][part] for part in ("models", "result", "pictures"))

    forget(tmp_path / "old" / "ldm", *new)
    found = outcome(train_two(tmp_path / "old" / "ldm", whole[0] / "ae" / "ckpt.pt"), "diffusion")
    assert all(found[part] == whole[2][part] for part in ("models", "pictures"))
    # as the log rounds it
    assert float(found["result"]["loss"]) == pytest.approx(
        float(whole[2]["result"]["loss"]), rel=1e-5
    )
