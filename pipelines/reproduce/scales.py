"""Three sizes at which a table is run, and how a row's recipe is brought to each.

A scale makes every row of every table smaller by the same few rules, so that what a row switches
stays switched: widths are divided and never set (all but the decoder's, which no row switches),
lengths and sides too, and what a row says of norms, losses, levels or parts is not touched.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from ldm.config import Config, Tree, key_paths, merge, parse_override, resolve, to_tree
from ldm.errors import UsageError
from pipelines.training.autoencoder_recipe import AutoencoderRecipe
from pipelines.training.diffusion_recipe import DiffusionRecipe

RecipeT = TypeVar("RecipeT", AutoencoderRecipe, DiffusionRecipe)


@dataclass(frozen=True)
class Measuring:
    """How what was trained is measured."""

    images: int | None = None
    """Held-out images reconstructed at most; None: all."""
    published: bool = True
    """Whether published networks (Inception, VGG) are asked for. Else others stand in for them, so
    that the code runs, and the columns that need them stay empty."""
    samples: int = 50_000
    """Images sampled for a FID."""
    sampler_steps: int = 18
    """Steps of the sampler, Heun's."""
    latents: int = 1000
    """Images whose latents a draw of MMD takes."""
    draws: int = 5
    """Draws of MMD."""
    encoder_side: int = 256
    """Side of the images whose encoding is timed, in pixels."""
    encoder_batch: int = 32
    """Images in the batch whose memory is told."""
    encoder_repeats: int | None = None
    """Turns that are timed; None: as `ldm bench`."""


@dataclass(frozen=True)
class Scale:
    """A size at which tables are run."""

    name: str
    summary: str
    """What it is for."""
    widths: int = 1
    """Divides the widths of all networks."""
    decoder: int | None = None
    """Width of the decoder; None: its own."""
    halvings: int = 0
    """How often the sides of the images are halved."""
    steps: float = 1.0
    """Share of the steps."""
    batch: int = 1
    """Divides the batch."""
    rate: float = 1.0
    """Multiplies the learning rate."""
    also: Mapping[str, Any] = field(default_factory=dict)
    """Laid over what these rules make of every recipe, where it has such keys."""
    measuring: Measuring = Measuring()
    judges: bool = True
    """Whether anything is learned that the paper's claims could be judged by."""

    @property
    def is_paper(self) -> bool:
        """Whether recipes stay as they are."""
        return self.widths == 1 and self.steps == 1.0


# A short training needs a larger learning rate, and these to stand it: those of the preset
# litevae-b-quarter, whose rate is five times the paper's.
BRISK = {"betas": [0.9, 0.99], "warmup_images": 800, "clip_norm": 1.0}

SCALES = {
    scale.name: scale
    for scale in (
        Scale(
            "smoke",
            "a minute a table on a CPU: proves that the machinery runs, and no more",
            # 12, as 40 below: GroupNorm makes groups of three
            widths=8, decoder=12, halvings=2, steps=1 / 12_500, batch=4, rate=5.0,
            also=BRISK | {
                "warmup_images": 0,
                "data": {"workers": 0},
                "loss": {"lpips": 0},  # no network of published weights is needed
                "validate_images": 8,
                "statistics_images": 32,
                "run": {"log_every_steps": 4},
            },
            measuring=Measuring(
                images=32, published=False, samples=16, sampler_steps=4, latents=32, draws=2,
                encoder_side=64, encoder_batch=2, encoder_repeats=1,
            ),
            judges=False,
        ),
        Scale(
            "small",
            "meant for an hour a table on a GPU, a night on a CPU, on a folder of photographs",
            # 40 is not quite a quarter of 128, but of 32 channels GroupNorm would normalise each
            # alone, and hide how bright a picture is as a whole; of 40 it makes groups of five
            # (the paper's have four and more).
            widths=4, decoder=40, halvings=1, steps=1 / 50, batch=2, rate=5.0,
            also=BRISK | {
                # a fifth of so few steps leaves nothing yet that is worth judging
                "adversarial": {"start": 0.5, "ramp": 0.1},
                "run": {"validate_every_steps": 1000, "save_every_steps": 500},
            },
            measuring=Measuring(samples=2048, latents=1000),
        ),
        Scale("paper", "the full recipe, on the paper's data"),
    )
}  # fmt: skip


def find_scale(name: str) -> Scale:
    """A scale by its name.

    Raises:
        UsageError: there is none.
    """
    if name not in SCALES:
        raise UsageError(f"--scale {name}: it must be one of {', '.join(SCALES)}")
    return SCALES[name]


def scale_recipe(
    published: RecipeT, scale: Scale, settings: Sequence[str] = (), source: str | None = None
) -> RecipeT:
    """A row's recipe at a scale.

    Args:
        published: the paper's.
        settings: `key=value` over all that; those that the recipe has no such key for are left out.
        source: the data in place of the recipe's.

    Raises:
        UsageError: a setting has a bad value, or does not fit.
    """
    config_class, tree = type(published), to_tree(published)
    if not scale.is_paper:
        tree = merge(_shrink(tree, scale), _known(scale.also, tree))
        if decoder := tree.get("decoder"):
            decoder["channels"] = scale.decoder
    if source is not None:
        tree["data"] = tree["data"] | {"source": source}
    keys = _keys(config_class) if settings else ()
    return resolve(config_class, tree, [s for s in settings if setting_key(s) in keys])


def check_settings(settings: Sequence[str]) -> None:
    """Refuse settings that no recipe knows, and those that a row or an option decides.

    Raises:
        UsageError: there is one.
    """
    known = _keys(AutoencoderRecipe) | _keys(DiffusionRecipe)
    for text in settings:
        key = setting_key(text)
        if key == "data.source":
            raise UsageError("data.source is given as --data")
        if key == "autoencoder":
            raise UsageError("autoencoder is given as --take ROW=PATH")
        if key not in known:
            # resolved against a recipe for its own words of what was meant
            resolve(AutoencoderRecipe, {}, [text])


@cache
def _keys(config_class: type[Config]) -> frozenset[str]:
    return frozenset(key_paths(config_class))


def setting_key(text: str) -> str:
    """The dotted key of `key=value`, without the numbers that index lists.

    Raises:
        UsageError: it is not of that form.
    """
    path, _ = parse_override(text)
    return ".".join(part for part in path if not part.isdigit())


# --------------------------------------------------------------------------------- the rules
def _width(value: int, scale: Scale) -> int:
    return max(1, value // scale.widths)


def _side(value: int, scale: Scale) -> int:
    return value >> scale.halvings


def _steps(value: int, scale: Scale) -> int:
    return max(1, round(value * scale.steps))


def _batch(value: int, scale: Scale) -> int:
    return max(1, value // scale.batch)


def _rate(value: float, scale: Scale) -> float:
    return value * scale.rate


def _images(value: float, scale: Scale) -> float:
    """Of what is counted in images over a training: the same share of it."""
    return value * scale.steps / scale.batch


# By the last part of a key, wherever it stands
RULES: dict[str, Callable[[Any, Scale], Any]] = {
    "channels": _width,  # of encoders, extractors, discriminators, the diffusion network
    "max_channels": _width,
    "width": _width,  # of a ViT's tokens
    "head_width": _width,  # of the diffusion network: as many heads as before
    "resolution": _side,  # of phases, of stage two, of StyleGAN's discriminator
    "grid": _side,  # of a ViT's positions
    "steps": _steps,
    "batch_size": _batch,
    "lr": _rate,
    "ema_half_life_images": _images,
}


def _shrink(tree: Tree, scale: Scale) -> Tree:
    """A recipe's tree by the rules above, and a discriminator that looks at smaller images."""
    small = _by_rules(tree, scale)
    if judge := small.get("discriminator"):
        # what belongs to a side: halvings, so that as much of an image is seen at once
        if judge["type"] == "unet":
            kept = max(1, len(judge["multipliers"]) - scale.halvings)
            judge["multipliers"] = judge["multipliers"][:kept]
        elif judge["type"] == "patchgan":
            judge["layers"] = max(1, judge["layers"] - scale.halvings)
        elif judge["channels"] is None:  # StyleGAN's own, 32768 / resolution
            full = 2**15 // tree["discriminator"]["resolution"]
            judge["channels"] = _width(full, scale)
    return small


def _by_rules(node: Any, scale: Scale) -> Any:
    if isinstance(node, list):
        return [_by_rules(item, scale) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: RULES[key](value, scale)
        if key in RULES and isinstance(value, (int, float))
        else _by_rules(value, scale)
        for key, value in node.items()
    }


def _known(over: Mapping[str, Any], tree: Tree) -> Tree:
    """The part of a tree whose keys another tree has: stage two has no loss.lpips."""
    return {
        key: _known(value, tree[key]) if isinstance(value, Mapping) else value
        for key, value in over.items()
        if key in tree
    }


def evaluation_side(recipe: AutoencoderRecipe, asked: int | None, scale: Scale) -> int:
    """Side of the images a row is measured on, in pixels.

    Args:
        asked: what the paper measured on, where that is not what the training ends at.
    """
    return recipe.phases[-1].resolution if asked is None else asked >> scale.halvings
