"""Experiment trackers beside metrics.jsonl, by accelerate's own classes.

`trackers.json` in the run's folder holds the identifier of each tracker's record, so that a resumed
run continues it. Environment variables of a tracker win over what is set here.
"""

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from torch import Tensor

from ldm.config import Tree, did_you_mean, flatten, to_flow
from ldm.console import STOPS
from ldm.errors import LdmError, brief, escape
from ldm.files import write_json
from ldm.images import to_pil
from ldm.records import RESTORE, Schema, read_tree

PROJECT = "ldm"
RECORDS = "trackers.json"

log = logging.getLogger("ldm")


class _Records(Schema):
    """Identifiers of a run's records, by the names of their trackers."""

    __pydantic_extra__: dict[str, Annotated[str, Field(min_length=1, max_length=500)]]


@dataclass(frozen=True)
class _Kind:
    """A class of accelerate's: its arguments, and what its own object tells of a record."""

    options: Callable[[Path, str | None], Tree] = lambda folder, record: {}
    """Keyword arguments from the run's folder and the identifier of the record to continue."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """By argument, "project" included, the environment variable that wins over it."""
    begin: Callable[[Any, str], object] = lambda run, name: None
    """Prepares an open record; its name is that of a new record's run, and "" for another."""
    record: Callable[[Any], str] = lambda run: ""
    link: Callable[[Any], str] = lambda run: ""
    fail: Callable[[Any], None] | None = None
    """Ends the record of a run that failed or was stopped; None: as any other."""


def _begin_wandb(run: Any, name: str) -> None:
    # wandb drops rows whose step is smaller than the last, as those that a resumed run repeats
    run.define_metric("images_seen")
    run.define_metric("*", step_metric="images_seen")


_KINDS = {
    "wandb": _Kind(
        lambda folder, record: {
            # a record that someone has renamed keeps its name
            "name": None if record else folder.name, "dir": str(folder), "id": record,
            "resume": "allow",
        },
        {"project": "WANDB_PROJECT", "name": "WANDB_NAME", "dir": "WANDB_DIR",
         "id": "WANDB_RUN_ID", "resume": "WANDB_RESUME"},
        _begin_wandb,
        lambda run: run.id,
        lambda run: f"offline, in {run.settings.sync_dir}" if run.offline else run.url,
        lambda run: run.finish(exit_code=1),
    ),
    "mlflow": _Kind(
        # the class itself reads the variables
        lambda folder, record: {"run_id": record, "run_name": None if record else folder.name},
        record=lambda run: run.info.run_id,
        link=lambda run: f"run {run.info.run_id} at {import_module('mlflow').get_tracking_uri()}",
        fail=lambda run: import_module("mlflow").end_run("KILLED"),
    ),
    "trackio": _Kind(  # it knows a run by its name; "never" begins another one of the same name
        lambda folder, record: {
            "name": record or folder.name, "resume": "allow" if record else "never"
        },
        record=lambda run: run.name,
        link=lambda run: f"run {run.name} of project {run.project}",
    ),
    "comet_ml": _Kind(
        lambda folder, record: {"experiment_key": record},
        {"project": "COMET_PROJECT_NAME", "experiment_key": "COMET_EXPERIMENT_KEY"},
        lambda run, name: name and run.set_name(name),
        lambda run: run.get_key(),
        lambda run: run.url,
    ),
    "clearml": _Kind(
        lambda folder, record: {
            "task_name": folder.name, "reuse_last_task_id": record or False,
            # 0: iterations are images seen, without an offset
            "continue_last_task": 0 if record else False,
            # else it reports TensorBoard's numbers again, and every file that torch.save writes;
            # and keeps the console, whose last lines are then lost
            "auto_connect_frameworks": False, "auto_connect_arg_parser": False,
            "auto_connect_streams": False,
        },
        {"project": "CLEARML_PROJECT", "task_name": "CLEARML_TASK"},
        record=lambda run: run.id,
        link=lambda run: run.get_output_log_web_page(),
    ),
    "swanlab": _Kind(
        lambda folder, record: {
            "experiment_name": None if record else folder.name,
            "logdir": str(folder / "swanlog"), "id": record, "resume": "allow",
        },
        {"project": "SWANLAB_PROJ_NAME", "experiment_name": "SWANLAB_EXP_NAME",
         "logdir": "SWANLAB_LOGDIR", "id": "SWANLAB_RUN_ID", "resume": "SWANLAB_RESUME"},
        record=lambda run: run.id,
        link=lambda run: run.url,
    ),
    "aim": _Kind(
        lambda folder, record: {"run_hash": record, "experiment": PROJECT},
        record=lambda run: run.hash,
        link=lambda run: f"run {run.hash}",
    ),
    "dvclive": _Kind(
        lambda folder, record: {"dir": str(folder / "dvclive"), "resume": record is not None},
        record=lambda run: "dvclive",
        link=lambda run: run.dir,
    ),
}  # fmt: skip
"""Differences between accelerate's classes; others, registered with it, have the defaults."""


def _known(name: str) -> str:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if name not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"no tracker '{name}'{did_you_mean(name, [*LOGGER_TYPE_TO_CLASS])}")
    return name


TrackerName = Annotated[str, AfterValidator(_known)]
"""Name of a tracker that the installed accelerate knows."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are installed, and that wandb is logged in; nothing asks for a key.

    Raises:
        LdmError: one is not; in wandb's online mode, also if its server does not answer.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    available = {kind.value for kind in get_available_trackers()}
    for name in names:
        if name in LoggerType.list() and name not in available:
            raise LdmError(
                f"run.trackers: {name} is not installed: `pip install {name}`, or omit it"
            )
    if "wandb" not in names:
        return
    import wandb

    reason = "no API key"
    with _unattended():
        try:
            if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
                return
            if wandb.login(verify=True):
                return
        except Exception as error:
            reason = _reason(error)
    raise LdmError(
        f"run.trackers: wandb is not logged in ({reason}): run `wandb login`, set WANDB_API_KEY "
        "or WANDB_MODE=offline, or omit it"
    )


class Trackers:
    """Records of one run with several trackers, begun or continued.

    A tracker that fails later is left out of the rest of the run, with one warning.

    Args:
        names: of trackers, without "tensorboard".
        folder: the run's folder; its name is the run's.
        config: the resolved configuration.

    Attributes:
        opening: a line for each tracker, with the link of its record.

    Raises:
        LdmError: a tracker did not start, or `trackers.json` is damaged.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Tree) -> None:
        self._open: dict[str, Any] = {}
        self._failed: set[str] = set()
        self.opening: list[str] = []
        if not names:
            return
        path = folder / RECORDS
        records = read_tree(path, _Records, f"{RESTORE}, to begin new records") or {}
        with ExitStack() as on_error:
            on_error.callback(self.finish, failed=True)
            for name in dict.fromkeys(names):
                self._begin(name, folder, config, records)
                write_json(path, records)
            on_error.pop_all()

    def _begin(self, name: str, folder: Path, config: Tree, records: dict[str, str]) -> None:
        """Start a tracker; note the identifier of its record."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind, before = _KINDS.get(name, _Kind()), records.get(name)
        options = {
            key: value
            for key, value in kind.options(folder, before).items()
            if value is not None and not os.environ.get(kind.variables.get(key, ""))
        }
        project = os.environ.get(kind.variables.get("project", "")) or PROJECT
        given: list[str] = [folder.name if name == "aim" else project]  # aim's is the run's name
        flat = {k: v if _is_scalar(v) else to_flow(v) for k, v in flatten(config).items()}
        try:
            with _unattended():
                make: Any = LOGGER_TYPE_TO_CLASS[name]
                if make.requires_logging_directory:
                    given.append("." if name == "aim" else str(folder))  # its repository, for all
                tracker = make(*given, **options)
                tracker.start()
                self._open[name] = tracker
                kind.begin(tracker.tracker, "" if before else folder.name)
                if before is None or name != "mlflow":  # whose parameters cannot change
                    tracker.store_init_configuration(config if name == "wandb" else flat)
        except (Exception, SystemExit) as error:
            again = f"delete {folder / RECORDS} to begin new records, " if before else ""
            raise LdmError(
                f"run.trackers: {name} did not start ({_reason(error)}): correct its settings, "
                f"{again}or omit it"
            ) from error
        if record := _ask(kind.record, tracker):
            records[name] = record
        link = _ask(kind.link, tracker) or "started"
        pictures = "" if hasattr(tracker, "log_images") else "; it gets no pictures"
        self.opening.append(f"{name}: {escape(_without_secrets(link))}{pictures}")

    def log(self, values: Mapping[str, float], images_seen: int) -> None:
        """Log finite numbers by their names."""
        for name, tracker in self._working():
            with self._attempt(name):
                if name == "wandb":
                    tracker.log({**values, "images_seen": images_seen})
                else:
                    tracker.log(dict(values), step=images_seen)

    def picture(self, title: str, sheet: Tensor, images_seen: int) -> None:
        """Log a float image (3, H, W) in [−1, 1], by the trackers that take some."""
        for name, tracker in self._working():
            if not hasattr(tracker, "log_images"):
                continue
            with self._attempt(name):
                image: Any = to_pil(sheet)
                values = {title: image if name in ("aim", "clearml") else [image]}
                if name == "wandb":
                    tracker.log_images(values, commit=False)  # in one row with its images_seen
                    tracker.log({"images_seen": images_seen})
                else:
                    tracker.log_images(values, step=images_seen)

    def finish(self, failed: bool = False) -> None:
        """End the records, of a run that may have failed; a resumed run continues them."""
        # those that failed too: the next run of this process would get into their records
        for name, tracker in self._open.items():
            with self._attempt(name):
                fail = _KINDS.get(name, _Kind()).fail
                if failed and fail is not None:
                    fail(tracker.tracker)
                else:
                    tracker.finish()
        self._open.clear()

    def _working(self) -> list[tuple[str, Any]]:
        return [(name, tracker) for name, tracker in self._open.items() if name not in self._failed]

    @contextmanager
    def _attempt(self, name: str) -> Iterator[None]:
        """Leave a tracker out of the rest of the run if it fails: each further call may wait for
        a network that is gone, and training with it."""
        try:
            yield
        except (Exception, SystemExit) as error:
            text = "%s failed (%s): it gets no more of this run; metrics.jsonl does"
            if name not in self._failed:
                log.warning(text, name, _reason(error))
            self._failed.add(name)


@contextmanager
def _unattended() -> Iterator[None]:
    """Give a tracker no terminal to ask on, and keep the signals by which a run saves and stops."""
    with Path(os.devnull).open() as nothing, ExitStack() as back:
        back.callback(setattr, sys, "stdin", sys.stdin)
        sys.stdin = nothing
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if (handler := signal.getsignal(number)) is not None:
                    back.callback(signal.signal, number, handler)
        yield


def _ask(question: Callable[[Any], Any], tracker: Any) -> str:
    """Return an answer of a tracker's own object; "" if it has none."""
    with suppress(Exception):  # such as the link of a record that is not online
        return str(question(tracker.tracker) or "")
    return ""


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _reason(error: BaseException) -> str:
    text = brief(error) if isinstance(error, Exception) else f"it called exit({error})"
    return escape(shorten(_without_secrets(text), 200, placeholder=" …"))


def _without_secrets(text: str) -> str:
    """Remove passwords and queries, which may be keys, from addresses such as a server's."""
    return re.sub(r"(//[^\s?]*)\?\S*", r"\1", re.sub(r"(?<=//)[^/\s]*@", "", text))
