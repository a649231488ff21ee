"""The command line: output and exit codes."""

import re
import sys
import time

import pytest
import torch

from ldm.checkpoint import FORMAT
from ldm.cli import main
from tests.small import AUTOENCODER, DIFFUSION, ldm

MODES = [
    "train-ae", "train-diffusion", "sample", "fid", "eval-ae", "presets", "show", "demo", "import",
    "export", "ema", "neighbours", "doctor", "analyze", "bench", "reproduce", "report",
]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Call the command line in this process, in an empty folder: (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["ldm", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return left.value.code or 0, printed.out, printed.err

    return call


@pytest.fixture
def failed(run):
    """The one line of a command that fails with a code."""

    def call(*words, code: int) -> str:
        left_with, out, err = run(*words)
        assert left_with == code, (out, err)
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        return lines[0]

    return call


def test_version(run):
    from importlib.metadata import version

    assert run("--version") == (0, f"ldm {version('ldm')}\n", "")


def test_help_names_every_command_and_is_quick(tmp_path):
    took = []
    for _ in range(3):
        began = time.monotonic()
        done = ldm("--help", cwd=tmp_path)
        took.append(time.monotonic() - began)
    assert done.returncode == 0 and all(mode in done.stdout for mode in [*MODES, "data"])
    assert min(took) < 3  # half a second alone; a machine under test is not


def test_presets_are_listed_with_summaries(run):
    code, out, _ = run("presets")
    assert code == 0
    for name in ("litevae-b", "sdvae", "ffhq256", "tiny", "demo"):
        assert re.search(rf"^ *{name} +\S+", out, re.MULTILINE), name


@pytest.mark.parametrize("value", ["", "1"])
def test_no_color_is_honoured(run, monkeypatch, value):
    monkeypatch.setenv("NO_COLOR", value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, out, _ = run("show", "ae/tiny")
    assert ("\x1b[" in out) == (not value)


def test_show_prints_resolved_settings_with_docs(run):
    code, out, _ = run("show", "litevae-b", "batch_size=32")
    assert code == 0
    assert re.search(r"^batch_size: 32 +# Images per step", out, re.MULTILINE)
    assert "[{resolution: 128, steps: 100000}, {resolution: 256, steps: 50000}]" in out
    _, both, _ = run("show", "tiny")
    assert "# ae/tiny" in both and "# diffusion/tiny" in both


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train-ae", "litevea-b"], "no preset 'litevea-b'; did you mean 'litevae-b'?"),
        (["show", "ffhq265"], "did you mean 'ffhq256'?"),
        (["show", "tiny", "steps=3"], "ae/tiny or diffusion/tiny"),
        (["train-ae", "tiny", "batchsize=3"], "unknown key 'batchsize'; did you mean 'batch_size'"),
        (["train-ae", "tiny", "encoder.type=sdvae", "encoder.extractor.channels=4"], "encoder.ext"),
        (["train-ae", "tiny", "lr=fast"], "'lr': input should be a valid number"),
        (["train-ae", "tiny", "lr"], "is not of the form key=value"),
        (["train-ae", "tiny", "batch_size=0"], "'batch_size': input should be greater than 0"),
        (["sample", "x", "--n", "0"], "--n 0: it must be at least 1"),
        (["sample", "x", "--precision", "fp8"], "'fp8' is not one of 'auto', 'fp32', 'bf16'"),
        (["fid", "--split", "test"], "'test' is not one of"),
        (["sample", "--n", "many"], "valid integer"),
        (["train-diffusion", "--ae", "a.pt", "autoencoder=b.pt"], "given twice"),
        (["train-ae", "tiny", "--batch_size", "4"], "settings are given as key=value"),
        (["train-ae", "tiny", "phases=[{resolution: 64, step: 4}]"], "unknown key 'phases.0.step'"),
        (["train-ae"], "give a preset, such as litevae-b (`ldm presets` lists them), or"),
        (["train-diffusion", "--batch_size", "4"], "settings are given as key=value"),
        (["train-ae", "--from", "a", "init.source=b"], "given twice: use either --from or init.so"),
        (["train-ae", "tiny", "--from", ""], "--from is empty: give a path or a name, or omit it"),
        (["show"], "Missing argument '"),
        (["trainae", "tiny"], "No such command 'trainae'"),
    ],
)
def test_usage_errors_are_one_line_and_code_2(failed, tmp_path, words, message):
    assert message in failed(*words, code=2)
    assert not (tmp_path / "runs").exists()


def test_failures_are_one_line_and_code_1(failed, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "truncated.pt").write_bytes(b"PK\x03\x04 not all of it")
    torch.save({"format": FORMAT + 1, "kind": "diffusion"}, tmp_path / "newer.pt")
    torch.save({"format": 1, "kind": "autoencoder"}, tmp_path / "other.pt")
    for words, message in (
        (["train-ae", "tiny", "data.source=nowhere"], "nowhere"),
        (["train-ae", "tiny", "data.source=empty"], "empty"),
        (["train-ae", "tiny", "run.device=cuda:77"], "PyTorch sees"),
        (["train-diffusion"], "`ldm train-ae` first"),
        (["train-diffusion", "autoencoder=b.pt"], "no checkpoint at b.pt"),
        (["sample"], "`ldm train-diffusion` first"),
        (["sample", "nowhere.pt"], "no model at nowhere.pt: it is no file or folder here"),
        (["sample", "truncated.pt"], "truncated.pt"),
        (["sample", "newer.pt"], "upgrade ldm"),
        (["sample", "other.pt"], "is a stage-one autoencoder"),
    ):
        assert message in failed(*words, code=1)


def test_missing_data_names_both_remedies(failed, tmp_path):
    text = failed("train-ae", "litevae-b", code=1)
    assert "ldm data prepare" in text and "data.source=photos" in text
    assert not (tmp_path / "runs").exists()


def test_a_missing_perceptual_loss_stops_before_training(failed, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    text = failed("train-ae", "litevae-b", "data.source=photos", code=1)
    assert "vgg16-397923af.pth" in text and "loss.lpips=0" in text
    assert not (tmp_path / "runs").exists()


def test_debug_leaves_the_traceback_to_python(failed, tmp_path):
    assert failed("sample", "nowhere.pt", code=1).startswith("error: no model at nowhere.pt: it is")
    done = ldm("sample", "nowhere.pt", "--debug", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_unexpected_errors_are_one_line(failed, monkeypatch):
    import ldm.config

    def surprise(kind):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(ldm.config, "list_presets", surprise)
    assert "ZeroDivisionError: a bug (unexpected: --debug" in failed("presets", code=1)


def test_everyday_commands_find_their_inputs(run, tmp_path, monkeypatch):
    """train-ae, train-diffusion, sample, fid, eval-ae: each takes the newest of the one before."""
    for name in ("TORCH_HOME", "LDM_CACHE", "TMPDIR"):  # no weights
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    printed = ""
    for words in (
        ["train-ae", "tiny", *AUTOENCODER],
        ["train-diffusion", "tiny", *DIFFUSION],
        ["sample", "--n", "4", "--steps", "2"],
        ["eval-ae", "--limit", "2"],
    ):
        code, out, err = run(*words)
        assert code == 0, err
        printed += out
    assert "next: ldm train-diffusion --ae runs/" in printed
    assert re.search(r"^model +resolution +images +(LPIPS ↓ +)?PSNR ↑", printed, re.MULTILINE)
    code, _, err = run("fid", "--force")
    if code:  # no network: the line says what to do, and SWD is there all the same
        assert "inception-2015-12-05.pt" in err and "--weights" in err
    assert list((tmp_path / "runs").glob("*/samples/*/fid.json"))
