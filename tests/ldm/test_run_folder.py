import json

import pytest
import yaml

from ldm.config import Config
from ldm.errors import LdmError
from ldm.run import RunConfig
from ldm.run_folder import differences, is_finished, new_or_unfinished, newest_run


class Recipe(Config):
    lr: float = 1e-3
    """Learning rate."""
    run: RunConfig = RunConfig()
    """The run."""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_new_run_is_named_and_described():
    folder = new_or_unfinished("autoencoder", "tiny", Recipe(), None)
    assert folder.parent.name == "runs" and folder.name.endswith("-tiny")
    assert yaml.safe_load((folder / "config.yaml").read_text())["lr"] == 1e-3
    described = json.loads((folder / "run.json").read_text())
    assert described["kind"] == "autoencoder" and described["versions"]["torch"]


def test_the_same_command_finds_the_unfinished_run():
    first = new_or_unfinished("autoencoder", "tiny", Recipe(), None)
    assert new_or_unfinished("autoencoder", "tiny", Recipe(), None) == first
    watched = Recipe(run=RunConfig(log_every_steps=7))
    assert new_or_unfinished("autoencoder", "tiny", watched, None) == first


def test_another_setting_another_stage_or_a_finished_run_begins_anew(tmp_path):
    first = new_or_unfinished("autoencoder", "tiny", Recipe(), tmp_path / "runs" / "first")
    assert new_or_unfinished("autoencoder", "tiny", Recipe(lr=1e-4), None) != first
    assert new_or_unfinished("diffusion", "tiny", Recipe(), None) != first
    (first / "result.json").write_text("{}")
    assert is_finished(first)
    assert new_or_unfinished("autoencoder", "tiny", Recipe(), None) != first


def test_a_folder_of_another_configuration_is_refused_by_its_keys(tmp_path):
    folder = new_or_unfinished("autoencoder", "tiny", Recipe(), tmp_path / "mine")
    assert differences(folder, Recipe(lr=1e-4)) == ["lr"]
    with pytest.raises(LdmError, match=r"another configuration \(lr\)"):
        new_or_unfinished("autoencoder", "tiny", Recipe(lr=1e-4), folder)
    with pytest.raises(LdmError, match="stage 'autoencoder', not 'diffusion'"):
        new_or_unfinished("diffusion", "tiny", Recipe(), folder)


def test_the_newest_run_that_fits(tmp_path):
    with pytest.raises(LdmError, match="`ldm train-ae` first"):
        newest_run("autoencoder")
    for name in ("a", "b"):
        folder = new_or_unfinished("autoencoder", "x", Recipe(), tmp_path / "runs" / name)
    (tmp_path / "runs" / "a" / "ckpt.pt").touch()
    assert newest_run("autoencoder").name == "a"
    (folder / "ckpt.pt").touch()
    assert newest_run("autoencoder").name == "b"
