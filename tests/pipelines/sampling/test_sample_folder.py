"""A folder of samples: its manifest, its lock, and the jobs that may add to it."""

import json

import pytest

from ldm.errors import LdmError
from ldm.files import lock
from pipelines.sample import sample_images
from pipelines.sampling.sample_folder import SampleStore
from tests.pipelines.untrained import make_model


def draw(model, out, n=2, **settings):
    settings = {"steps": 1, "batch_size": 4, "precision": "fp32", "device": "cpu"} | settings
    return sample_images(model, n, out, **settings)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---------------------------------------------------------------------------- another setting
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"steps": 3}, "steps"),
        ({"sampler": "euler"}, "sampler"),
        ({"churn": 3}, "churn"),
        ({"schedule": "cosine", "sigma_max": 9}, "schedule, sigma_max"),
        ({"sigma_min": 0.1}, "sigma_min"),
        ({"precision": "bf16"}, "precision"),
        ({"files": "zip"}, "files"),
    ],
)
def test_other_settings_are_refused(model, tmp_path, changed, named):
    draw(model, tmp_path / "out", n=1)
    with pytest.raises(LdmError, match=rf"with other settings \({named}\): give --out"):
        draw(model, tmp_path / "out", **changed)


def test_other_guidance_is_refused(conditional, tmp_path):
    out = draw(conditional, tmp_path / "out", n=1, guidance=2)
    with pytest.raises(LdmError, match=r"settings \(guidance\)"):
        draw(conditional, out, guidance=3)
    with pytest.raises(LdmError, match=r"settings \(interval\)"):
        draw(conditional, out, guidance=2, interval=(0.1, 9))
    with pytest.raises(LdmError, match=r"settings \(guided_channels\)"):
        draw(conditional, out, guidance=2, guided_channels=3)
    with pytest.raises(LdmError, match=r"settings \(labels\)"):
        draw(conditional, out, guidance=2, labels="dog")


def test_manifest_of_an_older_version_means_the_defaults(model, tmp_path):
    out = draw(model, tmp_path / "out", n=1)
    manifest = json.loads((out / "samples.json").read_text())
    assert manifest["schedule"] == "karras"
    for key in (
        "schedule", "sigma_min", "churn", "guidance", "interval", "weaker", "files", "shift",
        "guided_channels",
    ):  # fmt: skip
        del manifest[key]
    del manifest["model"]["identity"]
    (out / "samples.json").write_text(json.dumps(manifest))
    draw(model, out, n=2)
    with pytest.raises(LdmError, match=r"settings \(schedule\)"):
        draw(model, out, schedule="linear")


def test_default_folder_names_the_non_default_settings(model, conditional, tmp_path):
    def name(which, **settings):
        return draw(which, None, n=1, **settings).name

    assert name(model, sampler="euler", files="zip") == "seed0-steps1-euler-zip"
    assert name(conditional, labels=["dog", "2"], guidance=2) == "seed0-steps1-guidance2-class1_2"
    assert name(conditional / "ckpt.pt", seed=4) == "seed4-steps1"
    twin = conditional / "ckpt-ema0.05.pt"
    twin.write_bytes((conditional / "ckpt.pt").read_bytes())
    assert name(twin) == "seed0-steps1-ema0.05"
    flow = make_model(tmp_path / "flow", 0, settings=("denoiser={type: flow}",))
    assert name(flow) == name(flow, schedule="flow") == "seed0-steps1"
    assert name(flow, schedule="karras") == "seed0-steps1-karras"
    manifest = json.loads((flow / "samples/seed0-steps1/samples.json").read_text())
    assert (manifest["schedule"], manifest["shift"]) == ("flow", None)


# ------------------------------------------------------------------------------ another model
@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 1}, "model"),
        ({"autoencoder_seed": 5}, "model"),
        ({"std": 1.0}, "model"),
        ({"mean": 0.3}, "model"),
        ({"sigma_data": 1.0}, "model"),
        ({"settings": ("denoiser.sigma_data=0.6",)}, "model"),
        ({"settings": ("denoiser={type: discrete}",)}, "model"),
        ({"settings": ("denoiser={type: flow}",)}, "schedule, model"),
        ({"settings": ("network.head_width=4",)}, "model"),
        ({"settings": ("resolution=64",)}, "resolution, model"),
    ],
)
def test_another_model_is_refused(model, tmp_path, other, named):
    """Equal weights generate other images if built, scaled or decoded differently."""
    out = draw(model, tmp_path / "out", n=1)
    other = make_model(tmp_path / "other", **({"seed": 0} | other))
    with pytest.raises(LdmError, match=rf"with other settings \({named}\): give --out another"):
        draw(other, out)


@pytest.mark.parametrize(
    "other", [{"seed": 2}, {"seed": 1, "settings": ("denoiser.sigma_data=0.6",)}]
)
def test_another_guide_is_refused(model, tmp_path, other):
    guide = make_model(tmp_path / "guide", 1)
    out = draw(model, tmp_path / "out", guidance=2, guide=guide)
    named = json.loads((out / "samples.json").read_text())["weaker"]
    assert named["path"] == str(guide) and len(named["sha256"]) == len(named["identity"]) == 64
    with pytest.raises(LdmError, match=r"settings \(guide\)"):
        draw(model, out, guidance=2, guide=make_model(tmp_path / "third", **other))


def test_moved_model_resumes(model, tmp_path):
    out = draw(model, tmp_path / "out", n=1)
    moved = make_model(tmp_path / "moved", 0)
    assert len(list(draw(moved / "ckpt.safetensors", out, n=2).rglob("img*.png"))) == 2


# ------------------------------------------------------------------------------ two at a time
def test_second_job_in_a_locked_folder_is_refused(model, tmp_path):
    out = draw(model, tmp_path / "out", n=1)
    with lock(out), pytest.raises(LdmError, match="another process is at work in"):
        draw(model, out, n=2)


def test_lock_is_held_until_the_set_is_finished(model, tmp_path, monkeypatch):
    out, refused = tmp_path / "out", []

    def watched(done):
        def after(store, *how):
            with pytest.raises(LdmError, match="another process is at work in"), lock(out):
                pass
            refused.append(done.__name__)
            return done(store, *how)

        return after

    for name in ("write", "finish"):
        monkeypatch.setattr(SampleStore, name, watched(getattr(SampleStore, name)))
    draw(model, out, n=1)
    assert refused == ["write", "finish"]
    with lock(out):
        pass


def test_half_written_files_of_a_kill_are_removed(model, tmp_path):
    out = draw(model, tmp_path / "out", n=1)
    left = [out / ".samples.json.1.partial", out / "00000" / ".img00000001.png.1.partial"]
    for path in left:
        path.touch()
    draw(model, out, n=1)
    assert not any(path.exists() for path in left)


# --------------------------------------------------------------------------- refused folders
def test_folder_of_other_files_is_refused(model, tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(LdmError, match=r"holds no samples\.json"):
        draw(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(LdmError, match="damaged"):
        draw(model, tmp_path)


def test_folder_that_cannot_be_written_is_refused(model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(
            LdmError, match=r"could not write in .*: give --out another folder"
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


# --------------------------------------------------------------------------- damaged manifests
@pytest.mark.parametrize("damage", [{"n": None}, {"model": "x"}, {"weaker": 3}, {"data": []}])
def test_damaged_manifest_is_refused(model, tmp_path, damage):
    out = draw(model, tmp_path / "out", n=1)
    change(out / "samples.json", **damage)
    with pytest.raises(LdmError, match=r"samples\.json is damaged.*: give --out another folder"):
        draw(model, out, n=2)


def test_empty_manifest_matches_no_settings(model, tmp_path):
    (tmp_path / "samples.json").write_text("{}")
    with pytest.raises(LdmError, match=r"settings \(steps, seed, precision"):
        draw(model, tmp_path)


def test_damaged_labels_are_rewritten(conditional, tmp_path):
    out = draw(conditional, tmp_path / "out", n=4)
    labels = (out / "labels.json").read_text()
    (out / "labels.json").write_text("{")
    draw(conditional, out, n=3)
    assert (out / "labels.json").read_text() == labels
