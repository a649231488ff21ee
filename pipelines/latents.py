"""Latents for stage two: the codec, training batches of latents, and a cache of them on disk.

The diffusion model sees z: latents of the frozen stage one, standardised per channel to mean 0 and
standard deviation σ_data. Pixels become z, and z pixels, in `Codec` and nowhere else.

Image k's crop, flip, augmentation, posterior draw, noise, noise level and hidden label are
functions of (seed, k) alone. Encoded on the fly or read from the cache, batches are the same, apart
from rounding.

<cache>/cache.json                 identity of the latents: autoencoder, images, size, precision
<cache>/latents-00000.npy …        a thousand images each, float32 (n, mirrored, 2, n_z, h, w):
                                   mean and standard deviation of every image's posterior and, for
                                   data with flips, of its mirror image's; then, since version 0.2,
                                   the CRC-32 of each, uint32 (n, mirrored)

A corrupt image is NaN throughout; the next good one replaces it, as in training from pixels.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from numpy.lib.format import open_memmap
from pydantic import Field
from torch import Tensor, nn

from autoencoders import Autoencoder, DiagonalGaussian
from diffusion.augment import augment
from diffusion.network import check_labels
from ldm.config import plain_size
from ldm.data import Batch, Source, batches, evaluation_batches
from ldm.data.loader import FEWER_WORKERS, Draw, FaultCount, whole_shares
from ldm.data.sources import Part
from ldm.data.transforms import CorruptImage
from ldm.data.workers import load_in_workers
from ldm.device import full_float32, memory_format, one_ahead, to_device
from ldm.distributed import fail_together, from_main, wait_for_files
from ldm.errors import LdmError
from ldm.files import check_writable, lock, write_atomically, write_json
from ldm.images import as_float, assert_range
from ldm.records import checked, read_tree, schema
from ldm.run import Run
from ldm.seeds import generator
from pipelines.recipes import DiffusionRecipe, draw_numbers, latent_shape

FORMAT = 1
MANIFEST = "cache.json"
BLOCK = 1000  # images in a file
BATCH = 32  # images encoded at a time
ANOTHER = "give --cache another folder"
_Statistic = Annotated[float, Field(ge=-1e18, le=1e18)]
HASHED = 64  # images whose pixels are part of a source's fingerprint


# ------------------------------------------------------------------------------- the codec
class Codec(nn.Module):
    """images (B, C, H, W) in [−1, 1] ↔ z (B, n_z, H/f, W/f), by a frozen autoencoder.

    Args:
        autoencoder: stage one; frozen and put into eval mode.
        mean, std: per-channel statistics (n_z,) of its latents, from `measure_latents`.
        sigma_data: standard deviation of z (EDM's σ_data).

    Raises:
        LdmError: the statistics are not finite, or a channel does not vary.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, autoencoder: Autoencoder, mean: Tensor, std: Tensor, sigma_data: float = 0.5
    ) -> None:
        super().__init__()
        if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 1e-6).all()):
            first = [[f"{value:.3g}" for value in part.flatten()[:4]] for part in (mean, std)]
            raise LdmError(
                "latent statistics are degenerate (mean [{}], std [{}]): train the autoencoder "
                "first".format(*map(", ".join, first))
            )
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.sigma_data = sigma_data
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1))
        self.register_buffer("std", std.float().view(1, -1, 1, 1))

    def train(self, mode: bool = True) -> "Codec":
        """Keep eval mode: the autoencoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """images (B, C, H, W) in [−1, 1] → posterior of their raw latents (B, n_z, h, w).

        The range is not checked, which would wait for a GPU.
        """
        return self.autoencoder.encode(images)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """images (B, C, H, W) in [−1, 1] → z: drawn with noise (B, n_z, h, w), else the mean.

        Raises:
            ValueError: the images are not in [−1, 1].
        """
        assert_range(images)
        return self.standardise(self.posterior(images), noise)

    @torch.no_grad()
    def standardise(self, posterior: DiagonalGaussian, noise: Tensor | None = None) -> Tensor:
        """posterior → z (B, n_z, h, w): drawn with noise of that shape, else the mean."""
        latents = posterior.mode() if noise is None else posterior.sample(noise=noise)
        z = (latents - self.mean) * (self.sigma_data / self.std)
        # an encoder without gradients may have chosen a layout that is slow in training
        return z.contiguous(memory_format=memory_format(z.device))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """z (B, n_z, h, w) → images (B, C, H, W) in [−1, 1]."""
        latents = z.float() * (self.std / self.sigma_data) + self.mean
        return self.autoencoder.decode(latents).float().clamp(-1, 1)

    def statistics(self) -> dict[str, Any]:
        """The statistics as plain values, for a checkpoint."""
        return {
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "sigma_data": self.sigma_data,
        }

    @classmethod
    def from_statistics(
        cls, autoencoder: Autoencoder, statistics: Any, path: object = "the model's file"
    ) -> "Codec":
        """Build a codec from its `statistics()` in a file; an LdmError if they do not fit."""
        channels = autoencoder.config.latent_channels
        each = Annotated[list[_Statistic], Field(min_length=channels, max_length=channels)]
        known = schema(mean=each, std=each, sigma_data=Annotated[_Statistic, Field(gt=0)])
        checked(known, statistics, path, entry="statistics")
        mean, std = (torch.tensor(statistics[key]) for key in ("mean", "std"))
        return cls(autoencoder, mean, std, statistics["sigma_data"])


@torch.no_grad()
def measure_latents(
    posteriors: Iterable[DiagonalGaussian],
    drawn: bool = True,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> tuple[Tensor, Tensor]:
    """Measure the per-channel mean and standard deviation (n_z,) of latents.

    Each posterior is summed in closed form, E[z] = E[μ] and E[z²] = E[μ² + σ²], in float64.

    Args:
        posteriors: posteriors of batches of images.
        drawn: measure draws from the posteriors; else their means, E[z²] = E[μ²].
        reduce: adds the sums (3, n_z) of several processes.
    """
    sums: Tensor | float = 0.0
    for posterior in posteriors:
        mean = posterior.mean.double()
        squares = mean.square() + (posterior.logvar.double().exp() if drawn else 0)
        count = mean.new_full(mean.shape[1:2], mean[:, 0].numel())
        over = (0, 2, 3)
        sums = sums + torch.stack([mean.sum(over), squares.sum(over), count])
    first, second, count = reduce(torch.as_tensor(sums))
    mean = first / count
    return mean, (second / count - mean.square()).clamp_min(0).sqrt()


# ------------------------------------------------------------------------ training batches
class LatentBatch(NamedTuple):
    """One micro-batch of a training step, on the device."""

    z: Tensor
    """Standardised latents (b, n_z, h, w)."""
    sigma: Tensor
    """Noise levels (b,)."""
    noise: Tensor
    """Standard normal noise of z's shape."""
    labels: Tensor | None
    """Classes int64 (b,), −1 for none; None for a model without classes."""
    augment: Tensor | None
    """Parameters of the augmentation (b, A), or None."""


def latent_batches(
    run: Run,
    recipe: DiffusionRecipe,
    codec: Codec,
    source: Source,
    cache: "LatentCache | None",
    start: int,
) -> Iterator[tuple[int, LatentBatch]]:
    """Yield micro-batches from image `start` of the run to its last, with their first image's k.

    On a CUDA GPU the next batch is copied, augmented and encoded on a side stream while the current
    one is trained on; random numbers are drawn by the loader's workers.

    Args:
        cache: the latents to read in place of encoding.
    """
    shares = {
        "seed": run.seed, "start": start, "stop": recipe.steps * recipe.batch_size,
        "batch_size": recipe.batch_size // recipe.accumulate, "rank": run.rank, "world": run.world,
        "draw": partial(draw_numbers, recipe, latent_shape(recipe, codec.autoencoder), run.seed),
    }  # fmt: skip

    def encoded(batch: Batch) -> tuple[int, LatentBatch]:
        images, parameters = as_float(run.place(batch.images)), batch.drawn["augment"]
        if parameters is not None:
            images = augment(images, parameters)
        with run.autocast():
            posterior = codec.posterior(images)
        return finished(posterior, batch.k.tolist(), batch.labels, batch.drawn)

    def read(batch: tuple[DiagonalGaussian, list[int], Tensor, Any]) -> tuple[int, LatentBatch]:
        mean, logvar = (to_device(t, run.device) for t in (batch[0].mean, batch[0].logvar))
        return finished(DiagonalGaussian(mean, logvar), *batch[1:])

    def finished(
        posterior: DiagonalGaussian, ks: list[int], labels: Tensor, drawn: dict[str, Any]
    ) -> tuple[int, LatentBatch]:
        if drawn["hidden"] is not None:
            check_labels(labels, recipe.network.classes)
            drawn |= {"labels": labels.masked_fill(drawn["hidden"], -1)}
        of: Any = {k: None if v is None else to_device(v, run.device) for k, v in drawn.items()}
        z = codec.standardise(posterior, of["posterior"])
        return ks[0], LatentBatch(z, of["sigma"], of["noise"], of.get("labels"), of["augment"])

    if cache is not None:
        stored = cache.batches(**shares, workers=recipe.data.workers)
        return one_ahead(run.waits(stored), read, run.device)
    pixels = batches(source, recipe.data, recipe.resolution, **shares)
    return one_ahead(run.waits(pixels), encoded, run.device)


# ------------------------------------------------------------------------------- the cache
class LatentCache:
    """The posteriors of all images of a source, read by their number; see `open_cache`."""

    def __init__(self, folder: Path, source: Source, shape: tuple[int, ...]) -> None:
        self.source, self.mirrored = source, shape[0] == 2
        self._opened = folder, source, shape
        self._blocks = []
        for part in _parts(source):
            path = _block(folder, part)
            try:
                block = open_memmap(path, mode="r")
                start = block.offset + block.nbytes
                sums = np.fromfile(path, np.uint32, offset=start)
                if (block.shape, block.dtype) != ((len(part), *shape), np.float32) or (
                    path.stat().st_size - start not in (0, 4 * len(part) * shape[0])
                ):
                    raise ValueError(f"{block.dtype} {block.shape}")
            except Exception as error:  # damaged headers raise errors of nearly any type
                raise LdmError(f"{path} is damaged: delete it, and it is encoded again") from error
            # earlier versions stored no checksums
            self._blocks.append((block, sums.reshape(-1, shape[0]) if sums.size else None))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._opened  # a worker opens the files itself

    def load(self, seed: int, k: int) -> tuple[np.ndarray, int]:
        """Load image k of a run: mean and standard deviation (2, n_z, h, w), and its index."""
        count = len(self.source)
        mirror = int(generator(seed, "flip", k).integers(2)) if self.mirrored else 0
        first = self.source.shuffled(seed, k)
        for index in chain(range(first, count), range(first)):
            (block, sums), at = self._blocks[index // BLOCK], (index % BLOCK, mirror)
            row = np.ascontiguousarray(block[at])
            is_whole = sums is None or crc32(row.data) == sums[at]
            if is_whole and np.isfinite(row).all():
                return row, index
            if not (is_whole and np.isnan(row).all()):
                break
        raise LdmError(
            f"{block.filename} is damaged: the latents of {self.source.name(index)} are not "
            "finite, or not as they were written: delete it, and it is encoded again"
        )

    def batches(
        self, seed: int, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1,
        workers: int = 0, draw: Draw | None = None,
    ) -> Iterator[tuple[DiagonalGaussian, list[int], Tensor, Any]]:  # fmt: skip
        """Yield images k = start … stop−1 of a run, those that `ldm.data.batches` yields.

        A batch has the posterior of the raw latents (b, n_z, h, w), on the CPU; the numbers k; the
        classes, int64 (b,), −1 for none; and what `draw` draws for them.
        """
        work, pin = partial(self._batch, seed, draw), torch.cuda.is_available()
        numbers = whole_shares(start, stop, batch_size, rank, world)
        for mean, logvar, *rest in load_in_workers(work, numbers, workers, FEWER_WORKERS, pin):
            yield DiagonalGaussian(mean, logvar), *rest

    def _batch(self, seed: int, draw: Draw | None, ks: range) -> tuple[Any, ...]:
        rows, indices = zip(*(self.load(seed, k) for k in ks), strict=True)
        mean, std = torch.from_numpy(np.stack(rows)).unbind(1)
        labels = torch.tensor([self.source.label(index) for index in indices])
        return mean, 2 * std.log(), list(ks), labels, None if draw is None else draw(ks)


def open_cache(
    recipe: DiffusionRecipe, codec: Codec, ae_sha256: str, source: Source, run: Run
) -> LatentCache:
    """Open the cache in the recipe's folder; all processes encode what it lacks first.

    An interrupted call resumes, to the block of a thousand images.
    """
    folder = Path(recipe.cache).expanduser()

    def prepare() -> list[range]:
        if check_cache(recipe, source, run.precision, ae_sha256):
            held.enter_context(lock(folder, ANOTHER))
        if not (folder / MANIFEST).is_file():
            identity = _identity(recipe, source, run.precision, ae_sha256)
            write_json(folder / MANIFEST, identity | {"source": recipe.data.source})
        return check_cache(recipe, source, run.precision, ae_sha256)  # no other fills it now

    with ExitStack() as held:
        missing = from_main(run.accelerator, prepare)
        if missing:
            run.say(f"encoding {len(source):,} images into {folder}")
        faults = FaultCount(len(source))
        for turn in range(0, len(missing), run.world):  # all processes take as many turns
            for part in missing[turn:][run.rank : run.rank + 1]:
                block = _encode(codec, Part(source, part), recipe, run, faults)
                write_atomically(_block(folder, part), partial(_write_block, block))
            if run.stop_requested():
                raise run.interrupted(f"stopped while encoding into {folder}")
            done = len(source) - sum(map(len, missing[turn + run.world :]))
            run.say(f"encoded {done:,} of {len(source):,} images")
        run.accelerator.wait_for_everyone()
    with fail_together(run.accelerator):
        if lacking := wait_for_files(partial(_lacking, folder, source), run.world):
            raise LdmError(
                f"{folder} lacks {len(lacking)} of its files, which other processes wrote: it is "
                "not on a disk that all machines share: give --cache a folder that is"
            )
    return LatentCache(folder, source, _image_shape(recipe, codec))


@full_float32()
@torch.no_grad()
def _encode(
    codec: Codec, part: Part, recipe: DiffusionRecipe, run: Run, faults: FaultCount
) -> np.ndarray:
    """Encode some images, each to the `_image_shape`; corrupt ones stay NaN."""
    block = np.full((len(part), *_image_shape(recipe, codec)), np.nan, dtype=np.float32)
    for batch in evaluation_batches(
        part, recipe.resolution, BATCH, workers=recipe.data.workers, faults=faults
    ):
        images = as_float(run.place(batch.images))
        for mirror in range(1 + recipe.data.flip):
            with run.autocast():
                posterior = codec.posterior(images.flip(-1) if mirror else images)
            good = posterior.isfinite().cpu()
            reason = "latents not finite: train the autoencoder first, or try run.precision=fp32"
            faults.add({part.name(k): reason for k in batch.k[~good].tolist()})
            moments = torch.stack([posterior.mean, (posterior.logvar / 2).exp()], dim=1).cpu()
            moments[~good] = torch.nan
            block[batch.k.numpy(), mirror] = moments.numpy()
    return block


def _image_shape(recipe: DiffusionRecipe, codec: Codec) -> tuple[int, ...]:
    """Shape of an image in the cache: mirrored or not, mean or deviation, n_z, h, w."""
    return (1 + recipe.data.flip, 2, *latent_shape(recipe, codec.autoencoder))


def check_cache(
    recipe: DiffusionRecipe, source: Source, precision: str, ae_sha256: str | None
) -> list[range]:
    """List the images that the recipe's cache lacks, a range per file, without writing.

    A folder of other latents or of other files is an LdmError, as is one that lacks images and
    cannot be written. `ae_sha256` is None if the autoencoder is not trained yet: any will do.
    """
    folder = Path(recipe.cache).expanduser()
    if (found := read_tree(folder / MANIFEST, advice=ANOTHER)) is not None:
        identity = _identity(recipe, source, precision, ae_sha256)
        if ae_sha256 not in (None, found.pop("autoencoder_sha256", None)):
            raise LdmError(f"{folder} holds latents of another autoencoder: {ANOTHER}")
        del identity["autoencoder_sha256"]
        if differing := [key for key, value in identity.items() if found.get(key) != value]:
            raise LdmError(
                f"{folder} holds other latents ({', '.join(differing)} differ): {ANOTHER}"
            )
    # hidden are a lock and half-written files, of a process that was killed or is about to begin
    elif folder.is_file() or any(folder.glob("[!.]*")):
        raise LdmError(f"{folder} is not empty and holds no cache: {ANOTHER}")
    if lacking := _lacking(folder, source):
        check_writable(folder / MANIFEST, advice=ANOTHER)
    return lacking


def _lacking(folder: Path, source: Source) -> list[range]:
    return [part for part in _parts(source) if not _block(folder, part).is_file()]


def _identity(
    recipe: DiffusionRecipe, source: Source, precision: str, ae_sha256: str | None
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "autoencoder_sha256": ae_sha256,
        "images": len(source),
        "images_sha256": _fingerprint(source),
        "resolution": plain_size(recipe.resolution),
        "mirrored": recipe.data.flip,
        "precision": precision,
        **({} if recipe.data.small == "error" else {"small": recipe.data.small}),
        **({"range": list(source.range)} if source.range else {}),
    }


def _parts(source: Source) -> list[range]:
    count = len(source)
    return [range(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK)]


def _block(folder: Path, part: range) -> Path:
    return folder / f"latents-{part.start // BLOCK:05d}.npy"


def _write_block(block: np.ndarray, file: IO[bytes]) -> None:
    np.save(file, block)
    sums = [crc32(image) for image in block.reshape(-1, *block.shape[2:])]
    file.write(np.array(sums, np.uint32).tobytes())


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
