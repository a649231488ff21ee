"""Means over a data set, on autoencoders whose reconstructions are known."""

import numpy as np
import pytest
import torch
from skimage import data

from autoencoders import build_autoencoder
from ldm.data import DataConfig, evaluation_batches, open_source
from ldm.errors import LdmError
from ldm.images import to_float
from pipelines.validation import evaluate_autoencoder
from tests.pipelines.measuring.reconstructed import Adding, by_scikit_image

CPU = torch.device("cpu")


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
        return (recon - images + images).mean(dim=(1, 2, 3))  # differs from image to image

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


# ---------------------------------------------------------------------------------- errors
def test_no_images():
    with pytest.raises(LdmError, match="no image to evaluate"):
        evaluate_autoencoder(Adding(0.0), Crops(0), 32, 2, CPU)


def test_images_below_ssims_window():
    with pytest.raises(LdmError, match="SSIM needs images of 11×11"):
        evaluate_autoencoder(Adding(0.0), Crops(1), 8, 2, CPU)
