"""Settings, curves and measurements as a report shows them."""

import json
import re
from math import nan
from pathlib import Path

import pytest

from ldm.config import flatten
from ldm.files import write_json
from pipelines.report import page
from pipelines.report.records import Record, read_records
from pipelines.report.sections import POINTS, curves_section, numbers_section, settings_section
from tests.pipelines.report.run_folders import stage_one, stage_two, write_rows


def record(label: str = "a", config: dict | None = None, rows: list | None = None) -> Record:
    return Record(Path(), "autoencoder", label, {}, config or {}, rows or [], None)


# --------------------------------------------------------------------------------- settings
def test_settings_are_compared_key_by_key():
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


def test_only_long_curves_are_averaged(monkeypatch):
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
def test_log_scale_for_positive_values_over_a_decade(monkeypatch, name, values, title, log):
    rows = [{"images_seen": n, name: value} for n, value in enumerate(values)]
    scales = []
    monkeypatch.setattr(page, "lines_svg", lambda *asked: scales.append(asked[-1]) or "<svg></svg>")
    assert title in curves_section([record(rows=rows)])
    assert scales == [log]


def test_a_note_warns_of_different_validation_resolutions():
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


def test_the_gradient_ratio_is_explained():
    rows = [{"images_seen": n, "gradient_ratio": 0.25} for n in (8, 16)]
    text = curves_section([record(rows=rows)])
    assert "<h3>gradient ratio, ‖∇rec‖ ÷ ‖∇adv‖</h3>" in text and "a 0.25<" not in text
    assert "without its ½. `ldm analyze gradients` draws the inverse.</p>" in text


def test_no_curves_without_values():
    rows = [{"images_seen": 1, "val_count": 3}, {"images_seen": 2, "loss": nan}]
    assert curves_section([record(rows=rows)]) == ""


def test_damaged_rows_are_skipped(tmp_path):
    run = stage_one(tmp_path / "a")
    write_rows(run, [{"images_seen": 1, "l1": None}])
    (found,) = read_records([run])
    assert found.rows == [{"images_seen": 1}]
    assert curves_section([found]) == ""


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
