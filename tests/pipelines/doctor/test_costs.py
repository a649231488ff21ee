"""The paper's numbers, and those of the same step with real tensors."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoencoders import Autoencoder
from ldm.config import load_preset, resolve
from pipelines.doctor.costs import Holder, PaperRun, count_parameters
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe
from pipelines.train_autoencoder import AutoencoderState, Draws, train_step
from tests.golden import (
    DECODER_GMAC_256,
    ENCODER_GMAC_256,
    LITEVAE_ENCODER_PARAMETERS,
    SDVAE_DECODER_PARAMETERS,
)
from tests.pipelines.doctor.papers import CPU, paper_autoencoder, paper_diffusion
from tests.small import autoencoder_recipe, diffusion_recipe

# without VGG and the discriminator, which these numbers are not of
ALONE = ["loss.lpips=0", "adversarial.weight=0"]
# a discriminator that has no power iteration
PATCHES = "discriminator={type: patchgan, channels: 4, layers: 1}"


@pytest.mark.parametrize("preset", ["litevae-b", "sdvae"])
def test_golden_multiply_accumulates_of_stage_one(preset):
    recipe = resolve(AutoencoderRecipe, load_preset("ae", preset), ALONE)
    paper = paper_autoencoder(recipe)
    counted = paper.gmac(256)
    assert counted["encoder"] == pytest.approx(ENCODER_GMAC_256[preset], abs=0.005)
    assert counted["decoder"] == pytest.approx(DECODER_GMAC_256, abs=0.005)
    assert set(counted) == {"encoder", "decoder"}
    if preset in LITEVAE_ENCODER_PARAMETERS:
        encoder = paper.autoencoder.encoder
        assert count_parameters(encoder) == LITEVAE_ENCODER_PARAMETERS[preset]
    assert count_parameters(paper.autoencoder.decoder) == SDVAE_DECODER_PARAMETERS


def test_golden_multiply_accumulates_of_stage_two():
    recipe = resolve(DiffusionRecipe, load_preset("diffusion", "ffhq256"))
    model = resolve(AutoencoderRecipe, load_preset("ae", "litevae-b")).model
    paper = paper_diffusion(recipe, model)
    counted = paper.gmac(256)
    # thop counts 24.3 for the published network; to four digits, an independent prototype's
    assert counted["network"] == pytest.approx(24.34, abs=0.005)
    assert counted["encoder"] == pytest.approx(ENCODER_GMAC_256["litevae-b"], abs=0.005)
    assert count_parameters(paper.network) == 274_060_196
    # forward, and twice that for the gradients of inputs and weights
    trained = paper.cost(256).gmac - counted["encoder"]
    assert trained == pytest.approx(3 * counted["network"], rel=0.02)


@pytest.mark.parametrize("settings", [(), ("adversarial.cutmix=1", "loss.ldl=1")])
def test_on_paper_as_with_real_tensors(settings):
    """The real step, its saved tensors told apart by where they lie in memory."""
    recipe = autoencoder_recipe("ema_half_life_images=10", *settings)
    paper = paper_autoencoder(recipe).cost(32)

    own, kept, sums = set(), {}, []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    class Measured(PaperRun):
        folder = None

        def place(self, module):
            return module

        def step(self, loss, module, *_):
            sums.append(sum(storage.nbytes() for storage in kept.values()))
            loss.backward()
            kept.clear()

    images, noise = torch.rand(4, 3, 32, 32) * 2 - 1, torch.randn(4, recipe.latent_channels, 4, 4)
    draws = Draws(noise, torch.rand(4, 3) if recipe.adversarial.cutmix else None)
    run = Measured(CPU, "fp32")
    state = AutoencoderState(recipe, run, {})
    for network in (state.autoencoder, state.discriminator):
        own |= {t.data_ptr() for t in (*network.parameters(), *network.buffers())}
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, FlopCounterMode(display=False) as counter:
        train_step(run, state, images, draws, 1.0)
    assert len(sums) == 2  # the generator's step and the discriminator's
    # an empty storage lies nowhere, and some lie where another has been
    assert paper.activations == pytest.approx(max(sums), rel=0.01)
    assert paper.gmac == pytest.approx(counter.get_total_flops() / 2e9 / 4, rel=1e-6)


def test_what_makes_a_step_cheaper():
    recipe = autoencoder_recipe(PATCHES)
    whole = paper_autoencoder(recipe).cost(32)
    twice = paper_autoencoder(recipe).cost(32, batch=8)
    # but for weights that were worked on, such as the decoder's modulated ones
    assert 1.9 * whole.activations < twice.activations <= 2 * whole.activations
    assert twice.gmac == pytest.approx(whole.gmac)
    assert paper_autoencoder(recipe).cost(32, adversarial_active=False).gmac < whole.gmac
    half = paper_autoencoder(recipe, precision="bf16").cost(32)
    assert half.activations < whole.activations and half.gmac == whole.gmac
    less = paper_autoencoder(autoencoder_recipe(PATCHES, "checkpointing=true")).cost(32)
    assert less.activations < whole.activations and less.gmac > whole.gmac


def test_a_perceptual_loss_costs_without_its_weights():
    plain = paper_autoencoder(autoencoder_recipe("adversarial.weight=0")).cost(32)
    recipe = autoencoder_recipe("adversarial.weight=0", "loss.lpips=1", "loss.esrgan=1")
    paper = paper_autoencoder(recipe)
    # torchvision's VGG-16 and VGG-19 without their classifiers; LPIPS has 1472 weights of its own
    sizes = sorted(sum(p.numel() for p in net.parameters()) for net in paper.frozen)
    assert sizes == [14_714_688 + 1_472, 20_024_384]
    both = paper.cost(32)
    assert both.gmac > plain.gmac and both.activations > plain.activations


def test_a_cache_spares_the_encoder():
    model = autoencoder_recipe().model
    fly, kept = (
        paper_diffusion(diffusion_recipe("", *more), model)
        for more in ((), ("cache=x", "data={source: x, crop: center}"))
    )
    difference = fly.cost(32).gmac - kept.cost(32).gmac
    assert difference == pytest.approx(fly.gmac(32)["encoder"])
    assert fly.cost(32).activations == kept.cost(32).activations


@pytest.mark.parametrize(
    "settings",
    [
        ["denoiser.uncertainty=true"],
        ["network={type: edm2, channels: 16, multipliers: [1, 2], blocks: 1, head_width: 8, "
         "classes: 3, augment_parameters: 9}"],
    ],
)  # fmt: skip
def test_every_network_of_stage_two_has_a_cost(settings):
    recipe = diffusion_recipe("", *settings)
    paper = paper_diffusion(recipe, autoencoder_recipe().model, precision="bf16")
    cost = paper.cost(32)
    assert cost.gmac > paper.gmac(32)["network"] > 0 and cost.activations > 0


def test_what_stage_one_holds_while_it_encodes():
    """The same encoder with real tensors, of which each lies where it lies."""
    model = autoencoder_recipe().model
    paper = paper_diffusion(diffusion_recipe(""), model)
    autoencoder = Autoencoder(model).eval()
    with Holder() as holder, torch.no_grad():
        autoencoder.encode(torch.zeros(3, 3, 32, 32))
    assert paper.encoding(32, 3) == pytest.approx(holder.worst, rel=0.01)
    # at the least, its images and what its first layer makes of them
    assert paper.encoding(32, 3) > 3 * 3 * 32 * 32 * 4
    assert paper.encoding(32, 6) == pytest.approx(2 * paper.encoding(32, 3), rel=0.05)
    assert paper.encoding(32) == paper.encoding(32, paper.batch)


def test_a_part_of_the_activations_does_not_depend_on_the_batch():
    network = "network={type: edm2, channels: 16, multipliers: [1, 2], blocks: 1, head_width: 8}"
    paper = paper_diffusion(diffusion_recipe("", network), autoencoder_recipe().model)
    one, two, four = (paper.cost(32, batch).activations for batch in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)
    assert one > 1.5 * (two - one)  # its normalised filters
