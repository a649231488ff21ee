"""`ldm neighbours`: output and arguments."""

import json

import pytest
import typer
from typer.testing import CliRunner

from ldm.cli.measure import neighbours
from pipelines.sample import sample_images
from tests.pipelines.test_neighbours import pictures, save
from tests.pipelines.untrained import make_model


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(neighbours)
    return lambda *words: CliRunner().invoke(app, [*map(str, words)])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two samples of a model that says it learnt from five pictures, two more held out."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "data", pictures(7, seed=1))
    data = f"data={{source: {tmp_path / 'data'}, held_out: 2, workers: 0}}"
    model = make_model(tmp_path / "runs" / "x", 0, settings=(data,))
    return sample_images(model, 2, steps=1, device="cpu")


def test_it_measures_the_newest_samples(folder, command):
    done = command("--count", 1, "--nearest", 2)
    assert done.exit_code == 0, done.output
    result = json.loads((folder / "neighbours.json").read_text())
    assert result["space"] == "latents" and len(result["samples"]) == 1
    assert len(result["samples"][0]["nearest"]) == 2
    ours, theirs = result["median_nearest"]["samples"], result["median_nearest"]["held_out"]
    assert (
        "median distance to the nearest training image, standard deviations of the latents: "
        f"samples {ours:.3f}, held-out images {theirs:.3f}" in done.output
    )
    assert (folder / "neighbours.png").is_file()


def test_the_space_and_the_data_can_be_named(folder, command):
    done = command(folder, "--data", "photos", "--space", "pixels")
    assert done.exit_code == 0 and "levels of 255" in done.output
    assert command(folder, "--space", "colours").exit_code == 2
