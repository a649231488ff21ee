"""Saved states with an altered entry: training refuses them in one line, before it takes a step."""

import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.mutations import damage_tree
from ldm.errors import LdmError
from ldm.run_folder import load_state
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_diffusion import train_diffusion
from tests.small import autoencoder_recipe, diffusion_recipe

NUMBERS = {
    "images_seen", "validated_at", "skipped", "log", "held_out", "best", "row", "statistics",
    "autoencoder_sha256",
}  # fmt: skip
SMALLER = (
    "run={keep_states: 4, log_every_steps: 3, validate_every_steps: 4}", "batch_size=2",
    "data.workers=0",
)  # fmt: skip
OF_ONE = (
    "phases=[{resolution: 32, steps: 8}]", "validate_images=2", "encoder.depth=2",
    "encoder.extractor={channels: 2, multipliers: [1], blocks: 1}",
    "encoder.aggregator={channels: 2, multipliers: [1], blocks: 1}",
    "decoder={channels: 2, multipliers: [1, 1, 2], blocks: 1, norm: group}",
)  # fmt: skip
OF_TWO = "network={channels: 4, multipliers: [1], blocks: 1, head_width: 4}", "ema_stds=[0.1, 0.2]"
WRONG = "x", True, [[]], {"x": "x"}, 1 << 70
STATE = Path("state", "8")


@pytest.fixture(scope="module", params=["one", "two"])
def half_way(request, tmp_path_factory):
    """A call that resumes a run, its folder with a state after half of its steps, and the state."""
    folder = tmp_path_factory.mktemp("runs")
    recipe, train = autoencoder_recipe(*SMALLER, *OF_ONE), train_autoencoder
    run = train(recipe, "tiny", folder / "one")
    if request.param == "two":
        recipe = diffusion_recipe(run / "ckpt.pt", *SMALLER, *OF_TWO)
        train = train_diffusion
        run = train(recipe, "tiny", folder / "two")
    (run / "result.json").unlink()
    for later in ("12", "16"):
        (run / "state" / later / "state.pt").unlink()
    return lambda folder: train(recipe, "tiny", folder), run, deepcopy(load_state(run / STATE))


def entries(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """The path of every entry of a state, and the dict or list that holds it."""
    for key, value in [*(tree.items() if isinstance(tree, dict) else enumerate(tree))]:
        yield (*path, key), tree
        if isinstance(value, dict | list):
            yield from entries(value, (*path, key))


def refusal(resume, run: Path, tree: dict, path: tuple, owner: Any, wrong: Any) -> str:
    """The error of a run whose state has another value at a path."""
    right, owner[path[-1]] = owner[path[-1]], wrong
    torch.save(tree, run / STATE / "state.pt")
    owner[path[-1]] = right
    with pytest.raises(LdmError) as caught:
        resume(run)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_tensors_of_another_type_or_shape_are_refused(half_way):
    resume, run, tree = half_way
    tensors = [
        (path, owner) for path, owner in entries(tree) if isinstance(owner[path[-1]], Tensor)
    ]
    draw = Random(0)
    for path, owner in draw.sample(tensors, 8):
        tensor = owner[path[-1]]
        other = torch.int64 if tensor.is_floating_point() else torch.float32
        wrong = [False, None, [], tensor.to(other), tensor.to(torch.complex64), tensor[None]]
        line = refusal(resume, run, tree, path, owner, draw.choice(wrong))
        assert f"the saved state of {path[0]} does not fit: tensor " in line
        assert path[-1] in line


def test_numbers_of_another_type_are_refused(half_way):
    resume, run, tree = half_way
    numbers = [(path, owner) for path, owner in entries(tree) if path[0] in NUMBERS]
    draw = Random(0)
    for path, owner in draw.sample(numbers, 8):
        line = refusal(resume, run, tree, path, owner, draw.choice(WRONG))
        assert f"damaged: {path[0]}" in line or "has other weights" in line


def test_any_damage_is_refused_or_trains_on(half_way, tmp_path):
    resume, run, tree = half_way
    refused = 0
    for seed in range(6):
        folder = tmp_path / str(seed)
        shutil.copytree(run, folder)
        what, damaged = damage_tree(deepcopy(tree), Random(seed))
        torch.save(damaged, folder / STATE / "state.pt")
        try:
            resume(folder)
        except LdmError as error:
            assert str(error).isprintable(), what
            refused += 1
    assert refused > 1
