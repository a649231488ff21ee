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


# ------------------------------------------------------------------- with sFID's layer and classes
class Mixed(nn.Module):
    """Stands for `mixed_6`: a branch `conv` of 9 maps, beside the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(16, 9, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), x], 1)


class WholeInception(nn.Module):
    """The interface of the published file with the layers by their names, and `output`; called
    itself, it resizes as the published file does, by a grid that puts pixel i at i·H/299."""

    def __init__(self, dim: int, grid: int, classes: int) -> None:
        super().__init__()
        layers = [nn.AdaptiveAvgPool2d(grid), nn.Conv2d(3, 16, 1), nn.ReLU(), Mixed()]
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(100, dim), nn.ReLU()]
        names = ("conv", "conv_1", "conv_2", "mixed_6", "mixed_7", "pool2", "dense", "relu")
        self.layers = nn.Sequential()
        for name, layer in zip(names, layers, strict=True):
            self.layers.add_module(name, layer)
        self.output = nn.Linear(dim, classes)
        draw = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=draw)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        height, width = images.shape[-2:]
        theta = torch.eye(2, 3)
        theta[0, 2] = 1 / width - 1 / 299
        theta[1, 2] = 1 / height - 1 / 299
        count = images.shape[0]
        place = nn.functional.affine_grid(
            theta[None].repeat(count, 1, 1), [count, 3, 299, 299], align_corners=False
        )
        x = nn.functional.grid_sample(
            images, place, mode="bilinear", padding_mode="border", align_corners=False
        )
        features = self.layers((x - 128) / 128)
        return features if return_features else self.output(features).softmax(1)


def save_whole_inception(folder: Path, dim: int, grid: int = 17, classes: int = 1008) -> Path:
    """`inception-2015-12-05.pt` with the outputs of sFID and of the Inception Score."""
    return save_script(
        WholeInception(dim, grid, classes).eval(), folder / "inception-2015-12-05.pt"
    )
