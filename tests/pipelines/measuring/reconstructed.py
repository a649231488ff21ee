"""Images on disk, an autoencoder of random weights in a run folder, and features that need no
weights: all that measuring reconstructions needs."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from skimage import data, metrics
from torch import nn

from autoencoders import Autoencoder, build_autoencoder
from ldm.checkpoint import ModelFile, save_model
from ldm.config import to_tree
from ldm.images import Pixels

SIZE = 32
DIM = 12
"""Of the features of `thumbnails`."""
FEATURES = "tests.pipelines.measuring.reconstructed:thumbnails"


def thumbnails():
    """An extractor: the mean colours of the quarters of images, (B, 12)."""
    return lambda images: nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def crops(count: int, size: int = SIZE) -> list[np.ndarray]:
    """Crops (size, size, 3) uint8 of a photograph, no two alike."""
    image = data.astronaut()
    return [image[11 * i : 11 * i + size, 7 * i : 7 * i + size] for i in range(count)]


def save_images(folder: Path, images: list[np.ndarray], suffix: str = ".png") -> Path:
    """`000.png` … in a folder, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}{suffix}")
    return folder


def random_autoencoder(seed: int = 0) -> Autoencoder:
    """`tiny`, always of the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_autoencoder("tiny").eval()


def save_run(folder: Path, recipe: dict | None = None, seed: int = 0) -> Path:
    """A run folder with a `ckpt.pt`, which is returned; `recipe` is what the file says."""
    ae = random_autoencoder(seed)
    provenance = {"recipe": recipe or {}, "images_seen": 8}
    model = ModelFile("autoencoder", to_tree(ae.config), ae.state_dict(), provenance=provenance)
    save_model(folder / "ckpt.pt", model)
    return folder


class Adding(nn.Module):
    """An "autoencoder" whose reconstruction is the image plus a constant; it counts its batches."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount, self.modes = amount, []
        self.config = SimpleNamespace(pixels=Pixels())

    def encode(self, images):
        self.modes.append(self.training)
        return SimpleNamespace(mode=lambda: images)

    def decode(self, latents, size):
        assert size == latents.shape[-2:]
        return latents + self.amount


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
