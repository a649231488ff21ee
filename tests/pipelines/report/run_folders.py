"""Run folders with untrained models, as inputs of the report."""

import json
from pathlib import Path

import torch

from autoencoders import build_autoencoder
from ldm.checkpoint import ModelFile, save_model
from ldm.config import to_tree
from ldm.files import write_json
from ldm.images import save_grid
from ldm.run_folder import describe_run
from pipelines.report.records import Record
from tests.pipelines.untrained import make_model
from tests.small import autoencoder_recipe, diffusion_recipe

TILES = "phases=[{resolution: 32, steps: 8}]"


def record(label: str = "a", config: dict | None = None, rows: list | None = None) -> Record:
    """A run that was read from nowhere."""
    return Record(Path(), label, {}, config or {}, rows or [], None)


def write_rows(folder: Path, rows: list[dict[str, float | None]]) -> None:
    """Write its metrics.jsonl."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, "utf-8")


def stage_one(folder: Path, *settings: str, seed: int = 0, model: bool = True) -> Path:
    """A finished run of 32 images at 32², of random weights, with metrics and a picture."""
    recipe = autoencoder_recipe(TILES, *settings)
    describe_run(folder, "autoencoder", "tiny", recipe)
    if model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weights = build_autoencoder(recipe.model).state_dict()
        save_model(folder / "ckpt.pt", ModelFile("autoencoder", to_tree(recipe.model), weights))
    rows = [{"images_seen": n, "l1": 1 / n, "kl": 3.0, "lr": 1e-4} for n in (8, 16, 32)]
    write_rows(folder, [*rows, {"images_seen": 32, "val_psnr": 20.5, "val_count": 4}])
    save_grid(torch.zeros(3, 3, 32, 32), folder / "pictures" / "recon-00000032.png", 3)
    best = {"images_seen": 16, "psnr": 21.25, "ssim": 0.75}
    numbers = {"psnr": 20.5, "ssim": 0.625, "count": 4}
    write_json(folder / "result.json", {"images_seen": 32, **numbers, "best": best})
    return folder


def stage_two(folder: Path, *settings: str, seed: int = 0, model: bool = True) -> Path:
    """A finished stage-two run at 32²."""
    describe_run(folder, "diffusion", "tiny", diffusion_recipe("none", *settings))
    if model:
        make_model(folder, seed)
    rows = [{"images_seen": n, "loss": 1 / n, "loss_sigma_0_to_0.1": 0.5} for n in (8, 16, 32)]
    write_rows(folder, rows)
    save_grid(torch.zeros(4, 3, 32, 32), folder / "pictures" / "samples-00000032.png", 4)
    write_json(folder / "result.json", {"images_seen": 32, "loss": 0.03125})
    return folder
