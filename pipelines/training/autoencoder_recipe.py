"""How an autoencoder is trained: every setting of stage one, and whether they fit together."""

from typing import Literal

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from autoencoders import AutoencoderConfig
from autoencoders.discriminators import DiscriminatorConfig, UNetDiscriminatorConfig
from autoencoders.losses import AdversarialConfig, LossConfig
from autoencoders.wavelet import check_size
from ldm.config import Config
from ldm.data import DataConfig
from ldm.errors import LdmError
from ldm.run import RunConfig


class Phase(Config):
    """A stretch of training at one resolution; weights, optimisers and critic are carried over."""

    resolution: PositiveInt
    """Side of the square training images, in pixels."""
    steps: PositiveInt
    """Steps: each updates the generator, then the discriminator."""


class AutoencoderRecipe(AutoencoderConfig):
    """An autoencoder and how it is trained. The defaults are the paper's (Section F)."""

    phases: tuple[Phase, ...] = (Phase(resolution=256, steps=100_000),)
    """What is trained in turn: [{resolution: 128, steps: 100000}, …]."""
    data: DataConfig = DataConfig()
    """The images."""
    batch_size: PositiveInt = 16
    """Images per step, over all processes and accumulated micro-batches."""
    accumulate: PositiveInt = 1
    """Micro-batches per step, to fit a batch into less memory."""
    checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass: less memory, a third more time."""
    lr: PositiveFloat = 1e-4
    """Adam's learning rate, absolute: never scaled by batch or processes."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Adam's betas, of both optimisers."""
    warmup_images: NonNegativeInt = 0
    """Images over which the learning rate rises from 0."""
    clip_norm: PositiveFloat | None = None
    """Largest norm of a gradient, in either network; null: no clipping."""
    ema_half_life_images: NonNegativeFloat = 0.0
    """Half-life of the averaged weights in ckpt.pt, in images; 0: the last weights."""
    loss: LossConfig = LossConfig()
    """Weights of the reconstruction's terms; 0 turns one off, free of cost."""
    adversarial: AdversarialConfig = AdversarialConfig()
    """The adversarial term."""
    discriminator: DiscriminatorConfig = UNetDiscriminatorConfig()
    """The network that judges."""
    validate_images: PositiveInt = 256
    """Held-out images measured at every validation."""
    best_by: Literal["psnr", "ssim", "lpips"] = "psnr"
    """The held-out number that best.pt is chosen by. PSNR likes the blur from before the
    discriminator begins; lpips does not, and needs VGG-16's weights."""
    run: RunConfig = RunConfig()
    """How the run is carried out and watched."""

    @model_validator(mode="after")
    def _fits_together(self) -> "AutoencoderRecipe":
        """What would otherwise come to light hours later, when a phase or the critic begins."""
        if not self.phases:
            raise ValueError("phases is empty: give at least one, {resolution: 256, steps: 1000}")
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size must be a multiple of accumulate")
        if not any(getattr(self.loss, term) for term in ("l1", "l2", "lpips", "esrgan")):
            raise ValueError("loss: one of l1, l2, lpips, esrgan must be above 0")
        if self.adversarial.cutmix and self.discriminator.type != "unet":
            raise ValueError(
                "adversarial.cutmix mixes what a U-Net says of every pixel: "
                "it needs discriminator.type=unet"
            )
        for phase in self.phases:
            self._takes(phase.resolution)
        return self

    def _takes(self, resolution: int) -> None:
        f = self.encoder.downsampling
        if resolution % f:
            raise ValueError(
                f"phases: resolution {resolution} must be a multiple of {f}, the encoder's "
                "downsampling"
            )
        if self.encoder.type != "sdvae":
            try:
                check_size((resolution, resolution), self.encoder.depth, self.encoder.wavelet)
            except LdmError as error:
                raise ValueError(f"phases: {error}") from error
        if self.adversarial.weight:
            self.discriminator.check_resolution(resolution)

    @property
    def total_steps(self) -> int:
        """Generator updates over all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def model(self) -> AutoencoderConfig:
        """The autoencoder alone, without its training."""
        fields = AutoencoderConfig.model_fields
        return AutoencoderConfig(**{name: getattr(self, name) for name in fields})
