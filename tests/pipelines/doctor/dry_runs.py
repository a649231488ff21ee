"""Dry runs of equal networks, made once for all tests of one process."""

from functools import cache, partial

import torch

from autoencoders import AutoencoderConfig
from ldm.data import DataConfig
from ldm.run import RunConfig
from pipelines.doctor.costs import Costs
from pipelines.doctor.training import AutoencoderTraining, DiffusionTraining
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe

CPU = torch.device("cpu")
_cached = cache(Costs)


def autoencoder_costs(recipe: AutoencoderRecipe, batch: int = 4) -> Costs:
    return costs(partial(AutoencoderTraining, recipe), recipe.run, CPU, batch)


def diffusion_costs(recipe: DiffusionRecipe, config: AutoencoderConfig, batch: int = 4) -> Costs:
    return costs(partial(DiffusionTraining, recipe, config), recipe.run, CPU, batch)


def costs(build: partial, config: RunConfig, device: torch.device, batch: int) -> Costs:
    """As `Costs`, to which neither the data nor most settings of the run matter."""
    recipe, *others = build.args
    same = {"data": DataConfig(), "run": RunConfig(), "accumulate": 1}
    if isinstance(recipe, DiffusionRecipe):
        same["autoencoder"] = ""
    setup = _Setup(build.func, recipe.model_copy(update=same), *others)
    return _cached(setup, RunConfig(precision=config.precision), device, batch)


class _Setup:
    """A partial function that equals another of the same function and arguments."""

    def __init__(self, *parts):
        self.parts = parts

    def __call__(self, run):
        build, *args = self.parts
        return build(*args, run)

    def __eq__(self, other):
        return self.parts == other.parts

    def __hash__(self):
        return hash(self.parts)
