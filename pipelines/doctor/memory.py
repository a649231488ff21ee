"""How much memory and disk a run takes, by arithmetic; what a batch takes is an estimate."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pipelines.doctor.costs import PaperAutoencoder, PaperDiffusion
from pipelines.recipes import AutoencoderRecipe, DiffusionRecipe

SPARE = 1.2
"""What activations take in the end, as a multiple of what is kept of them: the gradients that
travel back, kernels' buffers, gaps."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs while it trains."""

    weights: int
    """Of the networks that are trained."""
    gradients: int
    buckets: int
    """Of gradients on their way to other processes; 0 where there are none."""
    adam: int
    """Adam's two moments."""
    averages: int
    """Of the weights."""
    frozen: int
    """Of networks that are only asked: perceptual losses, or stage one."""
    activations: int
    """An estimate: `SPARE` × what a micro-batch of the largest images keeps for its backward."""
    encoding: int
    """An estimate: `SPARE` × what stage one holds while it encodes a micro-batch for stage two. A
    CUDA GPU encodes the next while it trains on one; a CPU takes turns, and only what encoding
    needs more than training counts. 0 for stage one, and where there is a cache."""

    @property
    def lasting(self) -> int:
        """All but what depends on the micro-batch: what a smaller one needs as well."""
        return self.total - self.activations - self.encoding

    @property
    def total(self) -> int:
        """Everything together."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Disk:
    """Bytes that a run takes on the disk, pictures and logs aside."""

    states: int
    """To resume from: the newest `run.keep_states`."""
    models: int
    """ckpt.pt, best.pt, and their twins in .safetensors."""
    snapshots: int
    """Of averages, to make others of."""
    writing: int
    """More, for a moment: what is replaced stays until its successor is written beside it."""
    cache: int
    """Of latents; 0 where none is asked for, or the data are not there."""

    @property
    def run(self) -> int:
        """All but the cache: what the run's own folder takes."""
        return self.total - self.cache

    @property
    def total(self) -> int:
        """Everything together, at the worst moment."""
        return sum(vars(self).values())


def module_bytes(module: nn.Module) -> int:
    """Of a module's parameters and buffers."""
    return _parameter_bytes(module) + sum(b.numel() * b.element_size() for b in module.buffers())


def adam_bytes(module: nn.Module) -> int:
    """Of Adam's state: two moments of every parameter, and a counter of every tensor."""
    return 2 * _parameter_bytes(module) + 4 * sum(1 for _ in module.parameters())


def autoencoder_memory(
    recipe: AutoencoderRecipe,
    paper: PaperAutoencoder,
    processes: int = 1,
    batch: int | None = None,
) -> Memory:
    """Of stage one.

    Args:
        processes: how many train together.
        batch: images in a micro-batch on one process; None: `paper.batch`.
    """
    sides = {phase.resolution for phase in recipe.phases}
    kept = max(paper.cost(side, batch=batch).activations for side in sides)
    gradients = [_parameter_bytes(net) for net in _updated(recipe, paper)]
    return Memory(
        weights=sum(map(module_bytes, paper.trained)),
        # the two networks take turns, and keep none unless they gather over micro-batches
        gradients=sum(gradients) if recipe.accumulate > 1 else max(gradients),
        buckets=_bucket_bytes(paper.trained, processes),
        adam=sum(map(adam_bytes, _updated(recipe, paper))),
        averages=sum(map(module_bytes, paper.averaged)),
        frozen=sum(map(module_bytes, paper.frozen)),
        activations=int(SPARE * kept),
        encoding=0,
    )


def diffusion_memory(
    recipe: DiffusionRecipe, paper: PaperDiffusion, processes: int = 1, batch: int | None = None
) -> Memory:
    """Of stage two; the arguments are those of `autoencoder_memory`."""
    kept = paper.cost(recipe.resolution, batch).activations
    held = 0 if recipe.cache else paper.encoding(recipe.resolution, batch)
    if paper.device.type != "cuda":
        held = max(held - kept, 0)
    return Memory(
        weights=module_bytes(paper.objective),
        gradients=_parameter_bytes(paper.objective),
        buckets=_bucket_bytes(paper.trained, processes),
        adam=adam_bytes(paper.objective),
        averages=sum(map(module_bytes, paper.averaged)),
        frozen=module_bytes(paper.autoencoder),
        activations=int(SPARE * kept),
        encoding=int(SPARE * held),
    )


def autoencoder_disk(recipe: AutoencoderRecipe, paper: PaperAutoencoder, validates: bool) -> Disk:
    """Of stage one.

    Args:
        validates: whether there are held-out images, by which best.pt is chosen.
    """
    state = sum(map(module_bytes, [*paper.trained, *paper.averaged]))
    state += sum(map(adam_bytes, _updated(recipe, paper)))
    model = module_bytes(paper.autoencoder)
    states, writing = _kept(recipe, recipe.total_steps, state, model)
    files = 4 if validates else 2
    return Disk(states, files * model, snapshots=0, writing=writing, cache=0)


def diffusion_disk(recipe: DiffusionRecipe, paper: PaperDiffusion, images: int) -> Disk:
    """Of stage two.

    Args:
        images: that a cache is still to be made of; 0 where they are not known.
    """
    state = sum(map(module_bytes, [*paper.trained, *paper.averaged]))
    state += sum(map(adam_bytes, paper.trained))
    model = module_bytes(paper.network) + module_bytes(paper.autoencoder)
    states, writing = _kept(recipe, recipe.steps, state, model)
    times = min(recipe.steps, recipe.snapshots)  # as often as `snapshot_due` says so
    snapshots = len(recipe.ema_stds) * times * module_bytes(paper.network)
    cache = 0
    if recipe.cache:
        side = recipe.resolution // paper.autoencoder.downsampling
        # mean and standard deviation, float32, of every image and of its mirror image
        latents = recipe.network.latent_channels * side * side
        cache = images * (1 + recipe.data.flip) * 2 * latents * 4
    return Disk(states, 2 * model, snapshots, writing, cache)


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or would be made."""
    return shutil.disk_usage(_nearest(folder)).free


def same_disk(one: Path, other: Path) -> bool:
    """Whether two folders are, or would be made, on one disk."""
    return _nearest(one).stat().st_dev == _nearest(other).stat().st_dev


def _nearest(folder: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    while not folder.exists():
        folder = folder.absolute().parent
    return folder


def _updated(recipe: AutoencoderRecipe, paper: PaperAutoencoder) -> list[nn.Module]:
    """The networks that learn: the discriminator does not where nobody listens to it."""
    return paper.trained if recipe.adversarial.weight else [paper.autoencoder]


def _kept(
    recipe: AutoencoderRecipe | DiffusionRecipe, steps: int, state: int, model: int
) -> tuple[int, int]:
    """Bytes of the states on the disk at the end, and those that writing takes besides.

    Args:
        state, model: bytes of one file.
    """
    saves, keep = math.ceil(steps / recipe.run.save_every_steps), recipe.run.keep_states
    # the oldest state goes, and an old model's file is replaced, once the new one is whole; of a
    # state and a model, one is written at a time
    replaced = [state] * (saves > keep) + [model] * (saves > 1)
    return min(keep, saves) * state, max(replaced, default=0)


def _bucket_bytes(modules: list[nn.Module], processes: int) -> int:
    """Of the copies that `DistributedDataParallel` makes of gradients, to exchange them."""
    return sum(map(_parameter_bytes, modules)) if processes > 1 else 0


def _parameter_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
