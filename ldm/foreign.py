"""Model files of other toolkits, for both stages: names and shapes of their tensors, their files.

A table of pairs (ours, theirs) renames tensors both ways. The tensors themselves stay the same, bit
for bit.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint import first_difference, is_safetensors, read_safetensors, to_safetensors
from ldm.errors import LdmError
from ldm.files import to_json, write_together
from ldm.logbook import console
from ldm.records import read_tree
from ldm.safe_pickle import read_foreign

Pairs = Sequence[tuple[str, str]]
"""(ours, theirs): parts of dotted names, such as ("blocks", "resnets"), replaced in this order."""

# diffusers' names: of a folder's files, and of its attention before 2023
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PICKLED_FILE = "diffusion_pytorch_model.bin"
OLD_ATTENTION: Pairs = (
    ("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"),
)  # fmt: skip
# where checkpoints of training loops keep weights, and what DDP and torch.compile put before names
RAW = ("state_dict", "model_state_dict", "model")
AVERAGED = ("ema", "model_ema", "ema_state_dict")
WRAPPERS = ("module.", "_orig_mod.")
STEM = WEIGHTS_FILE.removesuffix(".safetensors")
# `.fp16` before the number of a shard or, as older versions wrote it, after it
SHARD = re.compile(
    rf"{STEM}(\.(?P<variant>[^.]+?))?(-(?P<number>\d{{1,9}})-of-(?P<count>\d{{1,9}}))?"
    r"(\.(?P<old_variant>[^.]+))?\.safetensors"
)


# ----------------------------------------------------------------------------------- names
def rename(name: str, pairs: Pairs) -> str:
    """A dotted name with whole parts of it replaced: left of each pair by right."""
    dotted = f".{name}."
    for old, new in pairs:
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]


def renamed(weights: Mapping[str, Tensor], pairs: Pairs) -> dict[str, Tensor]:
    """Weights under other names, in the same order."""
    return {rename(name, pairs): tensor for name, tensor in weights.items()}


def reverse(pairs: Pairs) -> Pairs:
    """The table of the way back."""
    return [(theirs, ours) for ours, theirs in pairs]


def find_prefix(names: Iterable[str], prefixes: Iterable[str], first: str) -> str | None:
    """The prefix under which a checkpoint has the tensor `first`; None where it has none."""
    names = set(names)
    return next((prefix for prefix in prefixes if prefix + first in names), None)


def pick(weights: Mapping[str, Tensor], prefix: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights under a prefix, without it, whose names then begin with one of `parts`."""
    return {
        short: tensor
        for name, tensor in weights.items()
        if name.startswith(prefix) and (short := name.removeprefix(prefix)).startswith(parts)
    }


# ---------------------------------------------------------------------------------- shapes
def fit(
    theirs: Mapping[str, Tensor], expected: Mapping[str, Tensor], pairs: Pairs
) -> dict[str, Tensor]:
    """Copies of weights under our names, ordered and typed as `expected`; others are refused."""
    if difference := first_difference(theirs, renamed(expected, pairs)):
        raise LdmError(difference)
    # copied: they are to outlive the file that they lie in
    return {
        name: theirs[rename(name, pairs)].to(tensor.dtype, copy=True)
        for name, tensor in expected.items()
    }


def layer_sizes(weights: Mapping[str, Tensor], name: str, dimensions: int = 4) -> tuple[int, int]:
    """Output and input channels of a layer, from its weight's shape."""
    if name not in weights or weights[name].ndim != dimensions:
        shape = tuple(weights[name].shape) if name in weights else "none"
        raise LdmError(f"tensor {name} is {shape}, not of {dimensions} dimensions")
    return weights[name].shape[0], weights[name].shape[1]


def as_multiples(widths: Sequence[int], base: int) -> list[int]:
    """The widths of a network's levels as multiples of its base width."""
    if not widths or min(base, *widths) < 1 or any(width % base for width in widths):
        raise LdmError(f"its widths {list(widths)} are not multiples of the first one, {base}")
    return [width // base for width in widths]


# ----------------------------------------------------------------------------------- files
def read_described(path: Path) -> dict[str, Any]:
    """The JSON object in a file that another toolkit wrote."""
    again = "copy or fetch it again"
    if (tree := read_tree(path, advice=again)) is None:
        raise LdmError(f"{path} does not exist: {again}")
    return tree


def check_described(
    described: Mapping[str, Any], fixed: Mapping[str, Sequence[Any]], needed: Iterable[str] = ()
) -> None:
    """Refuse a config of another toolkit that lacks a needed key, or is of another structure than
    ours: `fixed` has the values that a key may have; the first is meant where it is left out."""
    for key, known in fixed.items():
        if described.get(key, known[0]) not in known:
            only = " or ".join(repr(value) for value in known)
            raise LdmError(f"{key} is {described[key]!r}, only {only} is supported")
    for key in needed:
        if key not in described:
            raise LdmError(f"it has no {key}")


def weights_files(folder: Path) -> list[Path]:
    """Find the weights in a diffusers folder: the plain file, else its shards, else a `.bin`, else
    a variant, such as fp16."""
    # by (variant, number of shards, 0 where it is whole), then by the shard's own number
    found: dict[tuple[str, int], dict[int, Path]] = {}
    for path in sorted(folder.glob(f"{STEM}*.safetensors")):
        if parts := SHARD.fullmatch(path.name):
            key = (parts["variant"] or parts["old_variant"] or "", int(parts["count"] or 0))
            found.setdefault(key, {})[int(parts["number"] or 0)] = path
    if (folder / PICKLED_FILE).is_file() and all(variant for variant, _ in found):
        return [folder / PICKLED_FILE]
    if not found:
        raise LdmError(f"{folder} holds no {WEIGHTS_FILE}: save it again as safetensors")
    (_, count), paths = min(found.items())
    missing = next((number for number in range(1, count + 1) if number not in paths), None)
    if missing:
        raise LdmError(
            f"{folder} lacks shard {missing} of {count}, beside {next(iter(paths.values())).name}: "
            "copy or fetch it again"
        )
    return list(paths.values())


def read_weights(*paths: Path) -> dict[str, Tensor]:
    """The tensors in `.safetensors` or checkpoints of `torch.save`, by their names.

    They may lie in a mapping of the file: clone those that are to outlive it, and refuse those that
    are larger than it first (`refuse_damaged`).
    """
    weights: dict[str, Tensor] = {}
    for path in paths:
        tree = read_safetensors(path) if is_safetensors(path) else read_foreign(path)
        weights |= _find_weights(tree, path)
    return weights


def _find_weights(tree: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, or of the parts in it: averaged ones replace raw ones."""
    parts = tree if isinstance(tree, dict) else {}
    raw = next(((key, found) for key in RAW if (found := _tensors(parts.get(key)))), None)
    for key in AVERAGED:
        average = _tensors(parts.get(key))
        if raw is None and average:
            return average
        if raw is not None and average.keys() & raw[1].keys():
            _tell_of_average(path, key, raw[0])
            return raw[1] | {name: t for name, t in average.items() if name in raw[1]}
    return raw[1] if raw else _tensors(tree)


def _tensors(tree: Any) -> dict[str, Tensor]:
    """The tensors in a dict, without the prefixes that `WRAPPERS` gave to all of its names."""
    items = tree.items() if isinstance(tree, dict) else ()
    tensors = {k: v for k, v in items if isinstance(k, str) and isinstance(v, Tensor)}
    while tensors and (on_all := [w for w in WRAPPERS if all(n.startswith(w) for n in tensors)]):
        tensors = {name.removeprefix(on_all[0]): tensor for name, tensor in tensors.items()}
    return tensors


@cache  # once, although both stages and their config are read from the same file
def _tell_of_average(path: Path, average: str, raw: str) -> None:
    console.print(
        f"{path} holds averaged weights ({average}) beside the raw ones ({raw}): the averaged "
        "ones are used",
        markup=False,
    )


def write_folder(
    folder: Path, described: Mapping[str, Any], weights: Mapping[str, Tensor], **notes: Any
) -> list[Path]:
    """Write a diffusers model's config.json, weights and `notes` (NAME=tree: NAME.json), all or
    none, and return their paths."""
    trees = {"config": described, **notes}
    files = {folder / f"{name}.json": to_json(tree) for name, tree in trees.items()}
    files |= {folder / WEIGHTS_FILE: to_safetensors(weights, format="pt")}
    # in reverse: config.json describes the others, and so is the last to be replaced
    write_together({path: files[path] for path in reversed(files)})
    return list(files)
