"""Stage one: train an autoencoder on images, against a discriminator (LiteVAE, Sections 3 and 4).

L = L_recon + λ_reg L_KL + λ_adv L_adv                                          (Equation 1)
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from torch import Tensor, nn

from autoencoders import Autoencoder, AutoencoderConfig
from autoencoders.discriminators.unet import UNetDiscriminator, UNetDiscriminatorConfig
from autoencoders.losses import AdversarialConfig, LossConfig, Objective, load_lpips
from ldm.checkpoint import ModelFile, save_model, write_json
from ldm.config import Config, to_tree
from ldm.data import Batch, DataConfig, Source, batches, holds_out, open_source
from ldm.ema import Ema
from ldm.errors import Interrupted
from ldm.images import to_float
from ldm.logbook import Logbook
from ldm.run import Run, RunConfig, frozen, start_run
from ldm.run_folder import is_finished, provenance
from ldm.schedule import learning_rate, set_learning_rate
from ldm.seeds import normal
from pipelines.validate import validate_autoencoder


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
    discriminator: UNetDiscriminatorConfig = UNetDiscriminatorConfig()
    """The network that judges."""
    validate_images: PositiveInt = 256
    """Held-out images measured at every validation."""
    run: RunConfig = RunConfig()
    """How the run is carried out and watched."""

    @model_validator(mode="after")
    def _fits_together(self) -> "AutoencoderRecipe":
        """What would otherwise come to light hours later, when a phase or the critic begins."""
        if not self.phases:
            raise ValueError("phases is empty: give at least one, {resolution: 256, steps: 1000}")
        if self.batch_size % self.accumulate:
            raise ValueError("batch_size must be a multiple of accumulate")
        halvings = 2 ** len(self.discriminator.multipliers) if self.adversarial.weight else 1
        factor = max(self.encoder.downsampling, halvings)  # powers of two, both
        for phase in self.phases:
            if phase.resolution % factor:
                raise ValueError(
                    f"phases: resolution {phase.resolution} must be a multiple of {factor}, for "
                    f"the encoder ({self.encoder.downsampling}) and the discriminator ({halvings})"
                )
        return self

    @property
    def total_steps(self) -> int:
        """Generator updates over all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def model(self) -> AutoencoderConfig:
        """The autoencoder alone, without its training."""
        fields = AutoencoderConfig.model_fields
        return AutoencoderConfig(**{name: getattr(self, name) for name in fields})


def train_autoencoder(
    recipe: AutoencoderRecipe, preset: str = "autoencoder", folder: Path | None = None
) -> Path:
    """Train, or go on training, and return the run's folder with `ckpt.pt` in it.

    Raises:
        LdmError: data, perceptual weights or device missing (before anything is written), ten
            steps in a row not finite, or a disk that is full.
        Interrupted: asked to stop; the state is saved and the same call goes on from it.
    """
    sources = {
        phase.resolution: open_source(recipe.data, "train", phase.resolution)
        for phase in recipe.phases
    }
    final = recipe.phases[-1].resolution
    held_out = open_source(recipe.data, "val", final) if holds_out(recipe.data) else None
    perceptual = load_lpips() if recipe.loss.lpips else None

    with start_run("autoencoder", preset, recipe, recipe.run, recipe.accumulate, folder) as run:
        if is_finished(run.folder):
            run.say(f"{run.folder} is finished already")
            return run.folder
        run.check_batch(recipe.batch_size, recipe.accumulate)

        # the same initial weights on every process: start_run has seeded them
        autoencoder = run.place(Autoencoder(recipe.model))
        critic = run.place(UNetDiscriminator(recipe.discriminator))
        objective = Objective(recipe.loss, recipe.adversarial, perceptual)
        ema = Ema(autoencoder, recipe.ema_half_life_images)
        opt_ae, opt_critic = (
            torch.optim.Adam(
                net.parameters(), recipe.lr, recipe.betas, fused=run.device.type == "cuda"
            )
            for net in (autoencoder, critic)
        )
        parts = {"autoencoder": autoencoder, "critic": critic, "ema": ema}
        parts |= {"opt_autoencoder": opt_ae, "opt_critic": opt_critic}

        def state() -> dict[str, Any]:
            return {name: part.state_dict() for name, part in parts.items()}

        def validate() -> dict[str, float]:
            if held_out is None:
                return {}
            return validate_autoencoder(
                run, ema.model, held_out, final, recipe.validate_images, images_seen, logbook
            )

        images_seen, numbers = 0, {}
        if saved := run.resume():
            images_seen = saved["images_seen"]
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        ae, judge = run.prepare(autoencoder), run.prepare(critic)

        logbook = Logbook(run.folder if run.is_main else None, images_seen)
        run.say(_opening(recipe, run, autoencoder, critic))
        with run.progress() as bar:
            task = bar.add_task(
                "training", total=recipe.total_steps, completed=images_seen // recipe.batch_size,
                speed="", note="",
            )  # fmt: skip
            for resolution, batch in _stream(recipe, sources, run, images_seen):
                step = images_seen // recipe.batch_size
                run.seed_dropout(int(batch.k[0]))
                lr = learning_rate(recipe.lr, images_seen + recipe.batch_size, recipe.warmup_images)
                for optimizer in (opt_ae, opt_critic):
                    set_learning_rate(optimizer, lr)

                images = to_float(run.place(batch.images))
                side = resolution // autoencoder.downsampling
                shape = (recipe.latent_channels, side, side)
                noise = normal(run.seed, "posterior", batch.k.tolist(), shape).to(run.device)
                weight = objective.adversarial_weight(step / recipe.total_steps)
                terms = train_step(
                    run, ae, judge, opt_ae, opt_critic, images, noise, objective, weight,
                    recipe.clip_norm,
                )  # fmt: skip
                logbook.add(**terms)
                if not run.accelerator.sync_gradients:
                    continue

                images_seen += recipe.batch_size
                step += 1
                ema.update(images_seen, recipe.batch_size)
                last, stop = step == recipe.total_steps, run.stop_asked()
                if step % recipe.run.log_every_steps == 0 or last:
                    extra = {"lr": lr, "adversarial_weight": weight, "resolution": resolution}
                    row = logbook.row(images_seen, **extra, skipped=run.skipped.total())
                    bar.update(
                        task, completed=step, speed=f"{row['images_per_second']:.1f} images/s",
                        note=f"l1 {row.get('l1', float('nan')):.3f}",
                    )  # fmt: skip
                if step % recipe.run.save_every_steps == 0 or last or stop:
                    # the model first: a run that finds its last state is over has made it
                    _export(run, recipe, ema.model, images_seen)
                    run.save(images_seen, state())
                if stop and not last:
                    raise Interrupted(f"stopped after step {step}, saved in {run.folder}")
                if step % recipe.run.validate_every_steps == 0 or last:
                    numbers = validate()
                    shown = ", ".join(f"{k} {v:.3f}" for k, v in numbers.items() if k != "count")
                    run.say(f"step {step:>6}/{recipe.total_steps}: held-out {shown}")
        # a run killed between its last state and its result comes back here with nothing to train
        numbers = numbers or validate()
        logbook.close()
        if run.is_main:
            write_json(run.folder / "result.json", {"images_seen": images_seen, **numbers})
        run.accelerator.wait_for_everyone()
        return run.folder


def train_step(
    run: Run,
    ae: nn.Module,
    critic: nn.Module,
    opt_ae: torch.optim.Optimizer,
    opt_critic: torch.optim.Optimizer,
    images: Tensor,
    noise: Tensor,
    objective: Objective,
    adversarial_weight: float,
    clip_norm: float | None,
) -> dict[str, Tensor]:
    """One generator update, then one discriminator update, on the same batch.

    Args:
        ae, critic: the wrapped modules: what goes through them syncs gradients between processes.
        images: (b, 3, H, W) in [−1, 1]; noise: of the posterior (b, n_z, h, w).

    Returns:
        The named, unweighted terms, and the norms of the gradients where an update was made.
    """
    with run.accumulate(ae, critic):
        with run.autocast():
            out = ae(images, noise)
        terms = objective.reconstruction(out, images)  # l1, lpips, gaussian, wavelet, kl
        if adversarial_weight > 0:
            # the unwrapped critic, frozen: it passes gradients on and gets none
            with frozen(run.unwrap(critic)) as judge, run.autocast():
                terms["adversarial"] = objective.fool(judge(out.recon))
        total = objective.total(terms, adversarial_weight)
        norm = run.step(total, ae, opt_ae, "autoencoder", clip_norm)
        if norm is not None:
            terms["gradient_norm"] = norm

        if adversarial_weight > 0:
            # one forward for real and fake: the power iteration in it runs once
            with run.autocast():
                verdicts = critic(torch.cat([images, out.recon.detach()]))
            real, fake = verdicts.chunk(2)
            terms["critic"] = objective.judge(real, fake)
            terms["logit_real"], terms["logit_fake"] = real.pixels.mean(), fake.pixels.mean()
            norm = run.step(terms["critic"], critic, opt_critic, "discriminator", clip_norm)
            if norm is not None:
                terms["critic_gradient_norm"] = norm
    return terms


def _stream(
    recipe: AutoencoderRecipe, sources: dict[int, Source], run: Run, images_seen: int
) -> Iterator[tuple[int, Batch]]:
    """(resolution, micro-batch) from the image after `images_seen` to the last of the last phase.

    Image k of the run is the same whatever part of the run it is read in.
    """
    stop = 0
    for phase in recipe.phases:
        stop += phase.steps * recipe.batch_size
        if images_seen >= stop:
            continue
        for batch in batches(
            sources[phase.resolution], recipe.data, phase.resolution, run.seed,
            start=images_seen, stop=stop, batch_size=recipe.batch_size // recipe.accumulate,
            rank=run.rank, world=run.world,
        ):  # fmt: skip
            yield phase.resolution, batch
        images_seen = stop


def _export(run: Run, recipe: AutoencoderRecipe, averaged: Autoencoder, images_seen: int) -> None:
    """Write `ckpt.pt`: averaged weights, the config that builds them, where they come from."""
    if run.is_main:
        origin = provenance() | {"images_seen": images_seen, "recipe": to_tree(recipe)}
        config = to_tree(recipe.model)
        weights = averaged.state_dict()
        save_model(run.folder / "ckpt.pt", ModelFile("autoencoder", config, weights, {}, origin))
    run.accelerator.wait_for_everyone()


def _opening(recipe: AutoencoderRecipe, run: Run, ae: Autoencoder, critic: nn.Module) -> str:
    phases = ", then ".join(f"{p.steps:,} steps at {p.resolution}²" for p in recipe.phases)
    each = recipe.batch_size // (recipe.accumulate * run.world)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (ae.encoder, ae.decoder, critic)]
    return (
        f"{run.folder}: encoder {sizes[0]:,}, decoder {sizes[1]:,}, discriminator {sizes[2]:,} "
        f"parameters\n{phases}; batch {recipe.batch_size} = {run.world} process(es) × "
        f"{recipe.accumulate} × {each}; lr {recipe.lr:g}; {run.device.type}, {run.precision}"
    )
