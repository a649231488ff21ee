"""The folder of a run: made, found again, locked, described.

runs/<time>-<preset>/
  run.json         what kind of run, which preset, the command, the versions
  config.yaml      the resolved configuration
  metrics.jsonl    tensorboard/   pictures/
  state/           what the same command resumes from
  ckpt.pt          the model to use
  result.json      written when the run is complete

The state a run resumes from: a folder for each, whole or not there, the newest few kept.
"""

import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm.checkpoint import Damaged, read_tensors
from ldm.config import Config, Tree, flatten, to_tree, validate
from ldm.errors import LdmError, UsageError
from ldm.files import read_json, write_atomically, write_json

RUNS = Path("runs")

# How a run is watched, not what it computes: these may change between a stop and a resume.
WATCHING = {
    "log_every_steps",
    "save_every_steps",
    "validate_every_steps",
    "validate_images",
    "keep_states",
    "workers",
}


def new_or_unfinished(kind: str, preset: str, config: Config, folder: Path | None) -> Path:
    """The folder this command trains in: the one given, else the newest unfinished run of the same
    preset and the very same configuration, else a new one named after the time and the preset.

    Raises:
        LdmError: the folder given holds a run of another configuration (the keys that differ), or
            files that are no run.
    """
    if folder is None:
        for candidate in unfinished_runs(kind, preset):
            if not differences(candidate, config):
                return candidate
        folder = _new_folder(preset)
    elif _kind(folder) is not None:
        _check_same(folder, kind, config)
        return folder
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise LdmError(f"{folder} is not empty and holds no run: give --out another folder")
    describe_run(folder, kind, preset, config)
    return folder


def describe_run(folder: Path, kind: str, preset: str, config: Config) -> None:
    """Write `config.yaml` and `run.json`: what is computed, by which command and versions."""
    text = yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)
    write_atomically(folder / "config.yaml", lambda file: file.write(text.encode()))
    write_json(folder / "run.json", {"kind": kind, "preset": preset} | provenance())


def provenance() -> dict[str, Any]:
    """Who made a file: the command, the versions, the machine's kind and the moment."""
    return {
        "command": shlex.join(["ldm", *sys.argv[1:]]),
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: installed_version(name) for name in ("ldm", "torch", "numpy")},
        },
        "platform": f"{platform.system()} {platform.machine()}",
    }


def newest_run(kind: str, needs: str = "ckpt.pt", preset: str | None = None) -> Path:
    """The newest run of a kind, or of one preset, that holds `needs`, where no path was given.

    Raises:
        LdmError: there is none.
    """
    fitting = [
        folder
        for folder in _all_runs(kind)
        if (folder / needs).exists() and preset in (None, preset_of(folder))
    ]
    if fitting:
        # one that is complete before one that was only begun
        return ([folder for folder in fitting if is_finished(folder)] or fitting)[-1]
    command = {"autoencoder": "ldm train-ae", "diffusion": "ldm train-diffusion"}[kind]
    which, command = (kind, command) if preset is None else (preset, f"{command} {preset}")
    raise LdmError(
        f"no {which} run with {needs} under {RUNS}/: give its path, or `{command}` first"
    )


def unfinished_runs(kind: str, preset: str) -> list[Path]:
    """Runs of a preset that can go on, the newest first."""
    runs = reversed(_all_runs(kind))
    return [r for r in runs if not is_finished(r) and preset_of(r) == preset]


def preset_of(folder: Path) -> str | None:
    """The preset that the run in a folder was begun with; None where there is no run."""
    return _described(folder).get("preset")


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder has reached its last step."""
    return (folder / "result.json").is_file()


def read_config(folder: Path) -> Tree | None:
    """A run's configuration as a tree; None where there is none, or none that can be read."""
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return tree if isinstance(tree, dict) else None


def differences(folder: Path, config: Config) -> list[str]:
    """Dotted keys in which a run's configuration differs from another one, watching aside."""
    theirs = read_config(folder)
    if theirs is None:
        return ["config.yaml"]
    with suppress(UsageError):  # a key that is newer than the run had its default then
        theirs = to_tree(validate(type(config), theirs))
    ours, theirs = flatten(to_tree(config)), flatten(theirs)
    return sorted(
        key
        for key in ours | theirs
        if key.rpartition(".")[2] not in WATCHING and ours.get(key) != theirs.get(key)
    )


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder against a second process that would train in it at the same time."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system: nothing to hold
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # EAGAIN or EACCES: somebody holds it
            raise LdmError(
                f"another process is at work in {folder}: wait for it, or give --out another folder"
            ) from error
        except OSError:  # no such locks on this file system: nothing to hold
            pass
        yield


def clear_leftovers(folder: Path) -> None:
    """Remove what a kill left half-written in a run's folder; only while its `lock` is held."""
    for beside in (folder / "state").glob(".writing-*"):
        shutil.rmtree(beside, ignore_errors=True)
    for beside in (b for at in ("", "pictures/", "ema/") for b in folder.glob(f"{at}.*.partial")):
        beside.unlink(missing_ok=True)


def _new_folder(preset: str) -> Path:
    """A folder of its own for a run that begins now, even if another begins in the same second."""
    name, number = f"{datetime.now():%Y%m%d-%H%M%S}-{preset}", 1
    while True:
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise LdmError(
                f"could not make {folder} ({error.strerror}): give --out another folder"
            ) from error


def _check_same(folder: Path, kind: str, config: Config) -> None:
    found = _kind(folder)
    if found != kind:
        raise LdmError(f"{folder} holds a run of stage '{found}', not '{kind}': give another --out")
    changed = differences(folder, config)
    if changed:
        raise LdmError(
            f"{folder} was started with another configuration ({', '.join(changed[:5])}"
            f"{' …' if len(changed) > 5 else ''}): give --out another folder, or the same settings"
        )


def _all_runs(kind: str) -> list[Path]:
    """Runs of a kind, oldest first."""
    marks = [*RUNS.glob("*/run.json"), *RUNS.glob("demo/*/run.json")]  # not deeper: many samples
    ours = [mark for mark in marks if _kind(mark.parent) == kind]
    return [mark.parent for mark in sorted(ours, key=lambda mark: mark.stat().st_mtime)]


def _kind(folder: Path) -> str | None:
    """The kind of the run in a folder, None where there is none of ours."""
    return _described(folder).get("kind")


def _described(folder: Path) -> dict[str, Any]:
    return read_json(folder / "run.json") or {}


def installed_version(package: str) -> str:
    """The version of an installed package, or "unknown" for a source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


FORMER_PARTS = {"discriminator": "critic", "opt_discriminator": "opt_critic"}
"""Names of parts in states saved by earlier versions."""


def save_state(folder: Path, images_seen: int, tree: dict[str, Any], keep: int = 2) -> Path:
    """Write all that resuming needs to `folder/<images_seen>/`; keep the newest `keep`.

    The older ones go only after the new one is whole.
    """
    final, beside = folder / str(images_seen), folder / f".writing-{images_seen}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write_atomically(beside / "state.pt", lambda file: torch.save(tree, file))
        shutil.rmtree(final, ignore_errors=True)
        beside.replace(final)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for old in _states(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_state(folder: Path) -> Path | None:
    """The newest complete state under a run's `state/` folder, or None."""
    states = _states(folder)
    return states[-1] if states else None


def load_state(state: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        LdmError: it cannot be read, or is damaged.
    """
    try:
        return read_tensors(state / "state.pt")
    except Damaged as error:
        raise Damaged(
            f"{state} is damaged: delete that folder, and the state before it is used"
        ) from error


def restore(parts: Mapping[str, Any], tree: Mapping[str, Any]) -> None:
    """Load into every part, by its name, what its `state_dict` gave when the tree was saved.

    Raises:
        LdmError: a part is of another shape than the one that was saved.
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(tree[name if name in tree else FORMER_PARTS.get(name, name)])
        except torch.OutOfMemoryError:  # a RuntimeError, which says it well
            raise
        except (KeyError, RuntimeError, ValueError) as error:
            raise LdmError(
                f"the saved state of {name} does not fit: this run was begun by another version "
                "of the code (see its run.json): go on with that one, or give --out another folder"
            ) from error


def _states(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = (p for p in folder.iterdir() if p.name.isdigit() and (p / "state.pt").is_file())
    return sorted(found, key=lambda p: int(p.name))
