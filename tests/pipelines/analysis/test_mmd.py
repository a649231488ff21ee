"""Table 6: distances of known latents against closed forms, and what draws depend on."""

import csv
import math

import pytest
import torch
from accelerate import PartialState
from PIL import Image, ImageChops

from ldm.errors import LdmError, UsageError
from pipelines.analysis import mmd
from pipelines.analysis.mmd import Plan, analyze_mmd, latents_mmd
from pipelines.analysis.subjects import Images
from tests.pipelines.analysis.subjects import Pixels, known, pixels, save

CPU = torch.device("cpu")
SIGMAS = (2.0, 4.0, 8.0)


def measure(posterior, n_z=2, count=300, n=300, scale="raw", draws=4, batch_size=64, side=8):
    plan = Plan(SIGMAS, draws, scale, n, batch_size)
    subject = known(posterior, n_z)
    return mmd._measure(subject, pixels(count, side), plan, PartialState(cpu=True), CPU)


def constant(mean, std, n_z=2):
    """Posteriors that do not look at the image, so that latents are N(mean, std²)."""

    def posterior(images):
        shape = (len(images), n_z, images.shape[2] // 4, images.shape[3] // 4)
        return torch.full(shape, mean), torch.full(shape, 2 * math.log(std))

    return posterior


def closed_form(mean, std, sigma, d):
    """MMD² × 100 between N(mean, std² I) and N(0, I) of d dimensions, RBF kernel of width σ."""

    def expected(variance, shift):  # of k(x, y) where x − y ~ N(shift, variance I)
        damped = math.exp(-d * shift**2 / (2 * (sigma**2 + variance)))
        return (1 + variance / sigma**2) ** (-d / 2) * damped

    within = expected(2 * std**2, 0) + expected(2, 0)
    return 100 * (within - 2 * expected(1 + std**2, mean))


@pytest.mark.parametrize(("mean", "std"), [(0.8, 1.0), (0.0, 2.0), (-0.5, 0.3)])
def test_gaussian_latents_are_as_far_as_the_closed_form_says(mean, std):
    found = measure(constant(mean, std))
    for sigma in SIGMAS:
        average, spread = found[sigma]
        assert average == pytest.approx(closed_form(mean, std, sigma, 8), abs=0.6)
        assert 0 < spread < 2


def test_latents_that_are_noise_are_near():
    for average, spread in measure(constant(0.0, 1.0), draws=6).values():
        assert abs(average) < 3 * spread / math.sqrt(6) + 0.05


def test_scaling_takes_off_what_it_says():
    def latents(images, factor=1.0, shift=0.0):
        mean = images[:, :2, ::4, ::4] * factor + shift
        return mean, torch.full_like(mean, 2 * math.log(0.1 * factor))

    def close(a, b):
        return all(a[s] == pytest.approx(b[s], abs=1e-3) for s in SIGMAS)

    how = {"count": 60, "n": 60, "draws": 2}
    plain = measure(latents, scale="scaled", **how)
    assert close(plain, measure(lambda x: latents(x, 7.0), scale="scaled", **how))
    assert not close(plain, measure(lambda x: latents(x, 1.0, 0.5), scale="scaled", **how))
    each = measure(latents, scale="standardised", **how)
    assert close(each, measure(lambda x: latents(x, 7.0, 0.5), scale="standardised", **how))
    assert not close(each, measure(latents, scale="raw", **how))


def test_scaled_latents_have_standard_deviation_one_over_all_channels():
    posterior = mmd.DiagonalGaussian(
        torch.randn(200, 3, 4, 4) * 2 + torch.tensor([3.0, 0, -1]).view(1, 3, 1, 1),
        torch.full((200, 3, 4, 4), 2 * math.log(0.5)),
    )
    noise = torch.randn(200, 3, 4, 4)
    scaled = mmd._scale(posterior, noise, "scaled")
    assert scaled.std().item() == pytest.approx(1, abs=0.02)
    assert scaled[:, 0].mean().item() > 1  # no shift
    each = mmd._scale(posterior, noise, "standardised")
    assert torch.allclose(each.mean((0, 2, 3)), torch.zeros(3), atol=0.05)
    assert torch.allclose(each.std((0, 2, 3)), torch.ones(3), atol=0.05)


def test_draws_take_other_images_where_there_are_more():
    seen = []

    def posterior(images):
        seen.extend(images.mean((1, 2, 3)).tolist())
        return images[:, :1, ::4, ::4], images[:, :1, ::4, ::4] - 4

    measure(posterior, 1, count=40, n=10, draws=3)
    assert len(seen) == 30 and len(set(seen)) > 15
    seen.clear()
    measure(posterior, 1, count=10, n=10, draws=3)
    assert len(seen) == 10  # all there are, encoded once


def test_a_distance_does_not_depend_on_the_batch_size():
    def posterior(images):
        return images[:, :2, ::4, ::4], images[:, :2, ::4, ::4] - 2

    one, other = (measure(posterior, count=30, n=20, draws=2, batch_size=b) for b in (1, 7))
    for sigma in SIGMAS:
        assert one[sigma] == pytest.approx(other[sigma], rel=1e-6)
    assert measure(posterior, count=9, n=9, draws=1)[SIGMAS[0]][1] == 0.0


def test_plus_minus_is_the_standard_deviation_of_draws(monkeypatch):
    said = iter((0.01, 0.02, 0.06))
    monkeypatch.setattr(mmd, "rbf_mmd", lambda a, b, sigmas: dict.fromkeys(sigmas, next(said)))
    found = measure(constant(0.0, 1.0), count=4, n=4, draws=3)
    assert found[SIGMAS[0]] == pytest.approx((3.0, math.sqrt(7)))  # (4 + 1 + 9) / 2


# ---------------------------------------------------------------------------------- the job
def test_table_6_of_two_models(tmp_path):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", seed=1)
    words = [f"LiteVAE={a}", f"VAE={b}"]
    how = {"n": 12, "sigmas": (4, 8), "draws": 2, "device": "cpu"}
    found = analyze_mmd(words, **how)
    picture, table = found.files
    assert picture == a / "analysis" / "mmd.png" and picture.stat().st_size > 10_000
    assert found.header == ("σ", "LiteVAE", "VAE") and [row[0] for row in found.rows] == ["4", "8"]
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["sigma"]) for row in rows] == [
        ("LiteVAE", "4"), ("LiteVAE", "8"), ("VAE", "4"), ("VAE", "8")
    ]  # fmt: skip
    assert {(row["d"], row["images"], row["draws"]) for row in rows} == {("64", "12", "2")}
    # the table, the CSV and the function say the same
    alone = latents_mmd(b, **how)
    for row in rows[2:]:
        mean, std = alone[float(row["sigma"])]
        assert (float(row["mmd2_x100"]), float(row["std"])) == pytest.approx((mean, std), rel=1e-6)
    assert found.rows[1][2] == f"{alone[8.0][0]:.2f} ± {alone[8.0][1]:.2f}"


def test_notes_tell_what_does_not_compare(tmp_path):
    folder = save(tmp_path)
    (note,) = analyze_mmd([folder], n=4, draws=1, device="cpu").notes
    assert "√64 = 8" in note
    notes = analyze_mmd([folder], n=10**6, sigmas=(8,), draws=1, resolution=256, device="cpu").notes
    assert "are all there are" in notes[0]


def test_the_note_on_the_shift_names_those_it_is_true_of():
    plan = Plan(mmd.SIGMAS, 1, "raw", 4, 4)
    *_, note = mmd._notes({"small": 64, "paper's": 4096}, plan, 4)
    assert "√64 = 8" in note and "√4,096" not in note


def test_lines_go_from_width_to_width_in_whatever_order_they_are_asked(tmp_path):
    folder = save(tmp_path)
    rising, mixed = (
        analyze_mmd([folder], n=4, sigmas=sigmas, draws=2, device="cpu", out=tmp_path / str(i))
        for i, sigmas in enumerate([(4, 8, 16), (16, 4, 8)])
    )
    assert [row[0] for row in mixed.rows] == ["16", "4", "8"]
    with Image.open(rising.files[0]) as one, Image.open(mixed.files[0]) as other:
        assert ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getbbox() is None


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"n": 1}, "--n 1: it must be at least 2"),
        ({"draws": 0}, "--draws 0: it must be at least 1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"sigmas": (25, 0)}, "--sigmas 25, 0: widths must be above 0"),
        ({"sigmas": ()}, "widths must be above 0"),
        ({"scale": "other"}, "--latents other: it must be one of scaled, standardised, raw"),
    ],
)
def test_numbers_out_of_range(asked, told):
    with pytest.raises(UsageError, match=told):
        latents_mmd("nowhere.pt", **asked)


def test_one_image_is_too_few():
    plan = Plan(SIGMAS, 1, "raw", 5, 4)
    images = Images(Pixels(1), 16, "one image", 0)
    with pytest.raises(LdmError, match="one image: MMD needs two images or more"):
        mmd._measure(known(constant(0, 1), 2), images, plan, PartialState(cpu=True), CPU)
