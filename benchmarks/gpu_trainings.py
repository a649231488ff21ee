"""The trainings of `benchmarks.gpu_check`: both stages, by their own commands' functions."""

import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from shutil import copyfile
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from ldm.config import load_preset, resolve
from ldm.errors import Interrupted, brief
from ldm.logbook import read_rows
from ldm.run import Run
from pipelines.doctor.doctor import diagnose
from pipelines.doctor.timing import flops_per_image
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_diffusion import train_diffusion

PHOTOS = "data={source: photos, crop: random, flip: true, workers: 0}"
STAGE_ONE = {
    "full": ("litevae-b", [
        "phases=[{resolution: 128, steps: 24}]", "batch_size=16", "validate_images=16",
    ]),
    "quick": ("tiny", [
        "phases=[{resolution: 32, steps: 8}]", "batch_size=4", "validate_images=4",
        "encoder={extractor: {channels: 8}, aggregator: {channels: 8}}",
        "decoder={channels: 8, multipliers: [1, 1, 2, 2]}",
        "discriminator={channels: 4, multipliers: [1, 2, 2]}",
    ]),
}  # fmt: skip
STAGE_TWO = {
    "full": ("ffhq256", ["resolution=256", "steps=24", "batch_size=16", "statistics_images=32"]),
    "quick": ("tiny", [
        "resolution=32", "steps=8", "batch_size=4", "statistics_images=8",
        "network={channels: 16, multipliers: [1, 2], blocks: 1, head_width: 8}",
    ]),
}  # fmt: skip
NETWORKS = {
    "full": {
        "ldm": [],
        "edm2": ["network={type: edm2, channels: 192}"],
        "dit": ["network={type: dit, width: 768, depth: 12, heads: 12, patch: 2}"],
        "ldm, flow": ["denoiser.type=flow"],
    },
    "quick": {
        "ldm": [],
        "edm2": [
            "network={type: edm2, channels: 16, multipliers: [1, 2], blocks: 1, head_width: 16}"
        ],
        "dit": ["network={type: dit, width: 32, depth: 2, heads: 2, patch: 2}"],
        "ldm, flow": ["denoiser.type=flow"],
    },
}
MODES = {
    "fp32": ["run.precision=fp32", "run.compile=false"],
    "bf16": ["run.precision=bf16", "run.compile=false"],
    "bf16, compiled": ["run.precision=bf16", "run.compile=true"],
}
EXACT = ["run.precision=fp32", "run.compile=false", "run.deterministic=true"]


class Unavailable(Exception):
    """A check that this machine cannot run, with the reason."""


@dataclass(frozen=True)
class Setting:
    """The device, the sizes, and the folder of the trainings."""

    device: torch.device
    quick: bool
    work: Path
    trainings: "dict[str, Training]" = field(default_factory=dict)
    """Those that are finished, by name."""

    @property
    def size(self) -> str:
        return "quick" if self.quick else "full"

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def steps(self) -> int:
        """Steps of each training."""
        return 8 if self.quick else 24

    def need_gpu(self) -> None:
        if not self.on_gpu:
            raise Unavailable("only on a CUDA GPU")


Figures = Iterator[dict[str, str]]
"""Rows of a table, as they are found: those before a failure stay."""


# --------------------------------------------------------------------------------- training
@dataclass(frozen=True)
class Training:
    """A run that is finished."""

    folder: Path
    rows: list[dict[str, float]]
    peak: int
    """Bytes of GPU memory, at most; 0 on a CPU."""

    @property
    def figures(self) -> dict[str, str]:
        """The loss, or ℓ1, of its first and last logged steps; speed; memory."""
        rows = [row for row in self.rows if "skipped" in row]  # of training, not validation
        first, last = (row.get("l1", row.get("loss", math.nan)) for row in (rows[0], rows[-1]))
        if not math.isfinite(first + last):
            raise AssertionError(f"the loss went from {first} to {last}")
        if skipped := rows[-1]["skipped"]:
            raise AssertionError(f"{skipped} steps were skipped")
        mfu = rows[-1].get("mfu")
        if mfu is not None and not 0 < mfu < 1:
            raise AssertionError(f"the model FLOPs utilisation is {mfu}")
        return {
            "first": f"{first:.4f}",
            "last": f"{last:.4f}",
            "images/s": f"{rows[-1]['images_per_second']:.1f}",
            "MFU": "" if mfu is None else f"{mfu:.3f}",
            "peak memory, GiB": f"{self.peak / 2**30:.2f}" if self.peak else "",
        }


def recipe_one(setting: Setting, *more: str) -> tuple[str, AutoencoderRecipe]:
    """A preset of stage one, and its recipe at this size."""
    preset, settings = STAGE_ONE[setting.size]
    common = [PHOTOS, "loss.lpips=0", "adversarial={start: 0.25, ramp: 0.25}", "warmup_images=8"]
    common += _run(setting)
    return preset, resolve(
        AutoencoderRecipe, load_preset("ae", preset), [*common, *settings, *more]
    )


def recipe_two(setting: Setting, autoencoder: Path, *more: str) -> tuple[str, DiffusionRecipe]:
    """A preset of stage two, and its recipe at this size."""
    preset, settings = STAGE_TWO[setting.size]
    stage_one = f"autoencoder={json.dumps(str(autoencoder))}"
    common = [PHOTOS, stage_one, "warmup_images=8", *_run(setting)]
    return preset, resolve(
        DiffusionRecipe, load_preset("diffusion", preset), [*common, *settings, *more]
    )


def _run(setting: Setting) -> list[str]:
    steps = setting.steps
    return [
        f"run={{device: '{setting.device}', log_every_steps: {steps // 4}, trackers: [], "
        f"validate_every_steps: {steps}, save_every_steps: {steps // 2}}}"
    ]


def train(
    setting: Setting, name: str, preset: str, recipe: AutoencoderRecipe | DiffusionRecipe
) -> Training:
    """Train a recipe to its end, once for every name."""
    if name in setting.trainings:
        return setting.trainings[name]
    folder, before = setting.work / name.replace(", ", "-").replace(" ", "-"), 0
    if setting.on_gpu:
        gc.collect()  # the training before it
        before = torch.cuda.memory_allocated(setting.device)
        torch.cuda.reset_peak_memory_stats(setting.device)
    if isinstance(recipe, AutoencoderRecipe):
        train_autoencoder(recipe, preset, folder, count_flops=flops_per_image)
    else:
        train_diffusion(recipe, preset, folder, flops_per_image)
    peak = torch.cuda.max_memory_allocated(setting.device) - before if setting.on_gpu else 0
    training = Training(folder, read_rows(folder / "metrics.jsonl"), peak)
    setting.trainings[name] = training
    return training


def autoencoder_of(setting: Setting) -> Path:
    """The model that stage two trains on."""
    preset, recipe = recipe_one(setting, *MODES["fp32"])
    return train(setting, "stage one, fp32", preset, recipe).folder / "ckpt.pt"


@contextmanager
def stop_after(steps: int) -> Iterator[None]:
    """Let a training inside the `with` stop and save after some steps, as after a signal."""
    left = iter(range(steps - 1, -1, -1))
    with mock.patch.object(Run, "stop_after_step", lambda _: next(left) == 0):
        yield


def difference(a: Training, b: Training) -> float:
    """The largest difference between the weights of two models, as a share of the largest one."""
    ours, theirs = (load_file(run.folder / "ckpt.safetensors") for run in (a, b))
    largest = max(float(w.double().abs().max()) for w in ours.values())
    return max(float((ours[n].double() - theirs[n].double()).abs().max()) for n in ours) / largest


# ----------------------------------------------------------------------------------- checks
def check_stage_one(setting: Setting) -> Figures:
    """Stage one trains in float32, bfloat16 and compiled, and its losses agree."""
    yield from _modes(setting, "stage one", partial(recipe_one, setting))


def check_stage_two(setting: Setting, network: str) -> Figures:
    """Stage two trains likewise."""
    settings = NETWORKS[setting.size][network]
    recipe = partial(recipe_two, setting, autoencoder_of(setting), *settings)
    yield from _modes(setting, f"stage two, {network}", recipe)


def _modes(setting: Setting, name: str, recipe_of: Callable[..., tuple[str, Any]]) -> Figures:
    firsts: list[float] = []
    for mode, settings in MODES.items():
        if mode == "fp32" or setting.on_gpu:
            preset, recipe = recipe_of(*settings)
            row = train(setting, f"{name}, {mode}", preset, recipe).figures
            firsts.append(float(row["first"]))
            yield {"": f"{name}, {mode}", **row}
    if max(firsts) > 1.05 * min(firsts):
        raise AssertionError(f"the first losses differ by more than 5 %: {firsts}")


def check_memory(setting: Setting) -> Figures:
    """The peak of a training is near what `ldm doctor` predicts."""
    setting.need_gpu()
    for stage in ("stage one", "stage two"):
        options = MODES["bf16"]
        preset, recipe = (
            recipe_one(setting, *options) if stage == "stage one"
            else recipe_two(setting, autoencoder_of(setting), *options)
        )  # fmt: skip
        memory = diagnose(recipe, preset, seconds=0).memory
        measured = train(setting, f"{stage}, memory", preset, recipe).peak
        assert memory is not None
        ratio = memory.total / measured
        yield {
            "": stage, "predicted, GiB": f"{memory.total / 2**30:.2f}",
            "measured, GiB": f"{measured / 2**30:.2f}", "ratio": f"{ratio:.2f}",
        }  # fmt: skip
        if not 0.7 < ratio < 1.5:
            raise AssertionError(f"{stage}: predicted over measured is {ratio:.2f}")


def check_resume(setting: Setting) -> Figures:
    """A run that is stopped and resumed ends with the bits of one that is not."""
    recipes = {
        "stage one": recipe_one(setting, *EXACT),
        "stage two": recipe_two(setting, autoencoder_of(setting), *EXACT),
    }
    for stage, (preset, recipe) in recipes.items():
        whole = train(setting, f"{stage}, whole", preset, recipe)
        with stop_after(setting.steps // 2 + 1), suppress(Interrupted):
            train(setting, f"{stage}, resumed", preset, recipe)
            raise AssertionError(f"{stage}: it did not stop")
        resumed = train(setting, f"{stage}, resumed", preset, recipe)
        differs = difference(whole, resumed)
        yield {"": stage, "largest difference of weights": f"{differs:.1e}"}
        if differs:
            raise AssertionError(f"{stage}: the weights differ by {differs:.1e} of the largest")


def check_distributed(setting: Setting) -> Figures:
    """One process under DDP, started by torchrun, trains like one without it."""
    preset, recipe = recipe_one(setting, *EXACT)
    alone = train(setting, "stage one, whole", preset, recipe)
    common = [PHOTOS, "loss.lpips=0", "adversarial={start: 0.25, ramp: 0.25}", "warmup_images=8"]
    settings = [*common, *_run(setting), *STAGE_ONE[setting.size][1], *EXACT]
    out = setting.work / "stage-one-ddp"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += ["-m", "ldm", "--", "train-ae", preset, "--out", str(out), *settings]
    environment = os.environ | ({} if setting.on_gpu else {"ACCELERATE_USE_CPU": "true"})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode:
        raise AssertionError(brief(RuntimeError(done.stderr[-2000:])))
    differs = difference(alone, Training(out, read_rows(out / "metrics.jsonl"), 0))
    yield {"": "DDP beside none", "largest difference of weights": f"{differs:.1e}"}
    if differs > 1e-4:
        raise AssertionError(f"the weights differ by {differs:.1e} of the largest")


def check_traces(setting: Setting) -> Figures:
    """A profiler's trace of some steps of each stage."""
    window = f"run.profile={setting.steps // 2}:{setting.steps // 2 + 3}"
    mode = MODES["bf16" if setting.on_gpu else "fp32"]
    recipes = {
        "stage one": recipe_one(setting, *mode, window),
        "stage two": recipe_two(setting, autoencoder_of(setting), *mode, window),
    }
    for stage, (preset, recipe) in recipes.items():
        folder = train(setting, f"{stage}, trace", preset, recipe).folder
        (trace,) = folder.glob("profile*.json.gz")
        copy = setting.work / f"gpu_check-{stage.replace(' ', '-')}.json.gz"
        copyfile(trace, copy)
        yield {"": stage, "file": copy.name, "MB": f"{trace.stat().st_size / 1e6:.1f}"}
