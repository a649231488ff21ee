"""`ldm fid`: options and output."""

import inspect
import json
from pathlib import Path

import pytest
import typer

from ldm.cli.measure import eval_ae, fid
from ldm.errors import LdmError, UsageError
from tests.pipelines.measuring.fid_sides import pictures, write_folder, write_samples
from tests.pipelines.untrained import make_model

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def samples(tmp_path):
    write_folder(tmp_path / "data", pictures(12, 1, 1.3))
    return write_samples(tmp_path / "samples", pictures(10, 0), tmp_path / "data")


def read(text: str) -> dict[str, str]:
    """The result's lines, by the word they begin with."""
    rows = [line for line in text.splitlines() if not line.startswith(("note:", "measuring"))]
    return {line[:10].strip(): line[11:] for line in rows}


def test_each_number_and_what_it_is_of(samples, weights, capsys):
    fid(samples, weights=weights, bootstrap=4, device="cpu")
    printed, written = capsys.readouterr().out, json.loads((samples / "fid.json").read_text())
    rows, interval = read(printed), written["fid_interval"]
    assert rows["FID"] == (
        f"{written['fid']:.3f}  (95 %: {interval['low']:.3f} to {interval['high']:.3f}, "
        "4 bootstrap draws)  all 10 samples, all 12 images"
    )
    assert rows["KID ×10³"] == f"{1e3 * written['kid']:.3f} ± {1e3 * written['kid_std']:.3f}"
    assert rows["precision"] == f"{written['precision']:.3f}"
    assert rows["SWD ×10³"] == f"{written['swd']['mean']:.3f}  10 of each"
    assert rows["reference"].endswith("data, all: 12 images, centre-cropped")
    assert rows["samples"] == f"10 images of {samples}"
    assert rows["features"] == "inception-2015-12-05.pt, clean-fid resizing"
    assert rows["written"] == str(samples / "fid.json")


def test_straight_from_a_model(tmp_path, weights, capsys):
    model = make_model(tmp_path / "model", 0)
    fid(model=model, data="photos", n=9, seed=2, steps=1, weights=weights, device="cpu",
        precision="fp32", out=tmp_path / "x.json")  # fmt: skip
    made_with = json.loads((tmp_path / "x.json").read_text())["samples"]["made_with"]
    assert (made_with["n"], made_with["seed"], made_with["steps"]) == (9, 2, 1)
    assert read(capsys.readouterr().out)["samples"] == f"9 images of {model}, seed 2"


def test_the_words_reach_the_job(samples, monkeypatch):
    given = {}

    def job(*args, **options):
        given.update(options, args=args)
        raise LdmError("enough")

    monkeypatch.setattr("pipelines.fid.measure_fid", job)
    with pytest.raises(LdmError, match="enough"):
        fid(samples, data="x", split="val", mode="legacy-tensorflow", features="a:b", limit=99,
            force=True, batch_size=3)  # fmt: skip
    assert given["args"] == (samples, "x", "val") and given["batch_size"] == 3
    assert given["limit"] == 99 and given["weights"] is None and given["device"] == "auto"
    assert given["mode"] == "legacy-tensorflow" and given["features"] == "a:b"
    assert given["force"] is True and given["sampling"] == {} and given["model"] is None


def test_exclusive_options(samples):
    with pytest.raises(UsageError, match="--seed needs a model to sample from: give --model"):
        fid(samples, seed=3, device="cpu")
    with pytest.raises(UsageError, match="--data and --reference exclude each other"):
        fid(samples, data="x", reference="ffhq256", device="cpu")


def test_few_images_need_force(samples, weights, capsys):
    with pytest.raises(LdmError, match=r"is biased upwards.*--force measures anyway"):
        fid(samples, split="val", weights=weights, device="cpu")
    fid(samples, split="val", weights=weights, device="cpu", force=True)
    assert "note: FID over 10 samples" in capsys.readouterr().out


def test_where_statistics_are_kept(samples, tmp_path, weights, capsys):
    fid(samples, weights=weights, device="cpu")
    kept = read(capsys.readouterr().out)["statistics"]
    assert Path(kept).is_file() and Path(kept).parent == tmp_path / "cache" / "statistics"
    fid(samples, reference=kept, weights=weights, device="cpu")
    printed = capsys.readouterr().out
    assert "note: no SWD: it compares patches" in printed and "SWD ×10³" not in printed
    assert read(printed)["statistics"] == kept
    fid(samples, split="val", weights=weights, device="cpu", force=True)  # too few to be kept
    assert "statistics" not in read(capsys.readouterr().out)


@pytest.mark.parametrize("command", [fid, eval_ae])
def test_invalid_features_are_refused(command):
    (info,) = inspect.signature(command).parameters["features"].annotation.__metadata__
    assert "function(device) returns a callable that maps uint8 images (B, 3, H, W)" in info.help


def test_a_damaged_sample_is_told_by_its_name(samples, weights):
    path = next(samples.rglob("img00000003.png"))
    path.write_bytes(b"no picture")
    with pytest.raises(LdmError) as error:
        fid(samples, weights=weights, device="cpu")
    reason = "not an image, or its header is damaged"
    assert str(error.value) == f"{path} is damaged ({reason}): delete {path} and sample again"


def test_every_option_says_what_it_is():
    for name, parameter in inspect.signature(fid).parameters.items():
        (info,) = parameter.annotation.__metadata__
        assert isinstance(info, typer.models.ParameterInfo) and info.help, name
