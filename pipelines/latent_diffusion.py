"""The trained model as one object for Python users: seeds in, images out."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from autoencoders import Autoencoder, AutoencoderConfig
from diffusion import EDM, UNet, karras_sigmas, sample_heun
from ldm.checkpoint import ModelFile, build_with, load_model
from ldm.config import validate
from ldm.errors import LdmError, UsageError
from ldm.run import memory_format, resolve_device, resolve_precision
from ldm.seeds import normal
from pipelines.codec import Codec
from pipelines.train_diffusion import DiffusionRecipe


class LatentDiffusionPipeline:
    """Samples images from a stage-two checkpoint, which carries its stage one.

    >>> pipe = LatentDiffusionPipeline.from_pretrained("runs/x")
    >>> images = pipe(n=4, seed=0, steps=18)             # (4, 3, H, W) in [−1, 1]
    """

    def __init__(
        self, denoiser: EDM, codec: Codec, latent_shape: tuple[int, int, int], sha256: str = ""
    ) -> None:
        self.denoiser, self.codec = denoiser.eval().requires_grad_(False), codec
        self.latent_shape, self.sha256 = latent_shape, sha256
        self.device, self.precision = torch.device("cpu"), "fp32"
        self.recipe: DiffusionRecipe | None = None

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str = "auto", precision: str = "auto"
    ) -> "LatentDiffusionPipeline":
        """Load a `ckpt.pt`, its `.safetensors` twin, or a run folder.

        Raises:
            LdmError: no such file, a stage-one file, damaged weights, or a device not there.
        """
        file = load_model(path, "diffusion")
        try:
            recipe = validate(DiffusionRecipe, file.config)
        except UsageError as error:
            raise LdmError(f"the config in {path} is not of this version: {error}") from error
        autoencoder = _load_autoencoder(file, path)
        network = build_with(lambda: UNet(recipe.network), file.weights, path)
        codec = Codec.from_statistics(autoencoder, file.statistics)
        side = recipe.resolution // autoencoder.downsampling
        shape = (recipe.network.latent_channels, side, side)
        pipe = cls(EDM(network, recipe.edm.sigma_data), codec, shape, file.sha256)
        pipe.recipe = recipe
        return pipe.to(device, precision)

    def to(self, device: str, precision: str = "auto") -> "LatentDiffusionPipeline":
        """Move to a device; precision fp32, bf16 (networks under autocast) or auto."""
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        for module in (self.denoiser, self.codec):
            module.to(self.device, memory_format=memory_format(self.device))
        return self

    def __call__(
        self,
        n: int = 1,
        seed: int = 0,
        steps: int = 18,
        batch_size: int = 64,
        callback: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Sample images 0..n−1 of a seed → (n, 3, H, W) in [−1, 1], on the CPU.

        Image i depends on (seed, i) alone: n and the batch size change it by rounding at most.

        Args:
            steps: of Heun's sampler; each but the last calls the network twice.
            callback: called with the number of images done, after every batch.
        """
        for name, value in (("n", n), ("batch_size", batch_size)):
            if value < 1:
                raise UsageError(f"{name}={value}: it must be at least 1")
        done = []
        for start in range(0, n, batch_size):
            indices = range(start, min(n, start + batch_size))
            done.append(self.sample(indices, seed, steps))
            if callback:
                callback(indices.stop)
        return torch.cat(done)

    @torch.no_grad()
    def sample(self, indices: Sequence[int], seed: int, steps: int) -> Tensor:
        """One batch: the images with these numbers under a seed, (len, 3, H, W) on the CPU."""
        if steps < 1:
            raise UsageError(f"steps={steps}: the sampler needs at least one")
        noise = normal(seed, "sample", indices, self.latent_shape).to(self.device)
        sigmas = karras_sigmas(steps)
        bf16 = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext():
            return self.codec.decode(sample_heun(self.denoiser, noise, sigmas)).cpu()


def _load_autoencoder(file: ModelFile, path: str | Path) -> Autoencoder:
    inner = file.autoencoder
    named = file.provenance.get("autoencoder_sha256")
    if inner is None or inner.sha256 != named:
        state = "lacks" if inner is None else "carries another"
        raise LdmError(f"{path} {state} autoencoder than the one it was trained on: it is altered")
    config = validate(AutoencoderConfig, inner.config)
    return build_with(lambda: Autoencoder(config), inner.weights, path)
