"""Runs and measurements as a report reads them from their folders, and the table of numbers."""

import json
import re
from pathlib import Path

import pytest

from ldm.errors import LdmError, UsageError
from ldm.files import write_json
from pipelines.report.records import Record, numbers_section, read_records
from tests.pipelines.report.run_folders import record, stage_one, stage_two


def test_labels_are_the_shortest_distinct_path_ends(tmp_path):
    a, b = stage_one(tmp_path / "x" / "run"), stage_two(tmp_path / "y" / "run")
    c = stage_one(tmp_path / "z")
    assert [r.label for r in read_records([a, c])] == ["run", "z"]
    assert [r.label for r in read_records([a, b])] == ["x/run", "y/run"]
    kinds = [r.described["kind"] for r in read_records([a, b])]
    assert kinds == ["autoencoder", "diffusion"]
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


def test_damaged_results_become_notes(tmp_path):
    run = stage_one(tmp_path / "a")
    (found,) = read_records([run])
    assert found.images_seen == 32
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


# ----------------------------------------------------------------------------------- numbers
DATA = {"source": "some/images", "crop": "random", "held_out": 3, "workers": 2}
OURS = {"name": "wf:feats", "sha256": "f00d", "is_published": False}


def told_of(*records: Record) -> str:
    text = numbers_section(records)
    return text.replace("<wbr>", "").replace("\N{NO-BREAK SPACE}", " ")


def rows_of(text: str) -> list[list[str]]:
    """The cells of the table of numbers; of the first, what is under the run's name."""
    body = re.search(r"<tbody>(.*?)</tbody>", text).group(1)
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", body)]
    return [[cells[0].partition('dim">')[2].removesuffix("</span>"), *cells[1:]] for cells in rows]


def evaluate(path: Path, **other) -> None:
    """Write the relevant part of a result of `ldm eval-ae`."""
    told = {"path": f"runs/{path.parent.parent.name}/ckpt.pt", "sha256": "beef"}
    tree = {"resolution": 64, "count": 38, "split": "val", "data": DATA, "model": told}
    write_json(path, tree | {"numbers": {"psnr": 12.5}, "extractor": None, "notes": []} | other)


def test_every_measurement_is_a_row_with_sources(tmp_path):
    run = stage_one(tmp_path / "a")
    alone = {"resolution": 64, "count": 5000, "numbers": {"rfid": 0.5, "kid": 0.002},
             "details": {"kid_std": 0.001, "swd_images": 0},
             "doubtful": {"rfid": "too few", "kid": "too few"}, "notes": ["a note"],
             "model": {"recipe": {"lr": 0.125}},
             "command": "ldm eval-ae a", "extractor": {"sha256": "f00d"}}  # fmt: skip
    write_json(run / "eval" / "photos-val-64.json", alone)
    write_json(run / "eval" / "two.json", {"evaluations": [alone, alone | {"resolution": 128}]})
    (run / "eval" / "broken.json").write_text("[", "utf-8")
    (found,) = read_records([run])
    text = told_of(found)
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    assert re.findall(r"<th>(.*?)</th>", text) == [
        "measurement",
        "rFID",
        "KID ×10³",
        "PSNR, dB",
        "SSIM",
    ]
    kid = "2.000 ± 1.000"
    assert [(cells[0].partition('dim">')[2], *cells[1:]) for cells in rows[1:6]] == [
        ("at the end, 32 images seen, 4 held-out images at 32²</span>", "", "", "20.50", "0.6250"),
        ("best.pt, 16 images seen, at 32²</span>", "", "", "21.25", "0.7500"),
        ("photos-val-64, 5,000 images at 64²</span>", "0.500", kid, "", ""),
        ("two, 5,000 images at 64²</span>", "0.500", kid, "", ""),
        ("two, 5,000 images at 128²</span>", "0.500", kid, "", ""),
    ]
    assert ["extractor.sha256", "f00d"] in rows and ["command", "ldm eval-ae a"] in rows
    assert any(cells[:1] == ["versions.torch"] for cells in rows) and "0.125" not in text
    rows = "photos-val-64, 5,000 images at 64²; a: two, 5,000 images at 64²; a: two, 5,000 images"
    for said in ("too few", "a note"):  # once, of three measurements
        assert text.count(f'<p class="note">{said}<br><span class="dim">a: {rows} at 128²') == 1
    (note,) = found.notes
    assert "broken.json is damaged" in note


def test_samples_measured_in_a_runs_folder_are_found(tmp_path):
    run = stage_two(tmp_path / "a")
    doubt, why = "FID over 8 samples is biased upwards", "no weights: " + 80 * "x"
    told = {"fid": 12.5, "fid_interval": {"std": 0.25}, "kid": 0.002, "kid_std": 0.001,
            "swd": {"16": 9.0, "mean": 8.0}, "samples": {"count": 5000}, "recall": None,
            "reference": {"what": "photos, train"}, "warnings": [doubt, doubt],
            "missing": {"recall": why, "precision": why}}  # fmt: skip
    write_json(run / "samples" / "seed0-steps18" / "fid.json", told)
    write_json(run / "samples" / "seed1-steps18" / "fid.json", [])
    write_json(run / "fid" / "seed0-steps18-n50000.json", {"fid": 11.0})
    (found,) = read_records([run])
    text = told_of(found)
    assert re.findall(r"<th>(.*?)</th>", text) == [
        "measurement",
        "FID",
        "KID ×10³",
        "SWD ×10³",
        "loss",
    ]
    what = "samples seed0-steps18, 5,000 images against photos, train"
    cells = "<td>12.500 ± 0.250</td><td>2.000 ± 1.000</td><td>8.00</td><td></td>"
    assert f"{what}</span></td>{cells}" in text
    assert "samples seed0-steps18-n50000</span></td><td>11.000</td>" in text
    assert text.count(f'<p class="note">{doubt}<br><span class="dim">a: {what}</span></p>') == 1
    assert text.count(why) == 1 and "<td>same as missing.recall</td>" in text
    assert "seed1-steps18/fid.json is damaged" in found.notes[0]


def test_agreeing_evaluations_share_a_row(tmp_path):
    run = stage_one(tmp_path / "a")
    (run / "result.json").unlink()
    folder, of_ours = run / "eval", {"psnr": 12.5, "rfid": 3.0}
    evaluate(folder / "1-no-fid.json", data=DATA | {"workers": 0, "crop": "center"})
    evaluate(folder / "2-feats.json", numbers=of_ours, extractor=OURS)
    evaluate(folder / "3.json", numbers={"psnr": 12.5, "swd": 8.0})
    # of something else each, or by something else, or with other numbers
    evaluate(folder / "4.json", split="train")
    evaluate(folder / "5.json", resolution=128)
    evaluate(folder / "6.json", data=DATA | {"held_out": 4})
    evaluate(folder / "7.json", model={"path": "runs/a/best.pt", "sha256": "be57"})
    evaluate(folder / "8.json", numbers={"psnr": 12.25})
    evaluate(folder / "9.json", numbers=of_ours, extractor=OURS | {"name": "wf:b", "sha256": "b"})
    other = {"path": "runs/b", "sha256": "cafe"}
    evaluate(folder / "all.json", model=other)
    (found,) = read_records([run])
    text = told_of(found)
    assert rows_of(text) == [
        ["some/images, val, 38 images at 64², features of wf:feats", "3.000", "12.50", "8.00"],
        ["some/images, train, 38 images at 64²", "", "12.50", ""],
        ["some/images, val, 38 images at 128²", "", "12.50", ""],
        ["some/images, val, 38 images at 64² (eval/6.json)", "", "12.50", ""],
        ["best.pt, some/images, val, 38 images at 64²", "", "12.50", ""],
        ["some/images, val, 38 images at 64² (eval/8.json)", "", "12.25", ""],
        ["some/images, val, 38 images at 64², features of wf:b", "3.000", "12.50", ""],
        ["runs/b, some/images, val, 38 images at 64²", "", "12.50", ""],
    ]
    # all that was measured is there to unfold, in one place
    assert text.count("<summary>Sources</summary><details>") == 1
    assert text.count("<details>") == 1 + 1 + len(rows_of(text))
    for name in ("1-no-fid", "2-feats", "3", "all"):
        assert text.count(f"<td>{folder / name}.json</td>") == 1


def test_a_caveat_is_shown_once_with_its_rows(tmp_path):
    for name in "ab":
        run = stage_one(tmp_path / name)
        seen = f"runs/{name}/ckpt.pt was trained on these images"
        evaluate(run / "eval" / "1.json", split="train", notes=[seen, "too few"])
        evaluate(run / "eval" / "2.json", notes=["too few"])
    text = told_of(*read_records([tmp_path / "a", tmp_path / "b"]))
    train, val = (f"a, b: some/images, {split}, 38 images at 64²" for split in ("train", "val"))
    assert re.findall('<p class="note">(.*?)<br><span class="dim">(.*?)</span></p>', text) == [
        ("the model was trained on these images", train),
        ("too few", f"{train}; {val}"),
    ]


def test_results_of_samples_are_found_and_distinguished(tmp_path):
    run = stage_two(tmp_path / "a")
    (run / "result.json").unlink()
    ours = {"what": "8 images", "count": 8, "fingerprint": "f1"}
    swd = {"fid": None, "swd": {"mean": 8.0}, "samples": ours, "resolution": 32,
           "reference": {"what": "photos, all", "statistics": None}}  # fmt: skip
    fid = swd | {"fid": 2.0, "swd": None, "reference": {"what": "photos, all", "kept": True}}
    by_ours = {"mode": None, "extractor": OURS}
    for folder in (run / "samples" / "s", run / "samples"):
        first = "" if folder.name == "s" else "s.zip."
        write_json(folder / f"{first}fid.json", fid)
        write_json(folder / f"{first}fid-swd.json", swd)
    beside = run / "samples" / "s"
    write_json(beside / "fid-other.json", swd | {"reference": {"what": "other"}})
    write_json(beside / "fid-feats.json", fid | {"fid": 3.0} | by_ours)
    write_json(beside / "fid-legacy.json", fid | {"fid": 4.0, "mode": "legacy"})
    write_json(beside / "manifest.json", {"count": 8})
    text = told_of(*read_records([run]))
    what = "8 images at 32² against"
    assert sorted(rows_of(text)) == [
        [f"samples s, {what} other", "", "8.00"],
        [f"samples s, {what} photos, all (samples/s/fid-legacy.json)", "4.000", ""],
        [f"samples s, {what} photos, all (samples/s/fid.json)", "2.000", "8.00"],
        [f"samples s, {what} photos, all, features of wf:feats", "3.000", ""],
        [f"samples s.zip, {what} photos, all", "2.000", "8.00"],
    ]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (9999999.4, "9999999.400 ± 0.250"),
        (12345678.9, "1.23×10⁷ ± 0.250"),
        (-2.6152560151757095e20, "-2.62×10²⁰ ± 0.250"),
        (float("inf"), "inf ± 0.250"),
    ],
)
def test_long_numbers_are_powers_of_ten(tmp_path, value, told):
    run = stage_two(tmp_path / "a")
    (run / "result.json").unlink()
    (run / "samples" / "s").mkdir(parents=True)
    # JSON of ours holds no infinity; one that was written by hand may
    text = json.dumps({"fid": value, "fid_interval": {"std": 0.25}})
    (run / "samples" / "s" / "fid.json").write_text(text, "utf-8")
    assert rows_of(told_of(*read_records([run]))) == [["samples s", told]]
