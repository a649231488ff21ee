"""Damage to files that commands read: by bytes, and by the structure of what they hold."""

import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from benchmarks.world import DIFFUSION, EVAL, FID, JOBS

SAMPLE_ONE = ("--n", "1", "--steps", "1", "--device", "cpu", "--out", "samples")
REPORT = ("--images", "1", "--steps", "1", "--device", "cpu")
AGAIN = ("train-diffusion", *DIFFUSION, "--out", "runs/again", "--cache", "cache")
TRAINED = ("ckpt.pt", "result.json", "pictures")


@dataclass(frozen=True)
class Subject:
    """A kind of file, and a command that reads it.

    Attributes:
        files: pattern of the files to damage, one at a time.
        makes: beginnings of the paths whose contents are the command's result.
        strict: another result is wrong: the file is ours and carries what it takes to check it.
        form: of the content, for structural damage; bytes: none.
    """

    files: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    strict: bool = True
    form: str = "bytes"

    def results(self, contents: Mapping[str, str]) -> dict[str, str]:
        """Select the command's results."""
        return {name: digest for name, digest in contents.items() if name.startswith(self.makes)}


def _sampling(file: str, named: str, strict: bool, form: str = "bytes") -> Subject:
    words = ("sample", *((named,) if named else ()), *SAMPLE_ONE)
    return Subject(file, words, ("runs/ae", "runs/ldm"), ("samples/0",), strict, form)


def _reporting(file: str, run: str, form: str, needs: tuple[str, ...] = ()) -> Subject:
    needs = (f"runs/{run}", "data", *needs)
    return Subject(file, ("report", f"runs/{run}", *REPORT), needs, ("report.html",), False, form)


def _resuming(file: str, job: str, run: str, strict: bool, form: str = "bytes") -> Subject:
    needs = ("data", f"stopped/{job}/runs/{run}>runs/{run}")
    needs += ("runs/ae",) if run == "ldm" else ()
    makes = tuple(f"runs/{run}/{name}" for name in TRAINED)
    return Subject(file, JOBS[job].words, needs, makes, strict, form)


def _preparing(file: str, source: str, strict: bool) -> Subject:
    words = ("data", "prepare", source, *JOBS["data prepare"].words[3:])
    return Subject(file, words, (source,), ("data",), strict)


def _evaluating(file: str, strict: bool, form: str = "bytes") -> Subject:
    words = ("eval-ae", *EVAL, "data", "--out", "eval.json")
    return Subject(file, words, ("runs/ae", "data"), ("eval.json",), strict, form)


def _importing(file: str, source: str, form: str = "bytes") -> Subject:
    words = ("import", source, "new.pt")
    return Subject(file, words, (source,), ("new.pt",), False, form)


FIDS = ((*FID, "--force", "--out", "fid.json"), ("samples", "data", "inception.pt", "kept"))
CACHED = (AGAIN, ("data", "runs/ae", "cache"), ("runs/again/ckpt.pt", "runs/again/result.json"))
SUBJECTS = {
    "ckpt.pt": _sampling("runs/ldm/ckpt.pt", "runs/ldm", True),
    "ckpt.pt, edited": _sampling("runs/ldm/ckpt.pt", "runs/ldm", False, "torch"),
    "ckpt.safetensors": _sampling("runs/ldm/ckpt.safetensors", "runs/ldm/ckpt.safetensors", True),
    "ckpt.safetensors, edited": _sampling(
        "runs/ldm/ckpt.safetensors", "runs/ldm/ckpt.safetensors", False, "safetensors"
    ),
    "best.safetensors": Subject(
        "runs/ae/best.safetensors",
        ("eval-ae", "runs/ae/best.safetensors", *EVAL[1:], "data", "--out", "eval.json"),
        ("runs/ae", "data"), ("eval.json",),
    ),
    "ema/*.safetensors": Subject(
        "runs/ldm/ema/*", JOBS["ema"].words, ("runs/ldm",), ("ema.pt",), True, "safetensors"
    ),
    "state.pt of stage one": _resuming("runs/ae/state/*/state.pt", "train-ae", "ae", True),
    "state.pt of stage two": _resuming("runs/ldm/state/*/state.pt", "train-diffusion", "ldm", True),
    "state.pt, edited": _resuming(
        "runs/ldm/state/*/state.pt", "train-diffusion", "ldm", False, "torch"
    ),
    "latents": Subject("cache/latents*", *CACHED, True, "npy"),
    "cache.json": Subject("cache/cache.json", *CACHED, True, "json"),
    "manifest.json": _evaluating("data/manifest.json", False, "json"),
    "shards": _evaluating("data/*.tar", True),
    "sidecars": Subject(
        "data/*.tar.json", JOBS["data prepare"].words, ("images", "data"), ("data/",), True, "json"
    ),
    "run.json, scanned": _sampling("runs/*/run.json", "", False, "json"),
    "config.yaml, resumed": _resuming("runs/ae/config.yaml", "train-ae", "ae", True, "yaml"),
    "run.json, resumed": _resuming("runs/ae/run.json", "train-ae", "ae", True, "json"),
    "metrics.jsonl, resumed": _resuming(
        "runs/ldm/metrics.jsonl", "train-diffusion", "ldm", False, "jsonl"
    ),
    "config.yaml": _reporting("runs/ldm/config.yaml", "ldm", "yaml"),
    "run.json": _reporting("runs/ldm/run.json", "ldm", "json"),
    "metrics.jsonl": _reporting("runs/ae/metrics.jsonl", "ae", "jsonl"),
    "result.json": _reporting("runs/ae/result.json", "ae", "json"),
    "eval.json": _reporting("runs/ae/eval/*", "ae", "json", ("eval.json>runs/ae/eval/eval.json",)),
    "fid.json": _reporting(
        "runs/ldm/samples/s/fid.json", "ldm", "json",
        ("samples>runs/ldm/samples/s", "fid.json>runs/ldm/samples/s/fid.json"),
    ),
    "samples.json": Subject("samples/samples.json", *FIDS, ("fid.json",), False, "json"),
    "samples": Subject("samples/0*/*.png", *FIDS, ("fid.json",), True),
    "statistics": Subject("kept/statistics/*", *FIDS, ("fid.json",), True, "npz"),
    "PNG, data prepare": _preparing("images/*.png", "images", True),
    "JPEG, data prepare": _preparing("images/*.jpg", "images", False),
    "zip, data prepare": _preparing("images.zip", "images.zip", False),
    "diffusers' config": _importing("diffusers/config.json", "diffusers", "json"),
    "diffusers' weights": _importing("diffusers/*.safetensors", "diffusers", "safetensors"),
    "CompVis": _importing("compvis.ckpt", "compvis.ckpt", "torch"),
}  # fmt: skip


def damage(subject: Subject, folder: Path, random: Random) -> str:
    """Damage one of the subject's files in a folder; return what was done to which."""
    path = random.choice(sorted(folder.glob(subject.files)))
    content = path.read_bytes()
    if subject.form != "bytes" and random.random() < 0.7:
        what, content = FORMS[subject.form](content, random)
    else:
        what, content = damage_bytes(content, random)
    path.write_bytes(content)
    return f"{path.relative_to(folder)}: {what}"


# ---------------------------------------------------------------------------------------- bytes
def damage_bytes(content: bytes, random: Random) -> tuple[str, bytes]:
    """Flip, zero, cut, repeat, swap or insert bytes; every third time near the beginning."""
    reach = min(len(content), 512) if random.random() < 0.33 else len(content)
    at = random.randrange(max(1, reach))
    size = random.choice((1, 2, 8, 64, 512))
    part, what = content[at : at + size], f"{size} bytes at {at}"
    match random.choice(("flip", "flip", "zero", "cut", "repeat", "swap", "insert", "set")):
        case "flip":
            bit = 1 << random.randrange(8)
            return f"bit {bit} of byte {at}", b"".join(
                (
                    content[:at],
                    bytes(byte ^ bit for byte in content[at : at + 1]),
                    content[at + 1 :],
                )
            )
        case "zero":
            return f"zero {what}", content[:at] + bytes(len(part)) + content[at + size :]
        case "cut":
            return f"cut at {at}", content[:at]
        case "repeat":
            return f"repeat {what}", content[: at + size] + content[at:]
        case "swap":
            other = content[at + size : at + 2 * size]
            return f"swap {what}", content[:at] + other + part + content[at + 2 * size :]
        case "insert":
            return f"insert {what}", content[:at] + random.randbytes(size) + content[at:]
    return f"set {what}", content[:at] + random.randbytes(len(part)) + content[at + size :]


# ------------------------------------------------------------------------------------ structure
DEEP, HUGE = "@deep@", "@huge@"
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 10**9, 2**63, 10**40, HUGE, 1e308, float("nan"), float("inf"), "",
    "x", "1", "\x1b]0;owned\x07", "../../precious.txt", "/dev/zero", [], {}, ["x"], [[]],
    {"x": 1}, {"": None}, DEEP,
)  # fmt: skip
WHOLE = (
    "[" * 100_000, '{"a":' * 50_000, "null", "[]", "{}", '"text"', "1", "", "nan", "[1,",
    "\ufeff{}", "\x00", "1" * 100_000,
)  # fmt: skip
ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
"""Ten billion entries, should anything walk through them."""
CODE = "!!python/object/apply:os.system ['touch \"$CANARY\"']\n"


def damage_tree(tree: Any, random: Random) -> tuple[str, Any]:
    """Replace, remove or add one value anywhere in a tree of plain values."""
    places = list(_places(tree))
    if not places:
        return "replaced", random.choice(VALUES)
    owner, key = random.choice(places)
    value = random.choice(VALUES)
    action = random.choice(("replace",) * 6 + ("remove", "add"))
    if action == "remove":
        del owner[key]
    elif action == "add":
        if isinstance(owner, dict):
            owner["foreign"] = value
        else:
            owner.insert(key, value)
    else:
        owner[key] = value
    return f"{action} {key!r} {'' if action == 'remove' else repr(value)}", tree


def _places(tree: Any) -> list[tuple[Any, Any]]:
    if not isinstance(tree, dict | list):
        return []
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    return [(tree, key) for key in keys] + [place for key in keys for place in _places(tree[key])]


def _text(tree: Any) -> bytes:
    text = json.dumps(tree, ensure_ascii=False)
    text = text.replace(f'"{DEEP}"', "[" * 20_000 + "]" * 20_000)
    return text.replace(f'"{HUGE}"', "9" * 5_000).encode()


def _json(content: bytes, random: Random) -> tuple[str, bytes]:
    if random.random() < 0.2:
        text = random.choice(WHOLE)
        return f"all replaced by {text[:20]!r}", text.encode()
    what, tree = damage_tree(json.loads(content), random)
    return what, _text(tree)


def _yaml(content: bytes, random: Random) -> tuple[str, bytes]:
    if random.random() < 0.2:
        text = random.choice((ALIASES, CODE, "- &a [*a]\n", "? [a]\n: b\n", "{" * 50_000, *WHOLE))
        return f"all replaced by {text[:20]!r}", text.encode()
    what, tree = damage_tree(yaml.safe_load(content), random)
    return what, _text(tree)


def _jsonl(content: bytes, random: Random) -> tuple[str, bytes]:
    lines = content.splitlines()
    at = random.randrange(len(lines))
    what, lines[at] = _json(lines[at], random)
    return f"line {at}: {what}", b"\n".join(lines) + b"\n"


def _safetensors(content: bytes, random: Random) -> tuple[str, bytes]:
    size = int.from_bytes(content[:8], "little")
    what, header = _json(content[8 : 8 + size], random)
    return f"header: {what}", len(header).to_bytes(8, "little") + header + content[8 + size :]


def _torch(content: bytes, random: Random) -> tuple[str, bytes]:
    import torch

    tree = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    what, tree = damage_tree(tree, random)
    file = io.BytesIO()
    torch.save(tree, file)
    return what, file.getvalue()


HEADERS = (
    (rb"'shape': \([^)]*\)", b"'shape': (999999999999,)"), (rb"'shape': \([^)]*\)", b"'shape': ()"),
    (rb"'shape': \([^)]*\)", b"'shape': (-1, 5)"), (rb"'descr': '[^']*'", b"'descr': '|O'"),
    (rb"'descr': '[^']*'", b"'descr': '<f8'"), (rb"'descr': '[^']*'", b"'descr': '<c16'"),
    (rb"False", b"True"), (rb"\{'descr'.*", b"[" * 3000), (rb"\{'descr'.*", b"{}"),
)  # fmt: skip


def _npy(content: bytes, random: Random) -> tuple[str, bytes]:
    size = int.from_bytes(content[8:10], "little")
    pattern, new = random.choice(HEADERS)
    header = re.sub(pattern, new, content[10 : 10 + size].rstrip()) + b"\n"
    start = content[:8] + len(header).to_bytes(2, "little")
    return f"header: {new[:30]!r}", start + header + content[10 + size :]


def _npz(content: bytes, random: Random) -> tuple[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as pack:
        members = {name: pack.read(name) for name in pack.namelist()}
    name = random.choice(sorted(members))
    what, members[name] = random.choice((_npy, damage_bytes))(members[name], random)
    if random.random() < 0.2:
        del members[name]
        what = "removed"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as pack:
        for member, data in members.items():
            pack.writestr(member, data)
    return f"{name}: {what}", file.getvalue()


FORMS: Mapping[str, Callable[[bytes, Random], tuple[str, bytes]]] = {
    "json": _json, "yaml": _yaml, "jsonl": _jsonl, "safetensors": _safetensors, "torch": _torch,
    "npy": _npy, "npz": _npz,
}  # fmt: skip
