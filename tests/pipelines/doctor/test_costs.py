"""Counts against arithmetic by hand, costs against published numbers and real training parts."""

import os
from copy import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoencoders import Autoencoder, build_autoencoder
from autoencoders.layers import PIXELS_AT_ONCE
from diffusion import build_network
from ldm.config import load_preset, resolve
from ldm.distributed import make_accelerator
from ldm.files import write_atomically
from ldm.run import Run, RunConfig
from ldm.run_folder import save_state
from pipelines.doctor.costs import (
    AllocationTracker,
    DryRun,
    count_gmac,
    count_parameters,
    training_disk,
    training_memory,
)
from pipelines.doctor.training import AutoencoderTraining, DiffusionTraining
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe, fit
from pipelines.train_diffusion import snapshot_due
from tests.golden import (
    DECODER_GMAC_256,
    ENCODER_GMAC_256,
    LITEVAE_ENCODER_PARAMETERS,
    SDVAE_DECODER_PARAMETERS,
)
from tests.pipelines.doctor.dry_runs import CPU, autoencoder_costs, diffusion_costs
from tests.small import autoencoder_recipe, diffusion_recipe, sdvae

# without VGG and the discriminator, which these numbers are not of
ALONE = ["loss.lpips=0", "adversarial.weight=0"]
# a discriminator that has no power iteration
PATCHES = "discriminator={type: patchgan, channels: 4, layers: 1}"
CACHED = ("cache=x", "data={source: x, crop: center}")
EDM2 = "network={type: edm2, channels: 16, multipliers: [1, 2], blocks: 1, head_width: 8}"
FLAGS = 64  # bytes of an average's own two scalars, and of Adam's


# -------------------------------------------------------------------------------- counting
def test_a_linear_layer_by_hand():
    layer, run = nn.Linear(4, 8), DryRun(RunConfig(precision="fp32"), CPU)
    with run.record([layer]):
        loss = layer(torch.ones(5, 4)).square().sum()
        run.step(loss, layer)
    # the layer's input and the square's, in float32; the weight is no activation
    assert run.kept == 4 * (5 * 4 + 5 * 8)
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert count_gmac(lambda: layer(torch.ones(5, 4))) == pytest.approx(5 * 4 * 8 / 1e9)


def test_views_of_one_storage_count_once():
    scale, run = nn.Parameter(torch.ones(6)), DryRun(RunConfig(precision="fp32"), CPU)
    x = torch.ones(10, 6)
    with run.record([]):
        loss = (x * scale).sum() + (x.view(60)[:6] * scale).sum()
        run.step(loss, nn.ParameterList([scale]))
    assert run.kept == 4 * 60  # x, whole, for the gradients of scale


def test_attention_is_counted_as_its_two_products():
    q = torch.zeros(1, 2, 16, 8)
    call = lambda: nn.functional.scaled_dot_product_attention(q, q, q)  # noqa: E731
    assert count_gmac(call) == pytest.approx(2 * 2 * 16 * 16 * 8 / 1e9)


def test_peak_of_held_tensors():
    x = torch.ones(100)
    with AllocationTracker() as tracker:
        for _ in range(3):
            y = x * 2  # 400 bytes, and the one of the turn before until it is replaced
        z = y.view(10, 10)[0]  # of the same storage
        del y
        z.add_(1)
        w = torch.cat([x, x])
        assert z.numel() + w.numel() == 210
    assert tracker.peak == 400 + 800
    assert AllocationTracker().peak == 0


# Peebles and Xie 2023, Table 4, which calls multiply-accumulates Gflops: of 32×32 latents
@pytest.mark.parametrize(
    ("size", "gmac"), [("s", 6.06), ("b", 23.01), ("l", 80.71), ("xl", 118.64)]
)
def test_multiply_accumulates_of_dit_are_the_published_ones(size, gmac):
    recipe = resolve(DiffusionRecipe, load_preset("diffusion", f"dit-{size}-2-imagenet256"))
    with torch.device("meta"):
        network, x = build_network(recipe.network), torch.empty(1, 4, 32, 32)
        counted = count_gmac(lambda: network(x, torch.empty(1)))
    assert counted == pytest.approx(gmac, abs=0.03)


# ---------------------------------------------------------------------------------- a step
@pytest.mark.parametrize("preset", ["litevae-b", "sdvae"])
def test_golden_multiply_accumulates_of_stage_one(preset):
    recipe = resolve(AutoencoderRecipe, load_preset("ae", preset), ALONE)
    costs = autoencoder_costs(recipe)
    counted, autoencoder = costs.gmac(256), costs.training.state.autoencoder
    assert counted["encoder"] == pytest.approx(ENCODER_GMAC_256[preset], abs=0.005)
    assert counted["decoder"] == pytest.approx(DECODER_GMAC_256, abs=0.005)
    assert set(counted) == {"encoder", "decoder"}
    if preset in LITEVAE_ENCODER_PARAMETERS:
        assert count_parameters(autoencoder.encoder) == LITEVAE_ENCODER_PARAMETERS[preset]
    assert count_parameters(autoencoder.decoder) == SDVAE_DECODER_PARAMETERS


def test_golden_multiply_accumulates_of_stage_two():
    recipe = resolve(DiffusionRecipe, load_preset("diffusion", "ffhq256"))
    model = resolve(AutoencoderRecipe, load_preset("ae", "litevae-b")).model
    costs = diffusion_costs(recipe, model)
    counted = costs.gmac(256)
    # thop counts 24.3 for the published network; to four digits, an independent prototype's
    assert counted["network"] == pytest.approx(24.34, abs=0.005)
    assert counted["encoder"] == pytest.approx(ENCODER_GMAC_256["litevae-b"], abs=0.005)
    assert count_parameters(costs.training.state.network) == 274_060_196
    # forward, and twice that for the gradients of inputs and weights
    trained = costs.step(256).gmac - counted["encoder"]
    assert trained == pytest.approx(3 * counted["network"], rel=0.02)


class RealRun(Run):
    """A run on real tensors that sums what is kept for backward passes, by its place in memory."""

    def __init__(self, recipe):
        super().__init__(Path(), recipe.run, make_accelerator("cpu"))
        self.own, self.kept, self.sums = set(), {}, []

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.kept[storage.data_ptr()] = storage
        return tensor

    def step(self, loss, module, *_, **__):
        self.sums.append(sum(storage.nbytes() for storage in self.kept.values()))
        loss.backward()
        self.kept.clear()


@pytest.mark.parametrize("settings", [(), ("adversarial.cutmix=1", "loss.ldl=1")])
def test_a_dry_step_costs_what_a_real_one_does(settings):
    recipe = autoencoder_recipe("ema_half_life_images=10", *settings)
    dry = autoencoder_costs(recipe).step(32)
    run = RealRun(recipe)
    training = AutoencoderTraining(recipe, run)
    for network in training.trained:
        run.own |= {t.data_ptr() for t in (*network.parameters(), *network.buffers())}
    hooks = torch.autograd.graph.saved_tensors_hooks(run.note, lambda tensor: tensor)
    with hooks, FlopCounterMode(display=False) as counter:
        training.step(32, 4)
    assert len(run.sums) == 2  # the generator's step and the discriminator's
    # an empty storage lies nowhere, and some lie where another has been
    assert dry.activations == pytest.approx(max(run.sums), rel=0.01)
    assert dry.gmac == pytest.approx(counter.get_total_flops() / 2e9 / 4, rel=1e-6)


def test_cheaper_steps():
    costs = autoencoder_costs(autoencoder_recipe(PATCHES))
    whole, twice = costs.step(32), costs.step(32, batch=8)
    # but for weights that were worked on, such as the decoder's modulated ones
    assert 1.9 * whole.activations < twice.activations <= 2 * whole.activations
    assert twice.gmac == pytest.approx(whole.gmac)
    assert costs.step(32, adversarial_active=False).gmac < whole.gmac
    half = autoencoder_costs(autoencoder_recipe(PATCHES, "run.precision=bf16")).step(32)
    assert half.activations < whole.activations and half.gmac == whole.gmac
    less = autoencoder_costs(autoencoder_recipe(PATCHES, "checkpointing=true")).step(32)
    assert less.activations < whole.activations and less.gmac > whole.gmac
    model = autoencoder_recipe().model
    whole, less = (
        diffusion_costs(diffusion_recipe("", f"checkpointing={flag}"), model).step(32)
        for flag in ("false", "true")
    )
    assert less.activations < whole.activations / 3 and less.gmac > whole.gmac


def test_a_perceptual_loss_costs_without_its_weights():
    plain = autoencoder_costs(autoencoder_recipe("adversarial.weight=0")).step(32)
    recipe = autoencoder_recipe("adversarial.weight=0", "loss.lpips=1", "loss.esrgan=1")
    costs = autoencoder_costs(recipe)
    # torchvision's VGG-16 and VGG-19 without their classifiers; LPIPS has 1472 weights of its own
    sizes = sorted(map(count_parameters, costs.training.frozen))
    assert sizes == [14_714_688 + 1_472, 20_024_384]
    both = costs.step(32)
    assert both.gmac > plain.gmac and both.activations > plain.activations


@pytest.mark.parametrize("model", [autoencoder_recipe().model, sdvae().config])
def test_a_cache_saves_the_encoder(model):
    fly, cached = (diffusion_costs(diffusion_recipe("", *more), model) for more in ((), CACHED))
    difference = fly.step(32).gmac - cached.step(32).gmac
    assert difference == pytest.approx(fly.gmac(32)["encoder"])
    assert fly.step(32).activations == cached.step(32).activations


@pytest.mark.parametrize(
    "network",
    [
        "denoiser.uncertainty=true",
        f"{EDM2.removesuffix('}')}, classes: 3, augment_parameters: 9}}",
    ],
)
def test_every_network_of_stage_two_has_a_cost(network):
    recipe = diffusion_recipe("", network, "run.precision=bf16")
    costs = diffusion_costs(recipe, autoencoder_recipe().model)
    step = costs.step(32)
    assert step.gmac > costs.gmac(32)["network"] > 0 and step.activations > 0


def test_encoding_holds_what_it_does_with_real_tensors():
    model = autoencoder_recipe().model
    costs = diffusion_costs(diffusion_recipe(""), model)
    autoencoder = Autoencoder(model).eval()
    with AllocationTracker() as tracker, torch.no_grad():
        autoencoder.encode(torch.zeros(3, 3, 32, 32))
    assert costs.encoding(32, 3) == pytest.approx(tracker.peak, rel=0.01)
    # at the least, its images and what its first layer makes of them
    assert costs.encoding(32, 3) > 3 * 3 * 32 * 32 * 4
    assert costs.encoding(32, 6) == pytest.approx(2 * costs.encoding(32, 3), rel=0.05)
    assert costs.encoding(32) == costs.encoding(32, costs.batch)


@pytest.mark.parametrize("model", ["litevae", "sdvae", "dwt"])
def test_a_cpu_that_encodes_few_at_a_time_holds_what_a_direct_run_does(model, monkeypatch):
    config = {
        "litevae": autoencoder_recipe().model, "sdvae": sdvae().config,
        "dwt": build_autoencoder("dwt", decoder={"channels": 8}).config,
    }[model]  # fmt: skip
    monkeypatch.setitem(PIXELS_AT_ONCE, config.encoder.type, 2 * 32 * 32)
    costs = diffusion_costs(diffusion_recipe(""), config)
    for batch in (8, 15, 64):
        assert costs.encoding(32, batch) == pytest.approx(costs._encoding(32, batch), rel=0.01)


def test_a_part_of_the_activations_does_not_depend_on_the_batch():
    costs = diffusion_costs(diffusion_recipe("", EDM2), autoencoder_recipe().model)
    one, two, four = (costs.step(32, batch=batch).activations for batch in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)
    assert one > 1.5 * (two - one)  # its normalised filters


# ------------------------------------------------------------------------- memory and disk
def nbytes(tree) -> int:
    """Of all tensors in a tree of dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        tree = tree.values()
    return sum(map(nbytes, tree)) if hasattr(tree, "__iter__") and not isinstance(tree, str) else 0


def real_run(recipe) -> Run:
    return Run(Path(), recipe.run, make_accelerator("cpu"))


def test_stage_one_against_what_training_holds():
    recipe = autoencoder_recipe()
    costs = autoencoder_costs(recipe)
    real = AutoencoderTraining(recipe, real_run(recipe))
    real.step(32, 2)
    memory = training_memory(costs, [32, 64])
    parts = {name: nbytes(part.state_dict()) for name, part in real.state.parts.items()}
    weights = parts["autoencoder"] + parts["discriminator"]
    moments = parts["opt_autoencoder"] + parts["opt_discriminator"]
    assert memory.weights == weights and memory.adam == moments and memory.frozen == 0
    assert memory.averages == pytest.approx(parts["ema"], abs=FLAGS)
    gradients = [nbytes(list(net.parameters())) for net in real.trained]
    assert memory.gradients == max(gradients)
    assert training_memory(costs, [32], accumulate=2).gradients == sum(gradients)
    # the larger of the two phases, and a fifth more
    assert memory.activations == int(1.2 * costs.step(64).activations)
    assert memory.encoding == 0 and memory.total == memory.lasting + memory.activations
    assert memory.buckets == 0
    assert training_memory(costs, [32], processes=2).buckets == sum(gradients)

    disk = training_disk(costs.training, recipe.run, keeps_best=True)
    state = weights + moments + parts["ema"]
    assert disk.states == pytest.approx(2 * state, abs=2 * FLAGS)  # run.keep_states
    assert disk.models == 4 * parts["autoencoder"]
    last_only = training_disk(costs.training, recipe.run, keeps_best=False)
    assert last_only.models == disk.models / 2
    assert disk.writing == pytest.approx(state, abs=FLAGS)
    assert disk.run == disk.total == disk.states + disk.models + disk.writing


def test_an_unused_discriminator_has_no_optimiser_state():
    recipe = autoencoder_recipe("adversarial.weight=0")
    real = AutoencoderTraining(recipe, real_run(recipe))
    real.step(32, 2)
    memory = training_memory(autoencoder_costs(recipe), [32])
    assert memory.adam == nbytes(real.state.opt_autoencoder.state_dict())
    assert not real.state.opt_discriminator.state
    assert memory.weights == sum(nbytes(net.state_dict()) for net in real.trained)


def test_stage_two_against_what_training_holds():
    model = autoencoder_recipe().model
    settings = ("denoiser.uncertainty=true", "ema_stds=[0.05, 0.1]", "snapshots=5")
    recipe = diffusion_recipe("", *settings)
    costs = diffusion_costs(recipe, model)
    real = DiffusionTraining(recipe, model, real_run(recipe))
    real.step(32, 2)
    memory = training_memory(costs, [32])
    weights, moments = (
        nbytes(part.state_dict()) for part in (real.state.objective, real.state.optimizer)
    )
    averages = sum(nbytes(average.state_dict()) for average in real.state.averages)
    assert len(real.state.averages) == 3
    assert memory.weights == weights and memory.adam == moments
    assert memory.averages == pytest.approx(averages, abs=FLAGS)
    assert memory.frozen == nbytes(real.autoencoder.state_dict())
    assert memory.gradients == nbytes(list(real.state.objective.parameters()))
    assert training_memory(costs, [32], processes=2).buckets == memory.gradients
    assert memory.buckets == 0

    due = [step for step in range(1, recipe.steps + 1) if snapshot_due(step, recipe)]
    disk = training_disk(costs.training, recipe.run, False, snapshots=len(due))
    assert disk.states == pytest.approx(2 * (weights + moments + averages), abs=2 * FLAGS)
    network = nbytes(real.state.network.state_dict())
    assert disk.models == 2 * (network + memory.frozen)
    assert disk.snapshots == 2 * len(due) * network
    assert disk.cache == 0


def test_fewer_states_than_are_kept():
    training = autoencoder_costs(autoencoder_recipe()).training

    def disk(save_every):
        config = RunConfig(save_every_steps=save_every, keep_states=5)
        return training_disk(training, config, keeps_best=True)

    once = disk(100)
    assert disk(1).states == 5 * once.states
    assert once.writing == 0  # nothing is replaced
    assert disk(2).writing == once.models / 4  # ckpt.pt


@pytest.mark.parametrize("save_every", [1, 2, 4, 8])
def test_the_worst_moment_on_the_disk(tmp_path, monkeypatch, save_every):
    """Files of the very sizes, written as a run writes them."""
    recipe = diffusion_recipe("", f"run.save_every_steps={save_every}")
    training = diffusion_costs(recipe, autoencoder_recipe().model).training
    disk = training_disk(training, recipe.run, keeps_best=False)
    saves = recipe.steps // save_every
    state, model = disk.states // min(saves, 2), disk.models // 2
    worst = 0

    def measure():
        nonlocal worst
        worst = max(worst, sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()))

    flush = os.fsync
    monkeypatch.setattr("os.fsync", lambda number: (measure(), flush(number)))
    monkeypatch.setattr(torch, "save", lambda size, file: file.write(bytes(size)))
    for save in range(saves):
        for name in ("ckpt.pt", "ckpt.safetensors"):
            write_atomically(tmp_path / name, lambda file: file.write(bytes(model)))
        save_state(tmp_path / "state", save + 1, state, keep=2)
        measure()
    if saves > 2:
        assert disk.total == worst > disk.states + disk.models
    else:  # where no state is replaced, a model's file is, before the last state
        assert worst <= disk.total <= worst + model


def test_encoding_needs_memory_of_its_own():
    """On a GPU beside the training step, on a CPU before it."""
    model = autoencoder_recipe().model
    cpu = diffusion_costs(diffusion_recipe(""), model)
    gpu = copy(cpu)
    gpu.run = copy(cpu.run)
    gpu.step, gpu.encoding, gpu.run.device = cpu.step, cpu.encoding, torch.device("cuda")
    memory = training_memory(gpu, [32])
    assert memory.encoding == int(1.2 * cpu.encoding(32)) > 0
    assert memory.total == memory.lasting + memory.activations + memory.encoding
    assert training_memory(gpu, [32], batch=2).encoding < memory.encoding
    memory = training_memory(cpu, [32])
    worst = max(cpu.encoding(32), cpu.step(32).activations)
    assert memory.activations + memory.encoding == pytest.approx(1.2 * worst, abs=2)
    cached = diffusion_costs(diffusion_recipe("", *CACHED), model)
    assert cached.encoding(32) == 0


def test_labels_make_the_network_larger():
    model = autoencoder_recipe().model
    recipe = diffusion_recipe("", "data.labels=true")
    with torch.device("meta"):
        fitted = fit(recipe, Autoencoder(model), classes=7)
    weights = [training_memory(diffusion_costs(r, model), [32]).weights for r in (fitted, recipe)]
    # float32 rows of the embedding
    assert weights[0] - weights[1] == 4 * 7 * 4 * fitted.network.channels
