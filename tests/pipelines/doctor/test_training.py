"""Real steps on random images."""

from pathlib import Path

import pytest
import torch

from autoencoders import Autoencoder
from ldm.distributed import make_accelerator
from ldm.run import Run
from pipelines.doctor.training import AutoencoderTraining, DiffusionTraining
from pipelines.recipes import fit
from tests.small import autoencoder_recipe, diffusion_recipe

AUGMENTED = (
    "augment.probability=0.5", "data.flip=false", "denoiser.uncertainty=true",
    "ema_stds=[0.05, 0.1]",
)  # fmt: skip


def weights(module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(before, module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


FLOW = ("denoiser={type: flow, uncertainty: true}",)


def stage_one(*settings):
    recipe = autoencoder_recipe(*settings)
    return AutoencoderTraining(recipe, Run(Path(), recipe.run, make_accelerator("cpu")))


def stage_two(*settings, classes=0):
    recipe, model = diffusion_recipe("", *settings), autoencoder_recipe().model
    with torch.device("meta"):
        recipe = fit(recipe, Autoencoder(model), classes)
    return DiffusionTraining(recipe, model, Run(Path(), recipe.run, make_accelerator("cpu")))


def test_a_step_of_stage_one_trains_both_networks_and_the_average():
    training = stage_one("ema_half_life_images=10", "loss.ldl=1", "adversarial.cutmix=1")
    state = training.state
    nets = state.autoencoder, state.discriminator, state.ema.ema_model
    before = [weights(net) for net in nets]
    training.step(32, 2, adversarial_active=False)
    state.advance()
    assert [same(*pair) for pair in zip(before, nets, strict=True)] == [False, True, False]
    training.step(32, 2)
    assert not same(before[1], state.discriminator)
    assert state.averaged is state.ema.ema_model
    assert training.run.skipped.total() == 0


def test_resolutions_that_stage_one_accepts():
    training = stage_one()
    # the encoder divides by 8 and the small discriminator by 8
    assert [side for side in (4, 8, 12, 16, 64) if training.accepts(side)] == [8, 16, 64]


@pytest.mark.parametrize(
    ("settings", "classes"),
    [
        ((), 0),
        (("data.labels=true",), 3),
        (AUGMENTED, 0),
        (FLOW, 0),
        (("cache=x", "data={source: x, crop: center}"), 0),
        (("network={type: edm2, channels: 16, multipliers: [1, 2], blocks: 1, head_width: 8}",), 0),
        (("network={type: dit, width: 32, depth: 1, heads: 2}", "data.labels=true"), 3),
    ],
)
def test_a_step_of_stage_two_trains_the_network_alone(settings, classes):
    training = stage_two(*settings, classes=classes)
    before, frozen = weights(training.state.network), weights(training.autoencoder)
    training.step(32, 2)
    training.state.advance()
    training.step(32, 2)
    assert not same(before, training.state.network)
    assert same(frozen, training.autoencoder)
    assert training.run.skipped.total() == 0


def test_resolutions_that_stage_two_accepts():
    training = stage_two()
    # the autoencoder divides by 8, the network's two levels by 2
    assert [side for side in (8, 16, 24, 32) if training.accepts(side)] == [16, 32]
