import json

import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders import load_autoencoder
from ldm.checkpoint import load_model
from ldm.errors import Interrupted, LdmError
from ldm.logbook import read_rows
from ldm.run import Run
from pipelines.train_autoencoder import train_autoencoder
from tests.small import autoencoder_recipe


def test_checkpointing_trains_to_the_same_bits(tmp_path):
    plain, sparing = (
        train_autoencoder(autoencoder_recipe(f"checkpointing={flag}"), "tiny", tmp_path / flag)
        for flag in ("false", "true")
    )
    a, b = (load_model(folder, "autoencoder") for folder in (plain, sparing))
    assert a.sha256 == b.sha256


def test_compiled_training_is_the_same_training(tmp_path, monkeypatch):
    """Captured and differentiated ahead of time, but run by PyTorch: no C++ compiler needed."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compile(net, backend="aot_eager"))
    plain, compiled = (
        train_autoencoder(
            autoencoder_recipe(f"run.compile={flag}", "phases=[{resolution: 32, steps: 4}]"),
            "tiny",
            tmp_path / flag,
        )
        for flag in ("false", "true")
    )
    a, b = (load_model(folder, "autoencoder").weights for folder in (plain, compiled))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-2, atol=1e-3)


def test_the_best_is_kept_beside_the_last(tmp_path, monkeypatch):
    import pipelines.train_autoencoder as job

    scores = iter([20.0, 25.0, 22.0, 24.0])
    monkeypatch.setattr(job, "validate_autoencoder", lambda *_: {"psnr": next(scores), "count": 4})
    recipe = autoencoder_recipe("run.validate_every_steps=2")
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    best = load_model(folder / "best.pt", "autoencoder")
    assert best.provenance["images_seen"] == 16
    assert best.provenance["held_out"] == {"psnr": 25.0, "count": 4}
    assert load_model(folder, "autoencoder").provenance["images_seen"] == 32
    result = json.loads((folder / "result.json").read_text())
    assert result["best"] == {"images_seen": 16, "psnr": 25.0, "count": 4}
    assert result["psnr"] == 24.0
    assert not load_autoencoder(folder / "best.pt").training


def test_a_resumed_run_remembers_its_best(tmp_path, monkeypatch):
    import pipelines.train_autoencoder as job

    def stopping(scores, last):
        scores = iter(scores)

        def validate(run, *_):
            score = next(scores)
            if score == last:
                run.ask_to_stop()
            return {"psnr": score, "count": 4}

        return validate

    recipe = autoencoder_recipe("run.validate_every_steps=2")
    monkeypatch.setattr(job, "validate_autoencoder", stopping([20.0, 25.0], 25.0))
    with pytest.raises(Interrupted):
        train_autoencoder(recipe, "tiny", tmp_path / "run")
    monkeypatch.setattr(job, "validate_autoencoder", stopping([22.0, 24.0], None))
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    assert load_model(folder / "best.pt", "autoencoder").provenance["images_seen"] == 16


def test_a_validation_that_a_stop_cut_off_is_made_up_for(tmp_path, monkeypatch):
    import pipelines.train_autoencoder as job

    scores = {8: 20.0, 16: 25.0, 24: 22.0, 32: 24.0}

    def by_images_seen(run, ae, held_out, resolution, limit, seen, logbook, lpips):
        logbook.row(seen, val_psnr=scores[seen], val_count=4)
        return {"psnr": scores[seen], "count": 4}

    monkeypatch.setattr(job, "validate_autoencoder", by_images_seen)
    recipe = autoencoder_recipe("run.validate_every_steps=2")
    save = Run.save

    def killed_after_saving(run, images_seen, tree):
        save(run, images_seen, tree)
        if images_seen == 16:
            raise Interrupted("killed")

    monkeypatch.setattr(Run, "save", killed_after_saving)
    with pytest.raises(Interrupted):
        train_autoencoder(recipe, "tiny", tmp_path / "run")
    monkeypatch.setattr(Run, "save", save)
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    assert load_model(folder / "best.pt", "autoencoder").provenance["images_seen"] == 16
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["images_seen"] for row in rows if "val_psnr" in row] == [8, 16, 24, 32]


def test_lpips_that_decides_must_be_there_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(LdmError, match=r"vgg16-397923af.pth.*best_by=psnr"):
        train_autoencoder(autoencoder_recipe("best_by=lpips"), "tiny", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_run_leaves_what_it_promises(tmp_path):
    recipe = autoencoder_recipe()
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    for name in ("run.json", "config.yaml", "metrics.jsonl", "result.json", "ckpt.pt",
                 "ckpt.safetensors", "best.pt", "state/32/state.pt", "tensorboard"):  # fmt: skip
        assert (folder / name).exists(), name
    assert len(list((folder / "pictures").glob("recon-*.png"))) == 1
    rows = read_rows(folder / "metrics.jsonl")
    assert {"l1", "kl", "gaussian", "wavelet", "adversarial", "discriminator", "lr"} <= rows[
        -2
    ].keys()
    assert rows[-2]["gradient_ratio"] > 0 and rows[-2]["adversarial_weight"] == 0.1
    assert "val_psnr" in rows[-1]
    assert "adversarial" not in rows[0] and rows[0]["adversarial_weight"] == 0

    loaded = load_autoencoder(folder)
    assert not loaded.training
    origin = load_model(folder, "autoencoder").provenance
    assert origin["images_seen"] == 32 and origin["recipe"]["batch_size"] == 4


def test_phases_train_at_their_resolutions(tmp_path):
    folder = train_autoencoder(autoencoder_recipe(), "tiny", tmp_path / "run")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "resolution" in row]
    assert [row["resolution"] for row in rows] == [32, 32, 64, 64]


@pytest.mark.slow
def test_the_loss_falls(tmp_path):
    recipe = autoencoder_recipe(
        "phases=[{resolution: 32, steps: 60}]", "batch_size=8", "run.log_every_steps=10",
        "adversarial.weight=0",
    )  # fmt: skip
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "l1" in row]
    assert rows[-1]["l1"] < 0.8 * rows[0]["l1"]


def test_accumulation_sees_the_same_images(tmp_path):
    whole = train_autoencoder(autoencoder_recipe(), "tiny", tmp_path / "whole")
    parts = train_autoencoder(autoencoder_recipe("accumulate=2"), "tiny", tmp_path / "parts")
    a, b = (read_rows(f / "metrics.jsonl")[0]["l1"] for f in (whole, parts))
    assert a == pytest.approx(b, rel=1e-3)


def test_a_death_between_the_last_model_and_the_last_state_leaves_no_stale_model(
    tmp_path, monkeypatch
):
    import pipelines.train_autoencoder as job

    whole = train_autoencoder(autoencoder_recipe(), "tiny", tmp_path / "whole")
    save = job.save_model

    def dies_at_the_end(path, model):
        if model.provenance["images_seen"] == 32:
            raise LdmError("disk full")
        save(path, model)

    monkeypatch.setattr(job, "save_model", dies_at_the_end)
    with pytest.raises(LdmError, match="disk full"):
        train_autoencoder(autoencoder_recipe(), "tiny", tmp_path / "run")
    assert load_model(tmp_path / "run", "autoencoder").provenance["images_seen"] < 32
    monkeypatch.setattr(job, "save_model", save)
    folder = train_autoencoder(autoencoder_recipe(), "tiny", tmp_path / "run")
    ours, theirs = (load_model(path, "autoencoder") for path in (folder, whole))
    assert ours.sha256 == theirs.sha256 and ours.provenance["images_seen"] == 32


def make_pictures(folder, count: int) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.png")


def test_a_corrupt_held_out_picture_does_not_end_the_training(tmp_path):
    make_pictures(tmp_path / "data", 128)
    (tmp_path / "data" / "008.png").write_bytes(b"no picture")  # the first of those held out
    recipe = autoencoder_recipe(f"data.source={tmp_path / 'data'}", "data.workers=0",
                                "data.held_out=120", "validate_images=300")  # fmt: skip
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    assert read_rows(folder / "metrics.jsonl")[-1]["val_count"] == 119


def test_with_nothing_held_out_it_trains_without_validation(tmp_path):
    make_pictures(tmp_path / "data", 8)
    recipe = autoencoder_recipe(f"data.source={tmp_path / 'data'}", "data.workers=0",
                                "data.held_out=0")  # fmt: skip
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    assert (folder / "result.json").is_file() and not (folder / "pictures").exists()


def test_missing_vgg_weights_stop_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(LdmError) as caught:
        train_autoencoder(autoencoder_recipe("loss.lpips=1"), "tiny", tmp_path / "run")
    text = str(caught.value)
    assert "vgg16-397923af.pth" in text and "loss.lpips=0" in text and str(tmp_path) in text
    assert not (tmp_path / "run").exists()


def test_missing_data_says_how_to_prepare_it_and_what_else_there_is(tmp_path):
    with pytest.raises(LdmError) as caught:
        train_autoencoder(autoencoder_recipe("data.source=data/nowhere"), "x", tmp_path / "run")
    text = str(caught.value)
    assert "ldm data prepare" in text and "data.source=photos" in text and "data/nowhere" in text
    assert not (tmp_path / "run").exists()
