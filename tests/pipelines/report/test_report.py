"""The whole page: its pictures, numbers, notes and errors."""

import base64
import io
import re
from html.parser import HTMLParser
from math import nan

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from ldm.charts import colour
from ldm.checkpoint import load_model
from ldm.config import flatten
from ldm.data import DataConfig, open_source
from ldm.errors import LdmError, UsageError
from ldm.images import to_uint8
from pipelines.report import page
from pipelines.report.records import read_records
from pipelines.report.report import POINTS, curves_section, settings_section, write_report
from tests.pipelines.measuring.reconstructed import crops, save_images
from tests.pipelines.report.run_folders import record, stage_one, stage_two, write_rows
from tests.pipelines.untrained import load

VOID = {"meta", "img", "br", "wbr"}


class Checked(HTMLParser):
    """Check that tags are balanced, and that nothing is fetched or run."""

    def __init__(self, text):
        super().__init__()
        self.open = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "link", "iframe")
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("src", "href") or value.startswith("data:")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def report(tmp_path, monkeypatch):
    """The text of a page over runs."""
    monkeypatch.chdir(tmp_path)

    def write(*runs, **how):
        how = {"images": 2, "steps": 2, "device": "cpu"} | how
        text = write_report(runs, tmp_path / "page.html", **how).read_text("utf-8")
        Checked(text)
        assert "http" not in text.replace("http-equiv", "")
        return text

    return write


def pictures(text: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def part(text: str, title: str) -> str:
    (found,) = re.findall(rf"<section><h2>{title}</h2>.*?</section>", text, re.DOTALL)
    return found


def test_two_runs_side_by_side(tmp_path, report):
    a, b = stage_one(tmp_path / "a", "lr=0.5"), stage_one(tmp_path / "b", "lr=0.25", seed=1)
    text = report(a, b)
    assert "2 runs side by side" in text and "2 autoencoders (stage one)." in text
    differing = part(text, "Settings").partition("<details>")[0]
    assert re.findall(r"<td>([^<]*)</td>", differing) == ["lr", "0.5", "0.25"]
    assert "<td>batch_size</td><td>4</td><td>4</td>" in part(text, "Settings")

    curves = part(text, "Curves")
    drawn = dict(re.findall(r"<h3>(.*?)</h3>.*?<svg(.*?)</svg>", curves, re.DOTALL))
    assert list(drawn) == ["PSNR, held-out, dB", "ℓ1", "KL", "learning rate"]
    assert all(colour(i) in svg for svg in drawn.values() for i in range(2))
    assert "a 0.03125</span>" in curves  # its last ℓ1

    for run in (a, b):
        assert load_model(run, "autoencoder").sha256 in part(text, "Numbers")
        assert load_model(run, "autoencoder").sha256[:12] in text.partition("<section>")[0]


def test_reconstructions_and_their_psnr(tmp_path, report):
    text = part(
        report(stage_one(tmp_path / "a"), stage_one(tmp_path / "b", seed=1)), "Reconstructions"
    )
    original, of_a, of_b, *latents = np.split(np.stack(pictures(text)), 5)
    held_out = open_source(DataConfig(), "val", 32)
    assert (original == np.stack([held_out.load(i) for i in range(2)])).all()
    assert latents[0].shape == original.shape and (of_a != of_b).any()
    told = re.findall(r"PSNR (\S+) dB \((\S+) · (\S+)\)", text)
    for recon, numbers in zip((of_a, of_b), told, strict=True):
        each = [peak_signal_noise_ratio(*pair) for pair in zip(original, recon, strict=True)]
        assert float(numbers[0]) == pytest.approx(np.mean(each), abs=0.0051)
        assert [float(value) for value in numbers[1:]] == pytest.approx(each, abs=0.051)


def test_runs_of_another_range_of_pixels_are_not_shown_beside_originals(tmp_path, report):
    runs = stage_one(tmp_path / "a"), stage_one(tmp_path / "b", "pixels.range=[0, 100]")
    text = part(report(*runs), "Reconstructions")
    assert "another range of pixels, than the originals" in text
    assert len(re.findall(r"PSNR (\S+) dB", text)) == 1


def test_requested_data_keeps_the_split_of_each_training(tmp_path, report):
    """Another split would show training images as held-out ones."""
    folder, other = (save_images(tmp_path / name, crops(24)[::step]) for name, step in
                     (("data", 1), ("other", -1)))  # fmt: skip
    settings = (f"data.source={folder}", "data.held_out=3")
    run = stage_one(tmp_path / "a", *settings, "data.workers=0")
    for asked in (None, str(folder), "data"):
        text = part(report(run, data=asked), "Reconstructions")
        assert (np.stack(pictures(text)[:2]) == np.stack(crops(24)[-3:-1])).all()
        assert "held-out images, which training never saw, and their" in text
    text = part(report(run, data=str(other)), "Reconstructions")
    assert "never saw" not in text and "which may include these images" in text
    of_both = part(report(run, stage_one(tmp_path / "b"), data=str(folder)), "Reconstructions")
    assert "never saw" not in of_both and of_both.count("held-out images at 32²") == 2


def test_runs_are_shown_at_their_highest_resolution(tmp_path, report):
    larger = "phases=[{resolution: 32, steps: 4}, {resolution: 64, steps: 4}]"
    runs = stage_one(tmp_path / "a"), stage_one(tmp_path / "b", larger)
    text = part(report(*runs), "Reconstructions")
    assert pictures(text)[0].shape == (64, 64, 3) and text.count("trained at up to 32²") == 1
    text = part(report(*runs, resolution=32), "Reconstructions")
    assert pictures(text)[0].shape == (32, 32, 3) and text.count("trained at up to 64²") == 1


def test_samples_match_the_pipeline(tmp_path, report):
    a, b = stage_two(tmp_path / "a"), stage_two(tmp_path / "b", seed=1)
    text = report(a, b, seed=3, images=3)
    shown = pictures(part(text, "Samples"))
    for i, run in enumerate((a, b)):
        wanted = to_uint8(load(run)(n=3, seed=3, steps=2)).permute(0, 2, 3, 1).numpy()
        assert (np.stack(shown[3 * i : 3 * i + 3]) == wanted).all()
    assert "Images 0 to 2 of seed 3, 2 steps, in float32" in text
    assert "loss where 0 ≤ σ &lt; 0.1" in part(text, "Curves")
    assert load_model(a, "diffusion").sha256 in text


def test_stages_have_separate_sections(tmp_path, report):
    """As in the folder of a demo, which is no run itself."""
    stage_one(tmp_path / "demo" / "autoencoder")
    stage_two(tmp_path / "demo" / "diffusion")
    (tmp_path / "demo" / "other").mkdir()
    text = report(tmp_path / "demo")
    assert "1 autoencoder (stage one), 1 diffusion model (stage two)." in text
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == [
        "Reconstructions, stage one", "Numbers, stage one", "Settings, stage one",
        "Curves, stage one", "Samples, stage two", "Numbers, stage two", "Settings, stage two",
        "Curves, stage two", "This page",
    ]  # fmt: skip
    assert "ℓ1" not in part(text, "Curves, stage two")


def test_missing_files_become_notes(tmp_path, report):
    whole = stage_one(tmp_path / "whole")
    bare = stage_one(tmp_path / "bare")
    for name in ("metrics.jsonl", "result.json", "config.yaml"):
        (bare / name).unlink()
    drawn = stage_one(tmp_path / "drawn", model=False)
    (drawn / "pictures" / "recon-00000008.png").write_bytes(b"")  # not the newest
    text = report(whole, bare, drawn)
    assert "metrics.jsonl is missing or empty" in text and "not finished, 0 images seen" in text
    assert "config.yaml is missing or empty" in text
    shown = part(text, "Reconstructions")
    assert "config.yaml does not record the data: use --data" in shown
    missing = "drawn holds no ckpt.pt: its run has not written a model yet"
    assert f"{missing}). This is the newest picture" in shown
    assert shown.count("at 32 images seen.") == 2
    # the whole one's originals, reconstructions and latents, and both others' own pictures
    assert len(pictures(shown)) == 2 * 3 + 2


def test_an_empty_run_still_gives_a_page(tmp_path, report):
    for make in (stage_one, stage_two):
        run = make(tmp_path / make.__name__, model=False)
        for name in ("metrics.jsonl", "result.json"):
            (run / name).unlink()
        for file in (run / "pictures").iterdir():
            file.unlink()
        text = report(run)
        assert "and there is no picture from training" in text
        assert "Nothing has been measured yet" in text


def test_damaged_models_and_missing_data_become_notes(tmp_path, report):
    damaged, moved = stage_one(tmp_path / "a"), stage_one(tmp_path / "b", "data.source=gone")
    (damaged / "ckpt.pt").write_bytes(b"PK\x03\x04 not all of it")
    text = report(damaged, moved)
    assert "ckpt.pt is truncated or damaged" in text and "gone does not exist" in text
    assert load_model(moved, "autoencoder").sha256[:12] in text  # known all the same
    of_two = stage_two(tmp_path / "c")
    (of_two / "ckpt.pt").write_bytes(b"PK\x03\x04 not all of it")
    (of_two / "pictures" / "samples-00000032.png").write_bytes(b"")
    assert "ckpt.pt is truncated or damaged" in report(of_two)


@pytest.mark.parametrize(
    ("what", "error", "told"),
    [
        ("nothing", LdmError, "no folder at"),
        ("empty", LdmError, "contains no run"),
        ("a/ckpt.pt", LdmError, "is a file: pass the run folder"),
    ],
)
def test_paths_without_a_run_are_refused(tmp_path, report, what, error, told):
    stage_one(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.json").write_text('{"kind": "another"}', "utf-8")
    with pytest.raises(error) as refused:
        report(tmp_path / "a", tmp_path / what)
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "page.html").exists()


def test_invalid_options_are_refused(tmp_path):
    run = stage_one(tmp_path / "a")
    for how, told in (
        ({"images": 0}, "--images 0"),
        ({"steps": 0}, "--steps 0"),
        ({"resolution": -8}, "--resolution -8"),
    ):
        with pytest.raises(UsageError, match=f"{told}: must be at least 1"):
            write_report([run], tmp_path / "p.html", **how)
    with pytest.raises(UsageError, match=r"must be an \.html file, such as .*p\.html"):
        write_report([run], tmp_path / "p.png")
    with pytest.raises(UsageError, match="no run"):
        write_report([], tmp_path / "p.html")


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
