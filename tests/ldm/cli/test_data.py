"""`ldm data prepare`: options, output and errors."""

import pytest
from typer.testing import CliRunner

from ldm.cli import app
from ldm.errors import LdmError
from tests.ldm.data.pictures import class_folder, encode, noise, png_folder


def run(*words):
    return CliRunner().invoke(app, ["data", *map(str, words)])


def test_prepare_says_what_it_did_and_what_comes_next(tmp_path):
    source, out = png_folder(tmp_path / "a", [noise(0, 8, 8)] * 200), tmp_path / "out"
    (source / "0003.png").write_bytes(encode(noise(0))[:50])
    result = run("prepare", source, out, "--size", 8, "--shard-size", 150, "--workers", 0)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "199 images of 8×8 in 3 shards: 189 for training, 10 for validation",
        "skipped 1 corrupt image, listed in the manifest",
        f"manifest: {out}/manifest.json",
        f"next: ldm train-ae litevae-b data.source={out}",
    ]


def test_options_reach_the_job(tmp_path):
    source, out = png_folder(tmp_path / "a", [noise(0, 9, 9)] * 10), tmp_path / "out"
    words = ["prepare", source, out, "--size", 8, "--filter", "box", "--held-out", 3]
    assert run(*words, "--workers", 0).exit_code == 0
    manifest = (out / "manifest.json").read_text()
    assert '"filter": "box"' in manifest
    assert '"count": 3' in manifest


def test_labels(tmp_path):
    files = {f"{name}/{n}.png": noise(n, 8, 8) for name in "ab" for n in range(4)}
    source, out = class_folder(tmp_path / "a", files), tmp_path / "out"
    words = ["prepare", source, out, "--size", 8, "--held-out", 2, "--workers", 0, "--labels"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    first = "8 images of 8×8 in 2 shards: 6 for training, 2 for validation, 2 classes"
    assert result.stdout.splitlines()[0] == first


def test_errors_are_left_to_the_command_line_above(tmp_path):
    result = run("prepare", tmp_path / "nowhere", tmp_path / "out")
    assert isinstance(result.exception, LdmError)


@pytest.mark.parametrize(
    "words", [["--filter", "nearest"], ["--size", 0], ["--shard-size", 0], ["--workers", -1]]
)
def test_bad_options_are_refused(tmp_path, words):
    assert run("prepare", tmp_path, tmp_path / "out", *words).exit_code == 2


def test_help():
    assert "Prepare images for training" in run("--help").stdout
    assert "The same command resumes an interrupted one" in " ".join(
        run("prepare", "--help").stdout.replace("│", "").split()
    )
