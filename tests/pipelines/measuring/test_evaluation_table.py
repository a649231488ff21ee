"""Tables that are read, and pasted into papers."""

import json
import re
from pathlib import Path

import pytest

from ldm.errors import UsageError
from pipelines.measuring.evaluation import NUMBERS, Evaluation, format_evaluations, name_models

ABOUT = {
    "data": {"source": "data/ffhq_256"}, "split": "val", "recon": "8 bits", "extractor": None,
    "versions": {"ldm": "1.2.3"}, "doubtful": {}, "notes": [],
}  # fmt: skip


def evaluation(model: str = "runs/b_1", resolution: int = 256, about=None, **numbers):
    known = dict.fromkeys(NUMBERS) | {"psnr": 28.334, "ssim": 0.82149, "kid": 0.00123} | numbers
    about = ABOUT | (about or {})
    return Evaluation(Path(model), resolution, 5000, known, about, Path("x.json"))


def test_a_terminal_gets_columns():
    rows = [evaluation(rfid=0.4149), evaluation("runs/longer", psnr=9.5)]
    assert format_evaluations(rows).splitlines() == [
        "model   resolution  images  rFID ↓  PSNR ↑  SSIM ↑  KID ×10³ ↓",
        "b_1           256²    5000    0.41   28.33   0.821        1.23",
        "longer        256²    5000       –    9.50   0.821        1.23",
        "measured on data/ffhq_256, val: 8 bits; ldm 1.2.3",
    ]


def test_markdown_is_a_table():
    about = {"doubtful": {"rfid": "few images"}, "notes": ["a note"]}
    text = format_evaluations([evaluation("a|b.pt", rfid=0.4, about=about)], "markdown")
    assert text.splitlines() == [
        "| model | resolution | images | rFID ↓ | PSNR ↑ | SSIM ↑ | KID ×10³ ↓ |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a&#124;b.pt | 256² | 5000 | 0.40* | 28.33 | 0.821 | 1.23 |",
        "",
        "measured on data/ffhq_256, val: 8 bits; ldm 1.2.3  ",
        r"\* few images  ",
        "a note  ",
    ]


def test_latex_is_a_tabular_of_booktabs():
    extractor = {"name": "inception.pt"}
    text = format_evaluations(
        [evaluation(rfid=0.4, about={"extractor": extractor}), evaluation("50%&_{x}^~.pt")], "latex"
    )
    assert text.splitlines() == [
        "% measured on data/ffhq_256, val: 8 bits; features of inception.pt; ldm 1.2.3",
        "% measured on data/ffhq_256, val: 8 bits; ldm 1.2.3",
        r"\begin{tabular}{lrrrrrr}",
        r"\toprule",
        r"model & resolution & images & rFID $\downarrow$ & PSNR $\uparrow$ & SSIM $\uparrow$ & "
        r"KID $\times 10^3$ $\downarrow$ \\",
        r"\midrule",
        r"b\_1 & 256$^2$ & 5000 & 0.40 & 28.33 & 0.821 & 1.23 \\",
        r"50\%\&\_\{x\}\textasciicircum{}\textasciitilde{}.pt & 256$^2$ & 5000 & -- & 28.33 & "
        r"0.821 & 1.23 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_json_holds_all_that_is_known():
    rows = [evaluation(rfid=0.4), evaluation("runs/other")]
    assert json.loads(format_evaluations(rows, "json")) == [row.to_tree() for row in rows]


def test_models_at_one_resolution_stand_together():
    rows = [evaluation(model, side) for model in ("a.pt", "b.pt") for side in (256, 128)]
    lines = format_evaluations(rows).splitlines()[1:5]
    assert [line.split()[:2] for line in lines] == [
        ["a.pt", "256²"], ["b.pt", "256²"], ["a.pt", "128²"], ["b.pt", "128²"],
    ]  # fmt: skip


def test_data_that_differs_is_a_column():
    other = {"data": {"source": "photos"}}
    text = format_evaluations([evaluation(), evaluation("runs/c", about=other)], "latex")
    assert r"\begin{tabular}{llrrrrr}" in text
    assert re.search(r"^model & data & resolution", text, re.M)
    assert r"c & photos, val & 256" in text


def test_names_are_short_and_tell_models_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("runs/x", "old/x", "runs/y"):
        Path(run).mkdir(parents=True)
        (Path(run) / "run.json").write_text("{}")
    words = ["runs/y", "runs/x/ckpt.pt", "old/x", "runs/y/best.pt", "sd-vae.ckpt", "."]
    assert name_models(list(map(Path, words))) == [
        "y", "runs/x/ckpt.pt", "old/x", "y/best.pt", "sd-vae.ckpt", tmp_path.name,
    ]  # fmt: skip


def test_no_such_layout():
    with pytest.raises(UsageError, match="--format html: it must be one of table, markdown, latex"):
        format_evaluations([evaluation()], "html")
