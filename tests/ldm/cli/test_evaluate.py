"""`ldm eval-ae`: options, output and errors."""

import json
import sys

import pytest

from ldm.cli import main
from pipelines.evaluate import evaluate_checkpoints
from tests.pipelines.measuring.reconstructed import DIM, FEATURES, crops, save_images, save_run
from tests.small import ldm

# where no weights are, and none can be fetched
NO_WEIGHTS = {"TORCH_HOME": "nowhere", "https_proxy": "http://127.0.0.1:9"}


pytestmark = pytest.mark.usefixtures("no_lpips")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Call the command in this process, in an empty folder: (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rich.console.Console.is_terminal", False)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["ldm", "eval-ae", *map(str, words), "--device", "cpu"])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        return left.value.code or 0, said.out, said.err

    return call


def test_several_checkpoints_and_resolutions_give_a_table(run, tmp_path):
    for seed, name in enumerate("ab"):
        save_run(tmp_path / name, seed=seed)
    code, out, err = run(
        "a", "b/ckpt.pt", "--data", "photos", "--resolution", "16,32", "--resolution", 24,
        "--limit", 2, "--no-fid",
    )  # fmt: skip
    assert (code, err) == (0, "")
    lines = out.splitlines()
    table = lines.index("model  resolution  images  PSNR ↑  SSIM ↑  SWD ×10³ ↓")
    assert [line.split()[:3] for line in lines[table + 1 : table + 7]] == [
        [name, f"{side}²", "2"] for side in (16, 32, 24) for name in "ab"
    ]
    assert "measured on photos, val: posterior's mode, float32, rounded to 8 bits" in out
    assert "done: a/eval/photos-val-16-first2-no-fid.json" in lines
    assert len(list(tmp_path.glob("*/eval/*.json"))) == 6


@pytest.mark.parametrize("layout", ["json", "latex", "markdown"])
def test_other_formats_print_nothing_else(run, tmp_path, layout):
    save_run(tmp_path / "a")
    folder = save_images(tmp_path / "data", crops(DIM))
    code, out, err = run(
        "a", "--data", folder, "--split", "all", "--resolution", 32, "--features", FEATURES,
        "--out", "all.json", "--format", layout,
    )  # fmt: skip
    assert code == 0
    assert "without LPIPS: vgg16" in err and "measuring a on the all split" in err
    begins = {"json": "[", "latex": "% measured on", "markdown": "| model"}
    assert out.startswith(begins[layout])
    if layout == "json":
        assert json.loads(out)[0]["numbers"]["rfid"] > 0
    else:
        assert "rFID" in out
    (written,) = json.loads((tmp_path / "all.json").read_text())["evaluations"]
    assert written["numbers"]["kid"] is not None


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (
            ["--resolution", "12a"],
            2,
            "--resolution 12a: give a number of pixels, or HEIGHTxWIDTH, such as 96x64",
        ),
        (["--resolution", "16,,32"], 2, "--resolution : give a number of pixels"),
        (["--resolution", "0"], 2, "--resolution 0: must be at least 1"),
        (["--resolution", "8"], 1, "--resolution 8: a needs 16 or more"),
        (["--resolution", "16", "--limit", "0"], 2, "--limit 0: must be at least 1"),
        (["--no-fid", "--mode", "legacy-tensorflow"], 2, "--no-fid excludes --weights"),
        (["--features", "nowhere:x"], 2, "--features nowhere:x: no module 'nowhere'"),
        (["--weights", "x.pt"], 1, "no Inception weights at x.pt"),
        (["--format", "html"], 2, "'html' is not one of 'table', 'markdown', 'latex', 'json'"),
        (["--data", "nowhere"], 1, "nowhere does not exist"),
        (["b"], 1, "no checkpoint at b"),
    ],
)
def test_errors_are_one_line(run, tmp_path, words, code, message):
    save_run(tmp_path / "a")
    given = {"--data": "photos", "--resolution": "16"}
    rest = [word for pair in given.items() if pair[0] not in words for word in pair]
    left_with, _, err = run("a", *words, *rest)
    assert left_with == code, err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.glob("a/eval/*"))


# ------------------------------------------------------------------------ several processes
@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 8])
def test_two_processes_give_the_numbers_of_one(tmp_path, batch_size):
    """Of shares that are not equal: 8 and 7 of 15 images, or all of 8 and none of the rest."""
    limit = 15 if batch_size == 2 else 8
    model = save_run(tmp_path / "a")
    folder = save_images(tmp_path / "data", crops(16))
    alone = evaluate_checkpoints(
        [model], str(folder), "all", [16, 32], batch_size, limit=limit, device="cpu",
        features=FEATURES, force=True,
    )  # fmt: skip
    done = ldm(
        "eval-ae", "a", "--data", folder, "--split", "all", "--resolution", "16,32", "--limit",
        limit, "--features", FEATURES, "--batch-size", batch_size, "--force", "--device", "cpu",
        "--out", "two.json", cwd=tmp_path, processes=2, **NO_WEIGHTS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # said once, however many there are
    assert done.stdout.count("done:") == done.stdout.count("without LPIPS:") == 1
    written = json.loads((tmp_path / "two.json").read_text())["evaluations"]
    for one, two in zip((each.to_tree() for each in alone), written, strict=True):
        assert one["count"] == two["count"] == limit
        assert (one["processes"], two["processes"]) == (1, 2)
        assert one["numbers"].pop("lpips") is two["numbers"].pop("lpips") is None
        assert two["numbers"] == pytest.approx(one["numbers"], rel=1e-6, abs=1e-9)
        assert two["details"]["swd"] == pytest.approx(one["details"]["swd"], rel=1e-6)


@pytest.mark.slow
def test_two_processes_refuse_together(tmp_path):
    """Each reads its share; what one finds, all say, and nobody waits for anybody."""
    save_run(tmp_path / "a")
    images = crops(12)
    folder = save_images(tmp_path / "data", [*images, images[3]])
    done = ldm(
        "eval-ae", "a", "--data", folder, "--resolution", "32", "--device", "cpu", "--no-fid",
        cwd=tmp_path, processes=2, **NO_WEIGHTS,
    )  # fmt: skip
    assert done.returncode != 0
    assert "1 of 1 images" in done.stderr and "are also training images" in done.stderr
    assert not (tmp_path / "a" / "eval").exists()
