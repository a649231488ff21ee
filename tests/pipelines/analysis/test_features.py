"""Figure 3: magnitudes of the decoder's feature maps, and how uneven they are."""

import csv
from contextlib import contextmanager

import pytest
import torch

from autoencoders import load_autoencoder
from autoencoders.layers import PIXELS_AT_ONCE
from ldm.charts import drawing
from ldm.errors import LdmError, UsageError
from pipelines.analysis import features as job
from pipelines.analysis.features import analyze_features, decoder_magnitudes, imbalance
from tests.pipelines.analysis.subjects import opened, save


def test_a_flat_map_is_balanced():
    peak, top_energy = imbalance(torch.full((20, 30), 0.3))
    assert peak == pytest.approx(1) and top_energy == pytest.approx(0.01)


def test_imbalance_of_a_single_spike():
    spike = torch.ones(20, 30)
    spike[3, 4] = 11.0
    peak, top_energy = imbalance(spike)
    assert peak == pytest.approx(11 / (610 / 600))
    # 6 of 600 places: the spike, and five of the others
    assert top_energy == pytest.approx((121 + 5) / (121 + 599))


def test_imbalance_of_tiny_and_zero_maps():
    assert imbalance(torch.tensor([[1.0, 3.0]])) == (pytest.approx(1.5), pytest.approx(0.9))
    assert imbalance(torch.zeros(4, 4)) == (0, 0)


@pytest.mark.parametrize("norm", ["group", "smc"])
def test_magnitudes_are_those_of_the_levels(tmp_path, norm):
    ae = load_autoencoder(save(tmp_path, norm=norm))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = decoder_magnitudes(ae, images)
    assert [level.shape[-1] for level in found] == [8, 16, 32, 32]
    with torch.no_grad():
        x = ae.decoder.middle(ae.decoder.conv_in(ae.encode(images).mean))
        for level, ours in zip(ae.decoder.levels, found, strict=True):
            x = level(x)
            torch.testing.assert_close(ours, x.square().mean(1).sqrt(), rtol=1e-4, atol=1e-5)
    assert not any(level._forward_hooks for level in ae.decoder.levels)


def test_maps_do_not_depend_on_the_decoder_batch(tmp_path, monkeypatch):
    ae = load_autoencoder(save(tmp_path))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = decoder_magnitudes(ae, images)
    monkeypatch.setitem(PIXELS_AT_ONCE, "decoder", 32 * 32)  # one at a time
    for a, b in zip(together, decoder_magnitudes(ae, images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------- the job
def test_table_and_csv_agree_for_two_models(tmp_path):
    group, smc = save(tmp_path / "a", norm="group"), save(tmp_path / "b")
    found = analyze_features(*opened(f"G={group}", f"S={smc}"), count=2)
    picture, table = found.files
    assert picture == group / "analysis" / "features.png" and picture.stat().st_size > 10_000
    assert [row[:3] for row in found.rows] == [
        (name, norm, str(level))
        for name, norm in (("G", "GroupNorm"), ("S", "SMC"))
        for level in (1, 2, 3, 4)
    ]
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 2
    # the table has the mean over images
    for shown in found.rows:
        of = [r for r in rows if (r["model"], r["level"]) == (shown[0], shown[2])]
        mean = sum(float(r["peak_over_mean"]) for r in of) / 2
        assert float(shown[4]) == pytest.approx(mean, abs=0.006)


def test_headings_show_only_sizes_common_to_all_models(tmp_path, monkeypatch):
    figures = []

    @contextmanager
    def kept(*words):
        with drawing(*words) as figure:
            figures.append(figure)
            yield figure

    monkeypatch.setattr(job, "drawing", kept)
    coarse, fine = [[torch.ones(1, side, side) for side in sides] for sides in ((2, 4, 8), (4, 8))]
    images = torch.zeros(1, 3, 8, 8)
    for maps in ({"a": coarse}, {"a": coarse, "b": fine}):
        job._draw(tmp_path / "x.png", images, maps, dict.fromkeys(maps, "smc"), "one image")
    alone, together = (
        [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
        for figure in figures
    )
    assert alone == ["image", "level 1\n2×2", "level 2\n4×4", "level 3, the last\n8×8"]
    assert together == ["image", "level 1", "level 2", "level 3\n8×8"]
    below = [axes.get_xlabel().split("\n")[0] for axes in figures[1].axes if axes.get_xlabel()]
    assert below == ["2×2", "4×4", "peak 1.0×", "4×4", "8×8"]


def test_invalid_counts_and_non_finite_features_are_refused(tmp_path, monkeypatch):
    folder = save(tmp_path)
    with pytest.raises(UsageError, match="--images 0: must be at least 1"):
        analyze_features(*opened(folder), count=0)
    monkeypatch.setattr(job, "decoder_magnitudes", lambda *_: [torch.full((1, 2, 2), torch.nan)])
    with pytest.raises(LdmError, match="features of the decoder are not finite"):
        analyze_features(*opened(folder))
    assert not (folder / "analysis").exists()
