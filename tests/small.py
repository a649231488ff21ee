"""Recipes and models small enough for a test, and the command line as a process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from autoencoders import Autoencoder, build_autoencoder
from ldm.config import load_preset, resolve
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe

ROOT = Path(__file__).parent.parent

# fp32: these are tests of the loops, and shall say the same on every CPU
AUTOENCODER = [
    "phases=[{resolution: 32, steps: 4}, {resolution: 64, steps: 4}]", "batch_size=4",
    "encoder.extractor={channels: 8, multipliers: [1, 2]}",
    "encoder.aggregator={channels: 8, multipliers: [1, 2]}",
    "decoder={channels: 8, multipliers: [1, 1, 2, 2]}",
    "discriminator={channels: 4, multipliers: [1, 2, 2]}",
    "adversarial={start: 0.25, ramp: 0.25}", "warmup_images=8", "validate_images=4",
    "run={precision: fp32, log_every_steps: 2, validate_every_steps: 8, save_every_steps: 2}",
]  # fmt: skip
DIFFUSION = [
    "resolution=32", "steps=8", "batch_size=4", "statistics_images=8", "warmup_images=8",
    "network={channels: 16, multipliers: [1, 2], blocks: 1, head_width: 8, dropout: 0.1}",
    "run={precision: fp32, log_every_steps: 2, validate_every_steps: 8, save_every_steps: 2}",
]  # fmt: skip


def autoencoder_recipe(*settings: str) -> AutoencoderRecipe:
    return resolve(AutoencoderRecipe, load_preset("ae", "tiny"), [*AUTOENCODER, *settings])


def diffusion_recipe(autoencoder: Path, *settings: str) -> DiffusionRecipe:
    settings = (*DIFFUSION, f"autoencoder={str(autoencoder)!r}", *settings)
    return resolve(DiffusionRecipe, load_preset("diffusion", "tiny"), settings)


def sdvae() -> Autoencoder:
    """An SD-VAE, with its 1×1 convolutions, always of the same weights."""
    sizes = {"channels": 32, "multipliers": [1, 2], "blocks": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_autoencoder(
            "sdvae", conv1x1=True, encoder={"type": "sdvae", **sizes}, decoder=sizes
        ).eval()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let a write beyond `size` bytes of a file fail, as on a full disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def count_graphs(monkeypatch) -> list[torch.fx.GraphModule]:
    """The graphs that `torch.compile` finds from now on, which run as they are."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return graphs


def fill_disk_after_one_file(monkeypatch) -> None:
    """The first file fits, what follows does not."""
    flushed = []

    def full(_number):
        if flushed:
            raise OSError(28, "No space left on device")
        flushed.append(1)

    monkeypatch.setattr("os.fsync", full)


def ldm(
    *words: str,
    cwd: Path,
    processes: int = 1,
    start: bool = False,
    stdout: int = subprocess.DEVNULL,
    **environment: str,
):
    """Run `ldm …` as a person would; `start` hands out the running process, with `stdout`."""
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    # after `--`, for the launcher knows options that begin like ours
    command += ["ldm", *(["--"] if processes > 1 else []), *map(str, words)]
    inherited = {key: value for key, value in os.environ.items() if key != "RANK"}
    env = inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    env |= {"ACCELERATE_USE_CPU": "true"} | environment
    how = {"cwd": cwd, "env": env, "text": True}
    if start:
        return subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL, **how)
    return subprocess.run(command, capture_output=True, **how)
