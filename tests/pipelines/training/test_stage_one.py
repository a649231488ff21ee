import json
from pathlib import Path

import pytest

from ldm.config import load_preset, resolve
from ldm.errors import LdmError
from ldm.run_folder import describe_run
from pipelines.recipes import DiffusionRecipe, find_stage_one


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def autoencoder(name: str, preset: str) -> Path:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"kind": "autoencoder", "preset": preset}))
    (folder / "ckpt.pt").touch()
    (folder / "result.json").touch()
    return folder


def recipe(*settings: str) -> DiffusionRecipe:
    return resolve(DiffusionRecipe, load_preset("diffusion", "tiny"), settings)


def begun(folder: Path, preset: str, *settings: str) -> Path:
    describe_run(folder, "diffusion", preset, recipe(*settings))
    return folder


def found(given: str = "", preset: str = "tiny", out: Path | None = None, *settings: str) -> str:
    return str(find_stage_one(recipe(f"autoencoder={given!r}", *settings), preset, out))


def test_an_autoencoder_is_a_file_a_run_a_preset_or_the_newest():
    dwt, tiny = autoencoder("1", "dwt"), autoencoder("2", "tiny")
    assert found() == f"{tiny}/ckpt.pt"
    assert found("dwt") == f"{dwt}/ckpt.pt"
    assert found(f"{dwt}") == found(f"{dwt}/ckpt.pt") == f"{dwt}/ckpt.pt"
    assert found("other.pt") == "other.pt"  # loading it says what is wrong
    Path("dwt").mkdir()
    assert found("dwt") == "dwt"


def test_a_path_below_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.pt").touch()
    assert found("~/mine.pt") == str(tmp_path / "mine.pt")


def test_a_preset_never_trained_is_told_with_its_command():
    with pytest.raises(LdmError, match=r"no dwt run .*`ldm train-ae dwt` first"):
        found("dwt")


def test_the_run_the_command_began_keeps_its_autoencoder():
    autoencoder("1", "tiny")
    newest = autoencoder("2", "tiny")
    begun(Path("runs/a"), "tiny", "autoencoder=runs/1/ckpt.pt", "steps=7")
    assert found("", "tiny", None, "steps=7") == "runs/1/ckpt.pt"
    assert found("tiny", "tiny", None, "steps=7") == "runs/1/ckpt.pt"
    dwt = autoencoder("3", "dwt")
    assert found("dwt", "tiny", None, "steps=7") == f"{dwt}/ckpt.pt"  # not what that run has
    assert found("", "tiny", None, "steps=8") == f"{dwt}/ckpt.pt"
    # of equal settings, but another row of the paper
    assert found("", "other", None, "steps=7") == f"{dwt}/ckpt.pt"
    assert found(f"{newest}", "tiny", None, "steps=7") == f"{newest}/ckpt.pt"


def test_a_run_of_a_folder_that_was_given_is_found_there():
    newest = autoencoder("2", "tiny")
    begun(Path("mine"), "tiny", "autoencoder=x.pt")
    assert found("", "tiny", Path("mine")) == "x.pt"
    assert found("", "tiny", Path("new")) == f"{newest}/ckpt.pt"
