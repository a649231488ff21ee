"""Table 6 as it is asked for: files, tables and notes."""

import csv

from PIL import Image, ImageChops

from pipelines.analysis import mmd
from pipelines.analysis.mmd import MmdSettings, analyze_mmd, latents_mmd
from tests.pipelines.analysis.subjects import opened, save


def test_table_6_of_two_models(tmp_path):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    words = [f"LiteVAE={a}", f"VAE={b}"]
    found = analyze_mmd(*opened(*words), MmdSettings(n=12, sigmas=(4, 8), draws=2))
    picture, table = found.files
    assert picture == a / "analysis" / "mmd.png" and picture.stat().st_size > 10_000
    assert found.header == ("σ", "LiteVAE", "VAE") and [row[0] for row in found.rows] == ["4", "8"]
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["sigma"]) for row in rows] == [
        ("LiteVAE", "4"), ("LiteVAE", "8"), ("VAE", "4"), ("VAE", "8")
    ]  # fmt: skip
    assert {(row["d"], row["images"], row["draws"]) for row in rows} == {("64", "12", "2")}
    last = rows[-1]
    assert found.rows[1][2] == f"{float(last['mmd2_x100']):.2f} ± {float(last['std']):.2f}"


def test_one_draw_is_what_table_6_is_reproduced_by(tmp_path):
    settings = MmdSettings(n=8, sigmas=(8,), draws=1)
    (subject,), images = opened(f"a={save(tmp_path)}")
    found = analyze_mmd([subject], images, settings)
    mean, _ = latents_mmd(subject, images, settings).distances[8.0]
    assert found.rows == [("8", f"{mean:.2f} ± 0.00")]


def test_notes_tell_what_does_not_compare(tmp_path):
    folder = save(tmp_path)
    (note,) = analyze_mmd(*opened(folder), MmdSettings(n=4, draws=1)).notes
    assert "√64 = 8" in note
    settings = MmdSettings(n=10**6, sigmas=(8,), draws=1)
    notes = analyze_mmd(*opened(folder, resolution=256), settings).notes
    assert "there are only" in notes[0]


def test_the_note_on_the_shift_names_those_it_is_true_of():
    *_, note = mmd._notes({"small": 64, "paper's": 4096}, MmdSettings(n=4), 4)
    assert "√64 = 8" in note and "√4,096" not in note


def test_lines_go_from_width_to_width_in_whatever_order_they_are_asked(tmp_path):
    folder = save(tmp_path)
    rising, mixed = (
        analyze_mmd(*opened(folder), MmdSettings(4, sigmas, 2), out=tmp_path / str(i))
        for i, sigmas in enumerate([(4, 8, 16), (16, 4, 8)])
    )
    assert [row[0] for row in mixed.rows] == ["16", "4", "8"]
    with Image.open(rising.files[0]) as one, Image.open(mixed.files[0]) as other:
        assert ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getbbox() is None
