"""A pipeline as others get it: its file without paths of this machine, and its model card.

A card states what the model's file and the results beside it say, and nothing else. Text from files
stands in inline code, where nothing is markup.
"""

import json
import re
from collections.abc import Iterator
from pathlib import PureWindowsPath
from typing import Any

from torch import nn

from autoencoders.sdvae.formats import pick_settings
from ldm.checkpoint import ModelFile
from ldm.config import Tree, format_size, to_tree, validate
from ldm.data.hf import is_hub
from ldm.errors import LdmError, UsageError, try_call
from ldm.hub import REPOSITORY, code, front_matter
from ldm.records import NUMBERS, SAMPLES, read_numbers, read_tree, section, show_number
from ldm.run_folder import read_run
from ldm.tables import markdown_table
from pipelines.sampling.model import LatentModel
from pipelines.sampling.sample_folder import is_same_model
from pipelines.sampling.settings import Sampling, settings_slug

PICTURE = "samples.png"
PROVENANCE = ("created", "versions", "tf32", "images_seen", "ema_std", "ema_images", "ema_residual")
"""Entries of a provenance that are published: no command, which may hold anything."""
ORIGIN = ("format", "commit", "license", "scale_factor", "sha256")
"""Entries about weights from elsewhere that are published, besides their source and settings."""
SLASH = re.compile(r"[/\\]")
PATH = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\,;:()'\"]+){2,}")
SHOWN = 12
"""Classes that a card names."""

CARD = """{front}

# A latent diffusion model of {size} images
{picture}
```python
from pipelines import LatentDiffusionPipeline

pipe = LatentDiffusionPipeline.from_pretrained({where})
{draw}
```

## The model

{facts}
{numbers}"""
DRAW = 'images = pipe(n=4, seed=0, output="pil")\nimages[0].save("sample.png")'
DRAW_DEEP = "images = pipe(n=4, seed=0)  # a tensor in [−1, 1]: PIL images have 8 bits"
DRAWN = """
![Samples]({picture})

The first {count} images of seed 0, none left out: `pipe(n={count}, seed=0)`, in {precision}.
"""


# ----------------------------------------------------------------------- what is published
def published(model: LatentModel) -> ModelFile:
    """Return a model as a file without commands, and with the last folder of each path only.

    The weights are those in memory, float32 whatever the precision that it samples in.
    """
    config, ae = _with_names(to_tree(model.recipe)), model.codec.autoencoder
    origin, came_with = _origin(model.provenance.get("imported")), _origin(model.autoencoder_origin)
    imported = {"imported": came_with} if came_with else {}
    ae_config = _with_names(to_tree(ae.config))
    inner = ModelFile("autoencoder", ae_config, ae.state_dict(), provenance=imported)
    known = {key: model.provenance[key] for key in PROVENANCE if key in model.provenance}
    details = {"preset": _preset(model), "imported": origin, "autoencoder_sha256": inner.sha256}
    known |= {key: value for key, value in details.items() if value}
    statistics = model.codec.statistics() | {"classes": list(model.classes.names)}
    weights = model.denoiser.network.state_dict()
    return ModelFile("diffusion", config, weights, statistics, known, inner)


def last_name(path: object) -> str:
    """Return the last name in a path of any system, of a run's `ckpt.pt` that of its folder.

    A data set of the Hub keeps its whole name.
    """
    if is_hub(str(path)):
        return str(path)
    where = PureWindowsPath(str(path))
    is_model = where.suffix in (".pt", ".safetensors")
    if is_model and where.stem in ("ckpt", "best") and where.parent.name:
        where = where.parent
    return where.name or "unknown"


def _preset(model: LatentModel) -> str | None:
    run = try_call(read_run, model.folder) if model.folder else {}
    if isinstance(run, dict) and run.get("kind") == "diffusion":
        return run.get("preset")
    return model.provenance.get("preset")


def _origin(origin: Any) -> Tree:
    """Return what is published of the place that weights came from."""
    if not isinstance(origin, dict):
        return {}
    kept = {key: origin[key] for key in ORIGIN if key in origin} | pick_settings(origin)
    if source := origin.get("source"):
        # a name of the Hub, or a path that looks like one
        is_public = "commit" in origin and REPOSITORY.fullmatch(str(source))
        kept["source"] = str(source) if is_public else last_name(source)
    before = _origin(origin.get("imported"))
    return kept | ({"imported": before} if before else {})


def _with_names(tree: Any) -> Any:
    """Replace all paths in a tree, such as an imported config's `_name_or_path`, by last names."""
    if isinstance(tree, dict):
        return {key: _with_names(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_names(value) for value in tree]
    return last_name(tree) if isinstance(tree, str) and SLASH.search(tree) else tree


# --------------------------------------------------------------------------------- the card
def write_card(
    model: LatentModel, file: ModelFile, repo_id: str, revision: str | None, samples: int
) -> str:
    """Return the text of a model card.

    Args:
        file: what is `published` of the model.
        repo_id, revision: the repository and the branch that its lines load.
        samples: images in `samples.png`; 0: there is none.
    """
    inner = file.autoencoder.provenance if file.autoencoder else {}
    origin, came_with = section(file.provenance, "imported"), section(inner, "imported")
    task = {} if model.classes.count else {"pipeline_tag": "unconditional-image-generation"}
    tags = ["latent-diffusion", model.codec.autoencoder.config.encoder.type]
    where = json.dumps(repo_id, ensure_ascii=False)
    where += f", revision={json.dumps(revision)}" if revision else ""
    drawn = {"picture": PICTURE, "count": samples, "precision": model.precision}
    return CARD.format(
        # of all that the weights were made from, what binds the whole
        front=front_matter(_license(origin) or _license(came_with), **task, tags=tags),
        size=format_size(model.recipe.resolution),
        picture=DRAWN.format(**drawn) if samples else "",
        where=where,
        draw=DRAW if model.autoencoder_config.pixels.is_plain else DRAW_DEEP,
        facts="\n".join(f"- {fact}." for fact in _facts(model, file, origin, came_with)),
        numbers=_numbers(model),
    )


def _license(origin: Tree) -> Any:
    """The licence of weights from elsewhere, or of what those were made from."""
    before = section(origin, "imported")
    return origin.get("license") or (_license(before) if before else None)


def _facts(model: LatentModel, file: ModelFile, origin: Tree, came_with: Tree) -> Iterator[str]:
    recipe, ae, known = model.recipe, model.codec.autoencoder, file.provenance
    shape = " × ".join(map(str, model.latent_shape))
    kind = f"{recipe.network.type}, denoiser {recipe.denoiser.type}"
    yield f"The network ({kind}): {_parameters(model.denoiser)} parameters"
    yield (
        f"The autoencoder ({ae.config.encoder.type}): {_parameters(ae)} parameters; latents {shape}"
    )
    if names := model.classes.names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield f"{model.classes.count} classes: {', '.join(map(code, names[:SHOWN]))}{more}"
    if origin:
        yield f"Imported from {_named(origin)}"
    else:
        yield from _training(model, known)
    if came_with.get("source"):
        yield f"Its autoencoder was made from {_named(came_with)}"
    versions = section(known, "versions")
    if versions:
        yield f"Written with {code(', '.join(f'{name} {v}' for name, v in versions.items()))}"
    yield f"SHA-256 of the network's weights: {code(file.sha256)}"
    yield f"SHA-256 of the autoencoder's weights: {code(known['autoencoder_sha256'])}"


def _training(model: LatentModel, known: Tree) -> Iterator[str]:
    recipe, seen = model.recipe, known.get("images_seen")
    images = f", {seen:,} images seen" if isinstance(seen, int) else ""
    preset = f", preset {code(known['preset'])}" if known.get("preset") else ""
    data = code(last_name(recipe.data.source))
    yield f"Trained on {data}{images}, in batches of {recipe.batch_size}{preset}"
    if (std := known.get("ema_std")) is not None:
        yield f"Weights: a power-function average of relative width {code(std)}"
    elif recipe.ema_half_life_images:
        half_life = f"{recipe.ema_half_life_images:,.0f}"
        yield f"Weights: an exponential average of half-life {half_life} images"
    else:
        yield "Weights: the last ones, not an average"


def _named(origin: Tree) -> str:
    """The source of weights and their licence, and of those that they were made from."""
    text = code(origin.get("source") or "unknown")
    if origin.get("license"):
        text += f", whose licence is {code(origin['license'])}"
    before = section(origin, "imported")
    return f"{text}; that from {_named(before)}" if before.get("source") else text


def _parameters(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


# ------------------------------------------------------------------------------ the numbers
def _numbers(model: LatentModel) -> str:
    """The section of all measurements of this very model beside its file."""
    found = [(tree, *read_numbers(tree)) for tree in _measurements(model)]
    found = [each for each in found if each[1]]
    if not found:
        return ""
    names = [name for name in NUMBERS if any(name in numbers for _, numbers, _ in found)]
    schedule = model.denoiser.schedule
    header = ["samples", "compared with", "features", *(NUMBERS[name][0] for name in names)]
    rows = [
        [*_measured(tree, schedule), *(show_number(name, numbers, spread) for name in names)]
        for tree, numbers, spread in found
    ]
    warnings = dict.fromkeys(text for tree, *_ in found for text in _warnings(tree))
    lines = ["", "## Numbers", "", *markdown_table(header, rows, left=3)]
    lines += ["", *(f"- {code(text)}" for text in warnings)] if warnings else []
    return "\n".join([*lines, ""])


def _measurements(model: LatentModel) -> Iterator[Tree]:
    folder = model.folder
    for path in sorted(path for glob in SAMPLES if folder for path in folder.glob(glob)):
        tree = try_call(read_tree, path)
        if isinstance(tree, LdmError) or tree is None:
            continue
        named = section(section(section(tree, "samples"), "made_with"), "model")
        # others may lie there: of another average, or of this run before it went on
        if named.keys() & model.identifiers.keys() and is_same_model(named, model.identifiers):
            yield tree


def _measured(tree: Tree, schedule: str) -> tuple[str, str, str]:
    """Return cells of the samples, of what they were compared with, and of the network.

    Args:
        schedule: the model's own.
    """
    samples, reference = section(tree, "samples"), section(tree, "reference")
    made = section(samples, "made_with")
    words = [_count(samples), f"seed {made.get('seed', '?')}", _settings(made, schedule)]
    if sha256 := section(made, "weaker").get("sha256"):
        words.append(f"guide {str(sha256)[:12]}")
    words += [f"precision {made['precision']}"] if made.get("precision") else []
    words += ["chosen classes"] if made.get("labels") is not None else []
    data = section(reference, "data").get("source")
    against = last_name(data) if data else _scrubbed(str(reference.get("what", "unknown")))
    details = [against, str(reference.get("split", "")), _count(reference)]
    network = section(tree, "extractor")
    features = str(network.get("name") or "none")
    features += ", not the published weights" if network.get("is_published") is False else ""
    return code(", ".join(words)), code(", ".join(filter(None, details))), code(features)


def _count(tree: Tree) -> str:
    count = tree.get("count")
    return f"{count:,} images" if isinstance(count, int) else ""


def _settings(made: Tree, schedule: str) -> str:
    known = {key: made[key] for key in Sampling.model_fields if key in made}
    try:
        return settings_slug(validate(Sampling, known), schedule)
    except UsageError:  # of another version
        return "settings unknown"


def _warnings(tree: Tree) -> Iterator[str]:
    texts = tree.get("warnings")
    places = [section(section(tree, "reference"), "data").get("source")]
    places += [section(tree, "samples").get("path")]
    for text in texts if isinstance(texts, list) else ():
        yield _scrubbed(str(text), *(str(place) for place in places if place))


def _scrubbed(text: str, *places: str) -> str:
    """Replace paths in a sentence by their last names."""
    for place in places:
        if SLASH.search(place):
            text = text.replace(place, last_name(place))
    return PATH.sub(lambda found: last_name(found[0]), text)
