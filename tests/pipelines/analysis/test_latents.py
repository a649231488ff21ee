"""Figures 2 and 4: the pictures, the numbers in the files, and what is refused."""

import csv

import pytest
import torch

from autoencoders import load_autoencoder
from ldm.data import DataConfig, evaluation_batches, open_source
from ldm.errors import UsageError
from ldm.images import to_float
from pipelines.analysis import latents as job
from pipelines.analysis.latents import analyze_latents, project
from tests.pipelines.analysis.subjects import opened, save


def read(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_two_models_side_by_side(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(job, "draw_sheet", lambda path, rows, what: drawn.update(rows))
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    found = analyze_latents(*opened(a, b), n=6, count=2, out=tmp_path / "out")
    _, statistics, table, spectrum = found.files
    assert statistics.stat().st_size > 10_000
    for images, recon, channels, pca in drawn.values():
        assert images.shape == recon.shape == (2, 3, 32, 32)
        assert channels.shape == pca.shape == (2, 3, 4, 4)
        assert not torch.allclose(channels, pca)
    rows = read(table)
    assert [(r["model"], r["channel"]) for r in rows] == [(m, c) for m in "ab" for c in "1234"]
    spectra = read(spectrum)
    assert [r["channel"] for r in spectra[:10:2]] == ["1", "2", "3", "4", "image"]
    assert {r["cycles_per_latent"] for r in spectra} == {"0.25", "0.5"}
    # from the very images that are in no doubt: fewer than asked for are drawn at random
    ae = load_autoencoder(b)
    everything = analyze_latents(*opened(b, resolution=64), n=10**6, count=1)
    batches = evaluation_batches(open_source(DataConfig(), "val", 64), 64, 64)
    with torch.no_grad():
        means = torch.cat([ae.encode(to_float(batch.images)).mean for batch in batches])
    for row, channel in zip(read(everything.files[2]), means.transpose(0, 1), strict=True):
        assert float(row["mean"]) == pytest.approx(channel.mean().item(), abs=1e-4)
    assert f"{len(means)} images" in everything.title


def test_a_picture_is_drawn(tmp_path):
    found = analyze_latents(*opened(save(tmp_path)), n=3, count=2)
    sheet = found.files[0]
    assert sheet == tmp_path / "analysis" / "latents.png" and sheet.stat().st_size > 10_000
    assert found.rows[0][:2] == (found.rows[0][0], "4") and len(found.header) == len(found.rows[0])


def test_principal_components_do_not_correlate(tmp_path):
    torch.manual_seed(0)
    mixed = torch.einsum("ij,bjhw->bihw", torch.randn(5, 5), torch.randn(40, 5, 8, 8)) + 2
    flat = mixed.transpose(0, 1).flatten(1).double()
    empty = torch.zeros(5, dtype=torch.float64)
    statistics = job.LatentStatistics(
        40, flat.mean(1), flat.cov(correction=0), empty, empty, empty, empty, empty
    )
    components = project(mixed, statistics)
    assert components.shape == (40, 3, 8, 8)
    found = components.transpose(0, 1).flatten(1).double()
    variances, _ = statistics.principal_components()
    torch.testing.assert_close(found.cov(correction=0), variances[:3].diag(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.mean(1), torch.zeros(3).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("resolution", "how", "message"),
    [
        (32, {"n": 0}, "--n 0: must be at least 1"),
        (32, {"count": 0}, "--images 0: must be at least 1"),
        (16, {}, "--resolution 16: .* 8×8 pixels each: use at least 32"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(tmp_path, resolution, how, message):
    folder = save(tmp_path)
    with pytest.raises(UsageError, match=message):
        analyze_latents(*opened(folder, resolution=resolution), **how)
    assert not (folder / "analysis").exists()
