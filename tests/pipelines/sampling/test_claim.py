"""Whose a folder of samples is: what may go on in it, and what is refused."""

import json

import pytest

from ldm.errors import LdmError
from ldm.run_folder import lock
from pipelines.sample import sample_images
from pipelines.sampling.sample_folder import PngStore
from tests.pipelines.untrained import CLASSES, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("classes"), 0, CLASSES)


def draw(model, out, n=2, **settings):
    settings = {"steps": 1, "batch_size": 4, "precision": "fp32", "device": "cpu"} | settings
    return sample_images(model, n, out, **settings)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---------------------------------------------------------------------------- another setting
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 1}, "another seed"),
        ({"steps": 3}, "another steps"),
        ({"sampler": "euler"}, "another sampler"),
        ({"churn": 3}, "another churn"),
        ({"schedule": "cosine", "sigma_max": 9}, "another schedule, sigma_max"),
        ({"sigma_min": 0.1}, "another sigma_min"),
        ({"precision": "bf16"}, "another precision"),
        ({"files": "zip"}, "another files"),
    ],
)
def test_a_folder_of_other_settings_is_refused(model, tmp_path, changed, told):
    draw(model, tmp_path / "out", n=1)
    with pytest.raises(LdmError, match=told):
        draw(model, tmp_path / "out", **changed)


def test_other_guidance_is_refused(conditional, tmp_path):
    out = draw(conditional, tmp_path / "out", n=1, guidance=2)
    with pytest.raises(LdmError, match="another guidance: give --out"):
        draw(conditional, out, guidance=3)
    with pytest.raises(LdmError, match="another interval: give --out"):
        draw(conditional, out, guidance=2, interval=(0.1, 9))
    with pytest.raises(LdmError, match="another labels: give --out"):
        draw(conditional, out, guidance=2, labels="dog")


def test_a_folder_made_before_there_were_these_settings(model, tmp_path):
    out = draw(model, tmp_path / "out", n=1)
    mark = json.loads((out / "samples.json").read_text())
    for key in ("schedule", "sigma_min", "churn", "guidance", "interval", "weaker", "files"):
        del mark[key]
    del mark["model"]["identity"]
    (out / "samples.json").write_text(json.dumps(mark))
    draw(model, out, n=2)
    with pytest.raises(LdmError, match="another schedule"):
        draw(model, out, schedule="linear")


def test_folders_are_named_after_what_tells_them_apart(model, conditional, tmp_path):
    def name(which, **settings):
        return draw(which, None, n=1, **settings).name

    assert name(model, sampler="euler", files="zip") == "seed0-steps1-euler-zip"
    assert name(conditional, labels=["dog", "2"], guidance=2) == "seed0-steps1-guidance2-class1_2"
    assert name(conditional / "ckpt.pt", seed=4) == "seed4-steps1"
    twin = conditional / "ckpt-ema0.05.pt"
    twin.write_bytes((conditional / "ckpt.pt").read_bytes())
    assert name(twin) == "seed0-steps1-ema0.05"


# ------------------------------------------------------------------------------ another model
@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"seed": 1}, "another model"),
        ({"autoencoder_seed": 5}, "another model"),
        ({"std": 1.0}, "another model"),
        ({"mean": 0.3}, "another model"),
        ({"sigma_data": 1.0}, "another model"),
        ({"settings": ("denoiser.sigma_data=0.6",)}, "another model"),
        ({"settings": ("denoiser={type: discrete}",)}, "another model"),
        ({"settings": ("network.head_width=4",)}, "another model"),
        ({"settings": ("resolution=64",)}, "another resolution, model"),
    ],
)
def test_a_folder_of_another_model_is_refused(model, tmp_path, other, told):
    """The same weights make other pictures, built or scaled or decoded in another way."""
    out = draw(model, tmp_path / "out", n=1)
    other = make_model(tmp_path / "other", **({"seed": 0} | other))
    with pytest.raises(LdmError, match=f"samples made with {told}: give --out another folder"):
        draw(other, out)


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"seed": 1, "settings": ("denoiser.sigma_data=0.6",)}]
)
def test_a_folder_of_another_weaker_model_is_refused(model, tmp_path, other):
    weaker = make_model(tmp_path / "weaker", 1)
    out = draw(model, tmp_path / "out", guidance=2, weaker=weaker)
    told = json.loads((out / "samples.json").read_text())["weaker"]
    assert told["path"] == str(weaker) and len(told["sha256"]) == len(told["identity"]) == 64
    with pytest.raises(LdmError, match="another weaker: give"):
        draw(model, out, guidance=2, weaker=make_model(tmp_path / "third", **other))


def test_the_same_model_elsewhere_goes_on(model, tmp_path):
    out = draw(model, tmp_path / "out", n=1)
    moved = make_model(tmp_path / "moved", 0)
    assert len(list(draw(moved / "ckpt.safetensors", out, n=2).rglob("img*.png"))) == 2


# ------------------------------------------------------------------------------ two at a time
def test_two_jobs_in_one_folder(model, tmp_path):
    out = draw(model, tmp_path / "out", n=1)
    with lock(out), pytest.raises(LdmError, match="another process is at work in"):
        draw(model, out, n=2)


def test_the_folder_is_held_until_the_last_picture(model, tmp_path, monkeypatch):
    out, refused = tmp_path / "out", []

    def watched(done):
        def after(store, *how):
            with pytest.raises(LdmError, match="another process is at work in"), lock(out):
                pass
            refused.append(done.__name__)
            return done(store, *how)

        return after

    for name in ("write", "conclude"):
        monkeypatch.setattr(PngStore, name, watched(getattr(PngStore, name)))
    draw(model, out, n=1)
    assert refused == ["write", "conclude"]
    with lock(out):
        pass


def test_what_a_kill_left_half_written_is_cleared(model, tmp_path):
    out = draw(model, tmp_path / "out", n=1)
    left = [out / ".samples.json.1.partial", out / "00000" / ".img00000001.png.1.partial"]
    for path in left:
        path.touch()
    draw(model, out, n=1)
    assert not any(path.exists() for path in left)


# ------------------------------------------------------------------------ folders that are none
def test_a_folder_of_something_else_is_refused(model, tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(LdmError, match=r"holds no samples\.json"):
        draw(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(LdmError, match="damaged"):
        draw(model, tmp_path)


def test_a_folder_that_cannot_be_made_or_written(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(
            LdmError, match=r"could not write to .*: give --out another folder"
        ) as e:
            draw(model, out)
        assert "\n" not in str(e.value)
    assert (tmp_path / "file").read_text() == "x"

    out = draw(model, tmp_path / "out", n=1)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pipelines.sampling.sample_folder.lock", refuse)
    with pytest.raises(LdmError, match=r"write to .*out \(Permission denied\): give --out another"):
        draw(model, out, n=2)


# --------------------------------------------------------------------------- damage on the way
@pytest.mark.parametrize("damage", [{"n": None}, {"model": "x"}, {"weaker": 3}, {"data": []}])
def test_a_mark_that_is_damaged(model, tmp_path, damage):
    out = draw(model, tmp_path / "out", n=1)
    change(out / "samples.json", **damage)
    with pytest.raises(LdmError, match=r"samples\.json is damaged: give --out another folder"):
        draw(model, out, n=2)


def test_a_mark_that_says_nothing(model, tmp_path):
    (tmp_path / "samples.json").write_text("{}")
    with pytest.raises(LdmError, match="another steps, seed, precision"):
        draw(model, tmp_path)


def test_damaged_labels_are_written_anew(conditional, tmp_path):
    out = draw(conditional, tmp_path / "out", n=4)
    labels = (out / "labels.json").read_text()
    (out / "labels.json").write_text("{")
    draw(conditional, out, n=3)
    assert (out / "labels.json").read_text() == labels
