"""Latents for stage two: batches encoded on the fly, or read from a cache on disk.

Image k's crop, flip, augmentation, posterior draw, noise, noise level and hidden label are
functions of (seed, k) alone; both ways give the same batches, apart from rounding.

<cache>/cache.json                 identity of the latents: autoencoder, images, size, precision
<cache>/latents-00000.npy …        a thousand images each, float32 (n, mirrored, 2, n_z, h, w):
                                   mean and standard deviation of every image's posterior and, for
                                   data with flips, of its mirror image's

A corrupt image is NaN throughout; the next good one replaces it, as in training from pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from autoencoders.posterior import DiagonalGaussian
from diffusion.augment import augment, draw_augmentation
from diffusion.edm import sample_sigma
from ldm.data import Batch, Source, batches, evaluation_batches
from ldm.data.loader import FaultCount, image_index
from ldm.data.sources import Part, label_of
from ldm.data.transforms import CorruptImage
from ldm.errors import Interrupted, LdmError
from ldm.files import read_json, write_atomically, write_json
from ldm.images import to_float
from ldm.run import Run
from ldm.seeds import generator, normal, uniform
from pipelines.codec import Codec
from pipelines.recipes import DiffusionRecipe, latent_shape

FORMAT = 1
MANIFEST = "cache.json"
BLOCK = 1000  # images in a file
BATCH = 32  # images encoded at a time
HASHED = 64  # images whose pixels are part of a source's fingerprint


class CachedBatch(NamedTuple):
    """Posteriors of training images from a cache."""

    posterior: DiagonalGaussian
    """Posterior of the raw latents (b, n_z, h, w), on the CPU."""
    labels: Tensor
    """Classes int64 (b,), −1 for none."""
    k: Tensor
    """Numbers of the images in the run, int64 (b,)."""


class LatentCache:
    """The posteriors of all images of a source, read by their number; see `open_cache`."""

    def __init__(self, folder: Path, source: Source, shape: tuple[int, ...]) -> None:
        self.source, self.mirrored = source, shape[0] == 2
        self._blocks = [_read(folder, part, shape) for part in _parts(source)]

    def load(self, seed: int, k: int) -> tuple[np.ndarray, int]:
        """Load image k of a run: mean and standard deviation (2, n_z, h, w), and its index."""
        count = len(self.source)
        index = image_index(seed, count, k)
        while np.isnan(self._row(index)[0, 0, 0, 0, 0]):
            index = (index + 1) % count
        mirror = int(generator(seed, "flip", k).integers(2)) if self.mirrored else 0
        return self._row(index)[mirror], index

    def _row(self, index: int) -> np.ndarray:
        return self._blocks[index // BLOCK][index % BLOCK]

    def batches(
        self, seed: int, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1
    ) -> Iterator[CachedBatch]:
        """Yield images k = start … stop−1 of a run, those that `ldm.data.batches` yields."""
        share = batch_size // world
        for first in range(start + rank * share, stop - batch_size + rank * share + 1, batch_size):
            ks = range(first, first + share)
            rows, indices = zip(*(self.load(seed, k) for k in ks), strict=True)
            moments = torch.from_numpy(np.stack(rows))  # (b, 2, n_z, h, w)
            mean, std = moments.unbind(1)
            labels = [label_of(self.source, index) for index in indices]
            posterior = DiagonalGaussian(mean, 2 * std.log())
            yield CachedBatch(posterior, torch.tensor(labels), torch.tensor(ks))


def open_cache(
    recipe: DiffusionRecipe, codec: Codec, ae_sha256: str, source: Source, run: Run
) -> LatentCache:
    """Open the cache in the recipe's folder; all processes encode what it lacks first.

    An interrupted call resumes, to the block of a thousand images.

    Raises:
        LdmError: the folder holds latents of another autoencoder or other images, other files, or
            a damaged file; latents are not finite; more than 1 % of the images are corrupt; or the
            disk is full.
        Interrupted: asked to stop.
    """
    folder = Path(recipe.cache).expanduser()

    def prepare() -> list[range]:
        missing = check_cache(recipe, source, run.precision, ae_sha256)
        for leftover in folder.glob(".*.partial"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        if not (folder / MANIFEST).is_file():
            identity = _identity(recipe, source, run.precision, ae_sha256)
            write_json(folder / MANIFEST, identity | {"source": recipe.data.source})
        return missing

    missing = run.from_main(prepare)
    if missing:
        run.say(f"encoding {len(source):,} images into {folder}")
    faults = FaultCount(len(source))
    for turn in range(0, len(missing), run.world):  # all processes take as many turns
        for part in missing[turn:][run.rank : run.rank + 1]:
            block = _encode(codec, Part(source, part), recipe, run, faults)
            write_atomically(_block(folder, part), partial(np.save, arr=block))
        if run.stop_requested():
            raise Interrupted(f"stopped while encoding into {folder}")
        done = len(source) - sum(map(len, missing[turn + run.world :]))
        run.say(f"encoded {done:,} of {len(source):,} images")
    run.accelerator.wait_for_everyone()
    return LatentCache(folder, source, _shape(codec, recipe))


def _shape(codec: Codec, recipe: DiffusionRecipe) -> tuple[int, ...]:
    """Shape of an image's entry: (mirrored or not, mean or deviation, n_z, h, w)."""
    return (1 + recipe.data.flip, 2, *latent_shape(recipe, codec.autoencoder))


@torch.no_grad()
def _encode(
    codec: Codec, part: Part, recipe: DiffusionRecipe, run: Run, faults: FaultCount
) -> np.ndarray:
    """Encode some images: mean and standard deviation (n, mirrored or not, 2, n_z, h, w)."""
    block = np.full((len(part), *_shape(codec, recipe)), np.nan, dtype=np.float32)
    for batch in evaluation_batches(
        part, recipe.resolution, BATCH, workers=recipe.data.workers, faults=faults
    ):
        images = to_float(run.place(batch.images))
        for mirror in range(1 + recipe.data.flip):
            with run.autocast():
                posterior = codec.posterior(images.flip(-1) if mirror else images)
            moments = torch.stack([posterior.mean, (posterior.logvar / 2).exp()], dim=1).cpu()
            if not moments.isfinite().all():
                bad = batch.k[(~moments.isfinite()).flatten(1).any(1)][0]
                raise LdmError(
                    f"the latents of {part.name(int(bad))} are not finite: train the autoencoder "
                    "first, or try run.precision=fp32"
                )
            block[batch.k.numpy(), mirror] = moments.numpy()
    return block


def check_cache(
    recipe: DiffusionRecipe, source: Source, precision: str, ae_sha256: str | None
) -> list[range]:
    """List the images that the recipe's cache lacks, a range per file, without writing.

    Args:
        precision: the run's, "fp32" or "bf16".
        ae_sha256: fingerprint of the autoencoder; None if it is not trained yet.

    Raises:
        LdmError: the folder holds latents of another autoencoder or other images, or other files.
    """
    folder = Path(recipe.cache).expanduser()
    if (folder / MANIFEST).is_file():
        _compare(folder / MANIFEST, _identity(recipe, source, precision, ae_sha256))
    elif folder.exists():
        ours = set(folder.glob(".*.partial"))  # of a process that was killed
        if not folder.is_dir() or set(folder.iterdir()) - ours:
            raise LdmError(f"{folder} is not empty and holds no cache: give --cache another folder")
    return [part for part in _parts(source) if not _block(folder, part).is_file()]


def _identity(
    recipe: DiffusionRecipe, source: Source, precision: str, ae_sha256: str | None
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "autoencoder_sha256": ae_sha256,
        "images": len(source),
        "images_sha256": _fingerprint(source),
        "resolution": recipe.resolution,
        "mirrored": recipe.data.flip,
        "precision": precision,
    }


def _compare(manifest: Path, identity: dict[str, Any]) -> None:
    """Refuse a cache of other latents; an unknown autoencoder is not compared."""
    found = read_json(manifest)
    if found is None:
        raise LdmError(f"{manifest} is damaged: give --cache another folder")
    differing = [key for key, value in identity.items() if found.get(key) != value]
    if "autoencoder_sha256" in differing and identity["autoencoder_sha256"] is not None:
        raise LdmError(
            f"{manifest.parent} holds latents of another autoencoder: give --cache another folder"
        )
    if differing := [key for key in differing if key != "autoencoder_sha256"]:
        raise LdmError(
            f"{manifest.parent} holds other latents ({', '.join(differing)} differ): give --cache "
            "another folder"
        )


def _parts(source: Source) -> list[range]:
    count = len(source)
    return [range(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK)]


def _block(folder: Path, part: range) -> Path:
    return folder / f"latents-{part.start // BLOCK:05d}.npy"


def _read(folder: Path, part: range, shape: tuple[int, ...]) -> np.ndarray:
    path = _block(folder, part)
    try:
        block = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise LdmError(f"{path} is damaged: delete it, and it is encoded again") from error
    if block.shape != (len(part), *shape) or block.dtype != np.float32:
        raise LdmError(f"{path} is damaged: delete it, and it is encoded again")
    return block


def _fingerprint(source: Source) -> str:
    """SHA-256 over the images' names and the pixels of a few, evenly spread.

    Names alone do not suffice: all prepared data sets name their images alike.
    """
    digest, count = sha256(), len(source)
    for index in range(count):
        digest.update(Path(source.name(index)).name.encode("utf-8", "surrogateescape") + b"\n")
    for index in np.linspace(0, count - 1, min(HASHED, count)).round().astype(int).tolist():
        try:
            digest.update(np.ascontiguousarray(source.load(index)).tobytes())
        except CorruptImage:
            digest.update(b"corrupt")
    return digest.hexdigest()


Raw = TypeVar("Raw")


class LatentBatch(NamedTuple):
    """One micro-batch of a training step, on the device except for the labels."""

    z: Tensor
    """Standardised latents (b, n_z, h, w)."""
    sigma: Tensor
    """Noise levels (b,)."""
    noise: Tensor
    """Standard normal noise of z's shape."""
    labels: Tensor | None
    """Classes int64 (b,), −1 for none, on the CPU, where checking them makes no GPU wait; None for
    a model without classes."""
    augment: Tensor | None
    """Parameters of the augmentation (b, A), or None."""


def latent_batches(
    run: Run,
    recipe: DiffusionRecipe,
    codec: Codec,
    source: Source,
    cache: LatentCache | None,
    start: int,
) -> Iterator[tuple[int, LatentBatch]]:
    """Yield micro-batches from image `start` of the run to its last, with their first image's k.

    On a CUDA GPU the next batch is copied, augmented and encoded on a side stream while the current
    one is trained on.

    Args:
        cache: the latents to read in place of encoding.
    """
    shares = {
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
        sigma = sample_sigma(normal(run.seed, "sigma", ks, ()), recipe.edm)
        noise = normal(run.seed, "noise", ks, shape)
        shown = None
        if recipe.network.classes:
            hidden = uniform(run.seed, "label", ks, ()) < recipe.label_dropout
            shown = labels.masked_fill(hidden, -1)
        z = codec.standardise(posterior, of_posterior)
        return LatentBatch(z, _on(run.device, sigma), _on(run.device, noise), shown, parameters)

    if cache is not None:
        return one_ahead(cache.batches(**shares), from_cache, run.device)
    pixels = batches(source, recipe.data, recipe.resolution, **shares)
    return one_ahead(pixels, from_pixels, run.device)


def one_ahead(
    raw: Iterable[Raw], prepare: Callable[[Raw], Any], device: torch.device
) -> Iterator[Any]:
    """Yield `prepare` of every item; on a CUDA GPU the next on a side stream meanwhile.

    The next begins before the current one is yielded: the consumer waits for the device at the end
    of every step, and would begin it too late.

    Args:
        prepare: enqueues work on the current stream; returns tensors in nested tuples.
    """
    if device.type != "cuda":
        yield from map(prepare, raw)
        return
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(main)  # weights and statistics may still be on their way

    def begin(item: Raw) -> tuple[Any, torch.cuda.Event]:
        with torch.cuda.stream(side):
            return prepare(item), side.record_event()

    def finish(prepared: Any, ready: torch.cuda.Event) -> Any:
        main.wait_event(ready)
        for tensor in _on_gpu(prepared):
            tensor.record_stream(main)  # its memory is not reused before main has read it
        return prepared

    begun = None
    for item in raw:
        upcoming = begin(item)
        if begun is not None:
            yield finish(*begun)
        begun = upcoming
    if begun is not None:
        yield finish(*begun)


def _on_gpu(tree: Any) -> Iterator[Tensor]:
    """The tensors on a GPU in nested tuples."""
    if isinstance(tree, Tensor) and tree.is_cuda:
        yield tree
    elif isinstance(tree, tuple):
        for branch in tree:
            yield from _on_gpu(branch)


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy a CPU tensor to the device, from pinned memory so that the copy is asynchronous."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
