"""The campaign: seeded damage, verdicts, and a handful of its trials against the real commands."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from benchmarks import campaign
from benchmarks.campaign import FAULTS, Trial, judge, table
from benchmarks.mutations import FORMS, SUBJECTS, damage, damage_bytes, damage_tree
from benchmarks.trials import Outcome, changed, contents, copy
from benchmarks.world import Job
from tests.small import ROOT

TREE = {"a": [1, {"b": "x"}], "c": None}


def outcome(code, text=""):
    return Outcome(code, text, 0, 0)


def test_damage_depends_on_the_seed_alone():
    content = bytes(range(256)) * 8
    first = [damage_bytes(content, Random(seed)) for seed in range(40)]
    assert first == [damage_bytes(content, Random(seed)) for seed in range(40)]
    assert len({damaged for _, damaged in first}) > 30


def test_damage_to_a_tree_reaches_every_depth():
    seen = {repr(damage_tree(json.loads(json.dumps(TREE)), Random(seed))) for seed in range(300)}
    for key in ("'a'", "'b'", "'c'", "0"):
        assert any(f"replace {key}" in what for what in seen)
        assert any(f"remove {key}" in what for what in seen)


@pytest.mark.parametrize("form", ["json", "yaml", "jsonl"])
def test_structural_damage_gives_text(form):
    content = json.dumps(TREE).encode()
    for seed in range(50):
        what, damaged = FORMS[form](content, Random(seed))
        assert what
        assert damaged != content or "replace" in what


def test_damage_is_to_one_file_of_the_subject(tmp_path):
    for name in ("images/a.png", "images/b.png", "images/c.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(range(200)))
    before = contents(tmp_path)
    what = damage(SUBJECTS["PNG, data prepare"], tmp_path, Random(1))
    assert len(changed(before, contents(tmp_path))) == 1
    assert what.startswith("images/")


def test_files_are_compared_by_what_they_mean(tmp_path):
    for name, created, loss in (("a", 1, 2), ("b", 3, 2), ("c", 1, 4)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "x.json").write_text(json.dumps({"created": created, "loss": loss}))
    one, other, different = (contents(tmp_path / name) for name in "abc")
    assert not changed(one, other)
    assert changed(one, different) == ["x.json"]


def test_files_are_compared_without_their_place(tmp_path):
    for name in ("a/trial", "b/trial"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "x.json").write_text(json.dumps({"put at": str(folder.parent / "tools")}))
    one, other = (contents(tmp_path / name) for name in ("a/trial", "b/trial"))
    assert one and not changed(one, other)


@pytest.mark.parametrize(("code", "again"), [(0, 0), (-9, 1), (1, 1)])
def test_a_job_that_finished_is_not_run_again(code, again, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(campaign, "run", lambda *_: runs.append(1) or outcome(0))
    job = Job(("x",), (), ())
    trial = campaign._again("full", "x", 0, "", job, tmp_path, {}, outcome(code))
    assert (trial.verdict, len(runs)) == ("same", again)


def test_needs_may_be_copied_to_other_places(tmp_path):
    (tmp_path / "world/from").mkdir(parents=True)
    (tmp_path / "world/from/x").write_text("x")
    trial = copy(tmp_path / "world", ["from>to/here"], tmp_path / "trial")
    assert (trial / "to/here/x").read_text() == "x"


@pytest.mark.parametrize(
    ("ended", "verdict"),
    [
        (outcome(0), "done"),
        (outcome(1, "error: x is damaged: delete it\n"), "refused"),
        (outcome(2, "step 1\nerror: no such key\n"), "refused"),
        (outcome(1, "error: KeyError: x (unexpected: --debug shows where)\n"), "unexpected"),
        (outcome(1, "nothing said\n"), "unexpected"),
        (outcome(70, "Traceback (most recent call last):\n"), "unexpected"),
        (outcome(-11), "unexpected"),
        (outcome(None), "hung"),
        (outcome(1, "error: MemoryError: (unexpected: --debug shows where)\n"), "memory"),
    ],
)
def test_ends_are_judged(ended, verdict, tmp_path):
    assert judge(ended, tmp_path) == verdict


def test_code_that_ran_is_seen(tmp_path):
    (tmp_path / "canary").touch()
    assert judge(outcome(0), tmp_path) == "code"


def test_the_table_counts_verdicts_by_target():
    found = [Trial("kills", "x", i, "", verdict) for i, verdict in enumerate(("same", "wrong"))]
    rows = table([*found, Trial("hostile", "y", 0, "", "refused")])
    assert [row[:4] for row in rows] == [
        ("kills", "x", "2", "1"), ("kills", "all", "2", "1"), ("hostile", "all", "1", "0"),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute on an idle machine
def test_a_small_campaign_finds_nothing(tmp_path):
    words = ["--rounds", "0.01", "--seed", "1", "--just", "data prepare", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.campaign", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(Path(tmp_path / "campaign.json").read_text())
    assert {row[0] for row in found["rows"]} == {"kills", "full", "mutations", "hostile"}
    assert not found["faults"]
    assert all(row[-len(FAULTS) :] == ["0"] * len(FAULTS) for row in found["rows"])
