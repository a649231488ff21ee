"""Models and images of an analysis, and the files."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.data import DataConfig, open_source
from ldm.errors import LdmError, UsageError
from pipelines.analysis.scale import analyze_scale
from pipelines.analysis.subjects import analysis_folder, parse_models, write_csv
from tests.pipelines.analysis.subjects import Pixels, known, opened, pixels, save


# -------------------------------------------------------------------------------- the models
def test_models_are_named_after_their_runs_by_default(tmp_path):
    words = ["VAE=a.pt", "runs/20250131-120000-litevae-b", "runs/x/ckpt.pt", "runs/x/best.pt"]
    assert list(parse_models(words)) == ["VAE", "litevae-b", "x", "x/best"]
    assert str(parse_models(words)["VAE"]) == "a.pt"


def test_timestamps_are_kept_if_names_clash():
    first, second = "runs/20250131-120000-tiny", "runs/20250201-120000-tiny"
    assert list(parse_models([first, second])) == ["20250131-120000-tiny", "20250201-120000-tiny"]
    # and where folders are called alike, whole paths
    assert list(parse_models(["a/tiny", "b/tiny"])) == ["a/tiny", "b/tiny"]
    assert list(parse_models(["G=a/foo", "a/foo", first])) == ["G", "foo", "tiny"]
    assert list(parse_models(["tiny=a/foo", first])) == ["tiny", "20250131-120000-tiny"]


def test_a_path_with_an_equals_sign_is_a_path(tmp_path):
    folder = tmp_path / "lr=3"
    folder.mkdir()
    assert list(parse_models([str(folder)]).values()) == [folder]
    assert parse_models([f"LiteVAE f8/4={folder}"]) == {"LiteVAE f8/4": folder}


def test_a_name_used_twice_is_refused():
    with pytest.raises(UsageError, match="the name 'a' is used twice: name each path"):
        parse_models(["a=x.pt", "a=y.pt"])
    with pytest.raises(UsageError, match="is used twice"):
        parse_models(["x.pt", "x.pt"])
    with pytest.raises(UsageError, match="nor of the form NAME=PATH"):
        parse_models(["a="])


def test_the_default_is_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LdmError, match="`ldm train-ae` first"):
        parse_models([])
    folder = save(tmp_path / "runs" / "x")
    (folder / "run.json").write_text('{"kind": "autoencoder"}')
    assert list(parse_models([])) == ["x"]


def test_loaded_models_are_frozen(tmp_path):
    (subject,), _ = opened(f"a={save(tmp_path)}")
    assert subject.name == "a" and not subject.autoencoder.training
    assert not any(p.requires_grad for p in subject.autoencoder.parameters())


# -------------------------------------------------------------------------------- the images
def test_data_and_resolution_default_to_the_training(tmp_path):
    _, images = opened(save(tmp_path, resolution=64))
    assert images.resolution == 64 and images.what == "the val split of photos, 64×64"
    assert len(images.source) == len(open_source(DataConfig(), "val", 64))
    assert opened(tmp_path, resolution=32)[1].resolution == 32


@pytest.mark.parametrize("open_models", [opened, analyze_scale])
@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"image_channels": 1}, r"different image_channels \(a 3, b 1\)"),
        ({"pixels": {"range": [0, 9]}}, r"different pixels.range \(a None, b \(0.0, 9.0\)\)"),
    ],
)
def test_models_that_see_one_image_differently_are_refused(open_models, other, text, tmp_path):
    models = [save(tmp_path / "a"), save(tmp_path / "b", **other)]
    with pytest.raises(UsageError, match=text):
        open_models(models) if open_models is analyze_scale else open_models(*models)


def test_models_with_different_training_need_options(tmp_path):
    a, b = save(tmp_path / "a", resolution=32), save(tmp_path / "b", resolution=64)
    with pytest.raises(UsageError, match=r"different resolution \(a 32, b 64\): use --resolution"):
        opened(a, b)
    c = save(tmp_path / "c", data="elsewhere", resolution=32)
    with pytest.raises(UsageError, match=r"different data .*: use --data"):
        opened(a, c)
    assert opened(a, b, resolution=32)[1].resolution == 32
    # one that says nothing follows the other
    other = save(tmp_path / "d", told=False)
    assert opened(other, a)[1].resolution == 32
    with pytest.raises(UsageError, match="does not record the data of its training: use --data"):
        opened(other)


def test_training_data_keeps_its_split(tmp_path):

    for i in range(8):
        Image.fromarray(Pixels(8, 32).load(i)).save(tmp_path / f"{i}.png")
    config = DataConfig(source=str(tmp_path), held_out=3, workers=0)
    for data, held_out in ((config, 3), ("elsewhere", 1)):
        folder = save(tmp_path / "run", data=data)
        assert len(opened(folder, data=str(tmp_path))[1].source) == held_out


def test_small_resolutions_and_batches_are_refused(tmp_path):
    folder = save(tmp_path)
    with pytest.raises(UsageError, match="--batch-size 0: must be at least 1"):
        opened(folder, batch_size=0)
    with pytest.raises(UsageError, match=r"--resolution 4: .* encodes 8×8 pixels into one latent"):
        opened(folder, resolution=4)


def test_drawn_images_depend_only_on_the_draw():
    images = pixels(50)

    def names(draw):
        drawn = images.draw(20, draw).source
        return [drawn.name(i) for i in range(len(drawn))]

    assert names(0) == names(0) and len(set(names(0))) == 20
    assert set(names(0)) != set(names(1)) and set(names(0)) != {f"noise {i}" for i in range(20)}
    assert images.draw(50) is images


# ------------------------------------------------------------------------------- the encoding
def test_every_image_is_encoded_once():
    subject = known(lambda images: (images[:, :1, ::4, ::4], images[:, :1, ::4, ::4]), 1)
    found = pixels(5, batch_size=2).gather(subject, lambda *batch: batch)
    assert torch.cat([k for k, _, _ in found]).tolist() == [0, 1, 2, 3, 4]
    for _, images, posterior in found:
        assert torch.equal(posterior.mean, images[:, :1, ::4, ::4])


def test_non_finite_latents_are_refused():
    broken = known(lambda images: (images[:, :1] / 0, images[:, :1]), 1)
    with pytest.raises(LdmError, match=r"known\.pt: latents are not finite"):
        pixels(2).gather(broken, lambda *batch: batch)


# ------------------------------------------------------------------------------------- files
def test_the_default_folder_is_next_to_the_model(tmp_path):
    file = tmp_path / "ckpt.pt"
    file.touch()
    assert analysis_folder(None, file) == analysis_folder(None, tmp_path) == tmp_path / "analysis"
    assert analysis_folder(Path("elsewhere"), file) == Path("elsewhere")


def test_csv_round_trip(tmp_path):
    rows = [("a, b", 1, 1 / 3, None), ('"c"', 2, 1e-12, -2.5)]
    path = write_csv(tmp_path / "deep" / "x.csv", ("name", "k", "x", "y"), rows)
    with path.open(encoding="utf-8", newline="") as file:
        header, first, second = csv.reader(file)
    assert header == ["name", "k", "x", "y"]
    assert first[:2] == ["a, b", "1"] and first[3] == ""
    assert float(first[2]) == pytest.approx(1 / 3, rel=1e-8)
    assert second[0] == '"c"' and float(second[2]) == pytest.approx(1e-12, rel=1e-8)
