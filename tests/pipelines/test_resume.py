"""A run killed at any step and resumed gives the bits of one that never stopped."""

import random
import signal
import time

import numpy as np
import pytest
from PIL import Image

from ldm.checkpoint import load_model
from ldm.logbook import read_rows
from tests.small import AUTOENCODER, DIFFUSION, ldm

LONG_AE = [*AUTOENCODER, "phases=[{resolution: 32, steps: 20}, {resolution: 64, steps: 12}]"]
LONG_LDM = [*DIFFUSION, "steps=40"]
# what stage two may do besides: each is killed and resumed as well
ON_THE_FLY = [
    *LONG_LDM, "augment.probability=0.3", "data={labels: true, flip: false}",
    "ema_stds=[0.05, 0.1]", "denoiser.uncertainty=true",
]  # fmt: skip
CACHED = [*LONG_LDM, "data={source: images, crop: center}", "--cache", "cache"]


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
    return {int(p.name) for p in (folder / "state").glob("[0-9]*")}


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
def test_killed_and_resumed_to_the_bit(name, seed, unbroken, tmp_path):
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
