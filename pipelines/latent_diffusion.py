"""The sampling pipeline for Python users: generate, interpolate, edit and inpaint images."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusion.samplers import inpaint
from ldm import hub
from ldm.checkpoint import to_twin
from ldm.config import did_you_mean, height_width, validate
from ldm.errors import UsageError
from ldm.files import Content, check_writable, to_json, write_together
from ldm.images import grid, to_float, to_pil
from ldm.logbook import show_progress
from ldm.seeds import normal
from pipelines.sampling.model import MODEL_TYPE, LatentModel
from pipelines.sampling.settings import Churn, Options, integer

Images = Tensor | list[Image.Image]


class LatentDiffusionPipeline(LatentModel):
    """Samples images from a stage-two checkpoint, which includes its autoencoder.

    >>> pipe = LatentDiffusionPipeline.from_pretrained("runs/x").to("cuda")  # or "owner/name"
    >>> images = pipe(n=4, seed=0, steps=18)             # (4, C, H, W) in [−1, 1], on the CPU

    Input images are (B, C, H, W) in [−1, 1], of the model's C channels, and of its size or that of
    the option `size`; or, for models of 8-bit images, a list of PIL images. Output image i depends
    on (seed, i), on input i and on the options alone; the number of images and the batch size
    change it by rounding only: in fp32 by less than 1/255, in bf16 on a GPU not yet measured.
    """

    def __call__(self, n: int = 1, seed: int = 0, **options: Any) -> Images:
        """Sample images 0 … n−1 of a seed. All methods share these options:

        Args:
            steps: sampler steps, 18 by default.
            sampler: "heun", "euler" or "dpmpp-2m".
            schedule: spacing of the noise levels, "karras", "cosine", "linear" or "flow"; by
                default flow for models of type flow, karras for others.
            sigma_min, sigma_max: its ends; by default the model's own.
            shift: of the schedule flow; by default the model's own.
            churn: fresh noise during sampling, a number (S_churn) or a `Churn`.
            labels: a class by number or name, one or one per image, −1 for none; None: drawn
                uniformly for each image, if the model has classes.
            guidance: scale, 1 changes nothing. For a model with classes it is classifier-free
                guidance (Ho & Salimans 2022), unless there is a `guide`.
            guide: autoguidance (Karras et al. 2024): a pipeline, or the path of a model, with the
                same autoencoder, to guide away from. A pipeline is moved to this one's device.
            interval: noise levels (low, high) between which guidance acts.
            guided_channels: guide the first so many channels of the latents alone.
            size: of the images in pixels, R or (height, width); by default that of the training.
                Another is allowed where the networks can divide it, and may look worse.
            batch_size: images at a time, 64 by default.
            callback: called with the number of finished images after every batch.
            progress: show a progress bar.
            output: "tensor", or "pil" for a list of PIL images, of models of 8-bit images alone.

        Raises:
            UsageError: an option is unknown, invalid, has no effect, or does not fit the model.
            LdmError: the images are not finite.
        """
        requested, sample = self._read(options, n, seed)
        return _in_batches(n, requested, sample)

    def interpolate(self, seed_a: int, seed_b: int, count: int = 8, **options: Any) -> Images:
        """Interpolate from image 0 of one seed to image 0 of another, on the noise sphere.

        A model with classes needs `labels`. Churn is refused: it would make the images diverge.

        Args:
            count: number of images, both ends included.
        """
        if count < 2:
            raise UsageError(f"count={count}: it must be at least 2, both ends are included")
        requested, sample = self._read(options, count, seed_a)
        if requested.churn.S_churn > 0:
            raise UsageError("interpolate does not support churn: omit churn")
        if self.classes.count and requested.labels is None:
            raise UsageError("interpolate needs labels: the model has classes")
        shape = self.shape_of(requested.size)
        a, b = (normal(seed, "sample", [0], shape) for seed in (seed_a, seed_b))
        noise = slerp(a, b, torch.linspace(0, 1, count))
        return _in_batches(count, requested, lambda i: sample(i, noise=noise[i.start : i.stop]))

    def edit(self, images: Images, strength: float = 0.6, seed: int = 0, **options: Any) -> Images:
        """Noise images part of the way and denoise them: SDEdit.

        Meng et al. 2021 (arXiv 2108.01073).

        Args:
            strength: the share of the schedule's steps to run, rounded. 0 gives the autoencoder's
                reconstruction; 1 a new sample that keeps nothing.
        """
        images = self._read_images(images, options)
        if not 0 <= strength <= 1:
            raise UsageError(f"strength={strength}: it must lie between 0 and 1")
        requested, sample = self._read(options, len(images), seed)
        skip = requested.steps - round(strength * requested.steps)

        def change(i: range) -> Tensor:
            z = self.encode(images[i.start : i.stop]) if skip else None
            return sample(i, skip=skip, from_z=z)

        return _in_batches(len(images), requested, change)

    def inpaint(self, images: Images, mask: Tensor, seed: int = 0, **options: Any) -> Images:
        """Generate the masked part of images; every other pixel stays exactly as it was.

        Pixels under the mask are ignored. By default churn is as large as the sampler allows (none
        for dpmpp-2m): with less, the new part fits the known one less well.

        Args:
            mask: (B or 1, 1, H, W), 1 or true where to generate, 0 or false elsewhere.
        """
        images = self._read_images(images, options)
        mask = _read_mask(mask, images)
        if "churn" not in options and options.get("sampler") != "dpmpp-2m":
            options = options | {"churn": Churn(S_churn=float("inf"))}
        requested, sample = self._read(options, len(images), seed)

        def paint(i: range) -> Tensor:
            given, hidden = images[i.start : i.stop], mask[i.start : i.stop]
            known = self.encode(fill_hidden(given, hidden))
            where = latent_mask(hidden, known.shape[2:]).to(self.device)
            generated = sample(i, wrap=lambda denoise: inpaint(denoise, known, where))
            return torch.where(hidden > 0, generated, given)

        return _in_batches(len(images), requested, paint)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        samples: int = 16,
        repo_id: str = "owner/name",
        revision: str | None = None,
    ) -> list[Path]:
        """Write a folder for `from_pretrained`, as the Hub has it: no pickle, and no path or
        command of this machine.

        It holds config.json, model.safetensors (both stages, the latents' statistics, the classes,
        how it was trained), samples.png, and, unless there is one, a model card. The card has the
        numbers that `ldm fid` measured of this model, where they lie beside its file.

        Args:
            samples: images of seed 0 to draw for the card, on this pipeline's device; 0: none.
            repo_id, revision: the repository and its branch, for the card's lines that load it.

        Returns:
            The files written.

        Raises:
            UsageError: the folder holds a run, or `repo_id` is no name of a repository.
            LdmError: the folder cannot be written, or the samples are not finite.
        """
        from pipelines import model_card  # it reads measurements, which sampling does not need

        samples, folder = integer("samples=", samples, least=0), Path(folder)
        hub.check_name(repo_id)
        if (folder / "ckpt.pt").exists():
            raise UsageError(f"{folder} holds a ckpt.pt, which loads first: give another folder")
        check_writable(folder / hub.CONFIG_FILE, advice="give another folder")
        file, files = model_card.published(self), dict[Path, Content]()
        if samples:
            sheet = to_pil(grid(self._draw(samples), max(1, round(samples**0.5))))
            files[folder / model_card.PICTURE] = lambda opened: sheet.save(opened, "PNG")
        if not (folder / hub.CARD_FILE).exists():  # an existing card stays
            card = model_card.write_card(self, file, repo_id, revision, samples)
            files[folder / hub.CARD_FILE] = card.encode()
        described = hub.describe(MODEL_TYPE, file.config, file.sha256)
        files[folder / hub.WEIGHTS_FILE] = to_twin(file)
        files[folder / hub.CONFIG_FILE] = to_json(described)
        write_together(files)
        return list(reversed(files))

    def _draw(self, n: int) -> Tensor:
        images = self(n, seed=0)
        assert isinstance(images, Tensor)
        return images

    def push_to_hub(
        self,
        repo_id: str,
        *,
        samples: int = 16,
        commit_message: str = "Upload a latent diffusion model",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of the Hub, created if needed, and
        return its address. A model card that is there stays.

        Args:
            repo_id: `owner/name`.
            samples: images of seed 0 to draw for the card; 0: none.
            private: create it as a private repository; None: as its owner has set.
            token: of an account that may write there; None: that of `hf auth login`.
            revision: branch to push to, created if needed; None: the main one.

        Raises:
            UsageError: `repo_id` is no name of a repository.
            LdmError: the Hub could not be reached, or refused; the repository is public, and a
                private one is wanted; or the samples are not finite.
        """
        proposed = revision is not None and revision.startswith("refs/")  # to the main branch
        loaded = None if proposed or revision == "main" else revision
        save = partial(self.save_pretrained, samples=samples, repo_id=repo_id, revision=loaded)
        return hub.push(save, repo_id, commit_message, private, token, revision)

    def _read(
        self, options: dict[str, Any], n: int, seed: int
    ) -> tuple[Options, Callable[..., Tensor]]:
        """Validate the options, and bind them to `LatentModel.sample`."""
        n, seed = integer("n=", n, least=1), integer("seed=", seed)
        known = list(Options.model_fields)
        for name in options.keys() - known:
            raise UsageError(f"unknown option '{name}'{did_you_mean(name, known)}")
        requested = validate(Options, options)
        if requested.output == "pil":
            self._check_plain("give output='tensor'")
        labels = self.classes.choose(requested.labels, n, seed)
        guide = self.load_guide(requested, requested.guide, labels)

        def sample(i: range, **how: Any) -> Tensor:
            chosen = None if labels is None else labels[i.start : i.stop]
            return self.sample(i, seed, requested, chosen, guide, size=requested.size, **how)

        return requested, sample

    def _check_plain(self, instead: str) -> None:
        """Refuse PIL images for a model whose pixels they would cut to 8 bits."""
        pixels = self.autoencoder_config.pixels
        if not pixels.is_plain:
            low, high = pixels.bounds
            raise UsageError(
                f"PIL images have 8 bits, and the model's pixels are {pixels.type} from {low:g} to "
                f"{high:g}: {instead}"
            )

    def _read_images(self, images: Images, options: dict[str, Any]) -> Tensor:
        """(B, C, H, W) in [−1, 1] on the CPU, of the size in the options, else the model's."""
        channels = self.autoencoder_config.image_channels
        if not isinstance(images, Tensor):
            self._check_plain("give a tensor of images in [−1, 1]")
            mode = "L" if channels == 1 else "RGB"
            pictures = [
                np.array(image.convert(mode)).reshape(*image.size[::-1], -1) for image in images
            ]
            if len({picture.shape for picture in pictures}) != 1:
                raise UsageError("images: give at least one, all of one size")
            images = to_float(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
        requested = validate(Options, {"size": options.get("size")}).size
        wanted = (channels, *height_width(requested or self.recipe.resolution))
        if images.shape[1:] != wanted or not len(images):
            sides = ", ".join(map(str, wanted))
            raise UsageError(f"images are {tuple(images.shape)}, not (B, {sides})")
        if not images.is_floating_point() or not (images.abs() <= 1).all():
            raise UsageError("images must be floating point in [−1, 1]")
        return images.detach().float().cpu()


def _read_mask(mask: Tensor, images: Tensor) -> Tensor:
    """(B, 1, H, W) of 0.0 and 1.0, on the CPU."""
    count, _, height, width = images.shape
    if mask.ndim != 4 or mask.shape[1:] != (1, height, width) or len(mask) not in (1, count):
        raise UsageError(f"mask is {tuple(mask.shape)}, not {(count, 1, height, width)}")
    if not ((mask == 0) | (mask == 1)).all():
        raise UsageError("mask must be 1 where to generate and 0 elsewhere")
    return mask.cpu().float().expand(count, -1, -1, -1)


def _in_batches(n: int, options: Options, sample: Callable[[range], Tensor]) -> Images:
    batches = []
    with show_progress("sampling", n, options.progress) as advance:
        for start in range(0, n, options.batch_size):
            indices = range(start, min(n, start + options.batch_size))
            batches.append(sample(indices))
            advance(len(indices))
            if options.callback:
                options.callback(indices.stop)
    images = torch.cat(batches)
    return list(map(to_pil, images)) if options.output == "pil" else images


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation from noise a to noise b, (1, C, H, W) each, at fractions t (n,).

    Gaussian noise lies near a sphere; linear interpolation would lose its variance.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.double().clamp(-1, 1).acos()
    if angle < 1e-6:  # the same noise
        return a.expand(len(t), -1, -1, -1)
    t = t.double().view(-1, 1, 1, 1)
    # Shoemake 1985, Section 3.3
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b).div(angle.sin()).float()


def fill_hidden(images: Tensor, mask: Tensor) -> Tensor:
    """Replace the hidden pixels of images (B, 3, H, W) by the mean of the known ones around them.

    An encoder sees beyond the patch of a latent: neither a hidden pixel nor an artificial edge may
    reach it. The mean is over the known pixels of a square of 2, 4, 8 … pixels, the smallest that
    has any; grey if nothing is known. (After the pull-push of Gortler et al. 1996, which blends the
    squares; this takes one.)

    Args:
        mask: (B, 1, H, W), 1 where hidden, 0 where known.
    """
    known = 1 - mask
    return _means(images * known, known)


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    """Means (B, 3, H, W) from sums and counts (B, 1, H, W) over squares; where the count is 0, of
    the smallest surrounding square that is not empty."""
    mean = sums / counts.clamp_min(1)
    if max(counts.shape[2:]) == 1 or (counts > 0).all():
        return mean
    larger = [F.avg_pool2d(part, 2, ceil_mode=True, divisor_override=1) for part in (sums, counts)]
    wide = F.interpolate(_means(*larger), scale_factor=2, mode="nearest")
    return torch.where(counts > 0, mean, wide[..., : counts.shape[2], : counts.shape[3]])


def latent_mask(mask: Tensor, sides: Sequence[int]) -> Tensor:
    """(B, 1, H, W) of pixels → (B, 1, *sides): 1 where any pixel of a latent's patch is 1."""
    return F.adaptive_max_pool2d(mask, tuple(sides))
