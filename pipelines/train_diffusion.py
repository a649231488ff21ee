"""What of a diffusion model changes in training: the network, its averages, and its optimiser.

Stage two: train an EDM latent diffusion model, its latents encoded on the fly from pixels.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoencoders import Autoencoder, load_autoencoder
from autoencoders.posterior import DiagonalGaussian
from diffusion.build import build_denoiser, build_network
from diffusion.edm import EDMLoss, Uncertainty
from ldm.checkpoint import ModelFile, fingerprint, save_model
from ldm.config import to_tree
from ldm.data import Source, batches, open_source
from ldm.ema import Ema, PowerEma
from ldm.errors import Interrupted, LdmError
from ldm.files import write_json
from ldm.images import to_float
from ldm.learning_rate import learning_rate, set_learning_rate
from ldm.logbook import Logbook
from ldm.posthoc_ema import save_snapshot
from ldm.run import Run, start_run
from ldm.run_folder import is_finished, provenance, restore
from pipelines.codec import Codec, measure_latents
from pipelines.latents import LatentBatch, latent_batches, open_cache
from pipelines.recipes import DiffusionRecipe, fit, latent_shape
from pipelines.validation import band_losses, draw_losses, draw_samples


class Learner:
    """All that has state, built from a recipe and placed where a run trains.

    Attributes:
        network: what denoises, F.
        objective: what is trained, an `EDMLoss`: the denoiser and, if asked for, its uncertainty.
        ema: the averaged denoiser, which ckpt.pt is made of.
        powers: averages of other widths, by their relative standard deviation.
        optimizer: Adam over the objective's parameters.
    """

    def __init__(self, recipe: DiffusionRecipe, run: Run) -> None:
        self.recipe = recipe
        self.network = run.place(build_network(recipe.network))
        denoiser = build_denoiser(self.network, recipe.denoiser)
        uncertainty = Uncertainty().to(run.device) if recipe.denoiser.uncertainty else None
        self.objective = EDMLoss(denoiser, uncertainty)
        self.ema = Ema(denoiser, recipe.ema_half_life_images)
        self.powers = {std: PowerEma(self.network, std) for std in recipe.ema_stds}
        parameters = self.objective.parameters()
        self.optimizer = torch.optim.Adam(parameters, recipe.lr, recipe.betas, fused=True)
        for module in (self.network, uncertainty):
            if hasattr(module, "normalize_weights"):  # of a magnitude-preserving network
                self.optimizer.register_step_post_hook(lambda *_, m=module: m.normalize_weights())

    def set_rate(self, images_seen: int) -> float:
        """The learning rate of the step that ends at `images_seen`, set and answered."""
        recipe = self.recipe
        rate = learning_rate(
            recipe.lr, images_seen, recipe.warmup_images,
            recipe.lr_schedule, recipe.steps * recipe.batch_size, recipe.lr_decay_images,
        )  # fmt: skip
        set_learning_rate(self.optimizer, rate)
        return rate

    def average(self, images_seen: int) -> None:
        """Let all averages follow, after a step."""
        for average in (self.ema, *self.powers.values()):
            average.update(images_seen, self.recipe.batch_size)

    def save_snapshots(self, folder: Path, images_seen: int) -> None:
        """Keep what the averages of other widths are now, for `ldm ema`."""
        for std, power in self.powers.items():
            save_snapshot(folder, images_seen, std, power.model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        restore(self._parts(), state)

    def _parts(self) -> dict[str, Any]:
        powers = {f"power_ema_{std}": power for std, power in self.powers.items()}
        return {
            "objective": self.objective, "ema": self.ema, "optimizer": self.optimizer, **powers
        }  # fmt: skip


def train_diffusion(
    recipe: DiffusionRecipe, preset: str = "diffusion", folder: Path | None = None
) -> Path:
    """Train, or go on training, and return the run's folder with `ckpt.pt` in it.

    Raises:
        UsageError: settings that do not fit the autoencoder, the data or each other.
        LdmError: autoencoder, data or device missing, an autoencoder that changed since the run
            began, ten steps in a row not finite, or a disk that is full.
        Interrupted: asked to stop; the state is saved and the same call goes on from it.
    """
    autoencoder = load_autoencoder(recipe.autoencoder)
    ae_sha256 = fingerprint(autoencoder.state_dict())
    source = open_source(recipe.data, "train", recipe.resolution)
    asked, recipe = recipe, fit(recipe, autoencoder, source)
    shape = latent_shape(recipe, autoencoder)

    # the run is known by what was asked for, so that the same command finds it again
    with start_run("diffusion", preset, asked, recipe.run, recipe.accumulate, folder) as run:
        if is_finished(run.folder):
            run.say(f"{run.folder} is finished already")
            return run.folder
        run.check_batch(recipe.batch_size, recipe.accumulate)

        learner = Learner(recipe, run)
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
            learner.load_state_dict(saved)
        cache = open_cache(recipe, codec, ae_sha256, source, run) if recipe.cache else None
        run.compile(learner.network, autoencoder.encoder)  # the averages were copied before
        model = run.prepare(learner.objective)

        logbook = Logbook(run.folder if run.is_main else None, images_seen)
        run.say(_opening(recipe, run, learner.network, codec))
        with run.progress() as bar:
            task = bar.add_task(
                "training", total=recipe.steps, completed=images_seen // recipe.batch_size,
                speed="", note="",
            )  # fmt: skip
            for k, batch in latent_batches(run, recipe, codec, source, cache, images_seen):
                lr = learner.set_rate(images_seen + recipe.batch_size)
                run.seed_dropout(k)
                loss, norm = train_step(run, model, learner.optimizer, batch, recipe.clip_norm)
                loss, sigma = run.gather(loss), run.gather(batch.sigma)
                logbook.add(loss=loss.mean(), **band_losses(loss, sigma))
                if norm is None:
                    continue

                logbook.add(gradient_norm=norm)
                images_seen += recipe.batch_size
                step = images_seen // recipe.batch_size
                learner.average(images_seen)
                last, stop = step == recipe.steps, run.stop_asked()
                look = last or step % recipe.run.validate_every_steps == 0
                if look or step % recipe.run.log_every_steps == 0:
                    row = logbook.row(images_seen, lr=lr, skipped=run.skipped.total())
                    bar.update(
                        task, completed=step, speed=f"{row['images_per_second']:.1f} images/s",
                        note=f"loss {row['loss']:.3f}",
                    )  # fmt: skip
                if run.is_main and snapshot_due(step, recipe):
                    learner.save_snapshots(run.folder / "ema", images_seen)
                if step % recipe.run.save_every_steps == 0 or last or stop:
                    # the model first: a run that finds its last state is over has made it
                    _export(run, recipe, learner.ema.model, codec, source, images_seen)
                    plain = {"autoencoder_sha256": ae_sha256, "statistics": codec.statistics()}
                    run.save(images_seen, plain | learner.state_dict())
                if stop and not last:
                    raise Interrupted(f"stopped after step {step}, saved in {run.folder}")
                if look:
                    draw_samples(run, learner.ema.model, codec, shape, images_seen, logbook)
                    draw_losses(run)
                    run.say(f"step {step:>6}/{recipe.steps}: loss {row['loss']:.4f}, samples drawn")
        logbook.close()
        if run.is_main:
            write_json(run.folder / "result.json", {"images_seen": images_seen, **row})
        run.accelerator.wait_for_everyone()
        return run.folder


def snapshot_due(step: int, recipe: DiffusionRecipe) -> bool:
    """Whether the averages are kept after a step: `snapshots` times in a run, last after it."""
    return step * recipe.snapshots // recipe.steps > (step - 1) * recipe.snapshots // recipe.steps


def train_step(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: LatentBatch,
    clip_norm: float | None,
) -> tuple[Tensor, Tensor | None]:
    """One micro-batch, and at the last of a batch one update.

    Args:
        model: an `EDMLoss`, or what wraps it to synchronise gradients.

    Returns:
        Every image's loss (b,), without the uncertainty's share, and the gradient's norm where an
        update was made.
    """
    with run.accumulate(model):
        with run.autocast():
            minimised, loss = model(*batch)
        norm = run.step(minimised.mean(), model, optimizer, "diffusion model", clip_norm)
    return loss, norm


def measure_codec(
    autoencoder: Autoencoder, recipe: DiffusionRecipe, source: Source, run: Run
) -> Codec:
    """The codec with statistics measured over the first images of the run's own stream, before
    they are augmented: of what is trained on, draws from the posteriors or their means.

    Raises:
        LdmError: the latents are not finite, or a channel does not vary.
        Interrupted: asked to stop.
    """
    micro_batch = recipe.batch_size // recipe.accumulate  # over all processes
    asked = len(source) if recipe.statistics_images is None else recipe.statistics_images
    count = -(-asked // micro_batch) * micro_batch
    run.say(f"measuring the latents' mean and standard deviation over {count:,} images")
    stream = batches(
        source, recipe.data, recipe.resolution, run.seed, 0, count, micro_batch,
        rank=run.rank, world=run.world,
    )  # fmt: skip

    def posteriors() -> Iterator[DiagonalGaussian]:
        for batch in stream:
            if run.stop_asked():
                raise Interrupted(f"stopped before the first step of {run.folder}")
            yield autoencoder.encode(to_float(run.place(batch.images)))

    with run.autocast(), torch.no_grad():
        mean, std = measure_latents(posteriors(), recipe.posterior == "sample", run.sum)
    return Codec(autoencoder, mean, std, recipe.denoiser.sigma_data).to(run.device)


def _export(
    run: Run,
    recipe: DiffusionRecipe,
    denoiser: nn.Module,
    codec: Codec,
    source: Source,
    images_seen: int,
) -> None:
    """Write `ckpt.pt`: the averaged network with the statistics and the autoencoder it needs."""
    if run.is_main:
        ae = codec.autoencoder
        inner = ModelFile("autoencoder", to_tree(ae.config), ae.state_dict())
        origin = provenance() | {"images_seen": images_seen, "autoencoder_sha256": inner.sha256}
        told = codec.statistics() | {"classes": list(source.classes) if recipe.data.labels else []}
        weights = denoiser.network.state_dict()
        model = ModelFile("diffusion", to_tree(recipe), weights, told, origin, inner)
        save_model(run.folder / "ckpt.pt", model)
    run.accelerator.wait_for_everyone()


def _opening(recipe: DiffusionRecipe, run: Run, network: nn.Module, codec: Codec) -> str:
    each = recipe.batch_size // (recipe.accumulate * run.world)
    parameters = sum(p.numel() for p in network.parameters())
    statistics = codec.statistics()
    mean, std = ([round(v, 3) for v in statistics[key]] for key in ("mean", "std"))
    conditional = f", {recipe.network.classes} classes" if recipe.network.classes else ""
    latents = f"from the cache {recipe.cache}" if recipe.cache else "encoded on the fly"
    return (
        f"{run.folder}: denoiser {parameters:,} parameters{conditional}; latents of "
        f"{recipe.autoencoder}, {latents}: mean {mean}, std {std}\n{recipe.steps:,} steps; batch "
        f"{recipe.batch_size} = {run.world} process(es) × {recipe.accumulate} × {each}; "
        f"lr {recipe.lr:g}; {run.device.type}, {run.precision}"
    )
