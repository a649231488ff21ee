"""Reconstruction metrics over a data set, on autoencoders whose reconstructions are known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage import data, metrics
from torch import nn

from autoencoders import build_autoencoder
from ldm.checkpoint import ModelFile, save_model
from ldm.config import to_tree
from ldm.data import DataConfig, evaluation_batches, open_source
from ldm.errors import LdmError, UsageError
from ldm.images import to_float
from pipelines import evaluate
from pipelines.evaluate import evaluate_autoencoder, evaluate_checkpoint

CPU = torch.device("cpu")


class Adding(nn.Module):
    """An "autoencoder" whose reconstruction is the image plus a constant; it counts its batches."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount, self.modes = amount, []

    def encode(self, images):
        self.modes.append(self.training)
        return SimpleNamespace(mode=lambda: images)

    def decode(self, latents):
        return latents + self.amount


class Crops:
    """A source of 32×32 crops of one photograph."""

    def __init__(self, count: int) -> None:
        self.images = [data.astronaut()[i : i + 32, 200 + i : 232 + i] for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"crop {index}"

    def load(self, index: int) -> np.ndarray:
        return self.images[index]


def by_scikit_image(images, recon) -> tuple[float, float]:
    """Mean PSNR and SSIM of lists of uint8 images."""
    pairs = list(zip(images, recon, strict=True))
    psnr = [metrics.peak_signal_noise_ratio(x, y, data_range=255) for x, y in pairs]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssim = [
        metrics.structural_similarity(x, y, data_range=255, channel_axis=2, **options)
        for x, y in pairs
    ]
    return float(np.mean(psnr)), float(np.mean(ssim))


# --------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("batch_size", [2, 7])
def test_means_over_images_of_8_bit_reconstructions(batch_size):
    """0.05 is 6.375 levels: what is measured is rounded to 6, and clipped at white."""
    source = Crops(7)
    result = evaluate_autoencoder(Adding(0.05), source, 32, batch_size, CPU)
    recon = [(image.astype(int) + 6).clip(0, 255).astype(np.uint8) for image in source.images]
    psnr, ssim = by_scikit_image(source.images, recon)
    assert result["count"] == 7
    assert result["psnr"] == pytest.approx(psnr, abs=1e-5)
    assert result["ssim"] == pytest.approx(ssim, abs=1e-6)
    assert "lpips" not in result


def test_an_exact_reconstruction_counts_100_db():
    result = evaluate_autoencoder(Adding(0.0), Crops(3), 32, 2, CPU)
    assert result == {"psnr": 100.0, "ssim": pytest.approx(1.0), "count": 3}


def test_the_perceptual_distance_is_a_mean_over_images():
    def distance(recon, images):
        return (recon - images + images).mean()  # differs from image to image

    source = Crops(5)
    result = evaluate_autoencoder(Adding(0.0), source, 32, 2, CPU, perceptual=distance)
    stacked = to_float(torch.from_numpy(np.stack(source.images)))
    assert result["lpips"] == pytest.approx(stacked.mean().item(), abs=1e-6)


def test_limit():
    assert evaluate_autoencoder(Adding(0.0), Crops(5), 32, 2, CPU, limit=3)["count"] == 3


def test_a_model_in_training_is_put_back():
    model = Adding(0.0).train()
    evaluate_autoencoder(model, Crops(2), 32, 1, CPU)
    assert model.modes == [False, False]
    assert model.training


def test_the_mode_is_decoded_in_eval_mode_without_gradients():
    torch.manual_seed(0)
    ae = build_autoencoder("tiny")
    source = open_source(DataConfig(), "val", 32)
    result = evaluate_autoencoder(ae, source, 32, 4, CPU, limit=4)
    batch = next(evaluation_batches(source, 32, 4))
    with torch.no_grad():
        recon = ae.eval().decode(ae.encode(to_float(batch.images)).mean)
    levels = ((recon + 1) * 127.5).round().clamp(0, 255).byte()
    lists = [t.permute(0, 2, 3, 1).numpy() for t in (batch.images, levels)]
    psnr, ssim = by_scikit_image(*lists)
    assert (result["psnr"], result["ssim"]) == pytest.approx((psnr, ssim), abs=1e-4)


# -------------------------------------------------------------------------------- from files
@pytest.fixture
def no_lpips(monkeypatch):
    def missing(device, instead):
        raise LdmError("vgg16 is not on this machine")

    monkeypatch.setattr(evaluate, "load_lpips", missing)


def save_run(folder, recipe: dict) -> None:
    torch.manual_seed(0)
    ae = build_autoencoder("tiny")
    tree = to_tree(ae.config)
    save_model(
        folder / "ckpt.pt",
        ModelFile("autoencoder", tree, ae.state_dict(), provenance={"recipe": recipe}),
    )


def test_a_file_says_what_it_was_trained_on(tmp_path, no_lpips, capsys):
    phases = [{"resolution": 64, "steps": 1}, {"resolution": 32, "steps": 1}]
    save_run(tmp_path, {"data": to_tree(DataConfig(workers=0)), "phases": phases})
    result = evaluate_checkpoint(tmp_path / "ckpt.pt", limit=3, device="cpu")
    assert result["count"] == 3
    assert result.keys() == {"psnr", "ssim", "count"}
    out = capsys.readouterr().out
    assert "without LPIPS: vgg16 is not on this machine" in out
    assert f"measuring {tmp_path / 'ckpt.pt'} on the val split of photos at 32×32" in out


def test_data_and_resolution_can_be_given(tmp_path, monkeypatch):
    monkeypatch.setattr(
        evaluate, "load_lpips", lambda device, instead: lambda recon, images: torch.ones(())
    )
    save_run(tmp_path, {})
    result = evaluate_checkpoint(tmp_path, "photos", "val", 16, limit=2, device="cpu")
    assert result["lpips"] == 1
    assert result["count"] == 2


def test_the_newest_run(tmp_path, monkeypatch, no_lpips):
    run = tmp_path / "runs" / "x"
    save_run(run, {})
    (run / "run.json").write_text('{"kind": "autoencoder"}')
    monkeypatch.chdir(tmp_path)
    assert evaluate_checkpoint(None, "photos", "val", 16, limit=1, device="cpu")["count"] == 1


# ---------------------------------------------------------------------------------- errors
def test_a_file_that_does_not_say_what_it_was_trained_on(tmp_path):
    save_run(tmp_path, {})
    with pytest.raises(UsageError, match="does not say what it was trained on: give --data"):
        evaluate_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="does not say what it was trained on: give --resolution"):
        evaluate_checkpoint(tmp_path, "photos")
    build_autoencoder("tiny").save_pretrained(tmp_path / "hub")
    with pytest.raises(UsageError, match="give --data"):
        evaluate_checkpoint(tmp_path / "hub")


@pytest.mark.parametrize("name", ["batch_size", "resolution", "limit"])
def test_numbers_below_one(name):
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} 0: it must be at least 1"):
        evaluate_checkpoint(**{name: 0})


def test_no_images():
    with pytest.raises(LdmError, match="no image to evaluate"):
        evaluate_autoencoder(Adding(0.0), Crops(0), 32, 2, CPU)


def test_images_below_ssims_window():
    with pytest.raises(LdmError, match="SSIM needs images of 11×11"):
        evaluate_autoencoder(Adding(0.0), Crops(1), 8, 2, CPU)
