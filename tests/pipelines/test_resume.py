"""A run killed at any step and resumed gives the bits of one that never stopped."""

import random
import signal
import time

import pytest

from ldm.checkpoint import load_model
from ldm.logbook import read_rows
from tests.small import AUTOENCODER, DIFFUSION, ldm

LONG_AE = [*AUTOENCODER, "phases=[{resolution: 32, steps: 20}, {resolution: 64, steps: 12}]"]
LONG_LDM = [*DIFFUSION, "steps=40"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Both stages, trained without a stop."""
    folder = tmp_path_factory.mktemp("unbroken")
    for words in (
        ["train-ae", "tiny", "--out", "ae", *LONG_AE],
        ["train-diffusion", "tiny", "--ae", folder / "ae", "--out", "ldm", *LONG_LDM],
    ):
        done = ldm(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def stage(name: str, unbroken) -> list:
    if name == "autoencoder":
        return ["train-ae", "tiny", *LONG_AE, "--out", "again"]
    return ["train-diffusion", "tiny", *LONG_LDM, "--ae", unbroken / "ae", "--out", "again"]


def states(folder) -> set[int]:
    return {int(p.name) for p in (folder / "state").glob("[0-9]*")}


def same_as_unbroken(kind: str, folder, unbroken) -> None:
    whole = unbroken / ("ae" if kind == "autoencoder" else "ldm")
    assert load_model(folder, kind).sha256 == load_model(whole, kind).sha256
    # the log too tells one story: what the lost part had written is written once
    ours, theirs = (read_rows(path / "metrics.jsonl") for path in (folder, whole))
    assert [row["images_seen"] for row in ours] == [row["images_seen"] for row in theirs]
    assert ours[-1].get("val_psnr") == theirs[-1].get("val_psnr")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["autoencoder", "diffusion"])
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_and_resumed_to_the_bit(kind, seed, unbroken, tmp_path):
    process = ldm(*stage(kind, unbroken), cwd=tmp_path, start=True)
    folder, patience = tmp_path / "again", time.monotonic() + 120
    while not (folder.is_dir() and states(folder)) and time.monotonic() < patience:
        time.sleep(0.02)
    time.sleep(random.Random(seed).uniform(0, 1.0))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert states(folder), "it was killed before its first state"
    done = ldm(*stage(kind, unbroken), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    same_as_unbroken(kind, folder, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_stop_saves_the_very_step(number, unbroken, tmp_path):
    # saved by the signal alone: no periodic state would be due before the end
    words = [*stage("autoencoder", unbroken), "run.save_every_steps=1000"]
    process = ldm(*words, cwd=tmp_path, start=True)
    folder, patience = tmp_path / "again", time.monotonic() + 120
    while not read_rows(folder / "metrics.jsonl") and time.monotonic() < patience:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == 130
    assert len(states(folder)) == 1 and (folder / "ckpt.pt").is_file()
    assert not (folder / "result.json").exists()
    done = ldm(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    same_as_unbroken("autoencoder", folder, unbroken)


@pytest.mark.slow
def test_a_finished_run_is_left_alone(unbroken):
    done = ldm("train-ae", "tiny", *LONG_AE, "--out", "ae", cwd=unbroken)
    assert done.returncode == 0 and "finished already" in done.stdout


@pytest.mark.slow
def test_the_same_command_goes_on_though_another_autoencoder_was_trained_since(tmp_path):
    """Left out, the autoencoder is the newest: but a run that was stopped keeps its own."""
    stage_two = ["train-diffusion", "tiny", *DIFFUSION, "steps=4000", "run.save_every_steps=2"]
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
