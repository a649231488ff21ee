"""What a report reads of runs, and how it lays it out."""

import re
from math import nan
from pathlib import Path

import pytest

from ldm.config import flatten
from ldm.errors import LdmError, UsageError
from pipelines.report import page
from pipelines.report.records import Record, read_records
from pipelines.report.sections import POINTS, curves_section, settings_section
from tests.pipelines.report.run_folders import stage_one, stage_two, write_rows


def record(label: str = "a", config: dict | None = None, rows: list | None = None) -> Record:
    return Record(Path(), "autoencoder", label, {}, config or {}, rows or [], None)


# ---------------------------------------------------------------------------------- records
def test_runs_are_told_apart_by_as_little_as_needed(tmp_path):
    a, b = stage_one(tmp_path / "x" / "run"), stage_two(tmp_path / "y" / "run")
    c = stage_one(tmp_path / "z")
    assert [r.label for r in read_records([a, c])] == ["run", "z"]
    assert [r.label for r in read_records([a, b])] == ["x/run", "y/run"]
    assert [r.kind for r in read_records([a, b])] == ["autoencoder", "diffusion"]
    assert len(read_records([a, a, tmp_path / "x"])) == 1  # each once


def test_runs_are_called_what_a_person_calls_them(tmp_path):
    a, b = (stage_one(tmp_path / name / "run") for name in ("x", "y"))
    assert [r.label for r in read_records([f"SMC={a}", b])] == ["SMC", "y/run"]
    assert [r.label for r in read_records([f"all={tmp_path / 'x'}"])] == ["all/run"]
    odd = stage_one(tmp_path / "lr=1" / "run")
    assert [r.label for r in read_records([odd])] == ["run"], "a path may have a = in it"
    with pytest.raises(UsageError, match="the name 'SMC' is used twice"):
        read_records([f"SMC={a}", f"SMC={b}"])
    with pytest.raises(UsageError, match="is given as 'SMC' and as 'B': give it once"):
        read_records([f"SMC={a}", f"B={a}"])
    with pytest.raises(LdmError, match=r"no folder at .*/lr=2/run: pass a run folder"):
        read_records([tmp_path / "lr=2" / "run"])


def test_the_newest_picture_and_how_far_it_came(tmp_path):
    run = stage_one(tmp_path / "a")
    (run / "pictures" / "recon-00000008.png").write_bytes(b"")
    (found,) = read_records([run])
    assert found.newest_picture("recon").name == "recon-00000032.png"
    assert found.newest_picture("samples") is None and found.images_seen == 32
    (run / "result.json").write_text("{", "utf-8")
    (found,) = read_records([run])
    assert found.result is None and "result.json is damaged" in found.notes[0]


def test_where_a_run_ends_is_what_its_settings_say_or_its_rows_once_it_has_ended():
    rows = [{"images_seen": 8, "resolution": 64}, {"images_seen": 8, "val_psnr": 20.0}]
    phases = [{"resolution": 64, "steps": 1}, {"resolution": 128, "steps": 1}]
    assert record(config={"phases": phases}, rows=rows).resolution == 128
    assert record(config={"resolution": 256}).resolution == 256  # stage two
    ended = record(rows=rows)
    assert ended.resolution == 0  # a larger phase may follow
    ended.result = {"images_seen": 8}
    assert ended.resolution == 64 and record().resolution == 0


# --------------------------------------------------------------------------------- settings
def test_settings_are_compared_leaf_by_leaf():
    a = {"lr": 1.0, "run": {"seed": 0, "log_every_steps": 1}, "encoder": {"type": "x", "n": 1}}
    b = {"lr": 1.0, "run": {"seed": 1, "log_every_steps": 2}, "encoder": {"type": "y"}}
    assert flatten(a)["run.seed"] == 0
    records = record("a", a), record("b", b)
    text = settings_section(records)
    text = text.replace("<wbr>", "")
    differing, _, everything = text.partition("<details>")
    cells = re.findall(r"<td>(.*?)</td>", differing)
    # how often a run is logged makes no other run of it
    assert cells == ["run.seed", "0", "1", "encoder.type", "x", "y", "encoder.n", "1", "–"]
    assert "<td>run.log_every_steps</td><td>1</td><td>2</td>" in everything
    assert "All 5 settings" in everything


def test_equal_settings_and_single_runs_have_no_table_of_differences():
    records = record("a", {"lr": 1}), record("b", {"lr": 1})
    assert "have the same settings" in settings_section(records)
    assert "<table" not in settings_section(records[:1]).partition("<details>")[0]
    assert settings_section([record()]) == ""


# ----------------------------------------------------------------------------------- curves


def test_long_curves_are_averaged_and_short_ones_are_not(monkeypatch):
    rows = [{"images_seen": n, "loss": float(n % 2)} for n in range(1, 10 * POINTS + 1)]
    long, short = record("long", rows=rows), record("short", rows=rows[:POINTS])
    drawn = {}
    monkeypatch.setattr(page, "lines_svg", lambda lines, *_: drawn.update(lines) or "<svg></svg>")
    text = curves_section([long, short])
    assert f"averaged to {POINTS} points" in text
    assert len(drawn["long"]) == len(drawn["short"]) == POINTS
    assert {y for _, y in drawn["long"]} == {0.5}  # the mean of ten
    assert {y for _, y in drawn["short"]} == {0.0, 1.0}
    assert drawn["long"][-1][0] == 10 * POINTS


@pytest.mark.parametrize(
    ("name", "values", "title", "log"),
    [
        ("l1", (1.0, 0.01), "ℓ1", True),
        ("l1", (1.0, 0.5), "ℓ1", False),
        ("adversarial", (1.0, -0.01), "adversarial", False),
        ("val_psnr", (1.0, 30.0), "PSNR, held-out, dB", False),
    ],
)
def test_a_logarithm_is_taken_where_it_shows_more(monkeypatch, name, values, title, log):
    rows = [{"images_seen": n, name: value} for n, value in enumerate(values)]
    scales = []
    monkeypatch.setattr(page, "lines_svg", lambda *asked: scales.append(asked[-1]) or "<svg></svg>")
    assert title in curves_section([record(rows=rows)])
    assert scales == [log]


def test_a_curve_says_where_runs_are_validated_at_several_resolutions():
    rows = [{"images_seen": 8, "val_psnr": 20.0, "l1": 0.5, "resolution": 64}]
    sides = {"a": [64], "b": [64, 128], "c": [32, 64]}
    runs = [
        record(label, {"phases": [{"resolution": side, "steps": 1} for side in each]}, rows)
        for label, each in sides.items()
    ]
    text = curves_section(runs)
    told = "Not comparable between resolutions. Validated at 128²: b; at 64²: a, c."
    assert (
        text.count(told) == 1
        and told in re.search("<h3>PSNR.*?</p></div>", text, re.DOTALL).group()
    )
    assert "Validated" not in curves_section([runs[0], runs[2]])
    unknown = record("d", rows=rows)
    text = curves_section([runs[0], unknown])
    assert "Validated at 64²: a; at an unknown resolution: d." in text


def test_the_gradient_ratio_says_which_is_over_which():
    rows = [{"images_seen": n, "gradient_ratio": 0.25} for n in (8, 16)]
    text = curves_section([record(rows=rows)])
    assert "<h3>gradient ratio, ‖∇rec‖ ÷ ‖∇adv‖</h3>" in text and "a 0.25<" not in text
    assert "without its ½. `ldm analyze gradients` draws the inverse.</p>" in text


def test_there_are_no_curves_without_values():
    rows = [{"images_seen": 1, "val_count": 3}, {"images_seen": 2, "loss": nan}]
    assert curves_section([record(rows=rows)]) == ""


def test_rows_that_are_damaged_do_not_stop_a_report(tmp_path):
    run = stage_one(tmp_path / "a")
    write_rows(run, [{"images_seen": 1, "l1": None}])
    (found,) = read_records([run])
    assert found.rows == [{"images_seen": 1}]
    assert curves_section([found]) == ""
