"""What differs from the paper's conditions, in words: all of it, found by comparing recipes."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from autoencoders.discriminators.stylegan import StyleGANConfig
from ldm.config import Tree, to_tree
from ldm.data.dataset import PHOTOS
from pipelines.reproduce.plan import (
    DECISIVE,
    Job,
    Recipe,
    kind_of_stage_one,
    published_recipe,
)
from pipelines.reproduce.scales import setting_key
from pipelines.reproduce.tables import Table

UNTOLD = ("run.", "validate_images", "data.workers", "autoencoder")
"""How keys begin that change no number, all but `DECISIVE`; or that are told elsewhere."""
STANDING = (
    "Where the paper is silent (the losses' weights, the widths of some networks, the averaging of "
    "weights), this toolkit's defaults: the README lists them.",
    "One training of each recipe, of one seed: how much two seeds differ is not known. The ± of a "
    "difference is its standard error over the images, no more; where there is none, it is not "
    "known.",
)
EDM = (
    "Diffusion: EDM's preconditioning, noise and sampler (Karras et al. 2022); the paper follows "
    "latent diffusion's (Rombach et al. 2022)."
)
KNOWN = {
    "data.source": "data",
    "data.held_out": "images held out",
    "phases": "training",
    "steps": "steps",
    "batch_size": "images a step",
    "lr": "learning rate",
    "betas": "Adam's betas",
    "clip_norm": "largest norm of a gradient",
    "warmup_images": "images of warm-up",
    "ema_half_life_images": "half-life of the averaged weights, images",
    "decoder.channels": "base width of the decoder",
    "encoder.channels": "base width of the encoder",
    "encoder.extractor.channels": "base width of feature extraction",
    "encoder.aggregator.channels": "base width of feature aggregation",
    "encoder.aggregator.width": "width of the ViT",
    "encoder.aggregator.grid": "side of the ViT's grid of positions",
    "discriminator.channels": "base width of the discriminator",
    "discriminator.multipliers": "widths of the discriminator's halvings",
    "discriminator.layers": "halvings of the discriminator",
    "discriminator.resolution": "side the discriminator is made for",
    "discriminator.max_channels": "largest width of the discriminator",
    "network.channels": "base width of the diffusion network",
    "network.head_width": "width of its attention heads",
    "resolution": "side of the images",
    "statistics_images": "images the latents' statistics are taken over",
    "adversarial.start": "where the discriminator begins, as a fraction of all steps",
    "adversarial.ramp": "how long its weight takes to rise, likewise",
    "loss.lpips": "weight of LPIPS in the loss",
    "run.seed": "seed",
    "run.precision": "precision of the training",
}


def deviations(
    table: Table,
    jobs: Sequence[Job],
    settings: Sequence[str],
    records: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Lines on everything that is not as in the paper.

    Args:
        settings: given by hand.
        records: of the rows that are done.
    """
    lines = []
    if table.config.measure == "encoder":
        lines.append("The machine: see below; the paper's is a Quadro RTX 6000.")
    else:
        trained = [job for job in jobs if not (records.get(job.row.name) or {}).get("taken")]
        lines += _of_recipes(trained)
        lines += [
            f"Row {name} is {record['taken']['path']}, given by hand: trained as its own file says."
            for name, record in records.items()
            if record["taken"]
        ]
        lines += _shared(jobs)
        lines += STANDING
        lines += [EDM] if table.config.measure == "generation" else []
    if settings:
        lines.append(f"Set by hand: {', '.join(settings)}.")
    notes = (note for record in records.values() for note in record["notes"])
    return [*lines, *dict.fromkeys(notes)]


def levelled(jobs: Sequence[Job], settings: Sequence[str]) -> list[str]:
    """Keys set by hand in which the paper's rows differ, and these no longer do."""
    trained = [job for job in jobs if job.taken is None]
    here = [dict(_leaves(to_tree(job.training.recipe))) for job in trained]
    rows = (job.row for job in trained)
    paper = [dict(_leaves(to_tree(published_recipe(row.kind, row.preset)))) for row in rows]
    return [
        key
        for key in dict.fromkeys(map(setting_key, settings))
        if _differ(paper, key) and not _differ(here, key)
    ]


def _differ(trees: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(tree.get(key) != trees[0].get(key) for tree in trees)


def _of_recipes(jobs: Sequence[Job]) -> Iterator[str]:
    """A line for every key in which the rows' recipes differ from the paper's."""
    found: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for job in jobs:
        for stage, here, paper in _pairs(job):
            ours, theirs = _settings(here), _settings(paper)
            for key in ours | theirs:
                if is_told(key) and ours.get(key) != theirs.get(key):
                    told = _words(key, ours.get(key)), _words(key, theirs.get(key))
                    found[stage, key][f"{told[0]} in place of {told[1]}"] = None
    for (stage, key), ways in found.items():
        name = f"{stage}{KNOWN.get(key, key)}"
        yield f"{name[0].upper()}{name[1:]}: {'; '.join(ways)}{_why(key, ways)}."


def _pairs(job: Job) -> Iterator[tuple[str, Recipe, Recipe]]:
    """Of both stages: which, the recipe, and the paper's."""
    row = job.row
    yield "", job.training.recipe, published_recipe(row.kind, row.preset)
    if job.stage_two is not None and job.taken is None:
        name = job.stage_two.recipe.autoencoder
        published = published_recipe(kind_of_stage_one(name), name)
        yield "stage one, ", job.stage_one.recipe, published


def is_told(key: str) -> bool:
    """Whether a key, dotted, is told of where a recipe differs from the paper's."""
    return key in DECISIVE or not key.startswith(UNTOLD)


def _settings(recipe: Recipe) -> dict[str, Any]:
    """A recipe's values by dotted keys."""
    settings = dict(_leaves(to_tree(recipe)))
    judge = getattr(recipe, "discriminator", None)
    if isinstance(judge, StyleGANConfig):  # null is a width, too
        settings["discriminator.channels"] = judge.widths[0]
    return settings


def _why(key: str, ways: Iterable[str]) -> str:
    if key == "loss.lpips" and any(way.startswith("0 ") for way in ways):
        return " (no VGG-16 is needed; ℓ1 and the other terms of the row remain)"
    return ""


def _words(key: str, value: Any) -> str:
    if key == "phases":
        return ", then ".join(f"{p['steps']:,} steps at {p['resolution']}²" for p in value)
    if key == "data.source" and value == PHOTOS:
        return "the photographs inside scikit-image"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (int, float)):
        return f"{value:,}" if isinstance(value, int) else f"{value:,g}"
    return str(value)


def _shared(jobs: Sequence[Job]) -> Iterator[str]:
    by_folder: dict[Any, list[str]] = defaultdict(list)
    for job in jobs:
        by_folder[job.training.folder].append(job.row.name)
    for names in by_folder.values():
        if len(names) > 1:
            yield (
                f"Rows {', '.join(names)} differ in their data alone, of which there is one here: "
                "one training stands for them."
            )


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
