"""Stage one: train an autoencoder on images, against a discriminator.

Sadat et al. 2024 (LiteVAE, arXiv 2405.14477), Sections 3 and 4:

L = L_recon + λ_reg L_KL + λ_adv L_adv                                          (Equation 1)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from autoencoders import Autoencoder
from autoencoders.discriminators import build_discriminator, split
from autoencoders.layers import checkpoint_blocks
from autoencoders.losses import LPIPS, Objective, load_esrgan, load_lpips
from autoencoders.losses.adversarial import (
    adaptive_weight,
    cutmix_augmentation,
    cutmix_consistency,
    cutmix_masks,
    gradient_ratio,
    in_range,
)
from autoencoders.losses.objective import TeacherPosterior
from autoencoders.losses.perceptual import ESRGANPerceptual
from ldm.checkpoint import ModelFile, load_model
from ldm.config import Resolution, pixel_count, resolution_of, short_size, to_tree
from ldm.data import Batch, Source, batches, check_data, holds_out, open_source
from ldm.data.loader import image_name
from ldm.device import frozen, to_device
from ldm.distributed import check_batch
from ldm.ema import Ema
from ldm.images import as_float, grid, save_grid
from ldm.learning_rate import learning_rate, set_learning_rate
from ldm.logbook import Logbook, size_numbers
from ldm.run import CountFlops, Run, start_run
from ldm.run_folder import TrainingState, is_finished, provenance
from ldm.seeds import normal, uniform
from pipelines import finetune
from pipelines.recipes import AutoencoderRecipe
from pipelines.validation import (
    compare_with_teacher,
    evaluate_autoencoder,
    reconstruction_sheet,
    validation_lpips,
)

PerceptualLosses = Mapping[str, LPIPS | ESRGANPerceptual]
"""Perceptual losses by the name of their term, `lpips` and `esrgan`."""

BATCH, COLUMNS = 16, 8  # of held-out images, and of the sheet with some of them


class AutoencoderState(TrainingState):
    """Everything that stage one trains, built from its recipe where the run computes.

    Attributes:
        autoencoder, discriminator: the networks.
        ddp_autoencoder, ddp_discriminator: the same after `prepare`, wrapped so that processes
            average their gradients.
        objective: the losses of both.
        ema: the autoencoder with averaged weights, which ckpt.pt is made from.
        averaged: that autoencoder, if the objective compares with it.
        teacher: the encoder of a teacher, if there is one.
        latent_std: standard deviation of each channel of its latents (n_z,).
        origin: of the weights that training starts with; {} if all are new.
        held_out: numbers of the last validation.
        best: numbers of the best validation, and its `images_seen`; its weights are in best.pt.
    """

    def __init__(
        self, recipe: AutoencoderRecipe, run: Run, perceptual: PerceptualLosses,
        given: finetune.Given | None = None,
    ) -> None:  # fmt: skip
        super().__init__(recipe.batch_size, recipe.total_steps)
        self.recipe, self.folder = recipe, run.folder
        self.origin = finetune.origin_of(recipe, given)
        self.autoencoder, still, self.teacher = finetune.begin(recipe, run, given)
        self.latent_std = nn.Parameter(torch.ones(recipe.latent_channels, device=run.device), False)
        discriminator = build_discriminator(recipe.discriminator, recipe.image_channels)
        self.discriminator: nn.Module = run.place(discriminator)
        loss = finetune.loss_weights(recipe, self.autoencoder)
        self.objective = Objective(loss, recipe.adversarial, dict(perceptual))
        self.ema = Ema(self.autoencoder, recipe.ema_half_life_images, still)
        self.averages = [self.ema]
        # without an average, the two would be equal up to rounding
        compared = self.objective.needs_averaged and recipe.ema_half_life_images > 0
        self.averaged = self.ema.ema_model if compared else None
        self.opt_autoencoder, self.opt_discriminator = (
            torch.optim.Adam(finetune.learned(net), recipe.lr, recipe.betas, fused=True)
            for net in (self.autoencoder, self.discriminator)
        )
        self.parts = {
            "autoencoder": self.autoencoder,
            "discriminator": self.discriminator,
            "ema": self.ema,
            "opt_autoencoder": self.opt_autoencoder,
            "opt_discriminator": self.opt_discriminator,
        }
        if self.teacher is not None:
            self.parts["latent_std"] = nn.ParameterList([self.latent_std])
        self.held_out, self.best = dict[str, float](), dict[str, float]()

    def prepare(self, run: Run) -> None:
        """Checkpoint, compile and wrap the networks, as the recipe and the processes need it."""
        # after the average was copied: these change a module, not its weights
        if self.recipe.checkpointing:
            checkpoint_blocks(self.autoencoder)
        ae = self.autoencoder
        # not the decoder's last layer, where gradients are taken; see `gradient_ratio`
        decoder = getattr(ae.decoder, "features", ae.decoder)
        teacher = [] if self.teacher is None else [self.teacher.encoder]
        run.compile(ae.encoder, decoder, self.discriminator, *teacher)
        self.ddp_autoencoder = run.prepare(ae)
        self.ddp_discriminator = run.prepare(self.discriminator)

    def set_learning_rate(self) -> float:
        """Set, and return, the learning rate of the next step."""
        recipe, images_seen = self.recipe, self.images_seen + self.batch_size
        total = self.total_steps * self.batch_size
        lr = learning_rate(recipe.lr, images_seen, recipe.warmup_images, recipe.lr_schedule, total)
        for optimizer in (self.opt_autoencoder, self.opt_discriminator):
            set_learning_rate(optimizer, lr)
        return lr

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"held_out": self.held_out, "best": self.best}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        super().load_state_dict(saved)
        self.held_out, self.best = saved.get("held_out", {}), saved.get("best", {})
        if "best" not in saved and (self.folder / "best.pt").is_file():  # of an earlier version
            origin = load_model(self.folder / "best.pt", "autoencoder").provenance
            self.best = {"images_seen": origin["images_seen"], **origin["held_out"]}


# -------------------------------------------------------------------------------- one step
class Draws(NamedTuple):
    """Random numbers of a batch, each a function of (seed, k) alone."""

    posterior: Tensor
    """Noise of the draw from the posterior (b, n_z, h, w)."""
    boxes: Tensor | None
    """Uniform numbers of CutMix's boxes (b, 4); None without CutMix."""


def draw_numbers(recipe: AutoencoderRecipe, at: Resolution, seed: int, ks: Sequence[int]) -> Draws:
    """Draw the random numbers of images `ks`, at a resolution, on the CPU."""
    noise = normal(seed, "posterior", ks, recipe.latent_shape(at))
    boxes = uniform(seed, "cutmix", ks, (4,)) if recipe.adversarial.mixes else None
    return Draws(noise, boxes)


def train_step(
    run: Run,
    state: AutoencoderState,
    images: Tensor,
    ks: Sequence[int],
    ramp: float,
    log_gradients: bool = False,
    drawn: Draws | None = None,
) -> dict[str, Tensor | float]:
    """One generator update, then one discriminator update, on the same micro-batch.

    Args:
        images: (b, C, H, W) in [−1, 1].
        ks: their numbers in the run; random numbers are functions of (seed, k).
        ramp: factor of the adversarial weight, in [0, 1]; at 0 the discriminator is not trained.
        log_gradients: return the ratio of the gradients' norms (Figure 7) even if it is unused.
        drawn: their random numbers, where a loader's worker has drawn them.

    Returns:
        The named, unweighted terms; the adversarial weight; and the gradients' norms at the last
        micro-batch of a step.
    """
    if drawn is None:
        drawn = draw_numbers(state.recipe, (images.shape[-2], images.shape[-1]), run.seed, ks)
    with run.accelerator.accumulate(state.ddp_autoencoder, state.ddp_discriminator):
        terms, recon = _update_generator(run, state, images, drawn.posterior, ramp, log_gradients)
        if ramp * state.recipe.adversarial.weight > 0:
            terms |= _update_discriminator(run, state, images, in_range(recon), drawn.boxes)
    return terms


def _update_generator(
    run: Run,
    state: AutoencoderState,
    images: Tensor,
    noise: Tensor,
    ramp: float,
    log_gradients: bool,
) -> tuple[dict[str, Tensor | float], Tensor]:
    """Update the autoencoder; return its terms and the reconstructions (b, C, H, W)."""
    objective, adversarial = state.objective, state.objective.adversarial
    weight: Tensor | float = ramp * adversarial.weight
    logs: dict[str, Tensor | float] = {}
    noise, ema_recon, target = to_device(noise, run.device), None, None
    # a student's mean is decoded: its variance is taught by the teacher's alone
    drawn = state.teacher is None
    with run.autocast():
        out = state.ddp_autoencoder(images, noise, drawn)
        with torch.no_grad():
            if state.averaged is not None:
                ema_recon = state.averaged(images, noise, drawn).recon
            if state.teacher is not None:
                target = TeacherPosterior(state.teacher.encode(images), state.latent_std)
    terms = objective.reconstruction(out, images, ema_recon, target)  # l1, lpips, wavelet, kl, …
    if weight > 0:
        # unwrapped and frozen: gradients pass through it to the generator, and it gets none
        with frozen(state.discriminator) as discriminator, run.autocast():
            terms["adversarial"] = objective.generator_loss(discriminator(in_range(out.recon)))
        if log_gradients or adversarial.weighting == "adaptive":
            last = finetune.last_learned(state.autoencoder, state.recipe)
            recon_loss = objective.recon_total(terms)
            ratio = gradient_ratio(recon_loss, terms["adversarial"], last, run.mean)
            logs["gradient_ratio"] = ratio
            if adversarial.weighting == "adaptive":
                weight = ramp * adaptive_weight(adversarial.weight, ratio)
    total = objective.total(terms, weight)
    optimizer, clip_norm = state.opt_autoencoder, state.recipe.clip_norm
    each = out.recon.detach().mean(dim=(1, 2, 3))
    norm = run.step(total, state.autoencoder, optimizer, "autoencoder", clip_norm, each)
    if norm is not None:
        logs["gradient_norm"] = norm
    return {**terms, **logs, "adversarial_weight": weight}, out.recon.detach()


def _update_discriminator(
    run: Run, state: AutoencoderState, images: Tensor, recon: Tensor, boxes: Tensor | None
) -> dict[str, Tensor | float]:
    """Update the discriminator on real images and their reconstructions; return its terms."""
    batches_of_images, adversarial = [images, recon], state.recipe.adversarial
    if boxes is not None:
        mask = cutmix_masks(to_device(boxes, run.device), *images.shape[-2:])  # (b, 1, H, W)
        batches_of_images.append(torch.where(mask, images, recon))
    # one forward pass, so that the power iteration of spectral norm runs once
    with run.autocast():
        logits = state.ddp_discriminator(torch.cat(batches_of_images))
        real, fake, *mixed = split(logits, len(batches_of_images))
    total = state.objective.discriminator_loss(real, fake)
    terms: dict[str, Tensor | float] = {"discriminator": total}
    if adversarial.cutmix:
        terms["cutmix"] = cutmix_consistency(mixed[0], real, fake, mask)
        total = total + adversarial.cutmix * terms["cutmix"]
    if adversarial.cutmix_augmentation:
        terms["cutmix_augmentation"] = cutmix_augmentation(mixed[0], mask)
        total = total + adversarial.cutmix_augmentation * terms["cutmix_augmentation"]
    terms["logit_real"], terms["logit_fake"] = real[0].mean(), fake[0].mean()
    optimizer, clip_norm = state.opt_discriminator, state.recipe.clip_norm
    norm = run.step(total, state.discriminator, optimizer, "discriminator", clip_norm)
    if norm is not None:
        terms["discriminator_gradient_norm"] = norm
    return terms


# -------------------------------------------------------------------------------- the loop
def train_autoencoder(
    recipe: AutoencoderRecipe,
    preset: str = "autoencoder",
    folder: Path | None = None,
    perceptual: PerceptualLosses | None = None,
    count_flops: CountFlops | None = None,
) -> Path:
    """Train, or resume training; return the run's folder, with `ckpt.pt` and `best.pt` in it.

    Args:
        preset: name of the preset, for the name of a new folder.
        folder: the run's folder; None: the newest unfinished run of this recipe, or a new one.
        perceptual: losses to use in place of the published ones.
        count_flops: for the model FLOPs utilisation in the log; None: it has none.

    Raises:
        LdmError: data, weights, device or tracker missing, ten bad steps in a row, or a full disk.
        Interrupted: asked to stop; the state is saved, and the same call resumes.
    """
    # the largest first: its message about missing data then suits every phase
    sizes = sorted({phase.resolution for phase in recipe.phases}, key=pixel_count, reverse=True)
    last, data = recipe.phases[-1].resolution, recipe.data.of(recipe)
    sources = {size: open_source(data, "train", size) for size in sizes}
    held_out = open_source(data, "val", last) if holds_out(data) else None
    perceptual = load_perceptual(recipe, perceptual)
    lpips = validation_lpips(recipe, perceptual)
    recipe, given = finetune.read_given(recipe)
    flops = count_flops(recipe, given.ae.config if given else None) if count_flops else {}

    with start_run("autoencoder", preset, recipe, recipe.run, recipe.accumulate, folder) as run:
        if is_finished(run.folder):
            run.say(f"{run.folder} is already finished")
            return run.folder
        run.flops = flops
        check_batch(recipe.batch_size, recipe.accumulate, run.world)
        others = [*sources.values(), held_out]
        pixels = check_data(run.accelerator, run.folder, sources[last], data, *others)
        recipe = recipe.model_copy(update={"pixels": pixels})
        # the same initial weights on every process: start_run has seeded them
        state = AutoencoderState(recipe, run, perceptual, given)
        if saved := run.resume():
            state.load_state_dict(saved)
        elif state.teacher is not None:
            std = finetune.measure_teacher(run, recipe, state.teacher, sources[last])
            state.latent_std.copy_(std)
        del saved, given  # some gigabytes, and the file
        state.prepare(run)
        with run.logbook(state, recipe) as logbook:
            run.say(_opening(run, state))
            validate = partial(_validate, run, state, held_out, lpips, logbook)
            if state.owes_validation(recipe.run.validate_every_steps):
                validate()
            _train(run, state, run.waits(_stream(run, state, sources)), logbook, validate)
            logbook.close()
            best = {**state.held_out, "best": state.best}
            return run.finish({"images_seen": state.images_seen} | best)


def _train(
    run: Run,
    state: AutoencoderState,
    stream: Iterator[Batch],
    logbook: Logbook,
    validate: Callable[[], None],
) -> None:
    """Train from the state to the end of the recipe."""
    every = state.recipe.run

    def save() -> None:
        run.save(state.state_dict() | {"log": logbook.state_dict()}, _model(state))

    with run.progress(state) as show:
        for batch in run.until_stopped(state, stream, save):
            lr = state.set_learning_rate()
            ramp = state.objective.ramp(state.step / state.total_steps)
            active = ramp * state.recipe.adversarial.weight > 0
            run.begin(int(batch.k[0]), (resolution_of(*batch.images.shape[-2:]), active))
            images = as_float(run.place(batch.images))
            log_gradients = (state.step + 1) % every.log_every_steps == 0
            ks = batch.k.tolist()
            logbook.add(**train_step(run, state, images, ks, ramp, log_gradients, batch.drawn))
            if not run.accelerator.sync_gradients:
                continue
            state.advance()
            stop = run.stop_after_step() and not state.is_last
            if state.due(every.log_every_steps):
                extra = size_numbers(batch.images) | {"skipped": run.skipped.total()}
                row = logbook.row(state.images_seen, lr=lr, **extra)
                show(row, f"l1 {row.get('l1', float('nan')):.3f}")
            if state.due(every.validate_every_steps) and not stop:
                validate()
            if state.due(every.save_every_steps) or stop:
                save()
            if stop:
                raise run.interrupted(f"stopped after step {state.step}, saved in {run.folder}")


def _stream(run: Run, state: AutoencoderState, sources: Mapping[Any, Source]) -> Iterator[Batch]:
    """Yield micro-batches from the state's images seen to the run's last image."""
    recipe, images_seen, stop = state.recipe, state.images_seen, 0
    for phase in recipe.phases:
        stop += phase.steps * recipe.batch_size
        if images_seen >= stop:
            continue
        size, source = phase.resolution, sources[phase.resolution]
        run.name_image = partial(image_name, source, run.seed)
        yield from batches(
            source, recipe.data, size, run.seed, start=images_seen, stop=stop,
            batch_size=recipe.batch_size // recipe.accumulate, rank=run.rank, world=run.world,
            draw=partial(draw_numbers, recipe, size, run.seed),
        )  # fmt: skip
        images_seen = stop


def load_perceptual(
    recipe: AutoencoderRecipe, given: PerceptualLosses | None = None
) -> PerceptualLosses:
    """The perceptual losses with a weight above 0: those given, else the published ones."""
    losses = dict(given or {})
    if recipe.loss.lpips and "lpips" not in losses:
        losses["lpips"] = load_lpips(network=recipe.loss.lpips_network)
    if recipe.loss.esrgan and "esrgan" not in losses:
        losses["esrgan"] = load_esrgan()
    return losses


def _validate(
    run: Run,
    state: AutoencoderState,
    held_out: Source | None,
    lpips: LPIPS | None,
    logbook: Logbook,
) -> None:
    """Measure the averaged weights on held-out images; keep them as best.pt if they are best."""
    state.validated_at = state.images_seen
    if held_out is None or not run.is_main:
        return
    recipe, ae = state.recipe, cast(Autoencoder, state.ema.ema_model)
    by, resolution = recipe.best_by, recipe.phases[-1].resolution
    numbers = evaluate_autoencoder(
        ae, held_out, resolution, BATCH, run.device, recipe.validate_images, lpips and lpips.each
    )
    if state.teacher is not None:
        numbers |= compare_with_teacher(
            ae, state.teacher, held_out, resolution, BATCH, run.device, recipe.validate_images
        )
    logbook.row(state.images_seen, **{f"val_{name}": value for name, value in numbers.items()})
    sheet, columns = reconstruction_sheet(ae, held_out, resolution, COLUMNS)
    save_grid(sheet, run.folder / "pictures" / f"recon-{state.images_seen:08d}.png", columns)
    logbook.picture("reconstructions", grid(sheet, columns), state.images_seen)

    state.held_out, sign, best = numbers, -1 if by == "lpips" else 1, state.best.get(by)
    is_best = by in numbers and (best is None or sign * numbers[by] > sign * best)
    if is_best:
        run.write_model("best.pt", _model(state, held_out=numbers))
        state.best = {"images_seen": state.images_seen, **numbers}
    whole = [name for name in numbers if name != "count" and not name[-1].isdigit()]  # no channel's
    shown = ", ".join(f"{name} {numbers[name]:.3f}" for name in whole)
    shown += " (the best so far)" * is_best
    run.say(f"step {state.step:>6}/{state.total_steps}: held-out {shown}")


def _model(state: AutoencoderState, **more: Any) -> ModelFile:
    """The averaged weights, the config that builds them, and their provenance."""
    made = {"images_seen": state.images_seen, "recipe": to_tree(state.recipe)} | more
    origin = provenance() | made | (state.origin and {"imported": state.origin})
    if state.teacher is not None:
        origin["teacher_latent_std"] = state.latent_std.tolist()
    config, weights = to_tree(state.recipe.model), state.ema.ema_model.state_dict()
    return ModelFile("autoencoder", config, weights, {}, origin)


def _opening(run: Run, state: AutoencoderState) -> str:
    recipe, ae = state.recipe, state.autoencoder
    phases = [f"{p.steps:,} steps at {short_size(p.resolution)}" for p in recipe.phases]
    each = recipe.batch_size // (recipe.accumulate * run.world)
    networks = (ae.encoder, ae.decoder, state.discriminator)
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks]
    return (
        f"{run.folder}: encoder {sizes[0]:,}, decoder {sizes[1]:,}, discriminator {sizes[2]:,} "
        f"parameters{finetune.describe_start(recipe)}\n{', then '.join(phases)}; batch "
        f"{recipe.batch_size} = {run.world} process(es) × {recipe.accumulate} × {each}; "
        f"lr {recipe.lr:g}; {run.device.type}, {run.precision}"
    )
