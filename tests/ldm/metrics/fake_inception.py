"""A tiny TorchScript network with the interface of the published Inception file."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn


class Layers(nn.Module):
    """(B, 3, 299, 299) in [−1, 1) → (B, 2048): a random view of a 4×4 thumbnail."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        weight = torch.randn(dim, 48, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weight", weight)

    def forward(self, images: Tensor) -> Tensor:
        thumbnails = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return (thumbnails @ self.weight.T).relu()


class FakeInception(nn.Module):
    """The interface of the published file: a submodule `layers`; called itself, it resizes
    floats (B, 3, H, W) in 0..255, and gives features where it is asked for them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = Layers(dim)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        resized = nn.functional.interpolate(images, [299, 299], mode="bilinear")
        features = self.layers((resized - 128) / 128)
        return features if return_features else features[:, :1008]  # else classes


def save_script(module: nn.Module, path: Path) -> Path:
    """The module as a TorchScript file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(module), str(path))
    return path


def save_fake_inception(folder: Path, dim: int = 2048) -> Path:
    """`inception-2015-12-05.pt` in a folder."""
    return save_script(FakeInception(dim), folder / "inception-2015-12-05.pt")
