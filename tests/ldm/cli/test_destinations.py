"""Every command that writes refuses a destination that cannot be written, in one line."""

import sys
from pathlib import Path

import pytest

from autoencoders.sdvae.formats import write_diffusers
from ldm.checkpoint import ModelFile, save_model
from ldm.cli import main
from ldm.config import to_tree
from tests import small
from tests.pipelines.measuring.fid_sides import pictures, write_folder
from tests.pipelines.untrained import make_model

AUTOENCODER = ["ae.pt", "--data", "images", "--split", "all", "--device", "cpu"]
CACHED = ["--ae", "ae.pt", "data.source=images", "data.crop=center", "resolution=16"]
FOLDERS = {
    "data prepare": ["images", "OUT", "--size", "16", "--workers", "2"],
    "train-ae": ["tiny", "--out", "OUT", "loss.lpips=0"],
    "train-diffusion": ["tiny", "--ae", "ae.pt", "--out", "OUT"],
    "train-diffusion --cache": ["OUT", "tiny", *CACHED],
    "sample": ["model", "--n", "1", "--steps", "1", "--out", "OUT", "--device", "cpu"],
    "analyze latents": [*AUTOENCODER, "--resolution", "24", "--out", "OUT"],
    "analyze mmd": [*AUTOENCODER, "--resolution", "24", "--out", "OUT"],
    "analyze features": [*AUTOENCODER, "--resolution", "24", "--out", "OUT"],
    "analyze scale": [*AUTOENCODER, "--resolutions", "24", "--no-fid", "--out", "OUT"],
    "bench": ["litevae-s", "--device", "cpu", "--out", "OUT"],
    "demo": ["--out", "OUT", "--fresh"],
    "reproduce": ["t8", "--scale", "smoke", "--out", "OUT"],
    "export": ["ae.pt", "OUT", "--force"],
    "export --format hub": ["ae.pt", "OUT", "--force"],
    "export --format unet": ["model", "OUT", "--force"],
}
FILES = {
    "fid": ["images", "--data", "images", "--out", "OUT.json", "--device", "cpu"],
    "eval-ae": [*AUTOENCODER, "--resolution", "16", "--no-fid", "--out", "OUT.json"],
    "report": ["model", "--out", "OUT.html"],
    "import": ["vae", "OUT.pt", "--force"],
    "import --diffusion": ["pipeline", "OUT.pt", "--force"],
    "export --format compvis": ["ae.pt", "OUT.ckpt", "--force"],
    "ema": ["model", "--std", "0.1", "--out", "OUT.pt"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with models, images and, in the way, a file and a folder of any ending."""
    place = tmp_path_factory.mktemp("place")
    make_model(place / "model", 0)
    write_folder(place / "images", pictures(8, 0))
    ae = small.sdvae()
    save_model(place / "ae.pt", ModelFile("autoencoder", to_tree(ae.config), ae.state_dict()))
    write_diffusers(place / "vae", ae)
    (place / "a-file").write_text("kept")
    for ending in ("json", "html", "pt", "ckpt"):
        (place / f"a-folder.{ending}").mkdir()
    return place


def contents(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in place.rglob("*")}


@pytest.mark.parametrize("out", ["a-file/x", "a-file/x/y", "/proc/none/x", "a-file", "a-folder"])
@pytest.mark.parametrize("command", [*FOLDERS, *FILES])
def test_a_destination_that_cannot_be_written(place, monkeypatch, capsys, command, out):
    if out in ("a-file", "a-folder") and (out == "a-file") != (command in FOLDERS):
        return  # of the right kind
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    words = [word.replace("OUT", out) for word in (FOLDERS | FILES)[command]]
    monkeypatch.setattr(sys, "argv", ["ldm", *command.split(), *words])
    before = contents(place)
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr().err
    assert stopped.value.code in (1, 2), printed
    assert printed.startswith("error: ") and printed.count("\n") == 1 and out in printed
    assert "unexpected" not in printed
    assert contents(place) == before, "files were lost, changed or left behind"
