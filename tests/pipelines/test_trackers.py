"""Both stages with experiment trackers: what these get, and that training depends on none."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from accelerate import tracking
from accelerate.utils import LoggerType

from ldm.checkpoint import load_model
from ldm.config import flatten
from ldm.errors import Interrupted, LdmError
from ldm.logbook import read_rows
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_diffusion import train_diffusion
from tests.ldm.recorder import Recorder
from tests.small import AUTOENCODER, ROOT, autoencoder_recipe, diffusion_recipe

RECORDED = "run.trackers=[recorder]"
SHORT = "phases=[{resolution: 32, steps: 4}]"


@pytest.fixture
def recorder(monkeypatch) -> type[Recorder]:
    return Recorder.register(monkeypatch)


def calls_of(tracker: Recorder, name: str) -> list[tuple]:
    return [call[1:] for call in tracker.calls if call[0] == name]


@pytest.mark.slow
def test_both_stages_give_trackers_their_rows_pictures_and_settings(tmp_path, recorder):
    ae = train_autoencoder(autoencoder_recipe(SHORT, RECORDED), "tiny", tmp_path / "ae")
    recipe = diffusion_recipe(ae / "ckpt.pt", "steps=4", RECORDED)
    ldm = train_diffusion(recipe, "tiny", tmp_path / "ldm")
    for folder, tracker, title in zip(
        (ae, ldm), recorder.made, ("reconstructions", "samples"), strict=True
    ):
        rows = read_rows(folder / "metrics.jsonl")
        logged = [{"images_seen": step, **row} for row, step in calls_of(tracker, "log")]
        assert [row.keys() for row in logged] == [row.keys() for row in rows]
        assert logged == [pytest.approx(row, rel=1e-5) for row in rows]
        [(pictures, step)] = calls_of(tracker, "images")
        assert pictures.keys() == {title} and step == 16
        [(config,)] = calls_of(tracker, "config")
        written = flatten(yaml.safe_load((folder / "config.yaml").read_text()))
        assert config.keys() == written.keys() and config["lr"] == written["lr"]
        assert tracker.calls[-1] == ("finish",)
        assert not (folder / "tensorboard").exists()


@pytest.mark.slow
def test_training_does_not_depend_on_trackers(tmp_path, recorder, monkeypatch):
    """One that seeds every generator and then fails, and a resume with other trackers."""

    def start(tracker):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(0)

    def fail(tracker, values, step=None):
        raise ConnectionError

    monkeypatch.setattr(Recorder, "start", start)
    monkeypatch.setattr(Recorder, "log", fail)
    recipes = [autoencoder_recipe(SHORT, *words) for words in (["run.trackers=[]"], [], [RECORDED])]
    whole = train_autoencoder(recipes[0], "tiny", tmp_path / "whole")

    import pipelines.train_autoencoder as job

    steps, train_step = [], job.train_step

    def stopped(run, *rest):
        steps.append(1)
        if len(steps) == 2:
            run.request_stop()
        return train_step(run, *rest)

    monkeypatch.setattr(job, "train_step", stopped)
    with pytest.raises(Interrupted):
        train_autoencoder(recipes[1], "tiny", tmp_path / "parts")
    parts = train_autoencoder(recipes[2], "tiny", tmp_path / "parts")
    assert len(steps) == 4 and len(recorder.made) == 1
    a, b = (load_model(folder, "autoencoder") for folder in (whole, parts))
    assert a.sha256 == b.sha256
    last, same = (read_rows(folder / "metrics.jsonl")[-1] for folder in (whole, parts))
    assert last == same

    train_autoencoder(recipes[2], "tiny", parts)
    assert len(recorder.made) == 1  # of a finished run, nothing is opened


def test_a_missing_tracker_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    recipe = autoencoder_recipe("run.trackers=[tensorboard, mlflow]")
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    with pytest.raises(LdmError, match="mlflow is not installed"):
        train_autoencoder(recipe, "tiny", tmp_path / "run")
    assert not (tmp_path / "run").exists()


REFUSED = """
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
class Refused(GeneralTracker):
    name, requires_logging_directory, tracker = "refused", False, None
    def __init__(self, project):
        raise ValueError("no")
LOGGER_TYPE_TO_CLASS["refused"] = Refused
from ldm.cli import main
main()
"""


@pytest.mark.slow
def test_a_tracker_that_does_not_start_stops_all_processes(tmp_path):
    """Only the main process starts it, and it waits until the other has its error, too."""
    (tmp_path / "refused.py").write_text(REFUSED)
    words = ["train-ae", "tiny", *AUTOENCODER, "run.trackers=[refused]", "--out", "run"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", "refused.py", "--", *words]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "COLUMNS": "200"}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode != 0
    # not by line: two processes write at once, and the launcher stops one that is still writing
    told = (
        "process 0 failed and waits for the others: LdmError: run.trackers: refused did not start"
    )
    assert told in done.stderr, done.stderr
    assert done.stderr.count("refused did not start (no): correct its settings") >= 2, done.stderr
