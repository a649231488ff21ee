"""Which models and which images are meant."""

import pytest
import torch

from ldm.data import DataConfig, open_source
from ldm.errors import LdmError, UsageError
from pipelines.analysis.subjects import parse_models
from tests.pipelines.analysis.subjects import Pixels, known, opened, pixels, save


# -------------------------------------------------------------------------------- the models
def test_models_are_called_what_they_are_told_or_as_their_runs(tmp_path):
    words = ["VAE=a.pt", "runs/20250131-120000-litevae-b", "runs/x/ckpt.pt", "runs/x/best.pt"]
    assert list(parse_models(words)) == ["VAE", "litevae-b", "x", "x/best"]
    assert str(parse_models(words)["VAE"]) == "a.pt"


def test_two_runs_of_a_preset_keep_their_times():
    first, second = "runs/20250131-120000-tiny", "runs/20250201-120000-tiny"
    assert list(parse_models([first, second])) == ["20250131-120000-tiny", "20250201-120000-tiny"]
    # and where folders are called alike, whole paths
    assert list(parse_models(["a/tiny", "b/tiny"])) == ["a/tiny", "b/tiny"]


def test_a_path_with_an_equals_sign_is_a_path(tmp_path):
    folder = tmp_path / "lr=3"
    folder.mkdir()
    assert list(parse_models([str(folder)]).values()) == [folder]


def test_one_name_for_two_models_is_refused():
    with pytest.raises(UsageError, match="the name 'a' is used twice: name each path"):
        parse_models(["a=x.pt", "a=y.pt"])
    with pytest.raises(UsageError, match="is used twice"):
        parse_models(["x.pt", "x.pt"])
    with pytest.raises(UsageError, match="nor of the form NAME=PATH"):
        parse_models(["a="])


def test_nothing_is_the_newest_run(tmp_path, monkeypatch):
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
    assert subject.recipe["phases"][-1]["resolution"] == 32


# -------------------------------------------------------------------------------- the images
def test_what_is_left_out_is_what_the_model_was_trained_on(tmp_path):
    _, images = opened(save(tmp_path, resolution=64))
    assert images.resolution == 64 and images.what == "the val split of photos, 64×64"
    assert len(images.source) == len(open_source(DataConfig(), "val", 64))
    assert opened(tmp_path, resolution=32)[1].resolution == 32


def test_models_that_disagree_must_be_told(tmp_path):
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


def test_data_that_was_trained_on_is_split_as_then(tmp_path):
    from PIL import Image

    for i in range(8):
        Image.fromarray(Pixels(8, 32).load(i)).save(tmp_path / f"{i}.png")
    config = DataConfig(source=str(tmp_path), held_out=3, workers=0)
    for data, held_out in ((config, 3), ("elsewhere", 1)):
        folder = save(tmp_path / "run", data=data)
        assert len(opened(folder, data=str(tmp_path))[1].source) == held_out


def test_what_cannot_be_is_told(tmp_path):
    folder = save(tmp_path)
    with pytest.raises(UsageError, match="--batch-size 0: must be at least 1"):
        opened(folder, batch_size=0)
    with pytest.raises(UsageError, match=r"--resolution 4: .* encodes 8×8 pixels into one latent"):
        opened(folder, resolution=4)


def test_images_are_drawn_once_and_for_all():
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
    found = list(pixels(5, batch_size=2).encode(subject))
    assert torch.cat([k for k, _, _ in found]).tolist() == [0, 1, 2, 3, 4]
    for _, images, posterior in found:
        assert torch.equal(posterior.mean, images[:, :1, ::4, ::4])


def test_latents_that_are_not_finite_are_told():
    broken = known(lambda images: (images[:, :1] / 0, images[:, :1]), 1)
    with pytest.raises(LdmError, match=r"known\.pt: latents are not finite"):
        list(pixels(2).encode(broken))
