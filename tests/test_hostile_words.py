"""The command line with absurd sizes and with foreign text: one line, and no escape sequence."""

import json
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ldm.checkpoint import load_model, save_model
from ldm.cli import main
from tests.pipelines.report.run_folders import stage_one

HUGE = str(10**12)
ESC = "\x1b[2K\x1b]0;title\x07\rerror: \u202enothing\x9b1A\n2nd"


@pytest.fixture
def ldm(tmp_path, monkeypatch, capsys):
    """Call the command line in this process: its exit status, and all that it prints."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ldm", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        assert "unexpected" not in printed.err, printed.err
        return left.value.code, printed.out + printed.err

    return call


@pytest.mark.parametrize(
    "words",
    [
        "eval-ae RUN --resolution 9999999", f"eval-ae RUN --resolution 32,{HUGE}",
        f"eval-ae RUN --batch-size {HUGE}", "eval-ae RUN --resolution " + "9" * 5000,
        "analyze latents RUN --resolution 9999999", f"analyze mmd RUN --n {10**30}",
        "analyze scale RUN --resolutions 32,9999999", f"analyze latents RUN --images {HUGE}",
        f"sample MODEL --n {HUGE}", f"sample MODEL --batch-size {HUGE}",
        f"sample MODEL --steps {HUGE}", f"fid MODEL --n {HUGE}", f"fid SAMPLES --limit {HUGE}",
        "bench --resolution 9999999", f"bench --batch {HUGE}", f"bench --repeats {HUGE}",
        f"data prepare RUN new --size {HUGE}", f"data prepare RUN new --workers {HUGE}",
        f"train-ae tiny batch_size={HUGE}", f"train-ae tiny data.workers={HUGE}",
        "train-ae tiny phases=[{resolution:9999999,steps:4}]", f"doctor tiny batch_size={HUGE}",
        "train-diffusion tiny --ae RUN resolution=9999999",
        "train-ae tiny data.source=" + "[" * 9999,
        "train-ae tiny lr=0x" + "f" * 5000, "train-ae tiny data=[&a,[*a,*a]]",
        "report RUN --resolution 9999999", f"report RUN --images {HUGE}",
    ],
)  # fmt: skip
def test_an_absurd_size_is_one_line_before_memory_is_requested(ldm, model, words):
    stage_one(Path("runs/one"))
    places = {"RUN": "runs/one", "MODEL": str(model), "SAMPLES": str(model)}
    words = [places.get(word, word) for word in words.split(" ")]
    if words[-1].startswith("phases"):
        words[-1] = words[-1].replace(":", ": ")
    code, text = ldm(*words)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert code in (1, 2) and len(errors) == 1 and text.splitlines()[-1] == errors[0], text[-500:]
    assert len(text) < 12_000


def raw(text: str) -> set[str]:
    """Characters of a text that can forge a line."""
    return {c for c in text if not (c.isprintable() or c == "\n")}


def test_names_in_files_are_printed_escaped(ldm):
    """In a zip, a model file, a run, a manifest, and paths."""
    with zipfile.ZipFile("a.zip", "w") as pack:
        pack.writestr(f"{ESC}.png", b"no image")
    run = stage_one(Path("runs/one"))
    file = load_model(run, "autoencoder")
    odd = {**file.weights, ESC: torch.zeros(1)}
    save_model(run / "odd.pt", type(file)("autoencoder", file.config, odd))
    described = json.loads((run / "run.json").read_text())
    other = stage_one(Path("runs/two"), model=False)
    (other / "run.json").write_text(json.dumps(described | {"preset": [ESC], "kind": ESC}))
    Path("shards").mkdir()
    Path("shards/manifest.json").write_text(json.dumps({"format": 1, "splits": {ESC: ESC}}))
    Path("folder").mkdir()
    Path("folder/config.json").write_text(json.dumps({"_class_name": ESC, ESC: ESC}))
    for words in (
        ["data", "prepare", "a.zip", "new", "--size", "8", "--workers", "0"],
        ["eval-ae", run / "odd.pt"], ["eval-ae", ESC], ["eval-ae", run, "--data", ESC],
        ["train-ae", "tiny", f"data.source={ESC}"], ["train-ae", ESC], [ESC], ["sample", ESC],
        ["report", other], ["sample"], ["data", "check", "shards"],
        ["export", "folder"], ["import", "folder", "--out", "x"], ["train-ae", "tiny", f"{ESC}=1"],
        ["sample", "--n", ESC], ["report", f"{ESC}={run}", "--images", "x"], ["show", ESC],
        ["report", "\udcff\udcfe"], ["data", "prepare", "\udcff", "new"],
    ):  # fmt: skip
        code, text = ldm(*words)
        assert code != 0 and text.strip(), words
        assert not raw(text), (words, text)
        assert "2nd" not in [line.strip() for line in text.splitlines()], text


def test_a_report_of_odd_names_is_written(ldm):
    run = stage_one(Path("runs/one"), model=False)
    described = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(described | {"preset": ESC, "command": "\udcff"}))
    code, text = ldm("report", f"{ESC}={run}")
    assert code == 0 and not raw(text), text
    assert Path("report.html").read_bytes()


def test_text_leaves_through_functions_that_escape_it():
    """`options.echo`, `logbook.console`; two more escape what they print themselves."""
    root = Path(__file__).parent.parent
    allowed = {"ldm/cli/options.py": 1, "ldm/records.py": 2, "ldm/distributed.py": 1}
    for package in ("ldm", "autoencoders", "diffusion", "pipelines"):
        for path in (root / package).rglob("*.py"):
            text = path.read_text("utf-8")
            calls = re.findall(r"typer\.s?echo\(|(?<![.\w])(?<!def )print\(|stdout\.write", text)
            name = path.relative_to(root).as_posix()
            assert len(calls) <= allowed.get(name, 0), (name, calls)
