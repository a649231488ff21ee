"""Stage two: train an EDM latent diffusion model, its latents encoded on the fly from pixels."""

from pathlib import Path
from typing import Any

import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor, nn

from autoencoders import load_autoencoder
from diffusion import EDM, EDMConfig, UNet, UNetConfig, edm_loss, sample_sigma
from ldm.checkpoint import ModelFile, fingerprint, save_model, write_json
from ldm.config import Config, to_tree
from ldm.data import DataConfig, batches, open_source
from ldm.ema import Ema
from ldm.errors import Interrupted, LdmError, UsageError
from ldm.images import to_float
from ldm.logbook import Logbook
from ldm.run import Run, RunConfig, start_run
from ldm.run_folder import is_finished, provenance
from ldm.schedule import learning_rate, set_learning_rate
from ldm.seeds import normal
from pipelines.codec import Codec, measure_latents
from pipelines.validate import draw_samples


class DiffusionRecipe(Config):
    """A latent diffusion model and how it is trained."""

    autoencoder: str = ""
    """Stage one: its ckpt.pt, .safetensors or run folder; `--ae` sets it."""
    resolution: PositiveInt = 256
    """Side of the square training images, in pixels."""
    network: UNetConfig = UNetConfig()
    """The network that denoises; latent_channels is taken from stage one."""
    edm: EDMConfig = EDMConfig()
    """Preconditioning and the draw of noise levels."""
    data: DataConfig = DataConfig()
    """The images."""
    statistics_images: PositiveInt = 10_000
    """Images over which the latents' mean and standard deviation are measured, before training;
    rounded up to whole batches."""
    steps: PositiveInt = 500_000
    """Updates."""
    batch_size: PositiveInt = 48
    """Images per step, over all processes and accumulated micro-batches."""
    accumulate: PositiveInt = 1
    """Micro-batches per step, to fit a batch into less memory."""
    lr: PositiveFloat = 1e-4
    """Adam's learning rate, absolute: never scaled by batch or processes."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's betas."""
    warmup_images: NonNegativeInt = 0
    """Images over which the learning rate rises from 0."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    ema_half_life_images: NonNegativeFloat = 500_000
    """Half-life of the averaged weights in ckpt.pt, in images; 0: the last weights."""
    run: RunConfig = Field(default=RunConfig(validate_every_steps=5000, save_every_steps=5000))
    """How the run is carried out and watched."""

    @model_validator(mode="after")
    def _fits_together(self) -> "DiffusionRecipe":
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size must be a multiple of accumulate")
        return self


def train_diffusion(
    recipe: DiffusionRecipe, preset: str = "diffusion", folder: Path | None = None
) -> Path:
    """Train, or go on training, and return the run's folder with `ckpt.pt` in it.

    Raises:
        LdmError: autoencoder, data or device missing, an autoencoder that changed since the run
            began, ten steps in a row not finite, or a disk that is full.
        Interrupted: asked to stop; the state is saved and the same call goes on from it.
    """
    autoencoder = load_autoencoder(recipe.autoencoder)
    ae_sha256 = fingerprint(autoencoder.state_dict())
    source = open_source(recipe.data, "train", recipe.resolution)
    n_z, asked = autoencoder.config.latent_channels, recipe.network.latent_channels
    if asked not in (n_z, UNetConfig().latent_channels):
        raise UsageError(
            f"network.latent_channels={asked}, but {recipe.autoencoder} has {n_z}: leave it out"
        )
    config = recipe.network.model_copy(update={"latent_channels": n_z})
    recipe = recipe.model_copy(update={"network": config})
    side = recipe.resolution // autoencoder.downsampling
    shape = (config.latent_channels, side, side)
    factor = autoencoder.downsampling * 2 ** (len(config.multipliers) - 1)
    if recipe.resolution % factor:
        raise UsageError(
            f"resolution={recipe.resolution} must be a multiple of {factor}: the autoencoder "
            f"divides by {autoencoder.downsampling}, the network's multipliers by the rest"
        )

    with start_run("diffusion", preset, recipe, recipe.run, recipe.accumulate, folder) as run:
        if is_finished(run.folder):
            run.say(f"{run.folder} is finished already")
            return run.folder
        run.check_batch(recipe.batch_size, recipe.accumulate)

        network = run.place(UNet(config))
        denoiser = EDM(network, recipe.edm.sigma_data)
        ema = Ema(denoiser, recipe.ema_half_life_images)
        optimizer = torch.optim.Adam(network.parameters(), recipe.lr, recipe.betas, fused=True)
        parts = {"denoiser": denoiser, "ema": ema, "optimizer": optimizer}

        autoencoder = run.place(autoencoder)
        images_seen, row, saved = 0, {}, run.resume()
        if saved is None:
            codec = measure_codec(autoencoder, recipe, source, run)
        else:
            images_seen = saved["images_seen"]
            if saved["autoencoder_sha256"] != ae_sha256:
                raise LdmError(
                    f"{recipe.autoencoder} is not the autoencoder {run.folder} was started with "
                    "(other weights): give that one, or --out another folder"
                )
            codec = Codec.from_statistics(autoencoder, saved["statistics"]).to(run.device)
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        run.compile(network)  # after the average was copied from it
        model = run.prepare(denoiser)

        def state() -> dict[str, Any]:
            plain = {"autoencoder_sha256": ae_sha256, "statistics": codec.statistics()}
            return plain | {name: part.state_dict() for name, part in parts.items()}

        logbook = Logbook(run.folder if run.is_main else None, images_seen)
        run.say(_opening(recipe, run, network, codec))
        with run.progress() as bar:
            task = bar.add_task(
                "training", total=recipe.steps, completed=images_seen // recipe.batch_size,
                speed="", note="",
            )  # fmt: skip
            for batch in batches(
                source, recipe.data, recipe.resolution, run.seed, start=images_seen,
                stop=recipe.steps * recipe.batch_size,
                batch_size=recipe.batch_size // recipe.accumulate, rank=run.rank, world=run.world,
            ):  # fmt: skip
                lr = learning_rate(recipe.lr, images_seen + recipe.batch_size, recipe.warmup_images)
                set_learning_rate(optimizer, lr)
                run.seed_dropout(int(batch.k[0]))

                images = to_float(run.place(batch.images))
                ks = batch.k.tolist()
                posterior, noise = (
                    normal(run.seed, purpose, ks, shape).to(run.device, non_blocking=True)
                    for purpose in ("posterior", "noise")
                )
                sigma = sample_sigma(normal(run.seed, "sigma", ks, ()), recipe.edm).to(run.device)
                with run.autocast():
                    z = codec.encode(images, posterior)
                loss, norm = train_step(run, model, optimizer, z, sigma, noise, recipe.clip_norm)
                logbook.add(loss=loss, **({} if norm is None else {"gradient_norm": norm}))
                if not run.accelerator.sync_gradients:
                    continue

                images_seen += recipe.batch_size
                step = images_seen // recipe.batch_size
                ema.update(images_seen, recipe.batch_size)
                last, stop = step == recipe.steps, run.stop_asked()
                if step % recipe.run.log_every_steps == 0 or last:
                    row = logbook.row(images_seen, lr=lr, skipped=run.skipped.total())
                    bar.update(
                        task, completed=step, speed=f"{row['images_per_second']:.1f} images/s",
                        note=f"loss {row['loss']:.3f}",
                    )  # fmt: skip
                if step % recipe.run.save_every_steps == 0 or last or stop:
                    # the model first: a run that finds its last state is over has made it
                    _export(run, recipe, ema.model, codec, images_seen)
                    run.save(images_seen, state())
                if stop and not last:
                    raise Interrupted(f"stopped after step {step}, saved in {run.folder}")
                if step % recipe.run.validate_every_steps == 0 or last:
                    draw_samples(run, ema.model, codec, shape, images_seen, logbook)
                    run.say(f"step {step:>6}/{recipe.steps}: loss {loss.item():.4f}, samples drawn")
        logbook.close()
        if run.is_main:
            write_json(run.folder / "result.json", {"images_seen": images_seen, **row})
        run.accelerator.wait_for_everyone()
        return run.folder


def train_step(
    run: Run,
    denoiser: nn.Module,
    optimizer: torch.optim.Optimizer,
    z: Tensor,
    sigma: Tensor,
    noise: Tensor,
    clip_norm: float | None,
) -> tuple[Tensor, Tensor | None]:
    """One update on standardised latents z (b, n_z, h, w) at noise levels sigma (b,).

    Returns:
        The mean loss, and the gradient's norm where an update was made.
    """
    with run.accumulate(denoiser):
        with run.autocast():
            loss = edm_loss(denoiser, z, sigma, noise).mean()
        norm = run.step(loss, denoiser, optimizer, "diffusion model", clip_norm)
    return loss, norm


def measure_codec(autoencoder: Any, recipe: DiffusionRecipe, source: Any, run: Run) -> Codec:
    """The codec with statistics measured over the first images of the run's own stream."""
    per_process = recipe.batch_size // recipe.accumulate
    count = -(-recipe.statistics_images // per_process) * per_process
    run.say(f"measuring the latents' mean and standard deviation over {count:,} images")
    stream = batches(
        source, recipe.data, recipe.resolution, run.seed, 0, count, per_process,
        rank=run.rank, world=run.world,
    )  # fmt: skip
    images = (to_float(run.place(batch.images)) for batch in stream)
    with run.autocast():
        mean, std = measure_latents(
            autoencoder, images, lambda sums: run.accelerator.reduce(sums, "sum")
        )
    return Codec(autoencoder, mean, std, recipe.edm.sigma_data).to(run.device)


def _export(
    run: Run, recipe: DiffusionRecipe, denoiser: nn.Module, codec: Codec, images_seen: int
) -> None:
    """Write `ckpt.pt`: the averaged network with the statistics and the autoencoder it needs."""
    if run.is_main:
        ae = codec.autoencoder
        inner = ModelFile("autoencoder", to_tree(ae.config), ae.state_dict())
        origin = provenance() | {"images_seen": images_seen, "autoencoder_sha256": inner.sha256}
        weights = denoiser.network.state_dict()
        model = ModelFile("diffusion", to_tree(recipe), weights, codec.statistics(), origin, inner)
        save_model(run.folder / "ckpt.pt", model)
    run.accelerator.wait_for_everyone()


def _opening(recipe: DiffusionRecipe, run: Run, network: nn.Module, codec: Codec) -> str:
    each = recipe.batch_size // (recipe.accumulate * run.world)
    parameters = sum(p.numel() for p in network.parameters())
    statistics = codec.statistics()
    mean, std = ([round(v, 3) for v in statistics[key]] for key in ("mean", "std"))
    return (
        f"{run.folder}: denoiser {parameters:,} parameters; latents of {recipe.autoencoder}: "
        f"mean {mean}, std {std}\n{recipe.steps:,} steps; batch {recipe.batch_size} = {run.world} "
        f"process(es) × {recipe.accumulate} × {each}; lr {recipe.lr:g}; {run.device.type}, "
        f"{run.precision}"
    )
