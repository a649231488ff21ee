"""How an autoencoder is trained: every setting of stage one, and whether they fit together.

What a stage-two run is: the model, the noise, the images, and how long it learns from them.

Which autoencoder a stage-two run means, by a path, a name, or nothing.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from autoencoders import Autoencoder, AutoencoderConfig
from autoencoders.discriminators import DiscriminatorConfig, UNetDiscriminatorConfig
from autoencoders.losses import AdversarialConfig, LossConfig
from autoencoders.wavelet import check_size
from diffusion.augment import AUGMENT_PARAMETERS, AugmentConfig
from diffusion.build import DenoiserConfig, NetworkConfig
from diffusion.edm import EDMConfig
from diffusion.unet import UNetConfig
from ldm.config import Config, list_presets
from ldm.data import DataConfig, Source
from ldm.data.dataset import PHOTOS
from ldm.ema import gamma_of_std
from ldm.errors import LdmError, UsageError
from ldm.run import RunConfig
from ldm.run_folder import differences, newest_run, preset_of, read_config, unfinished_runs


class Phase(Config):
    """A stretch of training at one resolution; networks and optimisers are carried over."""

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
    """The network that tells real images from reconstructed ones."""
    validate_images: PositiveInt = 256
    """Held-out images measured at every validation."""
    best_by: Literal["psnr", "ssim", "lpips"] = "psnr"
    """The held-out number that best.pt is chosen by. PSNR likes the blur from before the
    discriminator begins; lpips does not, and needs VGG-16's weights."""
    run: RunConfig = RunConfig()
    """How the run is carried out and watched."""

    @model_validator(mode="after")
    def _fits_together(self) -> "AutoencoderRecipe":
        """Refuse what would fail hours later, when a phase or the discriminator begins."""
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


PRESETS = ("ae", "recipes")  # the folders of stage one's presets


def find_stage_one(recipe: DiffusionRecipe, preset: str, out: Path | None = None) -> Path:
    """The file or folder of a recipe's autoencoder.

    A path is that; the name of a preset is its newest run; nothing is the newest run of all. Where
    the same command began a run that is not finished, that run goes on with the autoencoder it
    has, whatever has been trained since.

    Args:
        preset: name of the stage-two preset.
        out: folder of the run, where it was given.

    Raises:
        LdmError: no run of that name, or none at all.
    """
    given = Path(recipe.autoencoder).expanduser()
    if recipe.autoencoder and given.exists():
        return _file(given)
    wanted = recipe.autoencoder or None  # the name of a preset, or any
    if wanted and not any(wanted in list_presets(kind) for kind in PRESETS):
        return given  # loading it says what is wrong
    for folder in [out] if out else unfinished_runs("diffusion", preset):
        theirs = (read_config(folder) or {}).get("autoencoder")
        if not isinstance(theirs, str):  # the folder was damaged, or is not ours
            continue
        same = recipe.model_copy(update={"autoencoder": theirs})
        if wanted in (None, preset_of(Path(theirs).parent)) and not differences(folder, same):
            return Path(theirs)
    return _file(newest_run("autoencoder", preset=wanted))


def _file(path: Path) -> Path:
    return path / "ckpt.pt" if (path / "ckpt.pt").is_file() else path
