"""The trained model as one object for Python users: seeds and images in, images out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.guidance import inpaint
from ldm.errors import UsageError
from ldm.images import to_float, to_pil
from ldm.logbook import progress_bar
from ldm.seeds import normal
from pipelines.sampling.model import LatentModel
from pipelines.sampling.settings import (
    Churn,
    Options,
    count,
    fill_hidden,
    latent_mask,
    slerp,
    whole,
)

Images = Tensor | list[Image.Image]


class LatentDiffusionPipeline(LatentModel):
    """Samples images from a stage-two checkpoint, which carries its stage one.

    >>> pipe = LatentDiffusionPipeline.from_pretrained("runs/x").to("cuda")
    >>> images = pipe(n=4, seed=0, steps=18)             # (4, 3, H, W) in [−1, 1], on the CPU

    Images that go in are (B, 3, H, W) in [−1, 1] or a list of pictures, of the model's size. Image
    i of what comes out depends on (seed, i), on what went in at i, and on the options alone: how
    many there are, and the batch size, change it by rounding at most. In fp32 that is below 1/255;
    what it comes to in bf16 on a GPU has not been measured.
    """

    def __call__(self, n: int = 1, seed: int = 0, **options: Any) -> Images:
        """Sample images 0 … n−1 of a seed. All methods take these options:

        Args:
            steps: 18 by default.
            sampler: "heun", "euler" or "dpmpp-2m".
            schedule: of noise levels, "karras", "cosine" or "linear".
            sigma_min, sigma_max: its ends; by default the model's own.
            churn: fresh noise during sampling, a number (S_churn) or a `Churn`.
            labels: a class by number or name, one for each image, −1 for none; None: drawn evenly
                for each image, where the model has classes.
            guidance: its scale, 1 changes nothing. Of a model with classes it is classifier-free
                (Ho & Salimans 2022), unless there is a `weaker` one.
            weaker: a pipeline, or the path of a model, of the same autoencoder, to be guided away
                from (autoguidance, Karras et al. 2024). A pipeline is moved to this one's device.
            interval: noise levels (low, high) at which guidance acts.
            batch_size: images at a time, 64 by default.
            callback: called with the number of images done, after every batch.
            progress: show a bar.
            output: "tensor", or "pil" for a list of pictures.

        Raises:
            UsageError: an option is unknown, has no meaning, would change nothing, or does not fit
                the model.
            LdmError: what comes out is not finite.
        """
        asked, sample = self._read(options, n, seed)
        return _in_batches(n, asked, sample)

    def interpolate(self, seed_a: int, seed_b: int, count: int = 8, **options: Any) -> Images:
        """`count` images from image 0 of one seed to image 0 of another, by turning the noise.

        A model with classes needs `labels`. Churn would part the images, and is refused.
        """
        if count < 2:
            raise UsageError(f"count={count}: an interpolation has two ends, it must be at least 2")
        asked, sample = self._read(options, count, seed_a)
        if asked.sampling.churn.S_churn > 0:
            raise UsageError("interpolation and churn do not go together: leave churn out")
        if self.classes.count and asked.labels is None:
            raise UsageError("the class must not be drawn anew from image to image: give labels")
        a, b = (normal(seed, "sample", [0], self.latent_shape) for seed in (seed_a, seed_b))
        noise = slerp(a, b, torch.linspace(0, 1, count))
        return _in_batches(count, asked, lambda i: sample(i, noise=noise[_part(i)]))

    def edit(self, images: Images, strength: float = 0.6, seed: int = 0, **options: Any) -> Images:
        """Noise images part of the way, and sample from there: SDEdit.

        Meng et al. 2021 (arXiv 2108.01073).

        Args:
            strength: the share of the schedule's steps that is run, rounded. 0 gives the
                autoencoder's reconstruction; 1 keeps nothing and is a new sample.
        """
        images = self._read_images(images)
        if not 0 <= strength <= 1:
            raise UsageError(f"strength={strength}: it must lie between 0 and 1")
        asked, sample = self._read(options, len(images), seed)
        skip = asked.sampling.steps - round(strength * asked.sampling.steps)

        def change(i: range) -> Tensor:
            return sample(i, skip=skip, from_z=self.encode(images[_part(i)]) if skip else None)

        return _in_batches(len(images), asked, change)

    def inpaint(self, images: Images, mask: Tensor, seed: int = 0, **options: Any) -> Images:
        """Paint the masked part of images anew; every other pixel stays exactly as it was.

        What lies under the mask is not looked at. By default there is as much churn as can be
        (with dpmpp-2m none): without, the new part follows the known one too little.

        Args:
            mask: (B or 1, 1, H, W), 1 or true where to paint, 0 or false elsewhere.
        """
        images = self._read_images(images)
        mask = _read_mask(mask, images)
        if "churn" not in options and options.get("sampler") != "dpmpp-2m":
            options = options | {"churn": Churn(S_churn=float("inf"))}
        asked, sample = self._read(options, len(images), seed)

        def paint(i: range) -> Tensor:
            given, hidden = images[_part(i)], mask[_part(i)]
            known = self.encode(fill_hidden(given, hidden))
            where = latent_mask(hidden, self.latent_shape[1:]).to(self.device)
            made = sample(i, hold=lambda denoise: inpaint(denoise, known, where))
            return torch.where(hidden > 0, made, given)

        return _in_batches(len(images), asked, paint)

    def _read(
        self, options: dict[str, Any], n: int, seed: int
    ) -> tuple[Options, Callable[..., Tensor]]:
        """What the options ask for, and `LatentModel.sample` as they want it of some images."""
        n, seed = count("n=", n), whole("seed=", seed)
        asked = Options.read(options)
        labels = self.classes.choose(asked.labels, n, seed)
        weaker = self.check_guidance(asked.sampling, asked.weaker, labels)

        def sample(i: range, **how: Any) -> Tensor:
            theirs = None if labels is None else labels[_part(i)]
            return self.sample(i, seed, asked.sampling, theirs, weaker, **how)

        return asked, sample

    def _read_images(self, images: Images) -> Tensor:
        """(B, 3, H, W) in [−1, 1] on the CPU, of the model's size."""
        if not isinstance(images, Tensor):
            pictures = [np.array(image.convert("RGB")) for image in images]
            if len({picture.shape for picture in pictures}) != 1:
                raise UsageError(f"{len(pictures)} pictures: give one or more, all of one size")
            images = to_float(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))
        factor = self.codec.autoencoder.downsampling
        wanted = (3, *(side * factor for side in self.latent_shape[1:]))
        if images.shape[1:] != wanted or not len(images):
            sides = ", ".join(map(str, wanted))
            raise UsageError(f"the images are {tuple(images.shape)}: they must be (B, {sides})")
        if not images.is_floating_point() or not (images.abs() <= 1).all():
            raise UsageError("the images must be floating point in [−1, 1]")
        return images.detach().float().cpu()


def _read_mask(mask: Tensor, images: Tensor) -> Tensor:
    """(B, 1, H, W) of 0.0 and 1.0, on the CPU."""
    count, _, height, width = images.shape
    if mask.ndim != 4 or mask.shape[1:] != (1, height, width) or len(mask) not in (1, count):
        raise UsageError(f"the mask is {tuple(mask.shape)}: it must be {(count, 1, height, width)}")
    if not ((mask == 0) | (mask == 1)).all():
        raise UsageError("the mask must be 1 where to paint and 0 elsewhere, nothing between")
    return mask.cpu().float().expand(count, -1, -1, -1)


def _in_batches(n: int, asked: Options, make: Callable[[range], Tensor]) -> Images:
    made = []
    bar = progress_bar("images")
    bar.disable = bar.disable or not asked.progress
    with bar:
        task = bar.add_task("sampling", total=n, speed="", note="")
        for start in range(0, n, asked.batch_size):
            indices = range(start, min(n, start + asked.batch_size))
            made.append(make(indices))
            bar.update(task, advance=len(indices))
            if asked.callback:
                asked.callback(indices.stop)
    images = torch.cat(made)
    return list(map(to_pil, images)) if asked.output == "pil" else images


def _part(indices: range) -> slice:
    return slice(indices.start, indices.stop)
