"""Configuration: preset YAML ← key=value → merged → one frozen, validated object.

A config class stands directly above what it configures, anywhere in the tree of packages; this
module only knows how to find presets, merge overrides into them and explain what is wrong.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ldm.errors import UsageError


class Config(BaseModel):
    """Frozen, complete, and closed: an unknown key is an error. Docstrings are the help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )


MANY = 12
"""Names that a line of an error still lists."""

ConfigT = TypeVar("ConfigT", bound=Config)
Tree = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML 1.1, in which 1e5 without a point is a number too, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    [*"-+0123456789"],
)


# ---------------------------------------------------------------------------------- presets
def list_presets(kind: str) -> list[str]:
    """Names of the presets of a kind: a folder of `configs/` ("ae", "recipes", "diffusion")."""
    folder = resources.files("configs") / kind
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def load_preset(kind: str, name: str) -> Tree:
    """The tree written in `configs/<kind>/<name>.yaml`, over that of its `base`, if it has one.

    A base of another kind is named with it: `base: ae/litevae-b`.
    """
    if name not in list_presets(kind):
        raise UsageError(f"no preset '{name}'{did_you_mean(name, list_presets(kind))}")
    tree = _read_preset(kind, name)
    base = tree.pop("base", "")
    tree.pop("paper", None)
    base_kind, _, base = base.rpartition("/")
    return merge(load_preset(base_kind or kind, base), tree) if base else tree


def published(kind: str, name: str) -> dict[str, Any]:
    """What the paper reports of a preset: its table, its row and its numbers; {} if nothing."""
    return _read_preset(kind, name).get("paper", {})


def _read_preset(kind: str, name: str) -> Tree:
    text = (resources.files("configs") / kind / f"{name}.yaml").read_text("utf-8")
    return yaml.load(text, _Loader) or {}


def preset_summary(kind: str, name: str) -> str:
    """The comment in a preset's first line: what it is, in a sentence."""
    text = (resources.files("configs") / kind / f"{name}.yaml").read_text("utf-8")
    first = text.partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def resolve(
    config_class: type[ConfigT], tree: Mapping[str, Any], overrides: Sequence[str] = ()
) -> ConfigT:
    """Merge `key=value` overrides into a preset's tree, both over the defaults, and validate.

    Raises:
        UsageError: an unknown key (with the nearest known one), a wrong type or a bad value, each
            with its dotted path.
    """
    edits = [parse_override(text) for text in overrides]
    tree = merge(_defaults(config_class), tree)  # so that a section is there to be edited
    # A `type` first: it exchanges a whole section, and the section's other keys come after it.
    for path, value in sorted(edits, key=lambda edit: edit[0][-1] != "type"):
        _set(tree, path, value)
    words = _meant_as_words(config_class, tree)
    for text, (path, _) in zip(overrides, edits, strict=True):
        if ".".join(path) in words:
            _set(tree, path, text.partition("=")[2].strip())
    return validate(config_class, tree)


def validate(config_class: type[ConfigT], tree: Mapping[str, Any]) -> ConfigT:
    """A tree of plain values as the config object it describes, or one line saying why not.

    It is laid over the defaults, so a section that does not say its `type` is of the default's.
    """
    try:
        return config_class.model_validate(merge(_defaults(config_class), tree))
    except ValidationError as error:
        raise UsageError(_explain(config_class, error)) from error


def _meant_as_words(config_class: type[Config], tree: Mapping[str, Any]) -> set[str]:
    """Keys that want a word where YAML saw something else: a folder named 2024, or no."""
    try:
        config_class.model_validate(tree)
    except ValidationError as error:
        problems = [p for p in error.errors() if p["type"] == "string_type"]
        return {_path(problem["loc"], config_class) for problem in problems}
    return set()


def _defaults(config_class: type[Config]) -> Tree:
    """The defaults as a tree, so that a section's `type` and lists are there to be edited."""
    fields = config_class.model_fields
    given = {name: f.get_default(call_default_factory=True) for name, f in fields.items()}
    optional = {name for name, field in fields.items() if not field.is_required()}
    return config_class.model_construct(**given).model_dump(mode="json", include=optional)


# ---------------------------------------------------------------------------------- merging
def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b=3` → (["a", "b"], 3). Values are YAML: numbers, true, null, [1, 2], {a: 1}, words."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip(" ."):
        raise UsageError(f"'{text}' is not of the form key=value, such as batch_size=32")
    try:
        return key.strip().split("."), yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"the value in '{text}' is not YAML: quote it") from error


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """`over` laid on `base`, section by section. A section of another `type` replaces it whole."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, Mapping):
            exchanged = "type" in value and isinstance(old, Mapping) and old.get("type") is not None
            if not isinstance(old, Mapping) or (exchanged and old["type"] != value["type"]):
                old = {}
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _set(tree: Tree, path: list[str], value: Any) -> None:
    """Lay one override on a tree in place; a number in the path indexes a list."""
    *sections, last = path
    node: Any = tree
    for depth, part in enumerate(sections):
        where = ".".join(path[: depth + 1])
        if isinstance(node, list):
            node = node[_index(node, part, where)]
        else:
            if not isinstance(node.get(part), (dict, list)):
                node[part] = {}
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise UsageError(f"'{where}' is a value, not a section: it has no '{last}'")
    if isinstance(node, list):
        node[_index(node, last, ".".join(path))] = value
    elif last == "type" and node.get("type") not in (None, value):
        node.clear()
        node["type"] = value
    else:
        node.update(merge(node, {last: value}))


def _index(items: list, part: str, where: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UsageError(f"'{where}': the list has entries 0 to {len(items) - 1}")
    return int(part)


# --------------------------------------------------------------------------- what is wrong
def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or what there is, so far as it fits in a line."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    shown = sorted(set(known))
    if len(shown) > MANY:
        shown = [*shown[:MANY], f"and {len(shown) - MANY} more"]
    return f"; there are: {', '.join(shown)}" if shown else ""


def _explain(config_class: type[Config], error: ValidationError) -> str:
    problems = error.errors()
    # a key that is not known first: what it was meant for is then missing, too
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    path = _path(first["loc"], config_class)
    if first["type"] == "extra_forbidden":
        keys = sorted(set(key_paths(config_class)))
        by_last = [key for key in keys if key.rpartition(".")[2] == path.rpartition(".")[2]]
        if path in keys:
            hint = ": it belongs to another type"
        elif len(by_last) == 1:
            hint = f"; did you mean '{by_last[0]}'?"
        else:
            hint = did_you_mean(path, keys)
        text = f"unknown key '{path}'{hint}"
    else:
        given = first.get("input")
        shown = "" if isinstance(given, (dict, BaseModel)) else f" (got {given!r})"
        where = f"'{path}': " if path else ""  # a rule between keys speaks of the whole
        said = first["msg"].removeprefix("Value error, ")
        text = f"{where}{said[0].lower()}{said[1:]}{shown}"
    more = len(problems) - 1
    return text + (f" (and {more} more)" if more else "")


def _path(loc: tuple[int | str, ...], config_class: type[Config]) -> str:
    """Pydantic's location as a dotted path a person could type: tags of unions left out."""
    names = {key.rpartition(".")[2] for key in key_paths(config_class)}
    parts = [str(part) for part in loc]
    is_tag = [
        isinstance(part, str) and part not in names and 0 < i < len(parts) - 1
        for i, part in enumerate(loc)
    ]
    return ".".join(part for part, tag in zip(parts, is_tag, strict=True) if not tag)


def key_paths(config_class: type[Config], prefix: str = "") -> Iterator[str]:
    """Every dotted key a config knows, over all variants of its unions."""
    for name, field in config_class.model_fields.items():
        yield f"{prefix}{name}"
        for section in _sections(field.annotation):
            yield from key_paths(section, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for variant in get_args(annotation):
            yield from _sections(variant)
    elif get_origin(annotation) is not Literal:
        # a list of sections: its keys take an index (phases.0.steps)
        for item in get_args(annotation):
            yield from _sections(item)


# ---------------------------------------------------------------------------------- showing
def to_tree(config: Config) -> Tree:
    """Plain Python values, fit for YAML, JSON and a checkpoint."""
    return config.model_dump(mode="json")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """A nested tree by dotted keys, {"a": {"b": 1}} as {"a.b": 1}; an empty section is a value."""
    leaves: Tree = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def describe(config: Config, indent: int = 0) -> Iterator[tuple[str, str]]:
    """Lines of YAML with the docstring of each key, and what it may be chosen from."""
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
            flow = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10_000)
            yield f"{pad}{name}: {flow.removesuffix(chr(10)).removesuffix('...').strip()}", doc


def _choices(annotation: Any) -> Iterator[str]:
    """The words that a key takes, or the types that a section has, where there are several."""
    if get_origin(annotation) is Literal and len(words := get_args(annotation)) > 1:
        yield from (word for word in words if isinstance(word, str))
    variants = list(_sections(annotation))
    if len(variants) > 1:
        yield from (f"type={variant.model_fields['type'].default}" for variant in variants)
