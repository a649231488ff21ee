"""FID without some of what it needs: errors, defaults, and the files of results."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from ldm.data import DataConfig
from ldm.errors import LdmError, UsageError
from ldm.files import write_json
from pipelines.fid import fid_path, measure_fid, path_without_fid
from pipelines.measuring.statistics import MeasureOptions
from tests.pipelines.measuring.fid_sides import SIZE, enlarged, pictures, write_folder

OURS = pictures(10, seed=0)
THEIRS = pictures(15, seed=1, blur=1.3)


pytestmark = pytest.mark.usefixtures("cache")


# ------------------------------------------------------------------------- without Inception
def test_without_inception_the_rest_is_measured(samples, reference, no_inception):
    with pytest.raises(LdmError) as error:
        measure_fid(samples, reference, device="cpu")
    text = str(error.value)
    assert "\n" not in text
    assert "give it with --weights PATH; without FID, SWD " in text
    assert text.endswith(f"was measured and is in {samples / 'fid.json'}")

    written = json.loads((samples / "fid.json").read_text())
    assert written["fid"] is None and written["kid"] is None and written["precision"] is None
    assert "could not be fetched" in written["fid_missing"]
    assert written["extractor"] is None
    assert written["warnings"] == []
    assert written["swd"]["mean"] > 0
    assert f"SWD {written['swd']['mean']:.3f} (×10³)" in text


def test_without_inception_nothing_is_compared_with_statistics(samples, no_inception):
    with pytest.raises(LdmError, match="could not be fetched"):
        measure_fid(samples, reference="ffhq256", device="cpu")
    assert not (samples / "fid.json").exists()


def test_requested_weights_must_be_available(samples, reference, tmp_path):
    with pytest.raises(LdmError, match=r"no Inception weights at .*x.pt"):
        measure_fid(samples, reference, weights=tmp_path / "x.pt", device="cpu")
    assert not (samples / "fid.json").exists()


# ----------------------------------------------------------------------------- left out
def test_the_newest_samples_and_their_own_data_are_the_default(
    samples, reference, weights, monkeypatch, capsys
):
    home = samples.parent
    (home / "runs" / "x").mkdir(parents=True)
    samples.rename(home / "runs" / "x" / "samples")
    monkeypatch.chdir(home)
    result = measure_fid(weights=weights, device="cpu", force=True)
    assert result["reference"]["count"] == 15
    said = capsys.readouterr().out
    assert "measuring 10 images of runs/x/samples against" in said and ", all: 15 images" in said


def test_samples_are_measured_against_other_data(samples, weights):
    result = measure_fid(samples, "photos", weights=weights, device="cpu", force=True)
    assert result["reference"]["what"].startswith("photos, all")


def test_their_own_data_is_split_as_for_training(samples, reference, weights):
    """By default one in twenty is held out: of these fifteen, one alone."""
    given = {"weights": weights, "device": "cpu", "force": True}
    result = measure_fid(samples, reference.source, "val", **given)
    assert result["reference"]["count"] == 3
    assert result["reference"]["data"]["held_out"] == 3


def test_samples_without_training_data_need_data(tmp_path, reference):
    with pytest.raises(UsageError, match="does not name its model's training data: give --data"):
        measure_fid(tmp_path / "data")


def test_data_settings_of_another_version_are_not_needed(samples, reference, measure, weights):
    mark = json.loads((samples / "samples.json").read_text())
    mark["data"] = {"folder": "x"}
    (samples / "samples.json").write_text(json.dumps(mark))
    assert measure(samples, reference)["samples"]["filter"] is None
    with pytest.raises(UsageError, match="unknown key 'folder'"):
        measure_fid(samples, device="cpu")
    with pytest.raises(UsageError, match="no reference 'faces'"):
        measure_fid(samples, reference="faces", weights=weights, device="cpu")


# ---------------------------------------------------------------------------------- errors
def test_options_out_of_range_are_refused(samples, reference):
    for given, told in (
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"limit": 1}, "--limit 1: a covariance needs two"),
        ({"bootstrap": 1}, "--bootstrap 1: it must be 0, or 2"),
        ({"bootstrap": -3}, "--bootstrap -3"),
        ({"mode": "dirty"}, "mode 'dirty' does not exist"),
        ({"features": "nothing"}, "names no function"),
    ):
        with pytest.raises(UsageError, match=told):
            measure_fid(samples, reference, device="cpu", **given)
    assert not (samples / "fid.json").exists()


def test_a_reference_of_one_image_is_refused(samples, reference, measure):
    one = reference.model_copy(update={"held_out": 1})
    with pytest.raises(LdmError, match=r"val: 1 images, .*needs two or more"):
        measure(samples, one, "val")


def test_a_reference_of_smaller_images_is_refused(tmp_path, reference, measure):
    (tmp_path / "large").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(tmp_path / "large" / f"{name}.png")
    with pytest.raises(LdmError) as error:
        measure(tmp_path / "large", reference)
    assert f"{tmp_path / 'data' / '000.png'} is 24×24, smaller than the 64×64" in str(error.value)


def test_one_smaller_image_is_refused(samples, reference, measure):
    folder = write_folder(samples.parent / "many", enlarged(pictures(60, 2)))
    Image.fromarray(THEIRS[0, :20]).save(folder / "031.png")
    with pytest.raises(LdmError, match=r"031.png is 24×20, smaller than the 24×24"):
        measure(samples, DataConfig(source=str(folder), workers=0), "all")


def test_a_reference_prepared_at_another_size_is_refused(tmp_path, samples, reference, measure):
    from ldm.data.prepare import prepare

    write_folder(tmp_path / "big", pictures(6, 4).repeat(2, 1).repeat(2, 2))
    for size, told in ((16, r"prepared at 16×16 .* 24×24: .*never enlarged .* --size 24"),
                       (48, r"prepared at 48×48 .* 24×24: resizing twice")):  # fmt: skip
        source = tmp_path / "big" if size > SIZE else reference.source
        prepare(source, tmp_path / f"{size}", size, held_out=3, workers=0)
        config = DataConfig(source=str(tmp_path / f"{size}"), workers=0)
        with pytest.raises(LdmError, match=told):
            measure(samples, config)


def test_features_that_are_not_finite_are_an_error(tmp_path, samples, reference, monkeypatch):
    (tmp_path / "broken_features.py").write_text(
        "def nan():\n    return lambda images: images.float().mean((2, 3)).log() * float('nan')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LdmError, match="NaN or an infinity"):
        measure_fid(samples, reference, "train", features="broken_features:nan", device="cpu")
    assert not (samples / "fid.json").exists()


def test_a_result_that_cannot_be_written_stops_before_the_work(samples, reference, measure):
    (samples / "fid.json").mkdir()
    with pytest.raises(LdmError, match="is a folder"):
        measure(samples, reference)


# -------------------------------------------------------------------------- where it is kept
def test_each_measurement_has_a_file_of_its_own(tmp_path, samples, reference, weights, monkeypatch):
    (tmp_path / "eyes.py").write_text("def two():\n    return lambda x: x[:, :2, 0, 0].float()\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = {"device": "cpu", "force": True}
    for named in (
        {}, {"data": "photos"}, {"split": "train"}, {"limit": 9}, {"mode": "legacy-tensorflow"},
    ):  # fmt: skip
        measure_fid(samples, weights=weights, **named, **given)
    measure_fid(samples, features="eyes:two", **given)
    first = json.loads((samples / "fid.json").read_text())
    assert sorted(path.name for path in samples.glob("*fid*")) == [
        "fid-eyes_two.json", "fid-first9.json", "fid-legacy-tensorflow.json", "fid-photos.json",
        "fid-train.json", "fid.json",
    ]  # fmt: skip
    plain = {"data": reference.source, "split": "all"}  # as it is where nothing is named
    again = measure_fid(samples, weights=weights, **plain, **given)
    assert again["written"] == str(samples / "fid.json") and again["fid"] == first["fid"]


def test_a_failed_measurement_leaves_what_was_finished(
    tmp_path, samples, reference, weights, no_inception
):
    finished = measure_fid(samples, weights=weights, device="cpu", force=True)
    there = json.loads((samples / "fid.json").read_text())
    for _ in range(2):
        with pytest.raises(LdmError) as error:
            measure_fid(samples, device="cpu")
        assert str(error.value).endswith(f"is in {samples / 'fid-swd.json'}")
    assert json.loads((samples / "fid.json").read_text()) == there
    told = json.loads((samples / "fid-swd.json").read_text())
    assert told["fid"] is None and told["swd"] == pytest.approx(finished["swd"], rel=1e-9)
    with pytest.raises(LdmError, match=r"is in .*x\.json"):
        measure_fid(samples, device="cpu", out=tmp_path / "x.json")


@pytest.mark.parametrize(
    ("other", "split", "how", "name"),
    [
        (None, None, {}, "fid"),
        (None, "all", {"bootstrap": 9, "force": True, "batch_size": 3}, "fid"),
        ("photos", None, {}, "fid-photos"),
        ("ffhq1024", None, {}, "fid-ffhq1024"),
        ("sets/faces", "val", {}, "fid-sets-faces-#-val"),
        (None, "train", {"limit": 8, "features": "my_net:vit/b"}, "fid-train-first8-my_net_vit_b"),
        (None, None, {"mode": "legacy-tensorflow"}, "fid-legacy-tensorflow"),
        (None, None, {"metrics": ("swd", "fid")}, "fid-fid-swd"),  # in any order
    ],
)
def test_a_file_is_named_after_the_non_default_settings(other, split, how, name):
    path = fid_path(Path("x/fid.json"), other, split, MeasureOptions(**how))
    assert path.parent == Path("x")
    assert re.sub("-[0-9a-f]{6}(?=[-.])", "-#", path.name) == f"{name}.json"


def test_a_file_keeps_the_name_of_its_archive_or_model():
    for plain, named in (("x.zip.fid.json", "x.zip.fid-photos.json"),
                         ("a b.zip.fid.json", "a b.zip.fid-photos.json"),
                         ("seed0-steps18-n9.json", "seed0-steps18-n9-photos.json")):  # fmt: skip
        assert fid_path(Path(plain), "photos", None, MeasureOptions()) == Path(named)


def test_a_result_without_an_fid_replaces_none(tmp_path):
    path = tmp_path / "fid.json"
    assert path_without_fid(path) == path
    for held in ({"fid": None}, {"format": 2}, []):
        write_json(path, held)
        assert path_without_fid(path) == path
    path.write_text("{")
    assert path_without_fid(path) == path
    write_json(path, {"fid": 0.0})
    assert path_without_fid(path) == tmp_path / "fid-swd.json"
