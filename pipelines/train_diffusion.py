"""Stage two: train a latent diffusion model; latents are encoded on the fly from pixels."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from autoencoders import Autoencoder, DiagonalGaussian
from autoencoders.autoencoder import assemble
from autoencoders.pretrained import find_origin, read_autoencoder
from diffusion import SCHEDULES, build_denoiser, build_network, sample_heun
from diffusion.edm import Denoiser, DenoisingLoss, Uncertainty
from diffusion.edm2 import MPModule
from ldm.checkpoint import ModelFile
from ldm.config import to_tree
from ldm.data import Source, batches, check_data, open_source
from ldm.data.loader import image_name
from ldm.device import full_float32, resolve_device, resolve_precision, to_host
from ldm.distributed import check_batch
from ldm.ema import Ema, PowerEma, save_snapshot
from ldm.errors import LdmError, UsageError, listed
from ldm.files import BackgroundWriter
from ldm.images import as_float, grid, save_grid
from ldm.learning_rate import learning_rate, set_learning_rate
from ldm.logbook import Logbook, read_rows
from ldm.run import CountFlops, Run, log, start_run
from ldm.run_folder import TrainingState, is_finished, provenance
from ldm.seeds import normal
from pipelines.latents import (
    Codec,
    LatentBatch,
    check_cache,
    latent_batches,
    measure_latents,
    open_cache,
)
from pipelines.recipes import DiffusionRecipe, as_begun, fit, latent_shape
from pipelines.validation import band_losses, draw_bands

SAMPLES, COLUMNS, SAMPLING_STEPS = 16, 4, 18  # of the pictures drawn in training


class DiffusionState(TrainingState):
    """Everything that stage two trains, built from its recipe where the run computes.

    Args:
        recipe: with the network's sizes, from `fit`.
        autoencoder: of its latents.

    Attributes:
        network: F, the network inside the denoiser.
        objective: a `DenoisingLoss`, of the denoiser and, if configured, its uncertainty; after
            `prepare`, wrapped so that processes average its gradients.
        ema: the denoiser with averaged weights, which ckpt.pt is made from.
        powers: power-function averages by their relative width.
        optimizer: Adam over the objective's parameters.
        row: the last row of metrics.
    """

    def __init__(self, recipe: DiffusionRecipe, run: Run, autoencoder: Autoencoder) -> None:
        super().__init__(recipe.batch_size, recipe.steps)
        self.recipe, self.folder = recipe, run.folder
        self.network = run.place(build_network(recipe.network))
        denoiser = build_denoiser(self.network, recipe.trained)
        uncertainty = run.place(Uncertainty()) if recipe.trained.uncertainty else None
        self.objective: nn.Module = DenoisingLoss(denoiser, uncertainty)
        self.ema = Ema(denoiser, recipe.ema_half_life_images)
        self.powers = {std: PowerEma(self.network, std) for std in recipe.ema_stds}
        self.averages = [self.ema, *self.powers.values()]
        # EDM and EDM2 sum the loss over a latent's values, by ε = 1e-8. The gradients of a mean are
        # smaller by their number: with that ε, most layers of EDM2 would be held back, unevenly.
        eps = 1e-8 / prod(latent_shape(recipe, autoencoder))
        self.optimizer = torch.optim.Adam(
            self.objective.parameters(), recipe.lr, recipe.betas, eps, fused=True
        )
        for module in (self.network, uncertainty):
            if isinstance(module, MPModule):
                self.optimizer.register_step_post_hook(partial(_normalize, module))
        self.parts = {"objective": self.objective, "ema": self.ema, "optimizer": self.optimizer}
        self.parts |= {f"power_ema_{std}": power for std, power in self.powers.items()}
        self.row: dict[str, float] = {}

    def prepare(self, run: Run, autoencoder: Autoencoder) -> None:
        """Checkpoint, compile and wrap the networks, as the recipe and the processes need it."""
        # after the averages were copied: these change a module, not its weights
        if self.recipe.checkpointing:
            self.network.checkpoint_blocks()
        run.compile(self.network, autoencoder.encoder)
        self.objective = run.prepare(self.objective)

    def set_learning_rate(self) -> float:
        """Set, and return, the learning rate of the next step."""
        recipe = self.recipe
        lr = learning_rate(
            recipe.lr, self.images_seen + self.batch_size, recipe.warmup_images,
            recipe.lr_schedule, recipe.steps * recipe.batch_size, recipe.lr_decay_images,
        )  # fmt: skip
        set_learning_rate(self.optimizer, lr)
        return lr

    def save_snapshots(self, writer: BackgroundWriter) -> None:
        """Keep the power-function averages as they are now, for `ldm ema`."""
        for std, power in self.powers.items():
            snapshot = self.images_seen, std, to_host(power.ema_model.state_dict())
            writer.submit(partial(save_snapshot, self.folder / "ema", *snapshot))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"row": self.row}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        super().load_state_dict(saved)
        self.row = saved.get("row", {})
        if "row" not in saved:  # of an earlier version
            rows = read_rows(self.folder / "metrics.jsonl")
            self.row = next((r for r in rows if r["images_seen"] == self.images_seen), {})


def _normalize(module: MPModule, optimizer: Any, *_: Any) -> None:
    # a step that `Run.step` has skipped must not change a bit
    module.normalize_weights(getattr(optimizer, "found_inf", None))


def snapshot_due(step: int, recipe: DiffusionRecipe) -> bool:
    """True after `snapshots` steps of the run, evenly spread, the last one included."""
    return step * recipe.snapshots // recipe.steps > (step - 1) * recipe.snapshots // recipe.steps


def train_step(run: Run, state: DiffusionState, batch: LatentBatch) -> tuple[Tensor, Tensor | None]:
    """Train on one micro-batch, and update at the last one of a step.

    Returns:
        Every image's loss (b,), without the uncertainty's term; and the gradient's norm if an
        update was made.
    """
    with run.accelerator.accumulate(state.objective):
        with run.autocast():
            total, loss = state.objective(*batch)
        optimizer, clip_norm = state.optimizer, state.recipe.clip_norm
        name, total = "diffusion model", total.mean()
        norm = run.step(total, state.objective, optimizer, name, clip_norm, loss)
    return loss, norm


def train_diffusion(
    recipe: DiffusionRecipe, preset: str = "diffusion", folder: Path | None = None,
    count_flops: CountFlops | None = None,
) -> Path:  # fmt: skip
    """Train, or resume training; return the run's folder, with `ckpt.pt` in it.

    Args:
        preset: name of the preset, for the name of a new folder.
        folder: the run's folder; None: the newest unfinished run of this recipe, or a new one.
        count_flops: for the model FLOPs utilisation in the log; None: it has none.

    Raises:
        UsageError: settings that do not fit the autoencoder, the data or each other.
        LdmError: autoencoder, data, device or tracker missing, an autoencoder that changed since
            the run began, ten steps in a row not finite, or a full disk.
        Interrupted: asked to stop; the state is saved, and the same call resumes.
    """
    autoencoder, inner = _load_autoencoder(recipe.autoencoder)
    ae_sha256 = inner.sha256
    check_range(recipe)
    data = recipe.data.of(autoencoder.config)
    source = open_source(data, "train", recipe.resolution)
    requested, recipe = recipe, fit(recipe, autoencoder, len(source.classes))
    if recipe.cache:
        precision = resolve_precision(recipe.run.precision, resolve_device(recipe.run.device))
        check_cache(recipe, source, precision, ae_sha256)
    flops = count_flops(recipe, autoencoder.config) if count_flops else {}
    # the run is known by the recipe as requested, so that the same command finds it again
    with start_run("diffusion", preset, requested, recipe.run, recipe.accumulate, folder) as run:
        if is_finished(run.folder):
            run.say(f"{run.folder} is already finished")
            return run.folder
        run.flops = flops
        check_batch(recipe.batch_size, recipe.accumulate, run.world)
        check_data(run.accelerator, run.folder, source, data)
        recipe = fit(as_begun(requested, run.folder), autoencoder, len(source.classes))
        state = DiffusionState(recipe, run, autoencoder)
        frozen = run.place_frozen(autoencoder)
        codec = _resume(run, state, frozen, ae_sha256)
        if codec is None:
            codec = measure_codec(frozen, recipe, source, run)
        cache = open_cache(recipe, codec, ae_sha256, source, run) if recipe.cache else None
        state.prepare(run, frozen)
        with run.logbook(state, requested) as logbook:
            run.say(_opening(run, state, codec))
            validate = partial(_validate, run, state, codec, logbook)
            if state.owes_validation(recipe.run.validate_every_steps):
                validate()

            def save() -> None:
                facts = {"autoencoder_sha256": ae_sha256, "statistics": codec.statistics()}
                tree = state.state_dict() | {"log": logbook.state_dict()} | facts
                run.save(tree, _model(state, codec, inner, ae_sha256, source))

            run.name_image = partial(image_name, source, run.seed)
            stream = latent_batches(run, recipe, codec, source, cache, state.images_seen)
            _train(run, state, stream, logbook, validate, save)
            logbook.close()
            return run.finish({"images_seen": state.images_seen, **state.row})


def check_range(recipe: DiffusionRecipe) -> None:
    """Raise a UsageError for a range of pixels that is to be measured."""
    if recipe.data.range == "measured":
        raise UsageError("data.range=measured is for stage one: stage two takes its range; omit it")


def _load_autoencoder(path: str) -> tuple[Autoencoder, ModelFile]:
    """Load an autoencoder, and make the model file to keep in stage two's. Its provenance names the
    source of imported weights, whose licence binds this model too."""
    found = read_autoencoder(path)
    autoencoder, origin = assemble(found, path).eval(), find_origin(path, found)
    came_with = {"imported": origin} if origin else {}
    config, weights = to_tree(autoencoder.config), autoencoder.state_dict()
    return autoencoder, ModelFile("autoencoder", config, weights, provenance=came_with)


def _resume(run: Run, state: DiffusionState, ae: Autoencoder, ae_sha256: str) -> Codec | None:
    """Load the newest saved state and return its codec; None if there is no state.

    The saved state, some gigabytes, is let go.
    """
    saved = run.resume()
    if saved is None:
        return None
    if saved.get("autoencoder_sha256") != ae_sha256:
        raise LdmError(
            f"{state.recipe.autoencoder} has other weights than the autoencoder that {run.folder} "
            "was started with: pass that one to --ae, or another folder to --out"
        )
    state.load_state_dict(saved)
    statistics, states = saved.get("statistics"), run.folder / "state"
    return Codec.from_statistics(ae, statistics, states).to(run.device)


def _train(
    run: Run,
    state: DiffusionState,
    stream: Iterator[tuple[int, LatentBatch]],
    logbook: Logbook,
    validate: Callable[[], None],
    save: Callable[[], None],
) -> None:
    """Train from the state to the end of the recipe."""
    every = state.recipe.run
    with run.progress(state) as show:
        for k, batch in run.until_stopped(state, stream, save):
            lr = state.set_learning_rate()
            run.begin(k, (state.recipe.resolution, False))
            loss, norm = train_step(run, state, batch)
            loss, sigma = run.accelerator.gather((loss, batch.sigma))
            logbook.add(loss=loss.mean(), **band_losses(loss, sigma))
            if norm is None:
                continue

            logbook.add(gradient_norm=norm)
            state.advance()
            stop = run.stop_after_step() and not state.is_last
            validates = state.due(every.validate_every_steps)
            if validates or state.due(every.log_every_steps):
                extra = {"lr": lr, "skipped": run.skipped.total()}
                state.row = logbook.row(state.images_seen, **extra)
                show(state.row, f"loss {state.row['loss']:.3f}")
            if run.is_main and snapshot_due(state.step, state.recipe):
                state.save_snapshots(run.writer)
            if validates and not stop:
                validate()
            if state.due(every.save_every_steps) or stop:
                save()
            if stop:
                raise run.interrupted(f"stopped after step {state.step}, saved in {run.folder}")


@full_float32()
def measure_codec(
    autoencoder: Autoencoder, recipe: DiffusionRecipe, source: Source, run: Run
) -> Codec:
    """Measure the latents' statistics over the first images of the run's own stream.

    Images are not augmented; latents are drawn or means, as in training. Images whose latents are
    not finite are named and left out.
    """
    micro_batch = recipe.batch_size // recipe.accumulate  # over all processes
    wanted = len(source) if recipe.statistics_images is None else recipe.statistics_images
    count = -(-wanted // micro_batch) * micro_batch
    run.say(f"measuring the mean and standard deviation of the latents of {count:,} images")
    stream = batches(
        source, recipe.data, recipe.resolution, run.seed, 0, count, micro_batch,
        rank=run.rank, world=run.world,
    )  # fmt: skip

    bad: list[str] = []

    def posteriors() -> Iterator[DiagonalGaussian]:
        for batch in stream:
            if run.stop_requested():
                raise run.interrupted(f"stopped before the first step of {run.folder}")
            posterior = autoencoder.encode(as_float(run.place(batch.images)))
            if not (good := posterior.isfinite().cpu()).all():
                bad.extend(image_name(source, run.seed, k) for k in batch.k[~good].tolist())
                posterior = DiagonalGaussian(posterior.mean[good], posterior.logvar[good])
            yield posterior

    with run.autocast(), torch.no_grad():
        mean, std = measure_latents(posteriors(), recipe.posterior == "sample", run.sum)
    if bad:
        log.warning("left out of the statistics: the latents of %s are not finite", listed(bad))
    return Codec(autoencoder, mean, std, recipe.trained.sigma_data).to(run.device)


@full_float32()
@torch.no_grad()
def _validate(run: Run, state: DiffusionState, codec: Codec, logbook: Logbook) -> None:
    """Draw samples of the averaged model, always from the same noise, cycling through classes; and
    the loss in each band of noise levels so far."""
    state.validated_at = state.images_seen
    if not run.is_main:
        return
    shape, classes = latent_shape(state.recipe, codec.autoencoder), state.recipe.network.classes
    noise = normal(run.seed, "sample", range(SAMPLES), shape).to(run.device)
    labels = torch.arange(SAMPLES, device=run.device) % classes if classes else None
    denoiser = cast(Denoiser, state.ema.ema_model)
    with run.autocast():
        levels = denoiser.schedule_options(denoiser.schedule)
        sigmas = SCHEDULES[denoiser.schedule](SAMPLING_STEPS, **levels)
        denoise = partial(denoiser, labels=labels)
        z = sample_heun(denoise, noise, sigmas, **denoiser.sampler_options("heun"))
        images = codec.decode(z).cpu()
    pictures = run.folder / "pictures"
    save_grid(images, pictures / f"samples-{state.images_seen:08d}.png", COLUMNS)
    logbook.picture("samples", grid(images, COLUMNS), state.images_seen)
    draw_bands(read_rows(run.folder / "metrics.jsonl"), pictures / "loss-by-sigma.png")
    loss = state.row.get("loss", float("nan"))
    run.say(f"step {state.step:>6}/{state.total_steps}: loss {loss:.4f}, samples drawn")


def _model(
    state: DiffusionState, codec: Codec, inner: ModelFile, inner_sha256: str, source: Source
) -> ModelFile:
    """The averaged network, the latents' statistics, and the autoencoder."""
    recipe = state.recipe
    origin = provenance() | {"images_seen": state.images_seen, "autoencoder_sha256": inner_sha256}
    statistics = codec.statistics() | {
        "classes": list(source.classes) if recipe.data.labels else []
    }
    weights, config = cast(Denoiser, state.ema.ema_model).network.state_dict(), to_tree(recipe)
    return ModelFile("diffusion", config, weights, statistics, origin, inner)


def _opening(run: Run, state: DiffusionState, codec: Codec) -> str:
    recipe, statistics = state.recipe, codec.statistics()
    each = recipe.batch_size // (recipe.accumulate * run.world)
    parameters = sum(p.numel() for p in state.network.parameters())
    mean, std = ([round(v, 3) for v in statistics[key]] for key in ("mean", "std"))
    conditional = f", {recipe.network.classes} classes" if recipe.network.classes else ""
    latents = f"from the cache {recipe.cache}" if recipe.cache else "encoded on the fly"
    return (
        f"{run.folder}: denoiser {parameters:,} parameters{conditional}; latents of "
        f"{recipe.autoencoder}, {latents}: mean {mean}, std {std}\n{recipe.steps:,} steps; batch "
        f"{recipe.batch_size} = {run.world} process(es) × {recipe.accumulate} × {each}; "
        f"lr {recipe.lr:g}; {run.device.type}, {run.precision}"
    )
