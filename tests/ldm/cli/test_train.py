"""`ldm ema` and `ldm sample`: arguments, output and errors."""

import json

import pytest
import typer
from typer.testing import CliRunner

from ldm.checkpoint import load_model
from ldm.cli.train import ema, sample
from ldm.errors import LdmError, UsageError
from ldm.files import write_json
from tests.ldm.test_synthesize_ema import BATCH, STEPS, make_run
from tests.pipelines.untrained import make_model


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


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), 0, ("cat", "dog"))


def test_words_become_settings(model, tmp_path, capsys):
    guide = make_model(tmp_path / "guide", 1, ("cat", "dog"))
    sample(
        model, n=2, steps=2, sampler="euler", schedule="cosine", guidance=1.5, interval="0.2,inf",
        guided_channels=3, guide=guide, labels="dog, 0", churn="4,0.1,50,1.01", files="zip",
        out=tmp_path / "out", device="cpu", precision="fp32",
    )  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "samples.json").read_text())
    expected = {
        "n": 2, "seed": 0, "steps": 2, "sampler": "euler", "schedule": "cosine", "guidance": 1.5,
        "interval": [0.2, "inf"], "labels": [1, 0], "files": "zip", "sigma_max": None,
        "churn": {"S_churn": 4, "S_min": 0.1, "S_max": 50, "S_noise": 1.01}, "guided_channels": 3,
    }  # fmt: skip
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["weaker"]["path"] == str(guide)
    printed = capsys.readouterr().out
    assert f"done: 2 images in {tmp_path / 'out'}" in printed
    assert f"next: ldm fid {tmp_path / 'out'}" in printed


def test_churn_alone_is_its_amount(model, tmp_path):
    sample(model, n=1, steps=1, churn="4", out=tmp_path / "out", device="cpu")
    manifest = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert manifest["churn"] == {"S_churn": 4, "S_min": 0, "S_max": "inf", "S_noise": 1}
    assert manifest["labels"] is None and (tmp_path / "out" / "00000").is_dir()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"interval": "3"}, "--interval 3: expected 2 number(s) separated by commas"),
        ({"interval": "low,high"}, "--interval low,high: expected 2"),
        ({"interval": "3,2"}, "interval (3, 2): the second number"),
        ({"interval": "0.2,3"}, "interval has no effect without guidance"),
        ({"guided_channels": 3}, "guided_channels has no effect without guidance"),
        ({"shift": 3.0}, "shift has no effect with schedule karras: use flow, or omit shift"),
        ({"churn": "1,2"}, "--churn 1,2: expected 1 or 4 number(s)"),
        ({"churn": "-1"}, "'churn.S_churn': input should be greater than or equal to 0"),
        ({"labels": "cow"}, "label 'cow': classes are 0 to 1 (cat, dog)"),
        ({"labels": ""}, "label '': classes are"),
        ({"labels": "2"}, "label 2: classes are 0 to 1"),
        ({"labels": "--1"}, "label '--1': classes are 0 to 1"),
        ({"labels": "1.5"}, "label '1.5': classes are 0 to 1"),
        ({"n": 0}, "--n 0: it must be at least 1"),
        ({"steps": 0}, "'steps': input should be greater than 0"),
    ],
)
def test_invalid_arguments(model, tmp_path, given, message):
    with pytest.raises(UsageError) as error:
        sample(model, out=tmp_path / "out", device="cpu", **given)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
