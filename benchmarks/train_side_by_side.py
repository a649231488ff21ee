"""Train two autoencoders side by side on the same images, in the same order.

    python -m benchmarks.train_side_by_side sdvae-quarter litevae-b-quarter \
        data.source=photographs/ data.held_out=100 --out docs/results/side-by-side

The two alternate in chunks of steps, so that other load on the machine affects both alike. A
chunk's images are loaded once for both, and only its steps are timed. Held-out PSNR and SSIM are
those of the averaged weights. After an interruption, the same command resumes.

Writes result.json, README.md with the table, curves.png and pictures.png to --out.
"""

import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from autoencoders import Autoencoder
from autoencoders.discriminators import build_discriminator
from autoencoders.sdvae import SDVAEDecoder
from benchmarks.comparison import add_out, describe_machine, make_parser
from ldm.config import load_preset, resolve, to_tree, validate
from ldm.data import Batch, Source, batches, open_source, sheet_images
from ldm.device import synchronise
from ldm.distributed import make_accelerator
from ldm.errors import LdmError, UsageError
from ldm.files import write_json
from ldm.images import save_grid, to_float
from ldm.run import Run
from ldm.run_folder import latest_state, load_state, restore, save_state
from ldm.seeds import torch_seed
from pipelines.recipes import AutoencoderRecipe
from pipelines.train_autoencoder import (
    AutoencoderState,
    PerceptualLosses,
    load_perceptual,
    train_step,
)
from pipelines.validation import evaluate_autoencoder

MAY_DIFFER = {"encoder", "conv1x1", "init"}
COLUMNS = 8


@dataclass
class Contender:
    """One of the two: its networks, its training time, and its measurements."""

    name: str
    recipe: AutoencoderRecipe
    training: AutoencoderState
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def averaged(self) -> Autoencoder:
        return self.training.ema.ema_model

    def state(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self.training.parts.items()}
        return {"parts": parts, "seconds": self.seconds, "curve": self.curve}

    def load(self, state: dict[str, Any]) -> None:
        restore(self.training.parts, state["parts"])
        self.seconds, self.curve = state["seconds"], state["curve"]


def main() -> None:
    """Parse, train both, write the results."""
    parser = make_parser(__doc__)
    parser.add_argument("first", help="preset")
    parser.add_argument("second", help="preset")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings for both")
    add_out(parser, "docs/results/side-by-side")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/side-by-side"), help="folder of the saved state"
    )
    parser.add_argument("--chunk", type=int, default=25, help="steps in a turn")
    parser.add_argument("--every", type=int, default=100, help="steps between measurements")
    given = parser.parse_args()
    try:
        if given.every % given.chunk:
            raise UsageError(f"--every {given.every} is not a multiple of --chunk {given.chunk}")
        recipes = [
            resolve(AutoencoderRecipe, load_preset("ae", name), given.settings)
            for name in (given.first, given.second)
        ]
        check_comparable(*recipes)
        run = Run(given.work, recipes[0].run, make_accelerator(recipes[0].run.device))
        names = (given.first, given.second)
        perceptual = load_perceptual(recipes[0])
        contenders = [make(run, *pair, perceptual) for pair in zip(names, recipes, strict=True)]
        held_out = train(run, contenders, given.chunk, given.every)
        write_results(given.out, run, contenders, held_out)
    except LdmError as error:
        sys.exit(f"error: {error}")


def check_comparable(first: AutoencoderRecipe, second: AutoencoderRecipe) -> None:
    """Refuse recipes that differ in more than their encoders."""
    ours, theirs = to_tree(first), to_tree(second)
    unequal = sorted(key for key in ours if ours[key] != theirs[key] and key not in MAY_DIFFER)
    if unequal:
        raise UsageError(f"the two presets differ in {', '.join(unequal)}: set it for both")
    if first.loss.ldl and not first.ema_half_life_images:
        raise UsageError("loss.ldl needs averaged weights: set ema_half_life_images")
    if first.accumulate > 1 or first.checkpointing or first.run.compile is True:
        raise UsageError("accumulate, checkpointing and run.compile are not supported here")
    if len(first.phases) > 1:
        raise UsageError("give one phase, such as phases=[{resolution: 128, steps: 1000}]")


def make(run: Run, name: str, recipe: AutoencoderRecipe, losses: PerceptualLosses) -> Contender:
    """Build networks, optimisers and averages; both decoders start from the same weights."""
    training = AutoencoderState(recipe, run, losses)
    build = {
        "autoencoder": lambda: Autoencoder(recipe.model),
        "decoder": lambda: SDVAEDecoder(recipe.decoder, recipe.latent_channels),
        "critic": lambda: build_discriminator(recipe.discriminator),  # the name seeds its weights
    }
    nets: dict[str, Any] = {}
    for what, building in build.items():
        torch.manual_seed(torch_seed(recipe.run.seed, f"weights of the {what}", 0))
        nets[what] = building()
    nets["autoencoder"].decoder.load_state_dict(nets["decoder"].state_dict())
    for network in (training.autoencoder, training.ema.ema_model):
        network.load_state_dict(nets["autoencoder"].state_dict())
    training.discriminator.load_state_dict(nets["critic"].state_dict())
    training.prepare(run)
    return Contender(name, recipe, training)


def train(run: Run, contenders: list[Contender], chunk: int, every: int) -> Source:
    """Train both in alternating chunks; return the held-out images."""
    recipe = contenders[0].recipe
    (phase,) = recipe.phases
    source, held_out = (
        open_source(recipe.data, split, phase.resolution) for split in ("train", "val")
    )
    step, states = 0, run.folder / "state"
    if latest := latest_state(states):
        saved = load_state(latest)
        if [validate(AutoencoderRecipe, r) for r in saved["recipes"]] != [
            c.recipe for c in contenders
        ]:
            raise UsageError(f"{run.folder} holds another comparison: give --work another folder")
        step = saved["step"]
        for contender, state in zip(contenders, saved["contenders"], strict=True):
            contender.load(state)
            contender.training.images_seen = step * recipe.batch_size
        del saved, state
        print(f"resuming from step {step}", flush=True)
    stream = batches(
        source, recipe.data, phase.resolution, run.seed, start=step * recipe.batch_size,
        stop=phase.steps * recipe.batch_size, batch_size=recipe.batch_size,
    )  # fmt: skip
    while step < phase.steps:
        images = [next(stream) for _ in range(min(chunk, phase.steps - step))]
        # who goes first alternates
        for contender in contenders[:: 1 if (step // chunk) % 2 else -1]:
            take_turn(run, contender, images)
        step += len(images)
        if step % every == 0 or step == phase.steps:
            for contender in contenders:
                numbers = evaluate_autoencoder(
                    contender.averaged, held_out, phase.resolution, 20, run.device
                )
                point = {"step": step, "seconds": contender.seconds}
                contender.curve.append(point | {k: numbers[k] for k in ("psnr", "ssim")})
                print(
                    f"step {step:>6}  {contender.name:<20} {contender.seconds:>7.0f} s  "
                    f"PSNR {numbers['psnr']:.2f}  SSIM {numbers['ssim']:.3f}",
                    flush=True,
                )
            tree = {"step": step, "recipes": [to_tree(c.recipe) for c in contenders]}
            tree["contenders"] = [contender.state() for contender in contenders]
            save_state(states, step, tree)
    return held_out


def take_turn(run: Run, contender: Contender, stream: list[Batch]) -> None:
    """Take a chunk of steps, timed."""
    recipe, training = contender.recipe, contender.training
    synchronise(run.device)
    start = time.perf_counter()
    for batch in stream:
        training.set_learning_rate()
        ramp = training.objective.ramp(training.step / recipe.total_steps)
        images = to_float(run.place(batch.images))
        train_step(run, training, images, batch.k.tolist(), ramp)
        training.advance()
    synchronise(run.device)
    contender.seconds += time.perf_counter() - start


# -------------------------------------------------------------------------------- results
def write_results(folder: Path, run: Run, contenders: list[Contender], held_out: Source) -> None:
    """Write the numbers, the table, the curves and the pictures."""
    machine = describe_machine(run.device, run.precision)
    first = contenders[0]
    result: dict[str, Any] = {"machine": machine, "recipe": to_tree(first.recipe)}
    result["models"] = [
        {
            "name": c.name,
            "encoder_parameters": count(c.averaged.encoder),
            "decoder_parameters": count(c.averaged.decoder),
            "seconds": c.seconds,
            "curve": c.curve,
        }
        for c in contenders
    ]
    write_json(folder / "result.json", result)
    draw_curves(folder / "curves.png", contenders)
    draw_pictures(folder / "pictures.png", contenders, held_out, run.device)
    (folder / "README.md").write_text(report(machine, contenders, len(held_out)), "utf-8")
    print(f"wrote {folder}/README.md, curves.png, pictures.png, result.json")


def count(module: torch.nn.Module) -> int:
    """Count a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def report(machine: dict[str, str], contenders: list[Contender], held_out: int) -> str:
    """Format the page: the set-up, and the table at equal steps and at equal seconds."""
    first = contenders[0].recipe
    (phase,) = first.phases
    budget = min(c.seconds for c in contenders)
    rows = []
    for c in contenders:
        end = c.curve[-1]
        within = [point for point in c.curve if point["seconds"] <= budget]
        then = f"{within[-1]['psnr']:.2f} | {within[-1]['ssim']:.3f}" if within else "– | –"
        rows.append(
            f"| {c.name} | {count(c.averaged.encoder):,} | {count(c.averaged.decoder):,} "
            f"| {1000 * c.seconds / end['step']:.0f} | {end['psnr']:.2f} | {end['ssim']:.3f} "
            f"| {then} |"
        )
    names = " and ".join(c.name for c in contenders)
    weights = {k: v for k, v in to_tree(first)["loss"].items() if isinstance(v, float) and v}
    terms = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    against = (
        f"adversarial {first.adversarial.weight:g}"
        if first.adversarial.weight
        else "no discriminator"
    )
    about = ", ".join(f"{key} {value}" for key, value in machine.items())
    return f"""# {names}, side by side

The same images in the same order, {phase.steps:,} steps of {first.batch_size} at
{phase.resolution}², Adam {first.lr:g}; {terms}; {against}. PSNR and SSIM of the averaged weights
over {held_out} held-out images.

| model | encoder | decoder | ms a step | PSNR | SSIM | PSNR in {budget:.0f} s | SSIM then |
|---|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(rows)}

![PSNR and SSIM against steps and seconds](curves.png)

Held-out images, and each model's reconstructions, in the table's order:

![Originals and reconstructions](pictures.png)

{about}.

    python -m benchmarks.train_side_by_side {shlex.join(sys.argv[1:])}
"""


def draw_curves(path: Path, contenders: list[Contender]) -> None:
    """Plot held-out PSNR and SSIM against steps and against seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharey="row", layout="constrained")
    for row, (key, label) in zip(axes, (("psnr", "PSNR, dB"), ("ssim", "SSIM")), strict=True):
        for axis, (x, name) in zip(
            row, (("step", "steps"), ("seconds", "seconds of training")), strict=True
        ):
            for contender in contenders:
                points = contender.curve
                axis.plot([p[x] for p in points], [p[key] for p in points], label=contender.name)
            axis.set_xlabel(name)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"held-out {label}")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@torch.no_grad()
def draw_pictures(
    path: Path, contenders: list[Contender], held_out: Source, device: torch.device
) -> None:
    """Draw a row of held-out images, and a row of reconstructions for each model."""
    resolution = contenders[0].recipe.phases[0].resolution
    images = to_float(sheet_images(held_out, resolution, COLUMNS)).to(device)
    rows = [images, *(c.averaged(images, sample=False).recon.clamp(-1, 1) for c in contenders)]
    save_grid(torch.cat(rows).cpu(), path, columns=len(images))


if __name__ == "__main__":
    main()
