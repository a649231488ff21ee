"""Real steps of real parts, on images that nobody took."""

import pytest
import torch

from autoencoders import Autoencoder
from pipelines.doctor.timing import (
    AutoencoderRehearsal,
    DiffusionRehearsal,
    SyntheticCache,
    SyntheticImages,
    make_run,
)
from pipelines.recipes import fit
from pipelines.train_diffusion import DiffusionState
from tests.pipelines.doctor.papers import CPU, paper_autoencoder, paper_diffusion
from tests.small import autoencoder_recipe, diffusion_recipe

AUGMENTED = (
    "augment.probability=0.5", "data.flip=false", "denoiser.uncertainty=true",
    "ema_stds=[0.05, 0.1]",
)  # fmt: skip


def weights(module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(before, module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def stage_one(*settings):
    recipe = autoencoder_recipe(*settings)
    return AutoencoderRehearsal(recipe, make_run(recipe, CPU), paper_autoencoder(recipe))


def stage_two(*settings, classes=0):
    model = autoencoder_recipe().model
    autoencoder, run_folder = Autoencoder(model), "nowhere"
    recipe = diffusion_recipe(run_folder, *settings)
    recipe = fit(recipe, autoencoder, SyntheticImages(32, classes))
    paper = paper_diffusion(recipe, model)
    return DiffusionRehearsal(recipe, autoencoder, make_run(recipe, CPU), paper)


def test_a_step_of_stage_one_trains_both_networks_and_the_average():
    rehearsal = stage_one("ema_half_life_images=10", "loss.ldl=1", "adversarial.cutmix=1")
    nets = rehearsal.state.autoencoder, rehearsal.state.discriminator, rehearsal.state.ema.model
    before = [weights(net) for net in nets]
    rehearsal.step(32, 2, adversarial_active=False)
    assert [same(*pair) for pair in zip(before, nets, strict=True)] == [False, True, False]
    rehearsal.step(32, 2, adversarial_active=True)
    assert not same(before[1], rehearsal.state.discriminator)
    assert rehearsal.state.averaged is rehearsal.state.ema.model


def test_an_update_of_nothing_leaves_no_gradient():
    rehearsal = stage_one()
    rehearsal.step(32, 1, adversarial_active=True)
    rehearsal.update(adversarial_active=True)
    assert all(p.grad is None for p in rehearsal.state.autoencoder.parameters())
    assert rehearsal.run.skipped.total() == 0


def test_sides_that_stage_one_takes():
    rehearsal = stage_one()
    # the encoder divides by 8 and the small discriminator by 8
    assert [side for side in (4, 8, 12, 16, 64) if rehearsal.takes(side)] == [8, 16, 64]


@pytest.mark.parametrize(
    ("settings", "classes"),
    [
        ((), 0),
        (("data.labels=true",), 3),
        (AUGMENTED, 0),
        (("cache=x", "data={source: x, crop: center}"), 0),
        (("network={type: edm2, channels: 16, multipliers: [1, 2], blocks: 1, head_width: 8}",), 0),
    ],
)
def test_a_step_of_stage_two_trains_the_network_alone(settings, classes):
    rehearsal = stage_two(*settings, classes=classes)
    assert isinstance(rehearsal.state, DiffusionState)  # the training's own
    before, frozen = weights(rehearsal.state.network), weights(rehearsal.codec.autoencoder)
    rehearsal.step(32, 2, False)
    rehearsal.step(32, 2, False)
    rehearsal.update(False)
    assert not same(before, rehearsal.state.network)
    assert same(frozen, rehearsal.codec.autoencoder)
    assert rehearsal.run.skipped.total() == 0


def test_sides_that_stage_two_takes():
    rehearsal = stage_two()
    # the autoencoder divides by 8, the network's two levels by 2
    assert [side for side in (8, 16, 24, 32) if rehearsal.takes(side)] == [16, 32]


def test_initial_weights_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    stage_one()
    assert torch.equal(torch.rand(1), expected)


def test_synthetic_data_is_as_data_is():
    images = SyntheticImages(16, 3)
    assert images.load(1).shape == (16, 16, 3) and images.load(1).dtype == "uint8"
    assert images.classes == ("0", "1", "2") and images.label(4) == 1
    assert SyntheticImages(16, 0).label(4) == -1
    batches = list(SyntheticCache((4, 2, 2)).batches(seed=0, start=0, stop=5, batch_size=2))
    assert [batch.k.tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert batches[0].posterior.mean.shape == (2, 4, 2, 2)
