"""Whose a folder of samples is: one model's and one setting's, and one process's at a time."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ldm.config import to_tree, validate
from ldm.errors import LdmError
from ldm.files import write_atomically, write_json
from ldm.run_folder import lock, provenance
from pipelines.sampling.folder import MARK, read_mark
from pipelines.sampling.settings import Sampling, told_apart

ELSEWHERE = "give --out another folder"


def default_folder(model: Path, settings: Mapping[str, Any]) -> Path:
    """`samples/seed0-steps18` beside a model, and what else tells these samples from others.

    Args:
        settings: what `samples.json` is going to say.
    """
    how = {name: settings[name] for name in Sampling.model_fields}
    words = [f"seed{settings['seed']}", told_apart(validate(Sampling, how))]
    if settings["weaker"]:
        words.append(f"weaker{settings['weaker']['sha256'][:8]}")
    if settings["labels"] is not None:
        shown = [str(label) for label in settings["labels"]]
        words.append("class" + "_".join([*shown[:8], *(["and_more"] if len(shown) > 8 else [])]))
    if settings["files"] != "png":
        words.append(settings["files"])
    if model.is_dir():
        return model / "samples" / "-".join(words)
    if which := model.stem.removeprefix("ckpt").strip("-"):  # ckpt-ema0.05.pt lies beside ckpt.pt
        words.append(which)
    return model.parent / "samples" / "-".join(words)


def claim_folder(out: Path, settings: Mapping[str, Any], n: int, held: ExitStack) -> int:
    """Make a folder these settings' own, and clear what a kill left half-written in it.

    Args:
        settings: what `samples.json` says of the samples, besides their number.
        n: how many there are to be.
        held: is given the folder's lock to hold.

    Returns:
        How many samples the folder says it is going to hold, n or more.

    Raises:
        LdmError: it holds something else, or samples of another model or setting; another process
            is at work in it; or it cannot be made or written.
    """
    try:
        if not (out / MARK).is_file() and out.is_dir() and any(map(_shows, out.iterdir())):
            raise LdmError(f"{out} is not empty and holds no {MARK}: {ELSEWHERE}")
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(out))
        found = read_mark(out, ELSEWHERE)
        if found is not None:
            _refuse_other(out, found, settings)
        for half in [*out.glob(".*.partial"), *out.glob("*/.*.partial")]:
            half.unlink(missing_ok=True)
    except OSError as error:
        raise LdmError(f"could not write to {out} ({error.strerror}): {ELSEWHERE}") from error
    if n > (announced := (found or {}).get("n", 0)):
        write_json(out / MARK, {"format": 1, "n": n} | dict(settings) | provenance())
    return max(n, announced)


def write_labels(path: Path, labels: Sequence[int], names: Sequence[str]) -> None:
    """Write the class of each image, in order, and what the classes are called."""
    text = json.dumps({"classes": list(names), "labels": list(labels)}, ensure_ascii=False)
    write_atomically(path, lambda file: file.write(text.encode()))


def _shows(path: Path) -> bool:
    return not path.name.startswith(".")


def _refuse_other(out: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a folder whose samples were made with something else, which is named."""
    before, now = _identity(_completed(found, settings)), _identity(settings)
    if other := [key for key in now if before.get(key) != now[key]]:
        raise LdmError(f"{out} holds samples made with another {', '.join(other)}: {ELSEWHERE}")


def _completed(found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A `samples.json` with what an older version did not write down: of settings, the defaults; of
    models, as much as is known now."""
    usual = to_tree(Sampling()) | {"weaker": None, "labels": None, "files": "png"}
    models = {
        key: (settings[key] or {}) | found[key] for key in ("model", "weaker") if found.get(key)
    }
    return usual | dict(found) | models


def _identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What two images must share to lie in one folder: paths aside, and what data there was."""
    shared = (*Sampling.model_fields, "seed", "labels", "files", "precision", "resolution")
    models = {
        key: [(settings.get(key) or {}).get(name) for name in ("sha256", "identity")]
        for key in ("model", "weaker")
    }
    return {key: settings.get(key) for key in shared} | models
