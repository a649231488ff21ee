"""Recipes: every setting of both stages, their consistency, and the autoencoder of a stage two."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor

from autoencoders import Autoencoder, AutoencoderConfig
from autoencoders.autoencoder import assemble, decoder_type
from autoencoders.discriminators import DiscriminatorConfig, UNetDiscriminatorConfig
from autoencoders.losses import AdversarialConfig, LossConfig
from autoencoders.losses.perceptual import SMALLEST
from autoencoders.pretrained import find_pretrained, read_autoencoder
from diffusion import DenoiserConfig, EDMConfig, FlowConfig, NetworkConfig, sample_sigma
from diffusion.augment import AUGMENT_PARAMETERS, AugmentConfig, draw_augmentation
from diffusion.unet import UNetConfig
from ldm.config import (
    Config,
    Resolution,
    Tree,
    height_width,
    list_presets,
    load_preset,
    merge,
    resolve,
    shorter_side,
    size_word,
    to_tree,
    validate,
)
from ldm.data import DataConfig
from ldm.data.dataset import PHOTOS
from ldm.ema import gamma_of_std
from ldm.errors import LdmError, UsageError
from ldm.records import read_each
from ldm.run import RunConfig
from ldm.run_folder import differences, newest_run, preset_of, read_config, unfinished_runs
from ldm.seeds import normal, uniform

Part = Literal["encoder", "decoder"]
BatchSize = Annotated[int, Field(gt=0, le=65_536)]


class WeightsConfig(Config):
    """Weights of an autoencoder that training starts with."""

    source: str = ""
    """A run, a model file, a diffusers folder, a CompVis checkpoint, or a repository of the Hub."""
    sha256: str = ""
    """Of its weights. Training fills it in; weights with another one are refused."""


class InitConfig(WeightsConfig):
    """Weights to begin from, in place of random ones."""

    parts: Annotated[tuple[Part, ...], Field(min_length=1)] = ("encoder", "decoder")
    """Parts that begin from them, each with its 1×1 convolution at the latent."""
    adapt: Literal["none", "sum"] = "none"
    """sum: to one channel, from three: first convolution's weights summed, the last's averaged."""
    logvar: Annotated[float, Field(ge=-30, le=20)] = 0.0
    """Log-variance at which a new encoder without a teacher begins, about: −5 is little noise."""
    mean_gain: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Factor on the means of such an encoder; 6 gives LiteVAE's a standard deviation of about 1."""


class TeacherConfig(WeightsConfig):
    """An autoencoder whose posterior a new encoder learns, for its decoder, which stays."""

    statistics_images: PositiveInt = 1000
    """Images for its latents' standard deviation, the unit of `loss.latent`; in whole batches."""


class GivenWeights(Config):
    """The autoencoder that training starts with, if any."""

    init: InitConfig = InitConfig()
    """Weights to begin from; `--from` sets its source."""
    teacher: TeacherConfig = TeacherConfig()
    """Autoencoder to learn from; `--teacher` sets its source."""


class Phase(Config):
    """A part of training at one resolution; networks and optimisers are carried over."""

    resolution: Resolution
    """Size of the training images in pixels: R for R×R, or [H, W], height first."""
    steps: PositiveInt
    """Steps, each a generator update and a discriminator update."""


class AutoencoderRecipe(GivenWeights, AutoencoderConfig):
    """An autoencoder and its training. The defaults are those of Sadat et al. 2024, Section F."""

    train: Literal["all", "encoder", "decoder"] = "all"
    """Parts that learn. decoder: the decoder and the convolution before it, so that latents stay
    the same. encoder: the encoder and, without a teacher, the convolution after it."""
    phases: tuple[Phase, ...] = (Phase(resolution=256, steps=100_000),)
    """Phases of training in order: [{resolution: 128, steps: 100000}, …]."""
    data: DataConfig = DataConfig()
    """Training and held-out images."""
    batch_size: BatchSize = 16
    """Images per step, over all processes and accumulated micro-batches."""
    accumulate: PositiveInt = 1
    """Micro-batches per step, to fit a batch into less memory."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    lr: PositiveFloat = 1e-4
    """Adam's learning rate; absolute, never scaled by batch size or processes."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine reaches 0 at the last step."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Adam's betas of both optimisers."""
    warmup_images: NonNegativeInt = 0
    """Images over which the learning rate rises from 0."""
    clip_norm: PositiveFloat | None = None
    """Largest gradient norm of either network; null: no clipping."""
    ema_half_life_images: NonNegativeFloat = 0.0
    """Half-life of the averaged weights in ckpt.pt, images; 0: the last weights."""
    loss: LossConfig = LossConfig()
    """Weights of the loss terms; a term of weight 0 is not computed."""
    adversarial: AdversarialConfig = AdversarialConfig()
    """The adversarial loss."""
    discriminator: DiscriminatorConfig = UNetDiscriminatorConfig()
    """The network that tells real images from reconstructed ones."""
    validate_images: PositiveInt = 256
    """Held-out images per validation."""
    best_by: Literal["psnr", "ssim", "lpips"] = "psnr"
    """Held-out metric that chooses best.pt. psnr favours blurred weights from before the
    discriminator starts; lpips does not, and needs VGG-16 weights."""
    run: RunConfig = RunConfig()
    """Seed, device, precision, and the steps between logs, validations and saves."""

    @model_validator(mode="after")
    def _fits_together(self) -> "AutoencoderRecipe":
        """Refuse what would fail hours later, when a phase or the discriminator begins."""
        if not self.phases:
            raise ValueError("phases is empty: give at least one, {resolution: 256, steps: 1000}")
        self._check_what_learns()
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size must be a multiple of accumulate")
        terms = ["l1", "l2", "lpips", "esrgan"]
        terms += ["latent"] if self.teacher.source and not self.adversarial.weight else []
        if not any(getattr(self.loss, term) for term in terms):
            raise ValueError(f"loss: one of {', '.join(terms)} must be above 0")
        if self.adversarial.mixes and self.discriminator.type != "unet":
            raise ValueError("adversarial: CutMix needs per-pixel logits, discriminator.type=unet")
        for phase in self.phases:
            self.check_resolution(phase.resolution)
        self.run.check_profile(self.total_steps)
        return self

    def _check_what_learns(self) -> None:
        """Refuse to train what cannot learn, and a teacher beside other weights."""
        if self.teacher.source and self.init.source:
            raise ValueError(
                "init.source (--from) and teacher.source (--teacher) exclude each other: with a "
                "teacher, the encoder is new and the decoder is the teacher's"
            )
        if self.teacher.source and self.train != "encoder":
            raise ValueError(
                f"train={self.train}: with a teacher only the encoder learns, train=encoder; "
                "afterwards, both learn with --from that run and train=all"
            )
        for key, neutral in {"logvar": 0, "mean_gain": 1}.items():
            if getattr(self.init, key) != neutral and self.encoder.type not in ("litevae", "sdvae"):
                raise ValueError(f"init.{key} needs a learned posterior: set it to {neutral}")
        stays = {"decoder": "encoder", "encoder": "decoder"}.get(self.train)
        if self.init.source and stays and stays not in self.init.parts:
            raise ValueError(
                f"train={self.train} keeps the {stays}, which must begin from weights: add it to "
                "init.parts, or set train=all"
            )
        if self.codes is not None and self.train != "encoder":
            raise ValueError(
                "codes: a quantizer is not trained: use a VQ model as --ae, as --teacher, or with "
                "train=encoder"
            )
        kinds = {"encoder": self.encoder.type, "decoder": decoder_type(self.decoder)}
        for part, kind in kinds.items():
            if kind == "diffusers" and self.train in ("all", part):
                other = "decoder" if part == "encoder" else "encoder"
                raise ValueError(
                    f"{part}s of type diffusers are not trained: use such a model as --ae, as "
                    f"--teacher, or with train={other} beside {other}s of ours"
                )
        if self.best_by == "lpips" and shorter_side(self.phases[-1].resolution) < SMALLEST["vgg"]:
            raise ValueError(f"best_by=lpips needs images of {SMALLEST['vgg']}²: use psnr or ssim")
        if self.encoder.type == "dwt" and self.train == "encoder":
            raise ValueError("train=encoder: a dwt encoder has no weights: use train=decoder")

    def check_resolution(self, resolution: Resolution) -> None:
        """Raise a ValueError if the networks cannot train on images of this size, in pixels."""
        f, size, sides = self.encoder.downsampling, size_word(resolution), height_width(resolution)
        if any(side % f for side in sides):
            raise ValueError(
                f"phases: resolution {size} must be a multiple of {f}, the encoder's downsampling"
            )
        try:
            self.check_size(resolution)
        except LdmError as error:
            raise ValueError(f"phases: {error}") from error
        if self.adversarial.weight:
            self.discriminator.check_resolution(resolution)
        for term, network in (("lpips", self.loss.lpips_network), ("esrgan", "vgg")):
            if getattr(self.loss, term) and min(sides) < SMALLEST[network]:
                raise ValueError(
                    f"phases: resolution {size} is below {SMALLEST[network]}, the least that "
                    f"loss.{term}'s network takes: set loss.{term}=0, or a larger resolution"
                )

    @property
    def total_steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def model(self) -> AutoencoderConfig:
        """The autoencoder alone, without its training."""
        return AutoencoderConfig(**{k: getattr(self, k) for k in AutoencoderConfig.model_fields})


class DiffusionRecipe(Config):
    """A latent diffusion model and its training."""

    autoencoder: str = ""
    """Stage one: its ckpt.pt, .safetensors or run folder; `--ae` sets it."""
    resolution: Resolution = 256
    """Size of the training images in pixels: R for R×R, or [H, W], height first."""
    network: NetworkConfig = UNetConfig()
    """The denoising network."""
    denoiser: DenoiserConfig = EDMConfig()
    """Preconditioning and training noise levels; type discrete is for imported models only."""
    data: DataConfig = DataConfig()
    """Training images; data.labels=true conditions the model on their classes."""
    augment: AugmentConfig = AugmentConfig()
    """EDM's augmentation of the pixels; the network is conditioned on its parameters."""
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Fraction of images trained without their label, for classifier-free guidance."""
    posterior: Literal["sample", "mean"] = "sample"
    """Train on samples of the posterior, or on its mean."""
    cache: str = ""
    """Folder of latents encoded before training; empty: encode on the fly. `--cache` sets it."""
    statistics_images: PositiveInt | None = 10_000
    """Images for the latents' mean and standard deviation, in whole batches; null: all."""
    steps: PositiveInt = 500_000
    """Optimiser steps."""
    batch_size: BatchSize = 48
    """Images per step, over all processes and accumulated micro-batches."""
    accumulate: PositiveInt = 1
    """Micro-batches per step, to fit a batch into less memory."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    lr: PositiveFloat = 1e-4
    """Adam's learning rate, absolute: never scaled by batch or processes."""
    lr_schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    """Learning rate after the warm-up; cosine reaches 0 at the last step."""
    lr_decay_images: PositiveInt | None = None
    """With inverse_sqrt: images after which the learning rate falls."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's betas."""
    warmup_images: NonNegativeInt = 0
    """Images over which the learning rate rises from 0."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest gradient norm; null: no clipping."""
    ema_half_life_images: NonNegativeFloat = 500_000
    """Half-life of the averaged weights in ckpt.pt, images; 0: the last weights."""
    ema_stds: tuple[PositiveFloat, ...] = ()
    """Relative widths (EDM2's σ_rel) of power-function averages to keep snapshots of, such as
    [0.05, 0.1]; `ldm ema` combines them into an average of any width."""
    snapshots: PositiveInt = 32
    """Snapshots of each of `ema_stds` over the whole run."""
    run: RunConfig = Field(default=RunConfig(validate_every_steps=5000, save_every_steps=5000))
    """Seed, device, precision, and the steps between logs, validations and saves."""

    @model_validator(mode="after")
    def _fits_together(self) -> "DiffusionRecipe":
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size must be a multiple of accumulate")
        if (self.lr_schedule == "inverse_sqrt") != (self.lr_decay_images is not None):
            raise ValueError("lr_schedule=inverse_sqrt and lr_decay_images need each other")
        if len(self.ema_stds) == 1 or len(set(self.ema_stds)) < len(self.ema_stds):
            raise ValueError("ema_stds needs two or more different widths, such as [0.05, 0.1]")
        for std in self.ema_stds:
            try:
                gamma_of_std(std)
            except UsageError as error:
                raise ValueError(f"ema_stds: {error}") from error
        if self.augment.probability > 0 and self.cache:
            raise ValueError("augment needs latents encoded on the fly: omit cache")
        if self.augment.probability > 0 and self.data.flip:
            raise ValueError("augment mirrors images itself: set data.flip=false")
        if self.cache and (self.data.crop == "random" or self.data.source == PHOTOS):
            raise ValueError("random crops cannot be cached: omit cache")
        self.run.check_profile(self.steps)
        if self.network.type == "edm2" and getattr(self.denoiser, "time_scale", 1) > 10:
            raise ValueError("denoiser.time_scale: edm2's network takes times of about 1: set 1")
        return self

    @property
    def trained(self) -> EDMConfig | FlowConfig:
        """The denoiser; a UsageError for a type that cannot be trained."""
        if self.denoiser.type != "discrete":
            return self.denoiser
        raise UsageError("denoiser.type=discrete is for imported models: use type=edm or flow")


def read_recipe(tree: Tree) -> DiffusionRecipe:
    """Validate the recipe of a run or of a model file."""
    network = tree.get("network")
    if isinstance(network, Mapping) and network.get("type") == "edm2":
        # the width of earlier versions, whatever the multipliers
        tree = merge({"network": {"type": "edm2", "embedding_multiplier": 4}}, tree)
    return validate(DiffusionRecipe, tree)


def as_begun(recipe: DiffusionRecipe, run: Path) -> DiffusionRecipe:
    """Give a recipe the network of its run, whose sizes an earlier version may have chosen."""
    begun = read_recipe(read_config(run) or to_tree(recipe))
    return recipe.model_copy(update={"network": begun.network})


def fit(recipe: DiffusionRecipe, autoencoder: Autoencoder, classes: int) -> DiffusionRecipe:
    """Fill in the network's sizes from stage one, the data and the augmentation.

    Args:
        classes: number of the data's classes; ignored without `data.labels`.
    """
    denoiser, n_z = recipe.trained, autoencoder.config.latent_channels
    sizes: Tree = {"latent_channels": n_z, "classes": classes if recipe.data.labels else 0}
    sizes["augment_parameters"] = AUGMENT_PARAMETERS if recipe.augment.probability > 0 else 0
    if recipe.network.type == "dit":
        sizes["grid"] = recipe.network.grid_of(recipe.resolution, autoencoder.downsampling)
    for key, value in sizes.items():
        requested = getattr(recipe.network, key)
        if requested not in (value, type(recipe.network).model_fields[key].default):
            raise UsageError(f"network.{key}={requested} must be {value} here: omit it")
    factor = autoencoder.downsampling * recipe.network.factor
    if any(side % factor for side in height_width(recipe.resolution)):
        raise UsageError(
            f"resolution={size_word(recipe.resolution)} must be a multiple of {factor}: stage one "
            f"divides by {autoencoder.downsampling}, the network by {recipe.network.factor}"
        )
    network = recipe.network.model_copy(update=sizes)
    return recipe.model_copy(update={"network": network, "denoiser": denoiser})


def latent_shape(recipe: DiffusionRecipe, autoencoder: Autoencoder) -> tuple[int, int, int]:
    """Shape (n_z, h, w) of one training image's latents."""
    return autoencoder.config.latent_shape(recipe.resolution)


def draw_numbers(
    recipe: DiffusionRecipe, shape: Sequence[int], seed: int, ks: Sequence[int]
) -> dict[str, Tensor | None]:
    """Draw the random numbers of images `ks`, each a function of (seed, k) alone.

    Returns:
        `sigma` (b,); `noise` and `posterior` (b, n_z, h, w), standard normal; `hidden` (b,), True
        where no label is shown; `augment` (b, A). The last three are None where not needed.

    Args:
        shape: of an image's latents, (n_z, h, w).
    """
    classes, augmented = recipe.network.classes, recipe.augment.probability > 0
    return {
        "posterior": normal(seed, "posterior", ks, shape) if recipe.posterior == "sample" else None,
        "sigma": sample_sigma(normal(seed, "sigma", ks, ()), recipe.trained),
        "noise": normal(seed, "noise", ks, shape),
        "hidden": uniform(seed, "label", ks, ()) < recipe.label_dropout if classes else None,
        "augment": draw_augmentation(seed, ks, recipe.augment) if augmented else None,
    }


PRESETS = ("ae", "recipes")  # folders of stage one's presets


def load_recipe(kind: str, preset: str, settings: Sequence[str] = ()) -> Any:
    """Load a preset, and merge settings (`key=value`) into it.

    What given weights decide is filled in: a preset without an encoder has the architecture of its
    source; with a teacher, all but the encoder is the teacher's, and only the encoder learns.

    Args:
        kind: "ae" or "recipes" for an `AutoencoderRecipe`, "diffusion" for a `DiffusionRecipe`.

    Raises:
        UsageError: no such preset, an unknown key, or a bad value.
        LdmError: given weights cannot be read.
    """
    tree = load_preset(kind, preset)
    if kind not in PRESETS:
        return resolve(DiffusionRecipe, tree, settings)
    keys = GivenWeights.model_fields
    own = [word for word in settings if re.split(r"[.=]", word)[0].strip() in keys]
    given = resolve(GivenWeights, {key: tree[key] for key in keys if key in tree}, own)
    if given.teacher.source and not given.init.source:  # both: the recipe refuses them
        encoder = {"encoder": tree.get("encoder", {}), "train": "encoder"}
        tree |= _read_config(given.teacher.source) | encoder
    elif given.init.source and "encoder" not in tree:
        tree |= _read_config(given.init.source)
    return resolve(AutoencoderRecipe, tree, settings)


def _read_config(source: str) -> Tree:
    path = find_pretrained(source)
    return to_tree(assemble(read_autoencoder(path), path).config)


def find_stage_one(recipe: DiffusionRecipe, preset: str, out: Path | None = None) -> Path:
    """Find the file or folder of a recipe's autoencoder.

    `autoencoder` is a path, the name of a preset (its newest run), or empty (the newest run of
    all). An unfinished run of the same command keeps the autoencoder it was started with.

    Args:
        preset: name of the stage-two preset.
        out: folder of the run, if given.
    """
    given = Path(recipe.autoencoder).expanduser()
    if recipe.autoencoder and given.exists():
        return _file(given)
    wanted = recipe.autoencoder or None  # a preset, or any
    if wanted and not any(wanted in list_presets(kind) for kind in PRESETS):
        return given  # loading it raises the error

    def begun_with(folder: Path) -> Path | None:
        theirs = (read_config(folder) or {}).get("autoencoder")
        if not isinstance(theirs, str):  # not ours
            return None
        same = recipe.model_copy(update={"autoencoder": theirs})
        if wanted not in (None, preset_of(Path(theirs).parent)) or differences(folder, same):
            return None
        return Path(theirs)

    found = read_each([out] if out else unfinished_runs("diffusion", preset), begun_with).values()
    return next(filter(None, found), None) or _file(newest_run("autoencoder", preset=wanted))


def _file(path: Path) -> Path:
    return path / "ckpt.pt" if (path / "ckpt.pt").is_file() else path
