"""Records with trackers: accelerate's own classes on substitutes, and wandb itself, offline."""

import json
import logging
import math
import os
import signal
import sys
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import PartialState, tracking

from ldm.config import Config, resolve
from ldm.errors import Interrupted, LdmError, UsageError
from ldm.logbook import Logbook, read_rows
from ldm.run import RunConfig
from ldm.trackers import check_trackers
from tests.ldm.recorder import Recorder

CONFIG = {"lr": 1e-4, "phases": [{"steps": 4}], "encoder": {"type": "dwt", "levels": None}}
SECRET = "0123456789abcdef" * 3


@pytest.fixture(autouse=True)
def ranks() -> PartialState:
    """The processes of a run, which accelerate's classes log by."""
    return PartialState(cpu=True)


@pytest.fixture
def recorder(monkeypatch) -> type[Recorder]:
    return Recorder.register(monkeypatch)


def open_book(folder: Path, *names: str, **more) -> Logbook:
    folder.mkdir(exist_ok=True)
    return Logbook(folder, trackers=names, config=CONFIG, **more)


# ------------------------------------------------------------------------------- the setting
class Recipe(Config):
    run: RunConfig = RunConfig()


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError) as refused:
        resolve(Recipe, {}, ["run.trackers=[tensorboard, wandbb]"])
    assert str(refused.value).startswith("'run.trackers.1': no tracker 'wandbb'; did you mean 'wan")
    assert resolve(Recipe, {}, ["run.trackers=[wandb, mlflow]"]).run.trackers == ("wandb", "mlflow")
    assert Recipe().run.trackers == ("tensorboard",)


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(LdmError, match=r"trackio is not installed: `pip install trackio`, or"):
        check_trackers(["trackio"])


def test_without_trackers_only_metrics_jsonl_is_written(tmp_path):
    with open_book(tmp_path / "run") as book:
        book.row(8, loss=1.0)
        book.picture("sheet", torch.zeros(3, 8, 8), 8)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_processes_that_do_not_write_open_no_tracker(recorder):
    with Logbook(None, trackers=["recorder"], config=CONFIG) as book:
        book.row(8, loss=1.0)
        book.picture("sheet", torch.zeros(3, 8, 8), 8)
    assert book.opening == [] and not recorder.made


# -------------------------------------------------------------------------------- what arrives
def test_numbers_pictures_and_settings_arrive(tmp_path, recorder):
    with open_book(tmp_path / "run", "recorder", "recorder") as book:
        book.add(loss=torch.tensor(2.0))
        book.row(8, psnr=math.inf, skipped=0)
        book.picture("sheet", -torch.ones(3, 4, 5), 8)
    [tracker] = recorder.made  # named twice
    assert tracker.project == "ldm"
    start, config, row, images, finish = tracker.calls
    assert (start, finish) == (("start",), ("finish",))
    # accelerate's classes take flat scalars
    flat = {"lr": 1e-4, "phases": "[{steps: 4}]", "encoder.type": "dwt", "encoder.levels": None}
    assert config == ("config", flat)
    _, values, step = row
    assert step == 8 and values.pop("images_per_second") > 0
    assert values == {"loss": 2.0, "skipped": 0}  # finite ones
    _, pictures, step = images
    assert step == 8 and [image.size for image in pictures["sheet"]] == [(5, 4)]
    assert book.opening == ["recorder: started"]


def test_a_tracker_without_pictures_says_so_once(tmp_path, recorder, monkeypatch):
    monkeypatch.delattr(Recorder, "log_images")
    with open_book(tmp_path / "run", "recorder") as book:
        book.picture("sheet", torch.zeros(3, 8, 8), 8)
    assert book.opening == ["recorder: started; it gets no pictures"]
    assert [name for name, *_ in recorder.made[0].calls] == ["start", "config", "finish"]


def test_a_record_ends_with_a_failed_run_too(tmp_path, recorder):
    with pytest.raises(Interrupted), open_book(tmp_path / "run", "recorder", "tensorboard"):
        raise Interrupted("stopped")
    assert recorder.made[0].calls[-1] == ("finish",)


# ------------------------------------------------------------------------------------ failures
def test_a_tracker_that_fails_is_left_out_with_one_warning(tmp_path, recorder, monkeypatch, caplog):
    def lost(self, values, step=None):
        self.calls.append("lost")
        raise ConnectionError("http://me:secret@host/api?key=secret is away\nTraceback")

    monkeypatch.setattr(Recorder, "log", lost)
    with caplog.at_level(logging.WARNING), open_book(tmp_path / "run", "recorder") as book:
        for seen in (8, 16):
            book.row(seen, loss=1.0)
        book.picture("sheet", torch.zeros(3, 8, 8), 8)
    [warning] = caplog.messages
    assert warning.startswith("recorder failed (http://host/api is away): it gets no more of this")
    # and ended: the next run of this process would get into its record
    assert [call for call in recorder.made[0].calls if call != "lost"][2:] == [("finish",)]
    assert recorder.made[0].calls.count("lost") == 1
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 2


@pytest.mark.parametrize("error", [ValueError("no\nway"), SystemExit(3)], ids=["error", "exit"])
def test_a_tracker_that_does_not_start_is_one_line_and_ends_the_others(
    tmp_path, recorder, monkeypatch, error
):
    class Refused(Recorder):
        def store_init_configuration(self, values):
            raise error

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "refused", Refused)
    with pytest.raises(LdmError) as refused:
        open_book(tmp_path / "run", "recorder", "refused")
    reason = "no" if isinstance(error, ValueError) else "it called exit(3)"
    assert str(refused.value) == (
        f"run.trackers: refused did not start ({reason}): correct its settings, or omit it"
    )
    assert [tracker.calls[-1] for tracker in recorder.made] == [("finish",), ("finish",)]


def test_a_tracker_cannot_ask_nor_keep_the_signals(tmp_path, recorder, monkeypatch):
    """A question would wait forever in a job; SIGTERM must still save."""

    def start(self):
        assert not sys.stdin.isatty() and not os.isatty(sys.stdin.fileno())
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        input("API key: ")

    monkeypatch.setattr(Recorder, "start", start)
    stdin, before = sys.stdin, signal.getsignal(signal.SIGTERM)
    with pytest.raises(LdmError, match=r"recorder did not start \(EOF when reading a line\)"):
        open_book(tmp_path / "run", "recorder")
    assert sys.stdin is stdin and signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("content", ["[]", '{"mlflow": 7}', '{"mlflow": ""}', "{"])
def test_damaged_identifiers_are_one_line(tmp_path, content):
    (tmp_path / "trackers.json").write_text(content)
    with pytest.raises(LdmError, match=r"trackers.json is damaged.* to begin new records"):
        open_book(tmp_path, "mlflow")


# --------------------------------------------------------------- resumed records, by substitutes
@pytest.fixture
def mlflow(monkeypatch) -> list[tuple]:
    """A module that notes its calls."""
    calls: list[tuple] = []
    ids = count()

    def start_run(run_id=None, run_name=None, **_):
        calls.append(("start", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or f"id{next(ids)}"))

    module = ModuleType("mlflow")
    validation = SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
    module.__dict__.update(
        utils=SimpleNamespace(validation=validation), start_run=start_run,
        search_experiments=lambda filter_string: [],
        create_experiment=lambda name, **_: calls.append(("experiment", name)),
        get_tracking_uri=lambda: "https://me:secret@host/mlflow",
        log_params=lambda values: calls.append(("params", values)),
        log_metrics=lambda values, step: calls.append(("metrics", values, step)),
        end_run=lambda status="FINISHED": calls.append(("end", status)),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "mlflow", module)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    return calls


def test_mlflow_continues_its_run_and_keeps_its_parameters(tmp_path, mlflow):
    folder = tmp_path / "my run"
    with pytest.raises(Interrupted), open_book(folder, "mlflow") as book:
        book.row(8, lr=1.0)
        raise Interrupted("stopped")
    assert book.opening == ["mlflow: run id0 at https://host/mlflow; it gets no pictures"]
    assert json.loads((folder / "trackers.json").read_text()) == {"mlflow": "id0"}
    first = [("experiment", "ldm"), ("start", None, "my run")]
    assert mlflow[:2] == first and mlflow[2][0] == "params"
    assert mlflow[3:] == [("metrics", {"lr": 1.0}, 8), ("end", "KILLED")]
    mlflow.clear()
    with open_book(folder, "mlflow", resume_at=4) as book:
        book.row(8, lr=1.0)  # again
    assert mlflow == [
        first[0], ("start", "id0", None), ("metrics", {"lr": 1.0}, 8), ("end", "FINISHED"),
    ]  # fmt: skip


def test_trackio_continues_by_name(tmp_path, monkeypatch):
    """Another run of that name, in another folder, is another record."""
    inits = []

    def init(**options):
        inits.append(options)
        end = {"finish": lambda: None, "log": lambda values, step: None}
        return SimpleNamespace(name=options["name"], project=options["project"], **end)

    module = SimpleNamespace(init=init, config={})
    monkeypatch.setitem(sys.modules, "trackio", module)
    for _ in range(2):
        open_book(tmp_path / "run", "trackio").__exit__(None, None, None)
    same = {"project": "ldm", "name": "run"}
    assert inits == [same | {"resume": "never"}, same | {"resume": "allow"}]


def test_identifiers_of_other_trackers_stay(tmp_path, mlflow):
    (tmp_path / "trackers.json").write_text('{"wandb": "abc"}')
    open_book(tmp_path, "mlflow").__exit__(None, None, None)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "abc", "mlflow": "id0"}


# ---------------------------------------------------------------------------------------- wandb
@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """wandb itself, offline, of nobody."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    module = pytest.importorskip("wandb")
    module.teardown()  # it reads variables once
    yield module
    module.teardown()


def read_record(folder: Path) -> list:
    """Read the records of an offline run: a log of LevelDB's format, with protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = folder.glob("*.wandb")
    data, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        if kind in (1, 4):  # a whole one, or its last part
            record = Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
        at += 7 + size
        if 2**15 - at % 2**15 < 7:  # no header fits into the rest of a block
            at += 2**15 - at % 2**15
    return records


def history(records: list) -> list[dict]:
    """The rows of a run's record, without wandb's own entries."""
    rows = [r.history.item for r in records if r.WhichOneof("record_type") == "history"]
    named = [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r} for r in rows]
    return [{k: v for k, v in row.items() if not k.startswith("_")} for row in named]


def test_wandb_holds_rows_pictures_and_settings_and_continues(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    check_trackers(["wandb"])
    folder = tmp_path / "run"
    with open_book(folder, "wandb") as book:
        for seen in (8, 16, 24):
            book.row(seen, loss=seen / 8)
        book.picture("sheet", torch.zeros(3, 4, 5), 24)
    wandb.teardown()  # as the end of the process, which completes the file
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with pytest.raises(Interrupted), open_book(folder, "wandb", resume_at=8) as again:
        again.row(16, loss=2.5)
        raise Interrupted("stopped")
    wandb.teardown()

    [first] = folder.glob("wandb/offline-run-*")
    [second] = tmp_path.glob("wandb/offline-run-*")
    records = read_record(first)
    [run] = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("mine", "run")
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": run.run_id}
    assert [r.run.run_id for r in read_record(second) if r.HasField("run")] == [run.run_id]
    assert book.opening == [f"wandb: offline, in {first}"]

    config = {i.key: json.loads(i.value_json) for r in records for i in r.config.update}
    assert config["encoder"] == CONFIG["encoder"] and config["phases"] == CONFIG["phases"]
    *rows, picture = history(records)
    assert rows == [{"images_seen": seen, "loss": seen / 8} for seen in (8, 16, 24)]
    assert picture["images_seen"] == 24
    assert list(first.rglob("media/images/sheet*.png"))
    assert history(read_record(second)) == [{"images_seen": 16, "loss": 2.5}]
    [exit_code] = [r.exit.exit_code for r in read_record(second) if r.HasField("exit")]
    assert exit_code == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("key", [None, "short"])
def test_wandb_without_a_key_is_refused_without_a_question(wandb, monkeypatch, key):
    """On a terminal, too: it may be that of a job."""
    monkeypatch.setenv("WANDB_MODE", "online")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    terminal = SimpleNamespace(isatty=lambda: True, fileno=lambda: 0)
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr("wandb.errors.term._sys_stderr_isatty", lambda: True, raising=False)
    with pytest.raises(LdmError, match=r"^run.trackers: wandb is not logged in \(.*\): run `wandb"):
        check_trackers(["wandb"])
