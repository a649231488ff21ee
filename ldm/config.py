"""Configuration: preset YAML ← key=value → merged → one frozen, validated object.

A config class stands directly above the class that it configures, in any package. This module finds
presets, merges overrides into them, validates the result and explains errors.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

from ldm.errors import UsageError
from ldm.records import check_bounds


class Config(BaseModel):
    """Base of all configs: frozen, without unknown keys; docstrings of fields are their help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


# Largest sizes of a model, so that a config from elsewhere cannot ask for any amount of memory.
Width = Annotated[int, Field(gt=0, le=65_536)]
"""Channels, features or a side."""
Depth = Annotated[int, Field(gt=0, le=64)]
"""Blocks in a row, or a factor."""
Levels = Annotated[tuple[Depth, ...], Field(min_length=1, max_length=8)]
"""A factor for each resolution."""


def read_resolution(given: Any) -> int | tuple[int, int]:
    """Return R for R×R pixels, given as R or [R, R], or (H, W) for [H, W], height first.

    A ValueError of one line says what it must be.
    """
    sides = given if isinstance(given, list | tuple) else (given, given)
    try:
        height, width = map(_SIDE.validate_python, sides)
    except ValueError:  # pydantic's too
        raise ValueError(
            "must be a number of pixels from 1 to 65536, or two, [height, width]"
        ) from None
    return resolution_of(height, width)


def plain_size(resolution: int | tuple[int, int]) -> int | list[int]:
    """A resolution as JSON holds it: R or [H, W]."""
    return resolution if isinstance(resolution, int) else list(resolution)


_SIDE = TypeAdapter(Width)
Resolution = Annotated[
    int | tuple[int, int],
    PlainValidator(read_resolution),
    PlainSerializer(plain_size, when_used="json"),
]
"""Size of images in pixels: R for R×R, else (H, W), height first."""


def resolution_of(height: int, width: int) -> Resolution:
    """Resolution of images of this height and width."""
    return height if height == width else (height, width)


def height_width(resolution: Resolution) -> tuple[int, int]:
    """Height and width of images of a resolution."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def shorter_side(resolution: Resolution) -> int:
    """The lesser of height and width."""
    return min(height_width(resolution))


def pixel_count(resolution: Resolution) -> int:
    """Number of pixels of an image."""
    height, width = height_width(resolution)
    return height * width


def format_size(resolution: Resolution) -> str:
    """Format a resolution for messages: 256×256 or 96×64, height first."""
    return "{}×{}".format(*height_width(resolution))


def short_size(resolution: Resolution) -> str:
    """Format a resolution for tables: 256² or 96×64, height first."""
    return f"{resolution}²" if isinstance(resolution, int) else format_size(resolution)


def size_word(resolution: Resolution) -> str:
    """Write a resolution as options take it, and names of files hold it: 256 or 96x64."""
    return str(resolution) if isinstance(resolution, int) else "{}x{}".format(*resolution)


ConfigT = TypeVar("ConfigT", bound=Config)
Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 1e5 without a point is a number, as in YAML 1.2.

    Aliases are refused: nine lines of them stand for a billion values.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # type: ignore[no-untyped-call]
            raise yaml.YAMLError("aliases are not supported")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    [*"-+0123456789"],
)


def parse_yaml(text: str | bytes) -> Any:
    """Parse YAML of bounded depth and numbers, without aliases; a ValueError says what is wrong."""
    try:
        tree = yaml.load(text, _Loader)
    except Exception as error:  # PyYAML's constructors raise nearly anything
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ValueError(f"not YAML: {problem}") from error
    check_bounds(tree)
    return tree


# ---------------------------------------------------------------------------------- presets
def list_presets(kind: str) -> list[str]:
    """Names of the presets of a kind: a folder of `configs/` ("ae", "recipes", "diffusion")."""
    folder = resources.files("configs") / kind
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def load_preset(kind: str, name: str) -> Tree:
    """Load the tree in `configs/<kind>/<name>.yaml`, merged over its `base`, if it has one.

    A base of another kind is given with its kind: `base: ae/litevae-b`.
    """
    if name not in list_presets(kind):
        raise UsageError(f"no preset '{name}'{did_you_mean(name, list_presets(kind))}")
    tree = _read_preset(kind, name)
    base = tree.pop("base", "")
    tree.pop("paper", None)
    base_kind, _, base = base.rpartition("/")
    return merge(load_preset(base_kind or kind, base), tree) if base else tree


def published(kind: str, name: str) -> dict[str, Any]:
    """The paper's results for a preset: table, row and numbers; {} if it reports none."""
    return _read_preset(kind, name).get("paper", {})


def _read_preset(kind: str, name: str) -> Tree:
    text = (resources.files("configs") / kind / f"{name}.yaml").read_text("utf-8")
    return parse_yaml(text) or {}


def preset_summary(kind: str, name: str) -> str:
    """The comment in a preset's first line, which describes it."""
    text = (resources.files("configs") / kind / f"{name}.yaml").read_text("utf-8")
    first = text.partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def resolve(
    config_class: type[ConfigT], tree: Mapping[str, Any], overrides: Sequence[str] = ()
) -> ConfigT:
    """Merge a preset's tree and `key=value` overrides over the defaults, and validate.

    A UsageError names the dotted path of an invalid value, or the key nearest to an unknown one.
    """
    edits = [parse_override(text) for text in overrides]
    tree = merge(_defaults(config_class), tree)  # every section exists before it is edited
    # A `type` replaces its whole section, so it is set before the section's other keys.
    for path, value in sorted(edits, key=lambda edit: edit[0][-1] != "type"):
        tree = _edited(tree, path, value)
    try:
        config_class.model_validate(tree)
    except ValidationError as error:
        # strings that YAML has read as another type: a folder named 2024, or no
        wanted = [p["loc"] for p in error.errors() if p["type"] == "string_type"]
        strings = {_path(loc, config_class) for loc in wanted}
        for text, (path, _) in zip(overrides, edits, strict=True):
            if ".".join(path) in strings:
                tree = _edited(tree, path, text.partition("=")[2].strip())
    return validate(config_class, tree)


def validate(config_class: type[ConfigT], tree: Mapping[str, Any]) -> ConfigT:
    """Build a config from a tree of plain values, merged over the defaults: a section without a
    `type` has the default's."""
    try:
        return config_class.model_validate(merge(_defaults(config_class), tree))
    except ValidationError as error:
        raise UsageError(_explain(config_class, error)) from error
    except UnicodeEncodeError as error:  # pydantic's own
        raise UsageError(f"{error.object!r:.60} is no text") from error


def _defaults(config_class: type[Config]) -> Tree:
    """The defaults as a tree, with every section and list that an override may edit."""
    fields = config_class.model_fields
    given = {name: f.get_default(call_default_factory=True) for name, f in fields.items()}
    optional = {name for name, field in fields.items() if not field.is_required()}
    return config_class.model_construct(**given).model_dump(mode="json", include=optional)


# ---------------------------------------------------------------------------------- merging
def parse_override(text: str) -> tuple[list[str], Any]:
    """Parse `a.b=3` as (["a", "b"], 3). Values are YAML: numbers, true, null, [1, 2], {a: 1}."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip(" ."):
        raise UsageError(f"'{text}' is not of the form key=value, such as batch_size=32")
    try:
        return key.strip().split("."), parse_yaml(value)
    except ValueError as error:
        raise UsageError(f"the value in '{text}' is {error}: quote it") from error


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """Merge `over` into `base`, section by section; a section of another `type` replaces it."""
    merged = dict(base)
    for key, value in over.items():
        if not isinstance(value, Mapping):
            merged[key] = value
            continue
        old = merged.get(key)
        section = old if isinstance(old, Mapping) else {}
        kind = section.get("type")
        is_another = kind not in (None, value.get("type", kind))
        merged[key] = merge({} if is_another else section, value)
    return merged


def _edited(tree: Any, path: Sequence[str], value: Any, above: str = "") -> Any:
    """Return a tree with one key set; a number in the path indexes a list."""
    if not path:
        return value
    part, *rest = path
    if isinstance(tree, list):
        if not part.isdigit() and tree:
            key = f"{above}0.{part}"
            raise UsageError(f"'{above}{part}': a list needs an index, such as {key}")
        if not part.isdigit() or int(part) >= len(tree):
            raise UsageError(f"'{above}{part}': the list has entries 0 to {len(tree) - 1}")
        at = int(part)
        return [*tree[:at], _edited(tree[at], rest, value, f"{above}{part}."), *tree[at + 1 :]]
    section = tree if isinstance(tree, Mapping) else {}
    if part == "type" and not rest and section.get("type") not in (None, value):
        return {"type": value}
    return merge(section, {part: _edited(section.get(part), rest, value, f"{above}{part}.")})


# ----------------------------------------------------------------------------------- errors
def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of an error message: the nearest known name, or else the known names."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    names = sorted(set(known))
    shown, others = names[:12], names[12:]
    if others:
        shown.append(f"and {len(others)} more")
    return f"; there are: {', '.join(shown)}" if shown else ""


def _explain(config_class: type[Config], error: ValidationError) -> str:
    problems = error.errors()
    # an unknown key first: it is often the misspelt name of one that is then missing
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = _path(first["loc"], config_class)
    if first["type"] == "extra_forbidden":
        keys = sorted(set(key_paths(config_class, index="0.")))
        by_last = [key for key in keys if key.rpartition(".")[2] == path.rpartition(".")[2]]
        if re.sub(r"\.\d+\.", ".0.", path) in keys:
            hint = ": it belongs to another type of this section"
        elif len(by_last) == 1:
            hint = f"; did you mean '{by_last[0]}'?"
        else:
            hint = did_you_mean(path, keys)
        text = f"unknown key '{path}'{hint}"
    else:
        given = first.get("input")
        shown = "" if isinstance(given, (dict, BaseModel)) else f" (got {given!r})"
        where = f"'{path}': " if path else ""  # a rule between keys has no path
        message = first["msg"].removeprefix("Value error, ")
        text = f"{where}{message[0].lower()}{message[1:]}{shown}"
    more = len(problems) - 1
    return text + (f" (and {more} more)" if more else "")


def _path(loc: tuple[int | str, ...], config_class: type[Config]) -> str:
    """Pydantic's location as the dotted path of an override, without the tags of unions."""
    names = {key.rpartition(".")[2] for key in key_paths(config_class)}
    ends = (0, len(loc) - 1)
    kept = (p for i, p in enumerate(loc) if i in ends or isinstance(p, int) or p in names)
    return ".".join(map(str, kept))


def key_paths(config_class: type[Config], prefix: str = "", index: str = "") -> Iterator[str]:
    """All dotted keys of a config, over all variants of its unions.

    After the name of a list of sections comes `index`, such as "0.".
    """
    for name, field in config_class.model_fields.items():
        yield f"{prefix}{name}"
        inside = f"{prefix}{name}.{index if get_origin(field.annotation) is tuple else ''}"
        for section in _sections(field.annotation):
            yield from key_paths(section, inside, index)


def _sections(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    elif get_origin(annotation) is not Literal:
        for inner in get_args(annotation):  # of a union, or of a list of sections
            yield from _sections(inner)


# ---------------------------------------------------------------------------------- showing
def to_tree(config: Config) -> Tree:
    """Convert a config to plain values, for YAML, JSON and checkpoints."""
    return config.model_dump(mode="json")


def drop_defaults(tree: Tree, defaults: Mapping[str, Any]) -> None:
    """Remove keys that have their default, in a tree of settings and its branches."""
    for key, default in defaults.items():
        if tree.get(key) == default:
            del tree[key]
    for branch in tree.values():
        if isinstance(branch, dict):
            drop_defaults(branch, defaults)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """Name values by dotted keys: {"a": {"b": 1}} → {"a.b": 1}; an empty section is a value."""
    leaves: Tree = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def to_flow(value: Any) -> str:
    """Format a plain value as YAML on one line."""
    flow = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    return flow.removesuffix("\n").removesuffix("...").strip()


def describe(config: Config, indent: int = 0) -> Iterator[tuple[str, str]]:
    """Yield lines of YAML, each with the docstring and the choices of its key."""
    pad = "  " * indent
    for name, field in type(config).model_fields.items():
        value, doc = getattr(config, name), " ".join((field.description or "").split())
        if choices := list(_choices(field.annotation)):
            doc = f"{doc} [{' | '.join(choices)}]"
        if isinstance(value, Config):
            yield f"{pad}{name}:", doc
            yield from describe(value, indent + 1)
        else:
            plain = config.model_dump(mode="json", include={name})[name]
            yield f"{pad}{name}: {to_flow(plain)}", doc


def _choices(annotation: Any) -> Iterator[str]:
    """The values of a key, or the types of a section, if there are several."""
    if get_origin(annotation) is Literal and len(words := get_args(annotation)) > 1:
        yield from (to_flow(word) for word in words if isinstance(word, str | bool))
    variants = [
        section
        for section in _sections(annotation)
        # one with a required key is part of an imported model, and not chosen by its type alone
        if not any(field.is_required() for field in section.model_fields.values())
    ]
    if len(variants) > 1:
        yield from (f"type={variant.model_fields['type'].default}" for variant in variants)
