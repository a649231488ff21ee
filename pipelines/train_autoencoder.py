"""One step of stage one: the generator's update, then the discriminator's, on the same images.

Stage one: train an autoencoder on images, against a discriminator (LiteVAE, Sections 3 and 4).

L = L_recon + λ_reg L_KL + λ_adv L_adv                                          (Equation 1)
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoencoders import Autoencoder
from autoencoders.discriminators import build_discriminator, split
from autoencoders.layers import checkpoint_blocks
from autoencoders.losses import (
    LPIPS,
    Objective,
    adaptive_weight,
    cutmix_consistency,
    cutmix_masks,
    find_lpips,
    gradient_ratio,
    load_esrgan,
    load_lpips,
)
from autoencoders.losses.perceptual import ESRGANPerceptual
from ldm.checkpoint import ModelFile, load_model, save_model
from ldm.config import to_tree
from ldm.data import Batch, Source, batches, holds_out, open_source
from ldm.ema import Ema
from ldm.errors import Interrupted
from ldm.files import write_json
from ldm.images import to_float
from ldm.learning_rate import learning_rate, set_learning_rate
from ldm.logbook import Logbook, read_rows
from ldm.run import Run, frozen, start_run
from ldm.run_folder import is_finished, provenance, restore
from ldm.seeds import normal, uniform
from pipelines.recipes import AutoencoderRecipe
from pipelines.validation import validate_autoencoder


class Draws(NamedTuple):
    """The random numbers of one micro-batch, each a function of its image."""

    noise: Tensor
    """Of the posterior (b, n_z, h, w), standard normal."""
    cutmix: Tensor | None
    """Of CutMix's boxes (b, 3), in [0, 1); None without CutMix."""


def draw(run: Run, recipe: AutoencoderRecipe, ks: Sequence[int], resolution: int) -> Draws:
    """The random numbers of images `ks` of the run."""
    side = resolution // recipe.encoder.downsampling
    shape = (recipe.latent_channels, side, side)
    noise = normal(run.seed, "posterior", ks, shape).to(run.device, non_blocking=True)
    if not recipe.adversarial.cutmix:
        return Draws(noise, None)
    return Draws(noise, uniform(run.seed, "cutmix", ks, (3,)).to(run.device, non_blocking=True))


def train_step(
    run: Run,
    ae: nn.Module,
    discriminator: nn.Module,
    opt_ae: torch.optim.Optimizer,
    opt_discriminator: torch.optim.Optimizer,
    images: Tensor,
    draws: Draws,
    objective: Objective,
    ramp: float,
    clip_norm: float | None,
    averaged: nn.Module | None = None,
    log_gradients: bool = False,
) -> dict[str, Tensor | float]:
    """One generator update, then one discriminator update, on the same batch.

    Args:
        ae, discriminator: the wrapped modules, whose gradients are averaged over processes.
        images: (b, 3, H, W) in [−1, 1].
        ramp: of the adversarial weight, in [0, 1]; at 0 the discriminator rests.
        averaged: the autoencoder with the averaged (EMA) weights, if a term compares with it.
        log_gradients: return the ratio of the gradients' norms (Figure 7) even if it is unused.

    Returns:
        The named, unweighted terms; the adversarial weight; and the norms of the gradients where
        an update was made.
    """
    adversarial = objective.adversarial
    weight: Tensor | float = ramp * adversarial.weight
    adversarial_active, logs = weight > 0, {}
    with run.accumulate(ae, discriminator):
        with run.autocast():
            out = ae(images, draws.noise)
            with torch.no_grad():
                ema_recon = None if averaged is None else averaged(images, draws.noise).recon
        terms = objective.reconstruction(out, images, ema_recon)  # l1, lpips, wavelet, kl, …
        if adversarial_active:
            # unwrapped and frozen: gradients pass through it to the generator, and it gets none
            with frozen(run.unwrap(discriminator)) as still, run.autocast():
                terms["adversarial"] = objective.generator_loss(still(out.recon))
        if adversarial_active and (log_gradients or adversarial.weighting == "adaptive"):
            last = run.unwrap(ae).decoder.conv_out.weight
            recon_loss = objective.recon_total(terms)
            ratio = gradient_ratio(recon_loss, terms["adversarial"], last, run.mean)
            logs["gradient_ratio"] = ratio
            if adversarial.weighting == "adaptive":
                weight = ramp * adaptive_weight(adversarial.weight, ratio)
        total = objective.total(terms, weight)
        norm = run.step(total, ae, opt_ae, "autoencoder", clip_norm)
        if norm is not None:
            logs["gradient_norm"] = norm

        if adversarial_active:
            pictures = [images, out.recon.detach()]
            if draws.cutmix is not None:
                mask = cutmix_masks(draws.cutmix, *images.shape[-2:])  # (b, 1, H, W)
                pictures.append(torch.where(mask, *pictures))
            # one forward for all of them: the power iteration in it runs once
            with run.autocast():
                real, fake, *mixed = split(discriminator(torch.cat(pictures)), len(pictures))
            terms["discriminator"] = objective.discriminator_loss(real, fake)
            total = terms["discriminator"]
            if mixed:
                terms["cutmix"] = cutmix_consistency(mixed[0], real, fake, mask)
                total = total + adversarial.cutmix * terms["cutmix"]
            terms["logit_real"], terms["logit_fake"] = real[0].mean(), fake[0].mean()
            norm = run.step(total, discriminator, opt_discriminator, "discriminator", clip_norm)
            if norm is not None:
                logs["discriminator_gradient_norm"] = norm
    return terms | logs | {"adversarial_weight": weight}


def train_autoencoder(
    recipe: AutoencoderRecipe,
    preset: str = "autoencoder",
    folder: Path | None = None,
    perceptual: Mapping[str, LPIPS | ESRGANPerceptual] = MappingProxyType({}),
) -> Path:
    """Train, or go on training; return the run's folder, with `ckpt.pt` and `best.pt` in it.

    Args:
        perceptual: losses by the name of their term (lpips, esrgan), used in place of the
            published ones.

    Raises:
        LdmError: data, perceptual weights or device missing (before anything is written), ten
            steps in a row not finite, or a disk that is full.
        Interrupted: asked to stop; the state is saved and the same call goes on from it.
    """
    # the largest first: what it says of missing data then suits every phase
    resolutions = sorted({phase.resolution for phase in recipe.phases}, reverse=True)
    sources = {side: open_source(recipe.data, "train", side) for side in resolutions}
    final = recipe.phases[-1].resolution
    held_out = open_source(recipe.data, "val", final) if holds_out(recipe.data) else None
    perceptual = load_perceptual(recipe, perceptual)
    lpips = _validation_lpips(recipe, perceptual)

    with start_run("autoencoder", preset, recipe, recipe.run, recipe.accumulate, folder) as run:
        if is_finished(run.folder):
            run.say(f"{run.folder} is finished already")
            return run.folder
        run.check_batch(recipe.batch_size, recipe.accumulate)

        # the same initial weights on every process: start_run has seeded them
        autoencoder = run.place(Autoencoder(recipe.model))
        discriminator = run.place(build_discriminator(recipe.discriminator))
        objective = Objective(recipe.loss, recipe.adversarial, perceptual)
        ema = Ema(autoencoder, recipe.ema_half_life_images)
        opt_ae, opt_discriminator = (
            torch.optim.Adam(net.parameters(), recipe.lr, recipe.betas, fused=True)
            for net in (autoencoder, discriminator)
        )
        parts = {"autoencoder": autoencoder, "discriminator": discriminator, "ema": ema}
        parts |= {"opt_autoencoder": opt_ae, "opt_discriminator": opt_discriminator}

        def state() -> dict[str, Any]:
            return {name: part.state_dict() for name, part in parts.items()}

        def validate() -> dict[str, float]:
            if held_out is None:
                return {}
            numbers = validate_autoencoder(
                run, ema.model, held_out, final, recipe.validate_images, images_seen, logbook, lpips
            )
            best.offer(ema.model, numbers, images_seen)
            return numbers

        images_seen, numbers = 0, {}
        if saved := run.resume():
            images_seen = saved["images_seen"]
            restore(parts, saved)
        if recipe.checkpointing:
            checkpoint_blocks(autoencoder)
        # now that the average was copied from it: compiling changes a module, not its weights
        decoder = autoencoder.decoder
        # not its last layer, where gradients are taken; see `gradient_ratio`
        run.compile(autoencoder.encoder, decoder.middle, *decoder.levels, discriminator)
        wrapped_ae, wrapped_discriminator = run.prepare(autoencoder), run.prepare(discriminator)
        best = Best(run, recipe)
        # weights that are their own average would differ from it by rounding alone
        compared = objective.needs_averaged and recipe.ema_half_life_images > 0
        averaged = ema.model if compared else None

        logbook = Logbook(run.folder if run.is_main else None, images_seen)
        run.say(_opening(recipe, run, autoencoder, discriminator))
        if _validation_was_cut_off(run, recipe, images_seen):
            numbers = validate()
        with run.progress() as bar:
            task = bar.add_task(
                "training", total=recipe.total_steps, completed=images_seen // recipe.batch_size,
                speed="", note="",
            )  # fmt: skip
            for resolution, batch in _stream(recipe, sources, run, images_seen):
                step = images_seen // recipe.batch_size
                run.seed_dropout(int(batch.k[0]))
                lr = learning_rate(recipe.lr, images_seen + recipe.batch_size, recipe.warmup_images)
                for optimizer in (opt_ae, opt_discriminator):
                    set_learning_rate(optimizer, lr)

                images = to_float(run.place(batch.images))
                draws = draw(run, recipe, batch.k.tolist(), resolution)
                log_gradients = (step + 1) % recipe.run.log_every_steps == 0
                terms = train_step(
                    run, wrapped_ae, wrapped_discriminator, opt_ae, opt_discriminator, images,
                    draws, objective, objective.ramp(step / recipe.total_steps),
                    recipe.clip_norm, averaged, log_gradients,
                )  # fmt: skip
                logbook.add(**terms)
                if not run.accelerator.sync_gradients:
                    continue

                images_seen += recipe.batch_size
                step += 1
                ema.update(images_seen, recipe.batch_size)
                last, stop = step == recipe.total_steps, run.stop_asked()
                if step % recipe.run.log_every_steps == 0 or last:
                    extra = {"lr": lr, "resolution": resolution, "skipped": run.skipped.total()}
                    row = logbook.row(images_seen, **extra)
                    bar.update(
                        task, completed=step, speed=f"{row['images_per_second']:.1f} images/s",
                        note=f"l1 {row.get('l1', float('nan')):.3f}",
                    )  # fmt: skip
                if step % recipe.run.save_every_steps == 0 or last or stop:
                    # the model first: a run that finds its last state is over has made it
                    _export(run, recipe, ema.model, images_seen, "ckpt.pt")
                    run.save(images_seen, state())
                if stop and not last:
                    raise Interrupted(f"stopped after step {step}, saved in {run.folder}")
                if step % recipe.run.validate_every_steps == 0 or last:
                    numbers = validate()
                    shown = ", ".join(f"{k} {v:.3f}" for k, v in numbers.items() if k != "count")
                    mark = " (the best yet)" if best.found_at(images_seen) else ""
                    if shown:
                        run.say(f"step {step:>6}/{recipe.total_steps}: held-out {shown}{mark}")
        # a run killed between its last state and its result comes back here with nothing to train
        numbers = numbers or validate()
        logbook.close()
        if run.is_main:
            result = {"images_seen": images_seen, **numbers, "best": best.numbers}
            write_json(run.folder / "result.json", result)
        run.accelerator.wait_for_everyone()
        return run.folder


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


def load_perceptual(
    recipe: AutoencoderRecipe,
    given: Mapping[str, LPIPS | ESRGANPerceptual] = MappingProxyType({}),
) -> dict[str, LPIPS | ESRGANPerceptual]:
    """The perceptual losses whose weight is not 0: those given, else the published ones."""
    losses = dict(given)
    if recipe.loss.lpips and "lpips" not in losses:
        losses["lpips"] = load_lpips(network=recipe.loss.lpips_network)
    if recipe.loss.esrgan and "esrgan" not in losses:
        losses["esrgan"] = load_esrgan()
    return losses


def _validation_lpips(
    recipe: AutoencoderRecipe, perceptual: dict[str, LPIPS | ESRGANPerceptual]
) -> LPIPS | None:
    """LPIPS as papers report it (VGG-16): needed if it decides, welcome if its weights are here."""
    if "lpips" in perceptual and recipe.loss.lpips_network == "vgg":
        return perceptual["lpips"]
    if recipe.best_by == "lpips":
        return load_lpips(instead="choose best_by=psnr")
    return find_lpips()


def _validation_was_cut_off(run: Run, recipe: AutoencoderRecipe, images_seen: int) -> bool:
    """Whether the run was stopped between saving a state and validating it."""
    step = images_seen // recipe.batch_size
    if not step or step % recipe.run.validate_every_steps or step == recipe.total_steps:
        return False
    rows = read_rows(run.folder / "metrics.jsonl")
    return not any(row["images_seen"] == images_seen and "val_count" in row for row in rows)


class Best:
    """Keeps `best.pt`: the averaged weights that did best on held-out images so far.

    The file itself says how good it is, so there is nothing more to save or to resume.
    """

    def __init__(self, run: Run, recipe: AutoencoderRecipe) -> None:
        self.run, self.recipe = run, recipe
        self.numbers: dict[str, float] = {}
        path = run.folder / "best.pt"
        if run.is_main and path.is_file():
            origin = load_model(path, "autoencoder").provenance
            self.numbers = {"images_seen": origin["images_seen"], **origin["held_out"]}

    def offer(self, averaged: Autoencoder, numbers: dict[str, float], images_seen: int) -> None:
        """Keep these weights if their held-out numbers are better than the best yet."""
        by = self.recipe.best_by
        if by not in numbers or (self.numbers and not self._better(numbers[by], self.numbers[by])):
            return
        _export(self.run, self.recipe, averaged, images_seen, "best.pt", held_out=numbers)
        self.numbers = {"images_seen": images_seen, **numbers}

    def found_at(self, images_seen: int) -> bool:
        """Whether the best are the weights of this moment."""
        return self.numbers.get("images_seen") == images_seen

    def _better(self, new: float, old: float) -> bool:
        return new < old if self.recipe.best_by == "lpips" else new > old


def _export(
    run: Run,
    recipe: AutoencoderRecipe,
    averaged: Autoencoder,
    images_seen: int,
    name: str,
    **more: Any,
) -> None:
    """Write a model file: averaged weights, the config that builds them, where they come from."""
    if not run.is_main:
        return
    origin = provenance() | {"images_seen": images_seen, "recipe": to_tree(recipe)} | more
    config, weights = to_tree(recipe.model), averaged.state_dict()
    save_model(run.folder / name, ModelFile("autoencoder", config, weights, {}, origin))


def _opening(recipe: AutoencoderRecipe, run: Run, ae: Autoencoder, discriminator: nn.Module) -> str:
    phases = ", then ".join(f"{p.steps:,} steps at {p.resolution}²" for p in recipe.phases)
    each = recipe.batch_size // (recipe.accumulate * run.world)
    networks = (ae.encoder, ae.decoder, discriminator)
    sizes = [sum(p.numel() for p in net.parameters()) for net in networks]
    return (
        f"{run.folder}: encoder {sizes[0]:,}, decoder {sizes[1]:,}, discriminator {sizes[2]:,} "
        f"parameters\n{phases}; batch {recipe.batch_size} = {run.world} process(es) × "
        f"{recipe.accumulate} × {each}; lr {recipe.lr:g}; {run.device.type}, {run.precision}"
    )
