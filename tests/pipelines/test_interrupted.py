"""Commands that fill a folder: two at once, and one that is killed at any of its file changes."""

from contextlib import ExitStack
from functools import partial

import pytest

from ldm.checkpoint import ModelFile, save_model
from ldm.config import to_tree
from ldm.data.prepare import prepare
from ldm.errors import LdmError
from ldm.files import lock
from ldm.run import RunConfig, start_run
from pipelines.analysis.scale import analyze_scale
from pipelines.demo import run_demo
from pipelines.exchange import export_autoencoder
from pipelines.reproduce.runner import reproduce
from pipelines.reproduce.tables import find_tables
from pipelines.sample import sample_images
from pipelines.sampling.sample_folder import open_for_writing
from pipelines.sampling.settings import Sampling
from tests.kills import contents, killed_at
from tests.ldm.data.pictures import noise, png_folder
from tests.small import autoencoder_recipe, sdvae


@pytest.fixture
def images(tmp_path):
    return png_folder(tmp_path / "images", [noise(n) for n in range(5)])


def train(out):
    with start_run("autoencoder", "tiny", autoencoder_recipe(), RunConfig(device="cpu"), 1, out):
        pass


@pytest.fixture
def autoencoder(tmp_path):
    ae = sdvae()
    save_model(tmp_path / "ae.pt", ModelFile("autoencoder", to_tree(ae.config), ae.state_dict()))
    return tmp_path / "ae.pt"


def test_a_row_of_a_table_is_built_by_one_command_at_a_time(tmp_path):
    row = find_tables("t8")[0].rows[0]
    out = tmp_path / "smoke" / row.table / row.name
    with lock(out), pytest.raises(LdmError, match=f"^another process is at work in {out}: "):
        reproduce("t8", "smoke", out=tmp_path)
    assert [path.name for path in out.iterdir()] == [".lock"]


FILL = {
    "prepare": lambda images, out: prepare(images, out, 16, workers=0),
    "train": lambda images, out: train(out),
    "demo": lambda images, out: run_demo(out, fresh=True),
}


@pytest.mark.parametrize("command", FILL)
def test_a_folder_is_filled_by_one_command_at_a_time(images, tmp_path, command):
    refuse_in(tmp_path / "out", lambda out: FILL[command](images, out))


def test_samples_are_drawn_by_one_command_at_a_time(model, tmp_path):
    refuse_in(tmp_path / "out", lambda out: sample_images(model, 1, out))


def test_an_analysis_is_written_by_one_command_at_a_time(images, autoencoder, tmp_path):
    def analyze(out):
        analyze_scale([autoencoder], str(images), [32], split="all", out=out, fid=False)

    refuse_in(tmp_path / "out", analyze)


def refuse_in(out, fill):
    with lock(out):
        with pytest.raises(LdmError, match=r"^another process is at work in .*: .*anoth") as error:
            fill(out)
        assert "\n" not in str(error.value)
        assert [path.name for path in out.iterdir()] == [".lock"]


def open_samples(out):
    settings = to_tree(Sampling()) | {"n": 2, "seed": 0, "model": {"sha256": "0"}, "weaker": None}
    with ExitStack() as held:
        open_for_writing(out, settings | {"files": "png"}, held)


JOBS = {
    "prepare": lambda images, model, out: prepare(images, out, 16, shard_size=3, workers=0),
    "samples": lambda images, model, out: open_samples(out),
    "hub": lambda images, model, out: export_autoencoder(out, "hub", model),
}


@pytest.mark.parametrize("command", JOBS)
def test_the_same_command_finishes_what_a_kill_interrupts(images, autoencoder, tmp_path, command):
    job = partial(JOBS[command], images, autoencoder)
    job(tmp_path / "whole")
    whole, number = contents(tmp_path / "whole"), 1
    while killed_at(number, partial(job, out := tmp_path / f"out-{number}")):
        try:
            job(out)
        except LdmError as error:  # an export that the kill found complete
            assert "exists: give another name" in str(error)
        assert contents(out) == whole
        number += 1
    assert number > 3
