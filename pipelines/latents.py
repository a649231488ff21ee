"""Latents encoded once and kept on disk: what others train on, to be compared with.

<folder>/cache.json                what the latents are of: the autoencoder, the images, the size
<folder>/latents-00000.npy …       a thousand images each, float32 (n, mirrored, 2, n_z, h, w):
                                   mean and standard deviation of every image's posterior, and of
                                   its mirror image where the data are mirrored

An image that cannot be read is NaN throughout, and the next good one stands in for it, as it does
when training from pixels.

The batches that stage two learns from: z, noise and noise levels, made one batch ahead.

Image k's crop, flip, augmentation, posterior draw, noise, noise level and hidden label are
functions of (seed, k) alone.
"""

from collections.abc import Callable, Iterable, Iterator
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
from ldm.data.sources import label_of
from ldm.data.split import Part
from ldm.data.transforms import CorruptImage
from ldm.errors import Interrupted, LdmError
from ldm.files import read_json, write_atomically, write_json
from ldm.images import to_float
from ldm.run import Run
from ldm.seeds import generator, normal, uniform
from pipelines.codec import Codec
from pipelines.recipes import DiffusionRecipe, latent_shape

FORMAT = 1
MARK = "cache.json"
BLOCK = 1000  # images in a file
BATCH = 32  # images encoded at a time
LOOKED_AT = 64  # images whose pixels are part of a source's fingerprint


class CachedBatch(NamedTuple):
    """Posteriors of training images, and which they are."""

    posterior: DiagonalGaussian
    """Of the raw latents (b, n_z, h, w), on the CPU."""
    labels: Tensor
    """int64 (b,), −1 for none."""
    k: Tensor
    """int64 (b,): the number of each image in the run."""


class LatentCache:
    """The posteriors of all images of a source, read by their number. See `open_cache`.

    Raises:
        LdmError: a file of latents is damaged.
    """

    def __init__(self, folder: Path, source: Source, shape: tuple[int, ...]) -> None:
        self.source, self.mirrored = source, shape[0] == 2
        self._blocks = [_read(folder, part, shape) for part in _parts(source)]

    def load(self, seed: int, k: int) -> tuple[np.ndarray, int]:
        """Image k of a run: mean and standard deviation (2, n_z, h, w), and its index."""
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
        """Images k = start … stop−1 of a run, the same as `ldm.data.batches` gives as pixels."""
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
    """The cache in the recipe's folder; what is missing of it is encoded first, by all processes.

    Stopped, the same call goes on where it was, to a block of a thousand images.

    Raises:
        LdmError: the folder holds latents of another autoencoder or other images, other files, or
            a damaged one; latents are not finite; more than 1 % of the images are corrupt; or the
            disk is full.
        Interrupted: asked to stop.
    """
    folder = Path(recipe.cache).expanduser()

    def look() -> list[range]:
        missing = check_cache(recipe, source, run.precision, ae_sha256)
        for beside in folder.glob(".*.partial"):  # of a process that was killed
            beside.unlink(missing_ok=True)
        if not (folder / MARK).is_file():
            identity = _identity(recipe, source, run.precision, ae_sha256)
            write_json(folder / MARK, identity | {"source": recipe.data.source})
        return missing

    missing = run.from_main(look)
    if missing:
        run.say(f"encoding {len(source):,} images into {folder}")
    faults = FaultCount(len(source))
    for turn in range(0, len(missing), run.world):  # all processes take as many turns
        for part in missing[turn:][run.rank : run.rank + 1]:
            block = _encode(codec, Part(source, part), recipe, run, faults)
            write_atomically(_block(folder, part), lambda file, block=block: np.save(file, block))
        if run.stop_asked():
            raise Interrupted(f"stopped while encoding into {folder}")
        done = len(source) - sum(map(len, missing[turn + run.world :]))
        run.say(f"encoded {done:,} of {len(source):,} images")
    run.accelerator.wait_for_everyone()
    return LatentCache(folder, source, _shape(codec, recipe))


def _shape(codec: Codec, recipe: DiffusionRecipe) -> tuple[int, ...]:
    """Of what is kept of an image: (mirrored or not, mean or deviation, n_z, h, w)."""
    return (1 + recipe.data.flip, 2, *latent_shape(recipe, codec.autoencoder))


@torch.no_grad()
def _encode(
    codec: Codec, part: Part, recipe: DiffusionRecipe, run: Run, faults: FaultCount
) -> np.ndarray:
    """Mean and standard deviation of some images: (n, mirrored or not, 2, n_z, h, w)."""
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
                    f"the latents of {part.name(int(bad))} are not finite: is the autoencoder "
                    "trained? run.precision=fp32 may help"
                )
            block[batch.k.numpy(), mirror] = moments.numpy()
    return block


def check_cache(
    recipe: DiffusionRecipe, source: Source, precision: str, ae_sha256: str | None
) -> list[range]:
    """The images that the cache in the recipe's folder lacks, a file each. Nothing is written.

    Args:
        precision: of the run, "fp32" or "bf16".
        ae_sha256: fingerprint of the autoencoder; None where it is not there yet.

    Raises:
        LdmError: the folder holds latents of another autoencoder or other images, or other files.
    """
    folder = Path(recipe.cache).expanduser()
    mark = folder / MARK
    if mark.is_file():
        _compare(mark, _identity(recipe, source, precision, ae_sha256))
    elif folder.exists():
        ours = set(folder.glob(".*.partial"))  # of a process that was killed
        if not folder.is_dir() or set(folder.iterdir()) - ours:
            raise LdmError(f"{folder} is not empty and holds no cache: give --cache another folder")
    return [part for part in _parts(source) if not _block(folder, part).is_file()]


def _identity(
    recipe: DiffusionRecipe, source: Source, precision: str, ae_sha256: str | None
) -> dict[str, Any]:
    """What the latents are of."""
    return {
        "format": FORMAT,
        "autoencoder_sha256": ae_sha256,
        "images": len(source),
        "images_sha256": _fingerprint(source),
        "resolution": recipe.resolution,
        "mirrored": recipe.data.flip,
        "precision": precision,
    }


def _compare(mark: Path, identity: dict[str, Any]) -> None:
    """Refuse a cache of other latents; an autoencoder that is not known is not compared."""
    found = read_json(mark)
    if found is None:
        raise LdmError(f"{mark} is damaged: give --cache another folder")
    differing = [key for key, value in identity.items() if found.get(key) != value]
    if "autoencoder_sha256" in differing and identity["autoencoder_sha256"] is not None:
        raise LdmError(
            f"{mark.parent} holds latents of another autoencoder: give --cache another folder"
        )
    if differing := [key for key in differing if key != "autoencoder_sha256"]:
        raise LdmError(
            f"{mark.parent} holds other latents ({', '.join(differing)} differ): give --cache "
            "another folder"
        )


def _parts(source: Source) -> list[range]:
    """The images of each file of latents."""
    count = len(source)
    return [range(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK)]


def _block(folder: Path, part: range) -> Path:
    return folder / f"latents-{part.start // BLOCK:05d}.npy"


def _read(folder: Path, part: range, shape: tuple[int, ...]) -> np.ndarray:
    path = _block(folder, part)
    try:
        block = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise LdmError(f"{path} is damaged: delete it, and it is made again") from error
    if block.shape != (len(part), *shape) or block.dtype != np.float32:
        raise LdmError(f"{path} is damaged: delete it, and it is made again")
    return block


def _fingerprint(source: Source) -> str:
    """SHA-256 over the images' names and the pixels of a few of them, evenly spread.

    Names alone would not do: all prepared data sets name their images alike.
    """
    digest, count = sha256(), len(source)
    for index in range(count):
        digest.update(Path(source.name(index)).name.encode("utf-8", "surrogateescape") + b"\n")
    for index in np.linspace(0, count - 1, min(LOOKED_AT, count)).round().astype(int).tolist():
        try:
            digest.update(np.ascontiguousarray(source.load(index)).tobytes())
        except CorruptImage:
            digest.update(b"corrupt")
    return digest.hexdigest()


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
