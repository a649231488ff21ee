"""Stage-two model files of random weights: what is tested is not what they draw."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from autoencoders import build_autoencoder
from diffusion import build_network
from ldm.checkpoint import ModelFile, save_model
from ldm.config import to_tree
from ldm.errors import UsageError
from pipelines.latent_diffusion import LatentDiffusionPipeline
from tests.small import autoencoder_recipe, diffusion_recipe

SIZE = 32
"""Side of the images that such a model makes; their latents are 4×4."""


CLASSES = ("cat", "dog", "emu")


def load(folder: Path) -> LatentDiffusionPipeline:
    return LatentDiffusionPipeline.from_pretrained(folder, "cpu", "fp32")


def pipeline(seed: int = 0, classes: tuple[str, ...] = ()) -> LatentDiffusionPipeline:
    """The model that `make_model` writes, made once; a copy, for `to` changes it."""
    return deepcopy(_made(seed, classes))


@cache
def _made(seed: int, classes: tuple[str, ...]) -> LatentDiffusionPipeline:
    with TemporaryDirectory() as folder:
        return load(make_model(Path(folder), seed, classes))


def said(call) -> str:
    """The one line of a call that is refused."""
    with pytest.raises(UsageError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def make_model(
    folder: Path,
    seed: int,
    classes: tuple[str, ...] = (),
    autoencoder_seed: int = 0,
    settings: tuple[str, ...] = (),
    std: float = 4.0,
    mean: float = 0.0,
    sigma_data: float = 0.5,
) -> Path:
    """Write `ckpt.pt` to a folder, which is returned.

    Args:
        seed: of the network's weights.
        settings: `key=value` over the tests' recipe.
        std, mean: of the latents, as the file has them.
        sigma_data: standard deviation that they are given, as the file has it.
    """
    recipe = diffusion_recipe("none", *settings)
    sizes = {"classes": len(classes)}
    recipe = recipe.model_copy(update={"network": recipe.network.model_copy(update=sizes)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(autoencoder_seed)
        autoencoder = build_autoencoder(autoencoder_recipe().model)
        torch.manual_seed(seed)
        network = build_network(recipe.network)
        for name, parameter in network.named_parameters():
            # what a block is told of noise and class counts for much, so that they can be seen
            told = "embed" in name or "shift" in name
            torch.nn.init.normal_(parameter, std=0.5 if told else 0.15)
    inner = ModelFile("autoencoder", to_tree(autoencoder.config), autoencoder.state_dict())
    statistics = {"mean": [mean] * 4, "std": [std] * 4, "sigma_data": sigma_data}
    statistics["classes"] = list(classes)
    origin = {"autoencoder_sha256": inner.sha256}
    model = ModelFile("diffusion", to_tree(recipe), network.state_dict(), statistics, origin, inner)
    save_model(folder / "ckpt.pt", model)
    return folder
