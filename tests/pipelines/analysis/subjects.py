"""Autoencoders to analyse: files of random weights, and one whose posteriors are known."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from autoencoders import DiagonalGaussian, build_autoencoder
from ldm.checkpoint import ModelFile, save_model
from ldm.config import to_tree
from ldm.data import DataConfig, Source
from pipelines.analysis.subjects import SharedImages, Subject, open_analysis

SMALL = {
    "encoder": {
        "extractor": {"channels": 8, "multipliers": [1, 2]},
        "aggregator": {"channels": 8, "multipliers": [1, 2]},
    },
    "decoder": {"channels": 8, "multipliers": [1, 1, 2, 2]},
}


def save(
    folder: Path,
    seed: int = 0,
    norm: str = "smc",
    resolution: int = 32,
    data: str | DataConfig = "photos",
    told: bool = True,
    **config: Any,
) -> Path:
    """Write a small autoencoder of random weights as a run's `ckpt.pt`; its folder."""
    decoder = SMALL["decoder"] | {"norm": norm}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ae = build_autoencoder("tiny", encoder=SMALL["encoder"], decoder=decoder, **config)
    own = data if isinstance(data, DataConfig) else DataConfig(source=data, workers=0)
    recipe = {
        "data": to_tree(own),
        "phases": [{"resolution": resolution, "steps": 1}],
    }
    origin = {"recipe": recipe} if told else {}
    model = ModelFile("autoencoder", to_tree(ae.config), ae.state_dict(), provenance=origin)
    save_model(folder / "ckpt.pt", model)
    return folder


class Pixels(Source):
    """A source of uint8 noise, every image its own."""

    def __init__(self, count: int, side: int = 16) -> None:
        self.count, self.side = count, side

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"noise {index}"

    def load(self, index: int) -> np.ndarray:
        shape = (self.side, self.side, 3)
        return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)


class Known(nn.Module):
    """An "encoder" whose posteriors are a given function of the images.

    Args:
        posterior: images (b, 3, H, W) → mean and log-variance (b, n_z, h, w).
    """

    def __init__(self, posterior, n_z: int, downsampling: int = 4) -> None:
        super().__init__()
        self.posterior, self.downsampling = posterior, downsampling
        self.config = SimpleNamespace(latent_channels=n_z)

    def encode(self, images):
        return DiagonalGaussian(*self.posterior(images))


def known(posterior, n_z: int, downsampling: int = 4) -> Subject:
    return Subject("known", Path("known.pt"), Known(posterior, n_z, downsampling))


def pixels(count: int, side: int = 16, batch_size: int = 64) -> SharedImages:
    source, ranks = Pixels(count, side), PartialState(cpu=True)
    what = f"{count} images of noise"
    return SharedImages(source, side, what, 0, batch_size, ranks, torch.device("cpu"))


def opened(*models, **how) -> tuple[list[Subject], SharedImages]:
    return open_analysis(models, device="cpu", **how)
