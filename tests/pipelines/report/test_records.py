"""Runs as a report reads them from their folders."""

from pathlib import Path

import pytest

from ldm.errors import LdmError, UsageError
from pipelines.report.records import Record, read_records
from tests.pipelines.report.run_folders import stage_one, stage_two


def record(label: str = "a", config: dict | None = None, rows: list | None = None) -> Record:
    return Record(Path(), "autoencoder", label, {}, config or {}, rows or [], None)


def test_labels_are_the_shortest_distinct_path_ends(tmp_path):
    a, b = stage_one(tmp_path / "x" / "run"), stage_two(tmp_path / "y" / "run")
    c = stage_one(tmp_path / "z")
    assert [r.label for r in read_records([a, c])] == ["run", "z"]
    assert [r.label for r in read_records([a, b])] == ["x/run", "y/run"]
    assert [r.kind for r in read_records([a, b])] == ["autoencoder", "diffusion"]
    assert len(read_records([a, a, tmp_path / "x"])) == 1  # each once


def test_names_given_on_the_command_line_are_labels(tmp_path):
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


def test_newest_picture_and_damaged_results(tmp_path):
    run = stage_one(tmp_path / "a")
    (run / "pictures" / "recon-00000008.png").write_bytes(b"")
    (found,) = read_records([run])
    assert found.newest_picture("recon").name == "recon-00000032.png"
    assert found.newest_picture("samples") is None and found.images_seen == 32
    (run / "result.json").write_text("{", "utf-8")
    (found,) = read_records([run])
    assert found.result is None and "result.json is damaged" in found.notes[0]


def test_resolution_comes_from_the_settings_or_the_rows_of_a_finished_run():
    rows = [{"images_seen": 8, "resolution": 64}, {"images_seen": 8, "val_psnr": 20.0}]
    phases = [{"resolution": 64, "steps": 1}, {"resolution": 128, "steps": 1}]
    assert record(config={"phases": phases}, rows=rows).resolution == 128
    assert record(config={"resolution": 256}).resolution == 256  # stage two
    ended = record(rows=rows)
    assert ended.resolution == 0  # a larger phase may follow
    ended.result = {"images_seen": 8}
    assert ended.resolution == 64 and record().resolution == 0
