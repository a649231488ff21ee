"""Figure 7: ratios of gradients from a run's log."""

import csv
import json

import numpy as np
import pytest
import yaml
from PIL import Image, ImageColor
from scipy.ndimage import median_filter

from ldm.charts import colour
from ldm.errors import LdmError
from pipelines.analysis.gradients import analyze_gradients, read_curve, running_median
from pipelines.train_autoencoder import train_autoencoder
from tests.small import autoencoder_recipe


def write_run(folder, ratios, weighting="constant", batch_size=4):
    """A log whose rows hold ‖∇L_recon‖ / ‖∇L_adv‖, one in between that does not."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"images_seen": 4, "l1": 0.5}]
    rows += [
        {"images_seen": 8 * i, "gradient_ratio": ratio, "adversarial_weight": 0.1}
        for i, ratio in enumerate(ratios, 1)
    ]
    rows.append({"images_seen": 8 * len(ratios), "val_psnr": 20.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"batch_size": batch_size, "adversarial": {"weighting": weighting}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_curve_is_adversarial_over_reconstruction(tmp_path):
    weighting, curve = read_curve(write_run(tmp_path, [0.5, 2.0, 0.01]))
    np.testing.assert_allclose(curve["ratio"], [2, 0.5, 100])
    assert curve["images_seen"].tolist() == [8, 16, 24] and curve["step"].tolist() == [2, 4, 6]
    assert curve["weight"].tolist() == [0.1] * 3 and weighting == "constant"


def test_rows_without_a_gradient_are_left_out(tmp_path):
    """A reconstruction loss without gradient has ratio 0, whose inverse is not finite."""
    _, curve = read_curve(write_run(tmp_path, [0.5, 0.0, None, 1.0]))
    assert len(curve["ratio"]) == 2


def test_spread_is_in_decades(tmp_path):
    wide, flat = write_run(tmp_path / "a", np.logspace(-1, 3, 101).tolist()), [3.0] * 5
    found = analyze_gradients([wide, write_run(tmp_path / "b", flat)])
    assert [row[6] for row in found.rows] == [f"{0.9 * 4:.2f}", "0.00"]


def test_running_median_matches_scipy():
    values = np.random.default_rng(0).normal(size=40)
    found = running_median(values, 7)
    np.testing.assert_allclose(found[3:-3], median_filter(values, 7)[3:-3])
    assert found[0] == np.median(values[:4]) and running_median(values, 1).tolist() == list(values)


def test_two_runs_are_drawn_and_tabulated(tmp_path):
    a = write_run(tmp_path / "a", [1.0] * 20)
    b = write_run(tmp_path / "b", list(np.logspace(-3, 3, 20)), "adaptive")
    (b / "ckpt.pt").touch()  # a run may be told by its model
    found = analyze_gradients([f"steady={a}", f"wild={b / 'ckpt.pt'}"], out=tmp_path / "out")
    picture, table = found.files
    assert picture == tmp_path / "out" / "gradients.png" and picture.stat().st_size > 10_000
    assert [(row[0], row[1], row[2]) for row in found.rows] == [
        ("steady", "constant", "20"), ("wild", "adaptive", "20")
    ]  # fmt: skip
    assert found.rows[0][6] == "0.00" and float(found.rows[1][6]) > 4
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40 and rows[0]["step"] == "2"
    assert float(rows[20]["ratio"]) == pytest.approx(1000, rel=1e-6)
    assert float(rows[20]["weighted_ratio"]) == pytest.approx(100, rel=1e-6)


def test_a_note_warns_of_mixing_means_and_single_steps(tmp_path):
    constant = write_run(tmp_path / "a", [1.0, 2.0])
    adaptive = write_run(tmp_path / "b", [1.0, 2.0], "adaptive")
    told = analyze_gradients([constant, adaptive]).notes[-1]
    assert "adaptive" in told and "run.log_every_steps=1" in told
    for alone in (constant, adaptive):
        assert "run.log_every_steps" not in " ".join(analyze_gradients([alone]).notes)


def test_a_single_row_is_visible(tmp_path):
    picture = analyze_gradients([write_run(tmp_path, [0.5])]).files[0]
    with Image.open(picture) as drawn:
        panels = drawn.convert("RGB").crop((0, 0, drawn.width, int(0.85 * drawn.height)))
    colours = {found: count for count, found in panels.getcolors(1 << 22)}
    assert colours.get(ImageColor.getrgb(colour(0)), 0) > 100


def test_a_run_without_a_config_counts_images(tmp_path):
    (write_run(tmp_path, [1.0, 2.0]) / "config.yaml").unlink()
    weighting, curve = read_curve(tmp_path)
    assert curve["step"].tolist() == [None, None] and weighting == "?"
    assert analyze_gradients([tmp_path]).files[0].is_file()


def test_runs_without_adversarial_gradients_are_refused(tmp_path):
    with pytest.raises(LdmError, match=r"metrics\.jsonl does not exist: pass the folder"):
        analyze_gradients([tmp_path])
    write_run(tmp_path, [])
    with pytest.raises(LdmError, match="has no adversarial gradients"):
        analyze_gradients([tmp_path])
    assert not (tmp_path / "analysis").exists()


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["constant", "adaptive"])
def test_a_trained_run_can_be_read(tmp_path, weighting):
    recipe = autoencoder_recipe(f"adversarial.weighting={weighting}", "adversarial.weight=0.5")
    folder = train_autoencoder(recipe, "tiny", tmp_path / "run")
    found, curve = read_curve(folder)
    assert found == weighting and len(curve["ratio"]) >= 2
    assert curve["step"][-1] == 8 and (curve["ratio"] > 0).all()
    if weighting == "adaptive":  # Equation 2, once the ramp is over: half the reconstruction's
        assert curve["weighted_ratio"][-1] == pytest.approx(0.5, rel=0.2)
