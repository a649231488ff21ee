"""Bytes by arithmetic, against the tensors of real training parts."""

import os
from copy import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.files import write_atomically
from ldm.run_folder import save_state
from pipelines.doctor import memory as room
from pipelines.doctor.memory import (
    autoencoder_disk,
    autoencoder_memory,
    diffusion_disk,
    diffusion_memory,
    free_disk,
    same_disk,
)
from pipelines.doctor.timing import (
    AutoencoderRehearsal,
    DiffusionRehearsal,
    SyntheticImages,
    make_run,
)
from pipelines.recipes import fit
from pipelines.train_diffusion import snapshot_due
from tests.pipelines.doctor.papers import CPU, paper_autoencoder, paper_diffusion
from tests.small import autoencoder_recipe, diffusion_recipe

FLAGS = 64  # bytes of an average's own two scalars, and of Adam's


def nbytes(tree) -> int:
    """Of all tensors in a tree of dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        tree = tree.values()
    return sum(map(nbytes, tree)) if hasattr(tree, "__iter__") and not isinstance(tree, str) else 0


def test_stage_one_against_what_training_holds():
    recipe = autoencoder_recipe()
    paper = paper_autoencoder(recipe)
    real = AutoencoderRehearsal(recipe, make_run(recipe, CPU), paper)
    real.step(32, 2, True)
    memory = autoencoder_memory(recipe, paper)
    weights = nbytes(real.state.autoencoder.state_dict()) + nbytes(
        real.state.discriminator.state_dict()
    )
    moments = nbytes(real.state.opt_autoencoder.state_dict()) + nbytes(
        real.state.opt_discriminator.state_dict()
    )
    average = nbytes(real.state.ema.state_dict())
    assert memory.weights == weights
    assert memory.adam == moments
    assert memory.averages == pytest.approx(average, abs=FLAGS)
    assert memory.frozen == 0
    gradients = [
        nbytes(list(net.parameters())) for net in (real.state.autoencoder, real.state.discriminator)
    ]
    assert memory.gradients == max(gradients)
    gathering = autoencoder_recipe("accumulate=2")
    assert autoencoder_memory(gathering, paper).gradients == sum(gradients)
    # the larger of the two phases, and a fifth more
    assert memory.activations == int(1.2 * paper.cost(64).activations)
    assert memory.encoding == 0 and memory.total == memory.lasting + memory.activations
    assert memory.buckets == 0
    assert autoencoder_memory(recipe, paper, processes=2).buckets == sum(gradients)

    disk = autoencoder_disk(recipe, paper, validates=True)
    state = weights + moments + average
    assert disk.states == pytest.approx(2 * state, abs=2 * FLAGS)  # run.keep_states
    assert disk.models == 4 * nbytes(real.state.autoencoder.state_dict())
    assert autoencoder_disk(recipe, paper, validates=False).models == disk.models / 2
    assert disk.writing == pytest.approx(state, abs=FLAGS)
    assert disk.run == disk.total == disk.states + disk.models + disk.writing


def test_a_discriminator_that_rests_learns_nothing():
    recipe = autoencoder_recipe("adversarial.weight=0")
    paper = paper_autoencoder(recipe)
    real = AutoencoderRehearsal(recipe, make_run(recipe, CPU), paper)
    real.step(32, 2, False)
    memory = autoencoder_memory(recipe, paper)
    assert memory.adam == nbytes(real.state.opt_autoencoder.state_dict())
    assert not real.state.opt_discriminator.state
    assert memory.weights == nbytes(real.state.autoencoder.state_dict()) + nbytes(
        real.state.discriminator.state_dict()
    )


def test_stage_two_against_what_training_holds(tmp_path):
    autoencoder = autoencoder_recipe().model
    recipe = diffusion_recipe(
        tmp_path, "denoiser.uncertainty=true", "ema_stds=[0.05, 0.1]", "snapshots=5"
    )
    paper = paper_diffusion(recipe, autoencoder)
    real = DiffusionRehearsal(recipe, _build(autoencoder), make_run(recipe, CPU), paper)
    real.step(32, 2, False)
    memory = diffusion_memory(recipe, paper)
    weights, moments = (
        nbytes(p.state_dict()) for p in (real.state.objective, real.state.optimizer)
    )
    averaged = [real.state.ema, *real.state.powers.values()]
    averages = sum(nbytes(average.state_dict()) for average in averaged)
    assert len(averaged) == 3
    assert memory.weights == weights and memory.adam == moments
    assert memory.averages == pytest.approx(averages, abs=FLAGS)
    assert memory.frozen == nbytes(real.codec.autoencoder.state_dict())
    assert memory.gradients == nbytes(list(real.state.objective.parameters()))
    assert diffusion_memory(recipe, paper, processes=2).buckets == memory.gradients
    assert memory.buckets == 0

    disk = diffusion_disk(recipe, paper, images=10)
    assert disk.states == pytest.approx(2 * (weights + moments + averages), abs=2 * FLAGS)
    network = nbytes(real.state.network.state_dict())
    assert disk.models == 2 * (network + memory.frozen)
    kept = [step for step in range(1, recipe.steps + 1) if snapshot_due(step, recipe)]
    assert disk.snapshots == 2 * len(kept) * network
    assert disk.cache == 0


def test_a_cache_is_two_moments_of_every_image_and_its_mirror_image(tmp_path):
    recipe = diffusion_recipe(tmp_path, "cache=x", "data={source: x, crop: center, flip: true}")
    paper = paper_diffusion(recipe, autoencoder_recipe().model)
    block = np.empty((1234, 2, 2, 4, 4, 4), np.float32)  # as `latent_cache` lays it out
    assert diffusion_disk(recipe, paper, images=1234).cache == block.nbytes


def test_fewer_states_than_are_kept():
    recipe = autoencoder_recipe("run.save_every_steps=100", "run.keep_states=5")
    paper = paper_autoencoder(recipe)
    once = autoencoder_disk(recipe, paper, validates=True)
    often = autoencoder_recipe("run.save_every_steps=1", "run.keep_states=5")
    assert autoencoder_disk(often, paper, validates=True).states == 5 * once.states
    assert once.writing == 0  # nothing is replaced
    some = autoencoder_recipe("run.save_every_steps=2", "run.keep_states=5")
    assert autoencoder_disk(some, paper, validates=True).writing == once.models / 4  # ckpt.pt


@pytest.mark.parametrize("save_every", [1, 2, 4, 8])
def test_the_worst_moment_on_the_disk(tmp_path, monkeypatch, save_every):
    """Files of the very sizes, written as a run writes them."""
    recipe = diffusion_recipe(tmp_path, f"run.save_every_steps={save_every}")
    disk = diffusion_disk(recipe, paper_diffusion(recipe, autoencoder_recipe().model), images=0)
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


def test_encoding_needs_its_own_room(tmp_path):
    """On a GPU beside the training step, on a CPU before it."""
    model = autoencoder_recipe().model
    recipe = diffusion_recipe(tmp_path)
    cpu = paper_diffusion(recipe, model)
    gpu = copy(cpu)
    gpu.device, gpu.cost, gpu.encoding = torch.device("cuda"), cpu.cost, cpu.encoding
    memory = diffusion_memory(recipe, gpu)
    assert memory.encoding == int(1.2 * gpu.encoding(32)) > 0
    assert memory.total == memory.lasting + memory.activations + memory.encoding
    assert diffusion_memory(recipe, gpu, batch=2).encoding < memory.encoding
    memory = diffusion_memory(recipe, cpu)
    worst = max(cpu.encoding(32), cpu.cost(32).activations)
    assert memory.activations + memory.encoding == pytest.approx(1.2 * worst, abs=2)
    cached = diffusion_recipe(tmp_path, "cache=x", "data={source: x, crop: center}")
    assert diffusion_memory(cached, gpu).encoding == 0


def test_free_disk_of_a_folder_that_is_not_there(tmp_path):
    assert free_disk(tmp_path / "not" / "yet") == pytest.approx(free_disk(tmp_path), rel=0.1)


def test_folders_of_one_disk(tmp_path, monkeypatch):
    assert same_disk(tmp_path / "not" / "yet", tmp_path)
    stat = os.stat
    monkeypatch.setattr(
        room.Path, "stat",
        lambda path, **how: SimpleNamespace(st_dev=path.name, st_mode=stat(path).st_mode),
    )  # fmt: skip
    assert not same_disk(tmp_path, tmp_path.parent)


def test_sizes_come_from_the_data(tmp_path):
    """Labels make the network larger, on paper as well."""
    recipe = diffusion_recipe(tmp_path, "data.labels=true")
    model = autoencoder_recipe().model
    fitted = fit(recipe, _build(model), SyntheticImages(32, 7))
    plain = paper_diffusion(recipe, model)
    labelled = paper_diffusion(fitted, model)
    more = diffusion_memory(fitted, labelled).weights - diffusion_memory(recipe, plain).weights
    assert more == 4 * 7 * 4 * fitted.network.channels  # float32 rows of the embedding


def _build(config):
    from autoencoders import Autoencoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Autoencoder(config)
