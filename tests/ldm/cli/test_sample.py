"""`ldm sample`: options become settings; invalid ones are refused."""

import json

import pytest

from ldm.cli.sample import sample
from ldm.errors import UsageError
from tests.pipelines.untrained import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), 0, ("cat", "dog"))


def test_words_become_settings(model, tmp_path, capsys):
    guide = make_model(tmp_path / "guide", 1, ("cat", "dog"))
    sample(
        model, n=2, steps=2, sampler="euler", schedule="cosine", guidance=1.5, interval="0.2,inf",
        guide=guide, labels="dog, 0", churn="4,0.1,50,1.01", files="zip", out=tmp_path / "out",
        device="cpu", precision="fp32",
    )  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "samples.json").read_text())
    expected = {
        "n": 2, "seed": 0, "steps": 2, "sampler": "euler", "schedule": "cosine", "guidance": 1.5,
        "interval": [0.2, "inf"], "labels": [1, 0], "files": "zip", "sigma_max": None,
        "churn": {"S_churn": 4, "S_min": 0.1, "S_max": 50, "S_noise": 1.01},
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
