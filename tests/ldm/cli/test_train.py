"""`ldm ema`, up to sampling from the averaged model."""

import pytest
import typer
from typer.testing import CliRunner

from ldm.checkpoint import load_model
from ldm.cli.sample import sample
from ldm.cli.train import ema
from ldm.errors import LdmError
from ldm.files import write_json
from tests.ldm.test_synthesize_ema import BATCH, STEPS, make_run


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run the command in an empty folder and give what it printed."""
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command("ema")(ema)
    app.command("sample")(sample)

    def call(*words):
        done = CliRunner().invoke(app, [str(word) for word in words])
        if isinstance(done.exception, LdmError):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.output

    return call


def test_the_newest_run_with_snapshots_is_averaged_and_samples(call, tmp_path):
    make_run(tmp_path / "runs" / "one")
    for name in ("one", "two"):  # the second, newer, has kept none
        write_json(tmp_path / "runs" / name / "run.json", {"kind": "diffusion"})
    said = call("ema", "--std", 0.07)
    assert said.startswith("run: runs/one\n")
    assert f"std 0.07 at {STEPS * BATCH} images, from 24 snapshots" in said
    assert said.endswith(
        "wrote runs/one/ckpt-ema0.07.pt\nnext: ldm sample runs/one/ckpt-ema0.07.pt\n"
    )
    call("sample", "runs/one/ckpt-ema0.07.pt", "--n", 2, "--steps", 2, "--out", "drawn")
    assert len(list((tmp_path / "drawn").rglob("img*.png"))) == 2


def test_run_time_and_file_can_be_given(call, tmp_path):
    make_run(tmp_path / "x")
    said = call("ema", "x", "--std", 0.08, "--at", 400, "--out", "mine.pt")
    assert said.splitlines()[-2:] == ["wrote mine.pt", "next: ldm sample mine.pt"]
    provenance = load_model(tmp_path / "mine.pt", "diffusion").provenance
    assert provenance["ema_std"] == 0.08 and provenance["ema_images"] == 400


def test_without_a_run_it_says_what_is_missing(call):
    with pytest.raises(LdmError, match=r"no diffusion run .* `ldm train-diffusion` first"):
        call("ema", "--std", 0.07)
