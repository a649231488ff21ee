"""Samples straight from a model, of which none is written."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.config import to_tree, validate
from ldm.data import Batch
from ldm.device import keep_freed_memory
from ldm.errors import UsageError
from ldm.images import to_uint8
from ldm.processes import join_processes
from pipelines.sampling.claim import default_folder
from pipelines.sampling.classes import Label
from pipelines.sampling.latent_model import LatentModel
from pipelines.sampling.settings import Sampling, count, noise_levels, whole

FID_50K = 50_000  # as many as papers take


class ModelSamples:
    """Images 0 … n−1 of a seed, as `ldm sample` writes them with the same settings, in memory.

    Args:
        model: a stage-two `ckpt.pt` or run folder.
        labels, weaker, sampling: as `sample_images` takes them.
        device: auto, cpu, cuda or cuda:1.
        precision: auto, fp32 or bf16.

    Attributes:
        made_with: what a `samples.json` of them would say.
        resolution: edge of the images, pixels.

    Raises:
        UsageError: a setting has no meaning, would change nothing, or does not fit the model.
        LdmError: a model cannot be read.
    """

    def __init__(
        self,
        model: Path,
        n: int = FID_50K,
        seed: int = 0,
        *,
        labels: Label | Sequence[Label] | None = None,
        weaker: Path | None = None,
        device: str = "auto",
        precision: str = "auto",
        **sampling: Any,
    ) -> None:
        self._n, self._seed = count("--n ", n), whole("--seed ", seed)
        self._how = validate(Sampling, sampling)
        _, where = join_processes(device)
        keep_freed_memory(where)
        self._pipe = LatentModel.from_pretrained(model, where, precision)
        noise_levels(self._how, self._pipe.denoiser)
        self._labels = None if labels is None else self._pipe.classes.read(labels)
        self._weaker = self._pipe.check_guidance(self._how, weaker, self._labels)
        if self._pipe.recipe is None:
            raise UsageError(f"{model} does not say how it was trained: sample it by hand")
        self.path, self.resolution = model, self._pipe.recipe.resolution
        self.made_with: dict[str, Any] = {
            "n": self._n,
            "model": _named(model, self._pipe),
            "seed": self._seed,
            **to_tree(self._how),
            "weaker": self._weaker and _named(weaker, self._weaker),
            "labels": self._labels and list(self._labels),
            "precision": self._pipe.precision,
            "resolution": self.resolution,
            "data": to_tree(self._pipe.recipe.data),
        }

    def __len__(self) -> int:
        return self._n

    @property
    def what(self) -> str:
        """What the images are, in words."""
        return f"{self._n} images of {self.path}, seed {self._seed}"

    @property
    def result_path(self) -> Path:
        """Where a measurement of the samples is written: `fid/seed0-steps18-n50000.json` beside
        the model."""
        folder = default_folder(self.path, self.made_with | {"files": "png"})
        return folder.parent.parent / "fid" / f"{folder.name}-n{self._n}.json"

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        return f"image {index} of seed {self._seed}"

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
    ) -> Iterator[Batch]:
        """Every image once over all processes, sampled as it is asked for.

        Args:
            batch_size: images at a time, over all processes.
            workers: there are none; the model is here.

        Raises:
            LdmError: (while iterating) images came out that are not finite.
        """
        share = -(-batch_size // world)
        for first in range(rank * share, self._n, world * share):
            indices = range(first, min(first + share, self._n))
            labels = self._labels_of(indices)
            images = self._pipe.sample(indices, self._seed, self._how, labels, self._weaker)
            told = [-1] * len(indices) if labels is None else labels
            yield Batch(to_uint8(images), torch.tensor(indices), torch.tensor(told))

    def _labels_of(self, indices: Sequence[int]) -> list[int] | None:
        """The class of each image, chosen in turn or drawn; None for a model without classes."""
        if not self._pipe.classes.count:
            return None
        if self._labels is None:
            return self._pipe.classes.draw(self._seed, indices)
        return [self._labels[i % len(self._labels)] for i in indices]


def _named(path: Path | None, model: LatentModel) -> dict[str, str]:
    return {"path": str(path), "sha256": model.sha256, "identity": model.identity}
