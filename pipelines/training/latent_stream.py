"""The batches that stage two learns from: z, noise and noise levels, made one batch ahead.

Image k's crop, flip, augmentation, posterior draw, noise, noise level and hidden label are
functions of (seed, k) alone.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from autoencoders.posterior import DiagonalGaussian
from diffusion.augment import augment, draw_augmentation
from diffusion.edm import sample_sigma
from ldm.data import Batch, Source, batches
from ldm.images import to_float
from ldm.run import Run
from ldm.seeds import normal, uniform
from pipelines.codec import Codec
from pipelines.training.diffusion_recipe import DiffusionRecipe
from pipelines.training.latent_cache import CachedBatch, LatentCache

Raw = TypeVar("Raw")


class LatentBatch(NamedTuple):
    """All that one micro-batch of a training step needs, on the device but for the labels."""

    z: Tensor
    """Standardised latents (b, n_z, h, w)."""
    sigma: Tensor
    """Noise levels (b,)."""
    noise: Tensor
    """Standard normal noise, of z's shape."""
    labels: Tensor | None
    """Classes int64 (b,), −1 for none, on the CPU, where checking them makes no GPU wait; None for
    a model without classes."""
    augment: Tensor | None
    """The augmentation's parameters (b, A), or None."""


def latent_batches(
    run: Run,
    recipe: DiffusionRecipe,
    codec: Codec,
    source: Source,
    cache: LatentCache | None,
    start: int,
) -> Iterator[tuple[int, LatentBatch]]:
    """Micro-batches from image `start` of the run to its last, each with its first image's number.

    From pixels, encoded here; or from a cache. On a CUDA GPU the next batch is copied, augmented
    and encoded on a stream of its own while this one is trained on.

    Raises:
        LdmError: (while iterating) as `ldm.data.batches`.
    """
    places = {
        "seed": run.seed, "start": start, "stop": recipe.steps * recipe.batch_size,
        "batch_size": recipe.batch_size // recipe.accumulate, "rank": run.rank, "world": run.world,
    }  # fmt: skip

    def from_pixels(batch: Batch) -> tuple[int, LatentBatch]:
        images = to_float(run.place(batch.images))
        parameters = None
        if recipe.augment.probability > 0:
            parameters = draw_augmentation(run.seed, batch.k.tolist(), recipe.augment)
            images = augment(images, parameters)
            parameters = _on(run.device, parameters)
        with run.autocast():
            posterior = codec.posterior(images)
        return int(batch.k[0]), drawn(posterior, batch.labels, batch.k, parameters)

    def from_cache(batch: CachedBatch) -> tuple[int, LatentBatch]:
        mean, logvar = (_on(run.device, t) for t in (batch.posterior.mean, batch.posterior.logvar))
        posterior = DiagonalGaussian(mean, logvar)
        return int(batch.k[0]), drawn(posterior, batch.labels, batch.k, None)

    def drawn(
        posterior: DiagonalGaussian, labels: Tensor, k: Tensor, parameters: Tensor | None
    ) -> LatentBatch:
        ks, shape = k.tolist(), posterior.mean.shape[1:]
        of_posterior = None
        if recipe.posterior == "sample":
            of_posterior = _on(run.device, normal(run.seed, "posterior", ks, shape))
        sigma = sample_sigma(normal(run.seed, "sigma", ks, ()), recipe.denoiser)
        noise = normal(run.seed, "noise", ks, shape)
        if recipe.network.classes:
            hidden = uniform(run.seed, "label", ks, ()) < recipe.label_dropout
            labels = labels.masked_fill(hidden, -1)
        else:
            labels = None
        z = codec.standardise(posterior, of_posterior)
        return LatentBatch(z, _on(run.device, sigma), _on(run.device, noise), labels, parameters)

    if cache is not None:
        return one_ahead(cache.batches(**places), from_cache, run.device)
    pixels = batches(source, recipe.data, recipe.resolution, **places)
    return one_ahead(pixels, from_pixels, run.device)


def one_ahead(
    raw: Iterable[Raw], prepare: Callable[[Raw], Any], device: torch.device
) -> Iterator[Any]:
    """`prepare` of every item; on a CUDA GPU the next on a side stream while this one is used.

    The next is begun before this one is handed out: the loop that takes it waits for the device at
    the end of every step, and would begin it too late.

    Args:
        prepare: puts work on the current stream; answers a tree of tuples with tensors in it.
    """
    if device.type != "cuda":
        yield from map(prepare, raw)
        return
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(main)  # weights and statistics may still be on their way

    def begin(item: Raw) -> tuple[Any, torch.cuda.Event]:
        with torch.cuda.stream(side):
            return prepare(item), side.record_event()

    def hand_out(made: Any, ready: torch.cuda.Event) -> Any:
        main.wait_event(ready)
        for tensor in _on_gpu(made):
            tensor.record_stream(main)  # its memory is not to be reused before main has read it
        return made

    begun = None
    for item in raw:
        upcoming = begin(item)
        if begun is not None:
            yield hand_out(*begun)
        begun = upcoming
    if begun is not None:
        yield hand_out(*begun)


def _on_gpu(tree: Any) -> Iterator[Tensor]:
    """Those on a GPU; the CPU's belong to no stream."""
    if isinstance(tree, Tensor) and tree.is_cuda:
        yield tree
    elif isinstance(tree, tuple):
        for branch in tree:
            yield from _on_gpu(branch)


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """A tensor of the CPU on the device; from pinned memory, so that the copy waits for nothing."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
