"""`ldm data`: options, output and errors of preparing and of checking."""

import json
import os

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
    result = run("prepare", tmp_path, tmp_path / "out", *words)
    assert getattr(result.exception, "exit_code", result.exit_code) == 2


def test_help():
    assert "Prepare images for training" in run("--help").stdout
    assert "The same command resumes an interrupted one" in " ".join(
        run("prepare", "--help").stdout.replace("│", "").split()
    )


# ------------------------------------------------------------------------------- data check
@pytest.fixture
def prepared(tmp_path):
    """Two shards of four training images, and one of two held out."""
    source, out = png_folder(tmp_path / "a", [noise(n, 8, 8) for n in range(10)]), tmp_path / "out"
    words = ["--size", 8, "--shard-size", 4, "--held-out", 2, "--workers", 0]
    assert run("prepare", source, out, *words).exit_code == 0
    return out


def damage(name: str, change):
    def apply(out):
        path = out / name
        data = path.read_bytes()
        path.write_bytes(change(data))

    return apply


def edit(**changes):
    """Edit the manifest; keys of a shard go to the first one."""

    def apply(out):
        manifest = json.loads((out / "manifest.json").read_text())
        shards = manifest["splits"]["train"]["shards"]
        manifest |= {key: changes[key] for key in changes if key == "total"}
        shards[0] |= {key: changes[key] for key in changes if key != "total"}
        manifest["count"] = manifest.pop("total", manifest["count"])
        (out / "manifest.json").write_text(json.dumps(manifest))

    return apply


def replaced_by_a_pipe(out):
    (out / "val-00000.tar").unlink()
    os.mkfifo(out / "val-00000.tar")


def test_check_of_what_is_as_it_was_written(prepared, tmp_path):
    result = run("check", prepared)
    said = "all 10 images in 3 shards are as they were written\n"
    assert (result.exit_code, result.stdout) == (0, said)
    (prepared / "train-00000.tar").rename(tmp_path / "elsewhere.tar")  # links are followed
    (prepared / "train-00000.tar").symlink_to(tmp_path / "elsewhere.tar")
    assert (run("check", prepared).exit_code, result.stdout) == (0, said)


@pytest.mark.parametrize(
    ("harm", "lines"),
    [
        (damage("train-00001.tar", lambda d: d[:-1]), ["train-00001.tar has "]),
        (damage("train-00001.tar", lambda d: d + b"\0"), ["train-00001.tar has "]),
        (damage("val-00000.tar", lambda d: b""), ["val-00000.tar has 0 bytes"]),
        (lambda out: (out / "train-00000.tar").unlink(), ["train-00000.tar cannot be read"]),
        (replaced_by_a_pipe, ["val-00000.tar cannot be read (not a regular file)"]),
        (edit(sha256="0" * 64), ["train-00000.tar holds other bytes"]),
        (edit(bytes=1), ["train-00000.tar has "]),
        (edit(total=11), ["manifest.json counts 11 images, its shards 10"]),
    ],
)
def test_check_names_each_fault_in_a_line(prepared, harm, lines):
    harm(prepared)
    result = run("check", prepared)
    assert result.exit_code == 1, result.output
    printed = result.stdout.splitlines()
    assert len(printed) == len(lines)
    for line, expected in zip(printed, lines, strict=True):
        assert expected in line and str(prepared) in line


def test_check_needs_a_manifest_whose_counts_add_up(prepared):
    edit(count=3)(prepared)
    error = run("check", prepared).exception
    assert "manifest.json is damaged: splits.train.count: not that of its shards" in str(error)


def test_check_notices_every_flipped_byte(prepared):
    path = prepared / "val-00000.tar"
    data = path.read_bytes()
    for place in range(0, len(data), 997):
        flipped = bytes([data[place] ^ 1])
        path.write_bytes(data[:place] + flipped + data[place + 1 :])
        assert "SHA-256" in run("check", prepared).stdout
    path.write_bytes(data)
    assert run("check", prepared).exit_code == 0


def test_two_damaged_shards_are_two_lines(prepared):
    for name in ("train-00000.tar", "val-00000.tar"):
        (prepared / name).unlink()
    printed = run("check", prepared).stdout.splitlines()
    assert [line.split(" cannot")[0] for line in printed] == [
        f"{prepared}/train-00000.tar",
        f"{prepared}/val-00000.tar",
    ]


def test_check_is_of_prepared_data(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        result = run("check", folder)
        assert isinstance(result.exception, LdmError)
        assert "has no manifest.json" in str(result.exception)
