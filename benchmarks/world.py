"""A small world of data, runs, samples and exports, made by the commands that a campaign tries."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from PIL import Image

from benchmarks import trials
from benchmarks.trials import FAKE_DIM, GHOSTSCRIPT, Fault, copy, run

RUN = (
    "run={precision: fp32, device: cpu, log_every_steps: 1, validate_every_steps: 2, "
    "save_every_steps: 2, keep_states: 2}"
)
AUTOENCODER = (
    "tiny", RUN, "phases=[{resolution: 16, steps: 2}, {resolution: 32, steps: 2}]", "batch_size=2",
    "encoder={depth: 2, extractor: {channels: 2, multipliers: [1], blocks: 1}, "
    "aggregator: {channels: 2, multipliers: [1], blocks: 1}}",
    "decoder={channels: 2, multipliers: [1, 1, 2], blocks: 1, norm: group}",
    "discriminator={channels: 2, multipliers: [1, 2]}", "validate_images=2", "warmup_images=4",
    "adversarial={start: 0.25, ramp: 0.25}", "data={source: data, workers: 0}",
)  # fmt: skip
DIFFUSION = (
    "tiny", RUN, "resolution=32", "steps=4", "batch_size=2", "statistics_images=4",
    "network={channels: 4, multipliers: [1, 1], blocks: 1, head_width: 4}", "warmup_images=4",
    "ema_stds=[0.05, 0.1]", "snapshots=2", "data={source: data, workers: 0, crop: center}",
    "--ae", "runs/ae",
)  # fmt: skip
SAMPLE = ("sample", "runs/ldm", "--n", "3", "--steps", "2", "--batch-size", "1", "--device", "cpu")
EVAL = ("runs/ae", "--no-fid", "--limit", "2", "--device", "cpu", "--data")
FID = ("fid", "samples", "--data", "data", "--weights", "inception.pt", "--device", "cpu")
PREPARE = ("--size", "32", "--shard-size", "6", "--held-out", "4", "--workers", "0")

MODELS = ("sdvae.pt", "inception.pt")


@dataclass(frozen=True)
class Job:
    """A command, and the files of the world that it reads."""

    words: tuple[str, ...]
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    """Files and folders that it writes."""
    again: tuple[str, ...] = ()
    """Further words where its output is there already."""


JOBS = {
    "data prepare": Job(("data", "prepare", "images", "data", *PREPARE), ("images",), ("data",)),
    "train-ae": Job(("train-ae", *AUTOENCODER, "--out", "runs/ae"), ("data",), ("runs/ae",)),
    "train-diffusion": Job(
        ("train-diffusion", *DIFFUSION, "--out", "runs/ldm"), ("data", "runs/ae"), ("runs/ldm",)
    ),
    "train-diffusion --cache": Job(
        ("train-diffusion", *DIFFUSION, "--out", "runs/cached", "--cache", "cache"),
        ("data", "runs/ae"), ("cache", "runs/cached"),
    ),
    "sample": Job((*SAMPLE, "--out", "samples"), ("runs/ldm",), ("samples",)),
    "sample --format zip": Job(
        (*SAMPLE, "--out", "zipped", "--format", "zip"), ("runs/ldm",), ("zipped",)
    ),
    "sample --format shards": Job(
        (*SAMPLE, "--out", "sharded", "--format", "shards"), ("runs/ldm",), ("sharded",)
    ),
    "export": Job(("export", "sdvae.pt", "diffusers"), ("sdvae.pt",), ("diffusers",), ("--force",)),
    "export --format compvis": Job(
        ("export", "sdvae.pt", "compvis.ckpt", "--format", "compvis"),
        ("sdvae.pt",), ("compvis.ckpt",), ("--force",),
    ),
    "export --format hub": Job(
        ("export", "runs/ae", "hub", "--format", "hub"), ("runs/ae",), ("hub",), ("--force",)
    ),
    "import": Job(
        ("import", "diffusers", "imported.pt"),
        ("diffusers",), ("imported.pt", "imported.safetensors"), ("--force",),
    ),
    "ema": Job(
        ("ema", "runs/ldm", "--std", "0.07", "--out", "ema.pt"),
        ("runs/ldm",), ("ema.pt", "ema.safetensors"),
    ),
    "eval-ae": Job(
        ("eval-ae", *EVAL, "data", "--out", "eval.json"), ("runs/ae", "data"), ("eval.json",)
    ),
    "fid": Job(
        (*FID, "--force", "--out", "fid.json"),
        ("samples", "data", "inception.pt"), ("fid.json", "kept"),
    ),
    "neighbours": Job(
        ("neighbours", "samples", "--data", "data", "--count", "2", "--device", "cpu",
         "--space", "pixels"),
        ("samples", "data"), ("samples/neighbours.png", "samples/neighbours.json"),
    ),
    "analyze mmd": Job(
        ("analyze", "mmd", "runs/ae", "--data", "data", "--n", "4", "--draws", "2",
         "--device", "cpu", "--out", "analysis"),
        ("runs/ae", "data"), ("analysis",),
    ),
    "report": Job(
        ("report", "runs/ae", "runs/ldm", "--images", "1", "--steps", "2", "--device", "cpu"),
        ("runs/ae", "runs/ldm", "data"), ("report.html",),
    ),
}  # fmt: skip


def make(folder: Path) -> Path:
    """Begin a world in a folder: images alone; `provide` adds what jobs make."""
    world = folder / "world"
    images = world / "images"
    images.mkdir(parents=True)
    tools = folder / "tools"
    tools.mkdir()
    (tools / "gs").write_text(GHOSTSCRIPT.format('"$CANARY"'))
    (tools / "gs").chmod(0o755)
    noise = np.random.default_rng(0).integers(0, 256, (16, 6, 6, 3), np.uint8)
    for number, pixels in enumerate(noise):
        suffix = ("png", "jpg")[number % 4 == 3]
        Image.fromarray(pixels).resize((40, 36)).save(images / f"{number:02d}.{suffix}")
    with ZipFile(world / "images.zip", "w") as pack:
        for path in sorted(images.iterdir()):
            pack.write(path, path.name)
    return world


def provide(world: Path, needs: Sequence[str]) -> None:
    """Make what is missing of the files that a job needs, by the jobs that make them."""
    for need in needs:
        name = need.partition(">")[0]
        if (world / name).exists():
            continue
        if name in MODELS:
            _make_models(world)
        elif name.startswith("stopped/"):
            _stop_training(world, name.split("/")[1])
        else:
            job = next(job for job in JOBS.values() if name in job.makes)
            provide(world, job.needs)
            outcome = run(job.words, world)
            if outcome.code != 0:
                raise RuntimeError(f"{job.words} fails in a good world: {outcome.text[-800:]}")


def _make_models(world: Path) -> None:
    """Write an SD-VAE and a stand-in for Inception, in a child: this process computes nothing."""
    import os

    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
        return
    code = 1
    try:
        import torch

        from autoencoders import build_autoencoder
        from ldm.checkpoint import ModelFile, save_model
        from ldm.config import to_tree
        from tests.ldm.metrics.fake_inception import FakeInception, save_script

        torch.manual_seed(0)
        sizes = {"channels": 32, "multipliers": [1, 2], "blocks": 1}
        model = build_autoencoder(
            "sdvae", conv1x1=True, encoder={"type": "sdvae", **sizes}, decoder=sizes
        )
        state = ModelFile("autoencoder", to_tree(model.config), model.state_dict())
        save_model(world / MODELS[0], state)
        save_script(FakeInception(FAKE_DIM), world / MODELS[1])
        code = 0
    finally:
        os._exit(code)


def _stop_training(world: Path, name: str) -> None:
    """Add a run that was killed half-way: `stopped/<name>/runs/…`."""
    job, trial = JOBS[name], world.with_name("stopping")
    operations = reference(name, world, trial)[1]
    copy(world, job.needs, trial)
    run(job.words, trial, Fault(operations * 3 // 4))
    copy(trial, job.makes, world / "stopped" / name)


@cache
def reference(name: str, world: Path, folder: Path) -> tuple[dict[str, str], int, int]:
    """Run a job undisturbed; return its files, operations, and the bytes that it wrote."""
    job = JOBS[name]
    provide(world, job.needs)
    trial = copy(world, job.needs, folder)
    before = size_of(trial)
    outcome = run(job.words, trial)
    if outcome.code != 0:
        raise RuntimeError(f"ldm {name}: {outcome.text[-800:]}")
    return trials.contents(trial), outcome.operations, size_of(trial) - before


def size_of(folder: Path) -> int:
    """Sum the sizes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
