"""The folder of a run: create it, find it again, save and restore its state.

runs/<time>-<preset>/
  run.json         kind of run, preset, command, versions
  config.yaml      the resolved configuration
  metrics.jsonl    tensorboard/   pictures/
  profile.json.gz  a trace of some steps (`run.profile`)
  data.json        the identity of the images
  trackers.json    identifiers of the records that other trackers keep
  state/           saved states, one folder each, from which the same command resumes
  ckpt.pt          the model
  result.json      written when the run is complete
"""

import platform
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field, InstanceOf
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.checkpoint import Damaged, first_difference, read_tensors
from ldm.config import Config, Tree, flatten, parse_yaml, to_tree, validate
from ldm.device import allows_tf32
from ldm.ema import Average
from ldm.errors import LdmError, UsageError, listed
from ldm.files import ANOTHER, clear_partials, lock, write_atomically, write_json
from ldm.logbook import console
from ldm.records import Count, checked, read_each, read_tree, schema

RUNS = Path("runs")
CONFIG_LIMIT = 2**17
"""Bytes of a `config.yaml`; ours have a few thousand."""

IGNORED = {
    "compile",
    "log_every_steps",
    "save_every_steps",
    "validate_every_steps",
    "validate_images",
    "keep_states",
    "trackers",
    "profile",
    "workers",
    "data.changed",
    "data.cache_gb",
    "init.source",
    "teacher.source",
}
"""Keys that may change between a stop and a resume: they do not change what a run computes, or only
by rounding and by dropout's masks. Weights may move: their SHA-256 must stay."""

_RUN = schema(kind=(str, ""), preset=(str, ""))
BEGINNING = re.compile(
    r"config\.yaml|data\.json|metrics\.jsonl|tensorboard/events\..*|trackers\.json|wandb/.*"
    r"|pictures/\w+-\d+\.png|state/\d+/state\.pt|profile\.json\.gz"
)
"""Files of a run that hold no result."""

_EARLIER = "delete that folder to resume from the state before it"
_FLOATS = Annotated[list[InstanceOf[float]], Field(min_length=1)]  # they may be NaN
_NUMBERS: tuple[Any, Any] = (dict[str, InstanceOf[float] | Count], {})
_STATE = schema(
    images_seen=Count, validated_at=(Count, 0), skipped=dict[str, Count], row=_NUMBERS,
    log=(schema(rows=(Count | None, None), pending=(dict[str, _FLOATS], {})), None),
    held_out=_NUMBERS, best=_NUMBERS,
)  # fmt: skip
"""Of a saved state, all but its parts."""

FORMER_PARTS = {"discriminator": "critic", "opt_discriminator": "opt_critic"}
"""Names of parts in states saved by earlier versions."""


# ------------------------------------------------------------------------- finding a folder
def new_or_unfinished(
    kind: str, preset: str, config: Config, folder: Path | None, held: ExitStack | None = None
) -> Path:
    """Return the folder to train in, with `run.json` and `config.yaml` in it.

    By default this is the newest unfinished run of the same preset and configuration, else a new
    folder in `runs/`. `held` keeps its lock.
    """
    if folder is None:
        changes = read_each(unfinished_runs(kind, preset), lambda run: differences(run, config))
        same = (run for run, changed in changes.items() if not changed)
        folder = next(same, None) or _new_folder(preset)
    elif not read_run(folder).get("kind") and not _is_beginning(folder):
        raise LdmError(f"{folder} is not empty and holds no run: {ANOTHER}")
    with ExitStack() as briefly:
        (held or briefly).enter_context(lock(folder))
        found, changed = read_run(folder).get("kind"), differences(folder, config)
        if found and found != kind:
            raise LdmError(f"{folder} holds a run of kind {found}, not {kind}: {ANOTHER}")
        if changed and (found or (read_config(folder) and latest_state(folder / "state"))):
            keys = ", ".join(changed[:5]) + " …" * (len(changed) > 5)
            raise LdmError(
                f"{folder} was started with another configuration ({keys}): give --out another "
                "folder, or the same settings"
            )
        if not found:
            if changed:
                _set_aside(folder)
            describe_run(folder, kind, preset, config)
        clear_leftovers(folder)
    return folder


def _is_beginning(folder: Path) -> bool:
    """Test for a folder with nothing but what a run leaves that was killed before it had a
    `run.json`, or whose folder was removed while it wrote: no model, and no file of others."""
    inside = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    visible = (path for path in inside if not any(part.startswith(".") for part in path.parts))
    return all(BEGINNING.fullmatch(path.as_posix()) for path in visible)


def _set_aside(folder: Path) -> None:
    """Hide what is in a folder: it may be of another run, which lost its settings, or of no run."""
    left = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if not left:
        return
    aside = folder / f".earlier-{secrets.token_hex(4)}"
    try:
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)
    except OSError as error:
        raise LdmError(f"could not write in {folder} ({error.strerror}): {ANOTHER}") from error
    names = listed([path.name for path in left])
    console.print(f"note: {names} of another run set aside in {aside}", markup=False)


def describe_run(folder: Path, kind: str, preset: str, config: Config) -> None:
    """Write `config.yaml` and `run.json`."""
    text = yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)
    write_atomically(folder / "config.yaml", text.encode())
    write_json(folder / "run.json", {"kind": kind, "preset": preset} | provenance())


def provenance(*packages: str) -> dict[str, Any]:
    """Describe the origin of a file: command, time, platform, versions (also of `packages`), and
    `tf32`, if float32 may be computed in it."""
    return {
        "command": shlex.join(["ldm", *sys.argv[1:]]),
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: installed_version(name) for name in ("ldm", "torch", "numpy", *packages)},
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "tf32": allows_tf32(),
    }


def installed_version(package: str) -> str:
    """Return the version of an installed package, or "unknown" for a source tree."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def newest_run(kind: str, needs: str = "ckpt.pt", preset: str | None = None) -> Path:
    """Find the newest run of a kind, or of one preset, that holds `needs`; finished ones first."""
    runs = [run for run in _all_runs(kind, preset) if (run / needs).exists()]
    if runs:
        return ([run for run in runs if is_finished(run)] or runs)[-1]
    command = {"autoencoder": "ldm train-ae", "diffusion": "ldm train-diffusion"}[kind]
    name, command = (kind, command) if preset is None else (preset, f"{command} {preset}")
    raise LdmError(f"no {name} run with {needs} under {RUNS}/: give its path, or `{command}` first")


def unfinished_runs(kind: str, preset: str) -> list[Path]:
    """List the unfinished runs of a preset, newest first."""
    return [run for run in reversed(_all_runs(kind, preset)) if not is_finished(run)]


def preset_of(folder: Path) -> str | None:
    """Return the preset of the run in a folder; None if there is no run."""
    return read_run(folder).get("preset")


def is_finished(folder: Path) -> bool:
    """Return True if the run in a folder is complete."""
    return (folder / "result.json").is_file()


def read_config(folder: Path) -> Tree | None:
    """Read a run's configuration as a tree; None if it is absent."""
    return read_tree(folder / "config.yaml", limit=CONFIG_LIMIT, parse=parse_yaml)


def differences(folder: Path, config: Config) -> list[str]:
    """List the dotted keys in which a run's configuration differs, except `IGNORED`; types first,
    which the others follow from."""
    theirs = read_config(folder)
    if theirs is None:
        return ["config.yaml"]
    with suppress(UsageError):  # keys that are newer than the run get their defaults
        theirs = to_tree(validate(type(config), theirs))
    ours, theirs = flatten(to_tree(config)), flatten(theirs)
    changed = (
        key
        for key in ours | theirs
        if IGNORED.isdisjoint([key, key.rpartition(".")[2]]) and ours.get(key) != theirs.get(key)
    )
    return sorted(changed, key=lambda key: (not key.endswith(".type"), key))


def _new_folder(preset: str) -> Path:
    """Create a folder that no other run has, even one started in the same second."""
    name, number = f"{datetime.now():%Y%m%d-%H%M%S}-{preset}", 1
    while True:
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise LdmError(f"could not make {folder} ({error.strerror}): {ANOTHER}") from error


def _all_runs(kind: str, preset: str | None) -> list[Path]:
    """List the runs of a kind, or of one preset, oldest first.

    It looks only where runs are, for samples are many files.
    """
    files = [*RUNS.glob("*/run.json"), *RUNS.glob("demo/*/run.json")]
    runs = read_each([file.parent for file in files], read_run)
    ours = [run for run, found in runs.items() if found.get("kind") == kind]
    ours = [run for run in ours if preset in (None, runs[run].get("preset"))]
    return sorted(ours, key=lambda run: (run / "run.json").stat().st_mtime)


def read_run(folder: Path) -> Tree:
    """Read the `run.json` of a folder; of one without, an empty tree."""
    return read_tree(folder / "run.json", _RUN) or {}


# -------------------------------------------------------------------------------- saved states
class TrainingState:
    """Everything that training changes, for an exact resume.

    Args:
        batch_size: images per step, over all processes and micro-batches.
        total_steps: steps of the whole run.

    Attributes:
        images_seen: images trained on, up to the last step.
        validated_at: images seen at the last validation.
        parts: networks, averages and optimisers, by their names in the saved state.
        averages: moving averages of the weights, updated after every step.
        log: the `Logbook`'s saved state.
    """

    def __init__(self, batch_size: int, total_steps: int) -> None:
        self.batch_size, self.total_steps = batch_size, total_steps
        self.images_seen = self.validated_at = 0
        self.parts: dict[str, Any] = {}
        self.averages: list[Average] = []
        self.log: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.images_seen // self.batch_size

    @property
    def is_last(self) -> bool:
        """True after the last step."""
        return self.step == self.total_steps

    def advance(self) -> None:
        """Count a step and update the averages."""
        self.images_seen += self.batch_size
        for average in self.averages:
            average.update(self.images_seen, self.batch_size)

    def due(self, every_steps: int) -> bool:
        """Return True every `every_steps` steps and after the last one."""
        return self.is_last or self.step % every_steps == 0

    def owes_validation(self, every_steps: int) -> bool:
        """Return True if the run stopped before a validation that was due."""
        return self.due(every_steps) and self.validated_at != self.images_seen

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and the state of every part by its name."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        return {"images_seen": self.images_seen, "validated_at": self.validated_at, **states}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.images_seen = saved["images_seen"]
        # earlier versions validated after saving, and did not save this count
        unknown = 0 if self.is_last else self.images_seen
        self.validated_at = saved.get("validated_at", unknown)
        self.log = saved.get("log", {})
        restore(self.parts, saved)


def clear_leftovers(folder: Path) -> None:
    """Remove the half-written files of a killed process; only while the `lock` is held."""
    for beside in (folder / "state").glob(".writing-*"):
        shutil.rmtree(beside, ignore_errors=True)
    clear_partials([folder, folder / "pictures", folder / "ema", *folder.glob("state/*")])
    for state in (folder / "state").glob("[0-9]*"):
        with suppress(OSError):  # it is empty only if its writing was killed
            state.rmdir()


def save_state(folder: Path, images_seen: int, tree: dict[str, Any], keep: int = 2) -> Path:
    """Write `folder/<images_seen>/`, atomically, then delete all but the newest `keep` states."""
    state = folder / str(images_seen)
    try:
        write_atomically(state / "state.pt", lambda file: torch.save(tree, file))
    finally:
        with suppress(OSError):  # it is empty only if the write failed
            state.rmdir()
    for old in _states(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return state


def latest_state(folder: Path) -> Path | None:
    """Return the newest complete state in a run's `state/` folder, or None."""
    return next(reversed(_states(folder)), None)


def load_state(state: Path) -> dict[str, Any]:
    """Map a state written by `save_state` into memory; copy its tensors, and let it go."""
    file = state / "state.pt"
    try:
        with suppress(Damaged):  # or on a file system that cannot map it
            return read_tensors(file, mmap=True)
        return read_tensors(file)
    except Damaged as error:
        raise Damaged(f"{state} is damaged: {_EARLIER}") from error


def check_state(state: Path, tree: Any) -> None:
    """Raise an LdmError for a state whose numbers are not such as a run saves."""
    checked(_STATE, tree, state, _EARLIER)
    if tree["images_seen"] != int(state.name):
        raise LdmError(f"{state} is damaged: images_seen is {tree['images_seen']}: {_EARLIER}")


def restore(parts: Mapping[str, Any], tree: Mapping[str, Any]) -> None:
    """Load the state of every part by its name; an LdmError if one does not fit."""
    for name, part in parts.items():
        try:
            saved = tree[name if name in tree else FORMER_PARTS.get(name, name)]
            if difference := _first_difference(part, saved):
                raise ValueError(difference)
            if isinstance(part, Optimizer):
                # its groups are as the configuration has them, and every step sets the rate
                saved = part.state_dict() | {"state": saved["state"]}
            part.load_state_dict(saved)
            if isinstance(part, Optimizer):
                copy_state(part)
        except torch.OutOfMemoryError:  # a RuntimeError that explains itself
            raise
        except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise LdmError(
                f"the saved state of {name} does not fit: {shorten(str(error), 160)}: if another "
                "version of the code began this run (see its run.json), resume with that; else "
                "delete the state to resume from the one before it, or give --out another folder"
            ) from error


def _first_difference(part: Any, saved: Any) -> str | None:
    """Describe the first tensor that a part could not continue with; names of a module's tensors
    are compared when it loads them."""
    if isinstance(part, Optimizer):  # Adam
        owned = [parameter for group in part.param_groups for parameter in group["params"]]
        given = {f"{i}.{k}": v for i, state in saved["state"].items() for k, v in state.items()}
        scalar, expected = torch.zeros(()), dict[str, Tensor]()
        for i in saved["state"]:
            expected |= {f"{i}.step": scalar}
            expected |= {f"{i}.{moment}": owned[i] for moment in ("exp_avg", "exp_avg_sq")}
        return first_difference(given, expected)
    own = part.state_dict() if isinstance(part, nn.Module) else {}
    names = [name for name in own if name in saved]
    return first_difference(*({name: each[name] for name in names} for each in (saved, own)))


def copy_state(optimizer: Optimizer) -> None:
    """Replace the tensors of an optimiser's state by copies, laid out as its parameters are.

    The tensors that it was given may be those of the file. And a state that was saved on another
    device may be laid out otherwise: fused kernels walk through parameters and moments alike, and
    would pair the wrong values.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                like = parameter if value.shape == parameter.shape else value
                state[name] = torch.empty_like(like, dtype=value.dtype).copy_(value)


def _states(folder: Path) -> list[Path]:
    states = (file.parent for file in folder.glob("*/state.pt") if file.parent.name.isdigit())
    return sorted(states, key=lambda state: int(state.name))
