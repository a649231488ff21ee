"""Networks on paper, worked out once for all tests of one process."""

from functools import cache

import torch

from autoencoders import AutoencoderConfig
from ldm.data import DataConfig
from ldm.run import RunConfig
from pipelines.doctor.costs import PaperAutoencoder, PaperDiffusion
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe

CPU = torch.device("cpu")
_autoencoder, _diffusion = cache(PaperAutoencoder), cache(PaperDiffusion)


def paper_autoencoder(
    recipe: AutoencoderRecipe,
    device: torch.device = CPU,
    precision: str = "fp32",
    batch: int = 4,
) -> PaperAutoencoder:
    """As `PaperAutoencoder`, which neither data, phases nor the run's settings matter to."""
    same = {"data": DataConfig(), "phases": (), "run": RunConfig(), "accumulate": 1}
    return _autoencoder(recipe.model_copy(update=same), device, precision, batch)


def paper_diffusion(
    recipe: DiffusionRecipe,
    config: AutoencoderConfig,
    device: torch.device = CPU,
    precision: str = "fp32",
    batch: int = 4,
) -> PaperDiffusion:
    """As `PaperDiffusion`, which neither data nor the run's settings matter to."""
    same = {"data": DataConfig(), "run": RunConfig(), "autoencoder": "", "accumulate": 1}
    return _diffusion(recipe.model_copy(update=same), config, device, precision, batch)
