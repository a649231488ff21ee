"""Distil an encoder and fine-tune a decoder, from small autoencoders that are trained here.

    python -m benchmarks.fine_tuning distil photographs/ --held-out 100
    python -m benchmarks.fine_tuning finetune photographs/ --held-out 100

All networks have a quarter of the published widths, and images 64², for a CPU.

`distil` trains a teacher, the SD-VAE of f = 4, on a folder of images; distils LiteVAE-B's encoder
from it; trains a diffusion model on the teacher's latents; and edits and inpaints held-out images
by that model with either encoder. `finetune` trains the SD-VAE of f = 8 with 16 latent channels on
the built-in photographs, and then its decoder alone on the folder.

After an interruption, the same command resumes. Writes distil.md or finetune.md, its numbers as
JSON, and its pictures, to --out.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoencoders import Autoencoder, load_autoencoder
from benchmarks.comparison import add_out, describe_machine, make_parser
from ldm.charts import drawing, line_style
from ldm.data import Source, open_source, sheet_images
from ldm.device import time_interleaved
from ldm.errors import Interrupted, LdmError
from ldm.files import write_atomically, write_json
from ldm.images import save_grid, to_float
from ldm.logbook import read_rows
from ldm.tables import markdown_table
from pipelines import LatentDiffusionPipeline
from pipelines.recipes import load_recipe
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_diffusion import train_diffusion
from pipelines.validation import compare_with_teacher, evaluate_autoencoder

CPU = torch.device("cpu")
CPU_RUN = ["run.device=cpu", "run.precision=fp32"]
RESOLUTION = 64
COLUMNS = 8
# at full width the smallest group of SD-VAE's norms has four channels too
DECODER = ["decoder.norm=group", "decoder.group_channels=4"]
F8 = ["latent_channels=16", "encoder.group_channels=4", *DECODER]
F4 = ["latent_channels=4", "decoder.multipliers=[1,2,4]", *DECODER]
SD_VAE = ["encoder={type: sdvae, channels: 32, multipliers: [1, 2, 4], group_channels: 4}"]
LITEVAE = [
    "encoder.depth=2", "encoder.extractor.channels=8", "encoder.extractor.group_channels=4",
    "encoder.aggregator.channels=8", "encoder.aggregator.group_channels=4",
]  # fmt: skip
PLUS = ["encoder.shortcut=wavelet", "init.logvar=-5"]
LOSS = ["loss.lpips=0", "loss.l2=1", "loss.gaussian=0", "loss.wavelet=0.25"]
TRAINING = [
    "batch_size=16", "betas=[0.9,0.99]", "warmup_images=800", "ema_half_life_images=2000",
    "adversarial.weight=0", "discriminator={channels: 16, multipliers: [1, 2]}",
    "run={log_every_steps: 25, validate_every_steps: 125, save_every_steps: 125, keep_states: 1}",
    *CPU_RUN,
]  # fmt: skip


def main() -> None:
    """Parse, train what is asked for, write its page."""
    parser = make_parser(__doc__)
    parser.add_argument("part", choices=("distil", "finetune"))
    parser.add_argument("images", help="folder of images, zip or shards")
    parser.add_argument("--held-out", type=int, default=100, help="images that are only measured")
    parser.add_argument(
        "--steps", type=int, default=400, help="of the teacher; the student takes 4×"
    )
    add_out(parser, "docs/results/fine-tuning")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/fine-tuning"), help="folder of the trainings"
    )
    given = parser.parse_args()
    try:
        result = {"distil": distil, "finetune": finetune}[given.part](given)
    except (Interrupted, LdmError) as error:
        sys.exit(str(error))
    result["machine"] = describe_machine(CPU, "fp32")
    result["command"] = shlex.join(["python", "-m", "benchmarks.fine_tuning", *sys.argv[1:]])
    write_json(given.out / f"{given.part}.json", result)
    page = {"distil": distil_page, "finetune": finetune_page}[given.part](result)
    write_atomically(given.out / f"{given.part}.md", page.encode())
    print(f"wrote {given.out / given.part}.md")


# -------------------------------------------------------------------------------- trainings
def train(folder: Path, kind: str, preset: str, settings: Sequence[str]) -> Path:
    """Train in a folder, or resume, or return what is finished."""
    recipe = load_recipe(kind, preset, settings)
    return {"diffusion": train_diffusion}.get(kind, train_autoencoder)(recipe, folder=folder)


def data_of(given: argparse.Namespace) -> list[str]:
    """Settings of the folder's images."""
    source = f"data.source={json.dumps(given.images)}"
    return [source, f"data.held_out={given.held_out}", "data.workers=0", "data.crop=random"]


def steps(count: int, last: int, lr: float) -> list[str]:
    """Settings of an autoencoder's training: steps at half the resolution, then at the last."""
    half, whole = (
        f"{{resolution: {side}, steps: {number}}}"
        for side, number in ((RESOLUTION // 2, count), (RESOLUTION, last))
    )
    phases = f"{half}, {whole}" if last else half
    return [f"phases=[{phases}]", f"lr={lr}", *LOSS, *TRAINING]


def train_teacher(given: argparse.Namespace) -> Path:
    """Train an SD-VAE that reconstructs colours.

    From scratch it had learned none after 12,000 images. A LiteVAE with the wavelet shortcut learns
    them early: SD-VAE's encoder is distilled from it, then trained together with the decoder.
    """
    work, data, count = given.work, data_of(given), given.steps
    first = train(
        work / "litevae", "ae", "litevae-b-quarter",
        [*data, *F4, *LITEVAE, *PLUS, *steps(count // 2, 0, 2e-3)],
    )  # fmt: skip
    encoder = train(
        work / "sdvae-encoder", "recipes", "distil-b",
        [*data, f"teacher.source={first}", *SD_VAE, *steps(count // 2, 0, 2e-3)],
    )  # fmt: skip
    return train(
        work / "teacher", "recipes", "finetune",
        [*data, f"init.source={encoder}", "train=all", *steps(count, count // 4, 1e-3)],
    )  # fmt: skip


def distil(given: argparse.Namespace) -> dict[str, Any]:
    """Train teacher, student and diffusion model; measure and draw."""
    work, data, count = given.work, data_of(given), given.steps
    teacher_run = train_teacher(given)
    student_run = train(
        work / "student", "recipes", "distil-b",
        [*data, f"teacher.source={teacher_run}", *LITEVAE, *steps(4 * count, count // 2, 2e-3)],
    )  # fmt: skip
    teacher, student = load_autoencoder(teacher_run), load_autoencoder(student_run)
    held_out = held_out_images(given)
    found = compare_with_teacher(student, teacher, held_out, RESOLUTION, 20, CPU)
    images = to_float(sheet_images(held_out, RESOLUTION, COLUMNS))
    with torch.no_grad():
        seconds = time_interleaved(
            {name: lambda ae=ae: ae.encode(images) for name, ae in
             (("teacher", teacher), ("student", student))}, 20, CPU,
        )  # fmt: skip
    draw_recons(given.out / "distil.png", (teacher, student), images)
    draw_curves(given.out / "distil-curves.png", teacher_run, student_run, len(held_out))

    diffusion = train(
        work / "diffusion", "diffusion", "tiny",
        [*data, f"autoencoder={teacher_run}", f"steps={count}", "batch_size=16", *CPU_RUN],
    )  # fmt: skip
    draw_edits(given.out / "distil-edits.png", diffusion, (teacher, student), images)
    return {
        "held_out": len(held_out),
        "steps": count,
        "scores": {"teacher": score(teacher, held_out), "student": score(student, held_out)},
        "latents": found,
        "images_per_second": {name: COLUMNS / s for name, s in seconds.items()},
        "encoder_parameters": {"teacher": count_of(teacher), "student": count_of(student)},
    }


def finetune(given: argparse.Namespace) -> dict[str, Any]:
    """Train on the built-in photographs, and the decoder alone on the folder; measure and draw."""
    count = given.steps
    before_run = train(
        given.work / "built-in", "ae", "sdvae-quarter", [*F8, *steps(count, count // 4, 2e-3)]
    )
    after_run = train(
        given.work / "fine-tuned", "recipes", "finetune",
        [*data_of(given), f"init.source={before_run}", *steps(count // 2, count // 8, 1e-3)],
    )  # fmt: skip
    before, after = load_autoencoder(before_run), load_autoencoder(after_run)
    held_out = held_out_images(given)
    images = to_float(sheet_images(held_out, RESOLUTION, len(held_out)))
    with torch.no_grad():
        a, b = (ae.encode(images) for ae in (before, after))
    draw_recons(given.out / "finetune.png", (before, after), images[:COLUMNS])
    return {
        "held_out": len(held_out),
        "steps": count,
        "scores": {"before": score(before, held_out), "after": score(after, held_out)},
        "latents_equal": torch.equal(a.mean, b.mean) and torch.equal(a.logvar, b.logvar),
    }


def held_out_images(given: argparse.Namespace) -> Source:
    """Open the images of the folder that no training sees."""
    return open_source(load_recipe("ae", "litevae-b", data_of(given)).data, "val", RESOLUTION)


def score(ae: Autoencoder, held_out: Source) -> dict[str, float]:
    """PSNR and SSIM over the held-out images."""
    return evaluate_autoencoder(ae, held_out, RESOLUTION, 20, CPU)


def count_of(ae: Autoencoder) -> int:
    """The number of parameters of an encoder."""
    return sum(parameter.numel() for parameter in ae.encoder.parameters())


# -------------------------------------------------------------------------------- pictures
def draw_curves(path: Path, teacher: Path, student: Path, held_out: int) -> None:
    """Draw held-out PSNR of teacher and student, and the correlation of their latents."""
    title, under = (
        "A teacher, and LiteVAE's encoder distilled from it",
        f"{held_out} held-out images",
    )
    with drawing(path, title, under, 2.8) as figure:
        left, right = figure.subplots(1, 2)
        for i, (name, run) in enumerate((("teacher", teacher), ("student", student))):
            rows = [row for row in read_rows(run / "metrics.jsonl") if "val_psnr" in row]
            seen = [row["images_seen"] for row in rows]
            style = line_style(i) | {"marker": None}
            left.plot(seen, [row["val_psnr"] for row in rows], label=name, **style)
            if name == "student":
                correlation = [row["val_latent_correlation"] for row in rows]
                right.plot(seen, correlation, **style)
        left.set(xlabel="images seen", ylabel="PSNR, dB")
        right.set(xlabel="images seen", ylabel="least correlation of a channel")
        left.legend()
        for axes in (left, right):
            axes.grid()


@torch.no_grad()
def draw_recons(path: Path, models: Sequence[Autoencoder], images: Tensor) -> None:
    """Draw a row of images, and a row of reconstructions for each model."""
    recons = [ae(images, sample=False).recon.clamp(-1, 1) for ae in models]
    save_grid(torch.cat([images, *recons]), path, columns=len(images))


def draw_edits(path: Path, run: Path, encoders: Sequence[Autoencoder], images: Tensor) -> None:
    """Edit and inpaint images, by one diffusion model, with each autoencoder in turn.

    Rows: images; edits, one row for each; images with the mask grey; inpainted, one row for each.
    """
    mask = torch.zeros(1, 1, RESOLUTION, RESOLUTION)
    mask[..., RESOLUTION // 4 : 3 * RESOLUTION // 4, RESOLUTION // 4 : 3 * RESOLUTION // 4] = 1
    pipe = LatentDiffusionPipeline.from_pretrained(run, "cpu")
    edits, painted = [], []
    for ae in encoders:
        pipe.codec.autoencoder = ae
        edits.append(pipe.edit(images, strength=0.4, seed=0))
        painted.append(pipe.inpaint(images, mask, seed=0))
    rows = [images, *edits, images * (1 - mask), *painted]
    save_grid(torch.cat([torch.as_tensor(row) for row in rows]), path, columns=len(images))


# ----------------------------------------------------------------------------------- pages
def distil_page(result: dict[str, Any]) -> str:
    """Format the page of `distil`."""
    scores, found, count = result["scores"], result["latents"], result["steps"]
    rows = [
        (
            name, f"{result['encoder_parameters'][which]:,}",
            f"{scores[which]['psnr']:.2f}", f"{scores[which]['ssim']:.3f}",
            f"{result['images_per_second'][which]:.0f}",
        )
        for name, which in (("SD-VAE, teacher", "teacher"), ("LiteVAE-B, student", "student"))
    ]  # fmt: skip
    channels = range(sum(key.startswith("latent_error_") for key in found))
    errors, correlations = (
        [found[f"latent_{what}_{c}"] for c in channels] for what in ("error", "correlation")
    )
    header = ("encoder", "parameters", "PSNR, dB", "SSIM", "encoded images/s")
    return "\n".join([
        "# Distilling an encoder", "",
        "LiteVAE-B's encoder, distilled into the latents of an SD-VAE. Both have a quarter of "
        f"their widths and see images of {RESOLUTION}². The teacher has {len(channels)} latent "
        "channels at f = 4. To learn colours, its encoder was itself distilled first, from "
        f"a LiteVAE with the wavelet shortcut ({count // 2:,} steps each), and then trained on "
        f"together with the decoder ({trained(count, count // 4)}). The student, a plain LiteVAE, "
        f"learned for {trained(4 * count, count // 2)}. Measured on {result['held_out']} images "
        "that none of them saw.", "",
        *markdown_table(header, rows), "",
        f"- Latents: correlation {min(correlations):.4f} to {max(correlations):.4f} over the "
        f"channels; error {min(errors):.3f} to {max(errors):.3f} of the teacher's standard "
        "deviation (root mean square).",
        f"- The student's reconstructions are {found['psnr_to_teacher']:.2f} dB from the "
        "teacher's.", "",
        "![Held-out PSNR, and correlation of the latents](distil-curves.png)", "",
        "Images; the teacher's reconstructions; the student's:", "",
        "![Images and reconstructions](distil.png)", "",
        f"A diffusion model, trained on the teacher's latents alone for {count:,} steps of 16, "
        "edits and inpaints with either encoder. Images; edited with the teacher's encoder; with "
        "the student's; masked; inpainted with the teacher's; with the student's:", "",
        "![Edited and inpainted images](distil-edits.png)", "",
        *about(result),
    ])  # fmt: skip


def finetune_page(result: dict[str, Any]) -> str:
    """Format the page of `finetune`."""
    scores = result["scores"]
    rows = [
        (name, f"{scores[which]['psnr']:.2f}", f"{scores[which]['ssim']:.3f}")
        for name, which in (("before", "before"), ("decoder fine-tuned", "after"))
    ]
    count = result["steps"]
    equal = "equal to the bit" if result["latents_equal"] else "NOT equal"
    return "\n".join([
        "# Fine-tuning a decoder", "",
        "SD-VAE at a quarter of its widths, trained on the built-in photographs for "
        f"{trained(count, count // 4)}; then its decoder alone, for "
        f"{trained(count // 2, count // 8)}, on other photographs, of which "
        f"{result['held_out']} are held out and measured here. Both trainings are short: the page "
        "shows what changes and what does not, not a quality to expect.", "",
        *markdown_table(("", "PSNR, dB", "SSIM"), rows), "",
        f"The latents of all {result['held_out']} images, means and log-variances, are {equal} "
        "before and after.", "",
        "Images; reconstructions before; after:", "",
        "![Images and reconstructions](finetune.png)", "",
        *about(result),
    ])  # fmt: skip


def trained(count: int, last: int) -> str:
    """The length of a training by `steps`."""
    return f"{count:,} steps of 16 images at {RESOLUTION // 2}² and {last:,} at {RESOLUTION}²"


def about(result: dict[str, Any]) -> list[str]:
    """The machine and the command."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    return [f"{machine}.", "", f"    {result['command']}", ""]


if __name__ == "__main__":
    main()
