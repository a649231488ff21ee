"""What a stage-two run is: the model, the noise, the images, and how long it learns from them."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from autoencoders import Autoencoder
from diffusion.augment import AUGMENT_PARAMETERS, AugmentConfig
from diffusion.build import DenoiserConfig, NetworkConfig
from diffusion.edm import EDMConfig
from diffusion.unet import UNetConfig
from ldm.config import Config
from ldm.data import DataConfig, Source
from ldm.data.dataset import PHOTOS
from ldm.ema import gamma_of_std
from ldm.errors import UsageError
from ldm.run import RunConfig

Share = Annotated[float, Field(ge=0, le=1)]


class DiffusionRecipe(Config):
    """A latent diffusion model and how it is trained."""

    autoencoder: str = ""
    """Stage one: its ckpt.pt, .safetensors or run folder; `--ae` sets it."""
    resolution: PositiveInt = 256
    """Side of the square training images, in pixels."""
    network: NetworkConfig = UNetConfig()
    """The network that denoises."""
    denoiser: DenoiserConfig = EDMConfig()
    """Preconditioning and the draw of noise levels; discrete is for imported models alone."""
    data: DataConfig = DataConfig()
    """The images; with data.labels=true the model is conditioned on their classes."""
    augment: AugmentConfig = AugmentConfig()
    """EDM's augmentation of the pixels, which the network is told of."""
    label_dropout: Share = 0.1
    """Share of the images whose label is hidden, so that guidance has an unconditional model."""
    posterior: Literal["sample", "mean"] = "sample"
    """Train on a draw from each image's posterior, or on its mean."""
    cache: str = ""
    """Folder of latents encoded once, before training; left out: encoded on the fly. `--cache`."""
    statistics_images: PositiveInt | None = 10_000
    """Images over which the latents' mean and standard deviation are measured, before training;
    rounded up to whole batches. null: as many as there are."""
    steps: PositiveInt = 500_000
    """Updates."""
    batch_size: PositiveInt = 48
    """Images per step, over all processes and accumulated micro-batches."""
    accumulate: PositiveInt = 1
    """Micro-batches per step, to fit a batch into less memory."""
    lr: PositiveFloat = 1e-4
    """Adam's learning rate, absolute: never scaled by batch or processes."""
    lr_schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    """What the learning rate does after its warm-up; cosine reaches 0 at the last step."""
    lr_decay_images: PositiveInt | None = None
    """inverse_sqrt: images after which the learning rate begins to fall."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's betas."""
    warmup_images: NonNegativeInt = 0
    """Images over which the learning rate rises from 0."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    ema_half_life_images: NonNegativeFloat = 500_000
    """Half-life of the averaged weights in ckpt.pt, in images; 0: the last weights."""
    ema_stds: tuple[PositiveFloat, ...] = ()
    """Relative widths of power-function averages to keep snapshots of, such as [0.05, 0.1], from
    which `ldm ema` makes an average of any width."""
    snapshots: PositiveInt = 32
    """How many snapshots of each of `ema_stds` are kept over the whole run."""
    run: RunConfig = Field(default=RunConfig(validate_every_steps=5000, save_every_steps=5000))
    """How the run is carried out and watched."""

    @model_validator(mode="after")
    def _fits_together(self) -> "DiffusionRecipe":
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size must be a multiple of accumulate")
        if (self.lr_schedule == "inverse_sqrt") != (self.lr_decay_images is not None):
            raise ValueError("lr_decay_images goes with lr_schedule=inverse_sqrt, and it with that")
        if len(self.ema_stds) == 1 or len(set(self.ema_stds)) < len(self.ema_stds):
            raise ValueError("ema_stds: two different widths at least, such as [0.05, 0.1]")
        for std in self.ema_stds:
            try:
                gamma_of_std(std)
            except UsageError as error:
                raise ValueError(f"ema_stds: {error}") from error
        if self.augment.probability > 0:
            if self.cache:
                raise ValueError("augment is for latents encoded on the fly: leave out cache")
            if self.data.flip:
                raise ValueError(
                    "augment mirrors without leaking, data.flip would leak: data.flip=false"
                )
        if self.cache and (self.data.crop == "random" or self.data.source == PHOTOS):
            raise ValueError("images cut at random cannot be cached: leave out cache")
        return self


def fit(recipe: DiffusionRecipe, autoencoder: Autoencoder, source: Source) -> DiffusionRecipe:
    """The recipe with the network's sizes taken from stage one, the data and the augmentation.

    Raises:
        UsageError: the network is asked for other sizes, or cannot take latents of this resolution.
    """
    if recipe.denoiser.type != "edm":
        raise UsageError(f"denoiser.type={recipe.denoiser.type} is for imported models: train edm")
    n_z, classes = autoencoder.config.latent_channels, 0
    if recipe.data.labels:
        classes = len(source.classes)
    told = AUGMENT_PARAMETERS if recipe.augment.probability > 0 else 0
    sizes = {"latent_channels": n_z, "classes": classes, "augment_parameters": told}
    defaults = type(recipe.network)()
    for key, value in sizes.items():
        asked = getattr(recipe.network, key)
        if asked not in (value, getattr(defaults, key)):
            raise UsageError(f"network.{key}={asked}, but it has to be {value} here: leave it out")
    factor = autoencoder.downsampling * 2 ** (len(recipe.network.multipliers) - 1)
    if recipe.resolution % factor:
        raise UsageError(
            f"resolution={recipe.resolution} must be a multiple of {factor}: the autoencoder "
            f"divides by {autoencoder.downsampling}, the network's multipliers by the rest"
        )
    return recipe.model_copy(update={"network": recipe.network.model_copy(update=sizes)})


def latent_shape(recipe: DiffusionRecipe, autoencoder: Autoencoder) -> tuple[int, int, int]:
    """(n_z, h, w) of one training image's latents."""
    side = recipe.resolution // autoencoder.downsampling
    return (autoencoder.config.latent_channels, side, side)
