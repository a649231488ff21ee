"""A faked trainer and a faked evaluation, which take no time and record their calls."""

from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autoencoders import Autoencoder
from ldm.checkpoint import ModelFile, save_model
from ldm.config import to_tree
from ldm.errors import Interrupted, LdmError
from ldm.files import write_json
from ldm.metrics.inception import SHA256
from ldm.run_folder import is_finished, new_or_unfinished, provenance
from pipelines.measuring.evaluation import NUMBERS
from pipelines.reproduce import rows


class Faked:
    """Stands in for the trainer of stage one and for `evaluate_checkpoints`.

    Attributes:
        trained: folders of the runs that really trained, in order.
        measured: models that were measured.
        stops: trainings are interrupted while this is above 0, which each one lowers.
        lacks: numbers that cannot be measured.
        scores: what numbers are measured in place of others by each.
        features: how many an image has.
        seen: whether what is measured was trained on.
    """

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.measured: list[str] = []
        self.stops, self.lacks = 0, ("rfid", "lpips")
        self.scores: dict[str, float] = {}
        self.features, self.seen = 12, False

    def train(self, recipe, preset, folder: Path, perceptual=None) -> Path:
        new_or_unfinished("autoencoder", preset, recipe, folder)  # refuses another recipe
        if is_finished(folder):
            return folder
        self.trained.append(str(folder))
        if self.stops:
            self.stops -= 1
            raise Interrupted(f"stopped, saved in {folder}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(self.trained))
            weights = Autoencoder(recipe.model).state_dict()
        origin = provenance() | {"images_seen": 64, "recipe": to_tree(recipe)}
        save_model(
            folder / "ckpt.pt", ModelFile("autoencoder", to_tree(recipe.model), weights, {}, origin)
        )
        write_json(folder / "result.json", {})
        return folder

    def evaluate(self, models, data, split, resolutions, **how) -> list[SimpleNamespace]:
        self.measured.append(str(models[0]))
        if self.seen and not how["force"]:
            raise LdmError("they were trained on: give --force")
        numbers = dict.fromkeys(NUMBERS, 20.0 + len(self.measured)) | self.scores
        numbers |= dict.fromkeys(self.lacks)
        missing = dict.fromkeys(self.lacks, "no weights")
        weights = how["weights"]
        digest = SHA256 if weights is None else sha256(weights.read_bytes()).hexdigest()
        about = {"missing": missing, "doubtful": {}, "notes": [],
                 "extractor": {"sha256": digest, "dim": self.features},
                 "seen": {"held_out": not self.seen}}  # fmt: skip
        count = how.get("limit") or 40
        each = {"k": np.arange(count)} | {
            name: np.full(count, numbers[name], np.float32) for name in ("psnr", "ssim")
        }
        return [SimpleNamespace(count=count, numbers=numbers, about=about, each=each)]


@pytest.fixture
def faked(tmp_path, monkeypatch) -> Faked:
    """In an empty folder, with neither network nor published weights."""
    made = Faked()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rows, "train_autoencoder", made.train)
    monkeypatch.setattr(rows, "evaluate_checkpoints", made.evaluate)
    monkeypatch.setattr(rows, "smoke_lpips", lambda: None)  # a VGG-16 takes seconds to build
    return made
