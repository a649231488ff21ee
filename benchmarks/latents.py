"""Model the latents of several autoencoders, with one diffusion network and budget.

    python -m benchmarks.latents SD-VAE=runs/a/ckpt.pt plus=runs/b/ckpt.pt --steps 2000

For each: how well it reconstructs; its latents' statistics and their distance from noise (Sadat
et al. 2024, Table 6); diffusion trained on them, over several seeds: the loss in each band of
noise levels, over the last quarter of the training, and the sliced Wasserstein distance of samples
from crops of the training images. Latents are standardised, so that losses compare where n_z is
equal. Images and their resolution are those of the autoencoders' own training.

After an interruption, the same command resumes. Writes <name>.md, its numbers as JSON, and
pictures, to --out.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from autoencoders.pretrained import read_autoencoder
from benchmarks.comparison import add_out, describe_machine, make_parser, spread
from ldm.config import to_tree
from ldm.data import DataConfig, batches, open_source
from ldm.errors import Interrupted, LdmError
from ldm.files import write_atomically, write_json
from ldm.images import save_grid, to_float, to_uint8
from ldm.logbook import read_rows
from ldm.metrics import sliced_wasserstein
from ldm.tables import markdown_table
from pipelines import LatentDiffusionPipeline
from pipelines.analysis.latents import analyze_latents
from pipelines.analysis.mmd import MmdSettings, analyze_mmd
from pipelines.analysis.subjects import (
    Analysis,
    SharedImages,
    Subject,
    agree_on_data,
    open_analysis,
)
from pipelines.recipes import load_recipe
from pipelines.train_diffusion import train_diffusion
from pipelines.validation import band_names, evaluate_autoencoder

CPU = torch.device("cpu")
SHOWN = 16


def main() -> None:
    """Parse, train what is not trained, measure, write the page."""
    parser = make_parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=PATH", help="autoencoders")
    parser.add_argument("--preset", default="demo", help="of stage two")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=256, help="a multiple of 32")
    parser.add_argument("--name", default="latents", help="of the files written")
    add_out(parser, "docs/results/learning")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/latents"), help="folder of the trainings"
    )
    given = parser.parse_args()
    if given.samples < 32 or given.samples % 32:
        parser.error("--samples must be a multiple of 32")
    try:
        subjects, held_out = open_analysis(given.models, device="cpu")
        recipes = {s.name: read_autoencoder(s.path).provenance["recipe"] for s in subjects}
        data = agree_on_data(recipes, None)
        found = {s.name: measure(given, s, held_out, data) for s in subjects}
        analyses = [
            analyze_latents(subjects, held_out, out=given.work / given.name),
            analyze_mmd(subjects, held_out, MmdSettings(), given.work / given.name),
        ]
    except (Interrupted, LdmError) as error:
        sys.exit(str(error))
    for analysis in filter(None, analyses):
        for picture in (file for file in analysis.files if file.suffix == ".png"):
            copy = given.out / f"{given.name}-{picture.name.removeprefix('latents-')}"
            write_atomically(copy, picture.read_bytes())
    facts = {
        "machine": describe_machine(CPU, "fp32"),
        "command": shlex.join(["python", "-m", "benchmarks.latents", *sys.argv[1:]]),
        "resolution": held_out.resolution,
        "models": found,
    }
    write_json(given.out / f"{given.name}.json", facts)
    page = page_of(given, found, [a for a in analyses if a is not None], facts)
    write_atomically(given.out / f"{given.name}.md", page.encode())
    print(page)


# ------------------------------------------------------------------------------ measurements
def measure(
    given: argparse.Namespace, subject: Subject, held_out: SharedImages, data: DataConfig
) -> dict[str, Any]:
    """Reconstruct with an autoencoder, train on its latents, sample: all numbers."""
    side, ae = held_out.resolution, subject.autoencoder
    train = open_source(data, "train", side)
    # two sets of crops: what all is compared with, and what shows how near to that one can come
    crops, others = (
        torch.cat([b.images for b in batches(train, data, side, seed, 0, given.samples, 32)])
        for seed in (1001, 1002)
    )
    with torch.no_grad():
        parts = [ae.decode(ae.encode(to_float(part)).mode()) for part in others.split(32)]
    found: dict[str, Any] = {
        "psnr": evaluate_autoencoder(ae, held_out.source, side, 16, CPU)["psnr"],
        "swd_crops": sliced_wasserstein(others, crops)["mean"],
        "swd_reconstructions": sliced_wasserstein(to_uint8(torch.cat(parts)), crops)["mean"],
        "seeds": [],
    }
    for seed in range(given.seeds):
        folder = train_on(given, subject, data, side, seed)
        pipe = LatentDiffusionPipeline.from_pretrained(folder, "cpu")
        drawn = pipe(n=given.samples, seed=0)
        assert isinstance(drawn, Tensor)
        if seed == 0:
            save_grid(
                drawn[:SHOWN], given.out / f"{given.name}-{slug(subject.name)}.png", SHOWN // 2
            )
        swd = sliced_wasserstein(to_uint8(drawn), crops)["mean"]
        found["seeds"].append(losses(folder) | {"swd": swd})
    return found


def train_on(
    given: argparse.Namespace, subject: Subject, data: DataConfig, side: int, seed: int
) -> Path:
    """Train the preset on a model's latents, or resume, or return what is finished."""
    path = subject.path / "ckpt.pt" if subject.path.is_dir() else subject.path
    recipe = load_recipe("diffusion", given.preset, [
        f"autoencoder={json.dumps(str(path))}", f"resolution={side}", f"steps={given.steps}",
        f"data={json.dumps(to_tree(data) | {'workers': 0})}", f"run.seed={seed}",
        "run.device=cpu", "run.precision=fp32", "run.keep_states=1", *given.settings,
    ])  # fmt: skip
    name = f"{given.preset}-{given.steps}-steps/{slug(subject.name)}-seed-{seed}"
    return train_diffusion(recipe, folder=given.work / given.name / name)


def slug(name: str) -> str:
    """A model's name in file names."""
    return re.sub(r"[^\w.+-]+", "-", name.lower())


def losses(folder: Path) -> dict[str, float]:
    """Mean loss of the last quarter of a training, whole and in each band of noise levels."""
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss" in row]
    last = [row for row in rows if row["images_seen"] > 0.75 * rows[-1]["images_seen"]]
    names = ["loss", *band_names().values()]
    return {name: fmean(row[name] for row in last if name in row) for name in names}


# -------------------------------------------------------------------------------------- page
def page_of(
    given: argparse.Namespace,
    found: dict[str, dict[str, Any]],
    analyses: Sequence[Analysis],
    facts: dict[str, Any],
) -> str:
    """Format the page: how well each is modelled, then what its latents are like."""
    bands = [f"{low:g} < σ < {high:g}" for low, high in band_names()]
    header = ("latents of", "PSNR, dB", "SWD, reconstructions", "SWD, samples", "loss", *bands)
    rows = [
        (
            name, f"{each['psnr']:.2f}", f"{each['swd_reconstructions']:.1f}",
            spread([seed["swd"] for seed in each["seeds"]], 1),
            *(spread([seed[key] for seed in each["seeds"]], 3)
              for key in ("loss", *band_names().values())),
        )
        for name, each in found.items()
    ]  # fmt: skip
    floor = next(iter(found.values()))["swd_crops"]
    machine = ", ".join(f"{key} {value}" for key, value in facts["machine"].items())
    lines = [
        "# How latents can be modelled", "",
        f"One diffusion network (preset `{given.preset}`, {given.steps:,} steps) on the "
        f"standardised latents of each autoencoder, at {facts['resolution']}²; mean ± standard "
        f"deviation over {given.seeds} seeds. SWD × 10³ of {given.samples} images to random crops "
        f"of the training images; that of other such crops is {floor:.1f}.", "",
        *markdown_table(header, rows), "",
        *(f"![Samples of {name}]({given.name}-{slug(name)}.png)" for name in found), "",
    ]  # fmt: skip
    for analysis in analyses:
        lines += [f"## {analysis.title[0].upper()}{analysis.title[1:]}", ""]
        lines += [*markdown_table(analysis.header, analysis.rows), "", *analysis.notes, ""]
    lines += [
        f"![Images, reconstructions and latents]({given.name}-latents.png)",
        f"![Statistics of the latents]({given.name}-statistics.png)",
        f"![MMD to Gaussian noise]({given.name}-mmd.png)", "",
        f"{machine}.", "", f"    {facts['command']}", "",
    ]  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
