"""Statistics against numpy; feature sets, independent of batches and processes."""

import pickle
import tracemalloc

import numpy as np
import pytest
import torch

from ldm.errors import LdmError
from ldm.metrics import FeatureSet, FeatureStatistics
from tests.ldm.metrics.photo_features import normal_features, photo_features, statistics_of

DIM = 6


def features(count: int) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(0))


def filled(order, batch: int, total: int = 50, kept: int = 12, seed: int = 0) -> FeatureSet:
    """A set that has seen the features of the images in `order`."""
    rows, some = features(total), FeatureSet(DIM, total, kept, seed)
    order = torch.as_tensor(order, dtype=torch.long)
    for ks in order.split(batch):
        some.update(rows[ks], ks)
    return some


def assert_same(a: FeatureSet, b: FeatureSet) -> None:
    assert a.count == b.count
    np.testing.assert_array_equal(a.sample(), b.sample())
    np.testing.assert_allclose(a.statistics.mean, b.statistics.mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(
        a.statistics.covariance, b.statistics.covariance, rtol=1e-12, atol=1e-15
    )


# ------------------------------------------------------------------------------ statistics
def test_streaming_is_numpys_mean_and_covariance():
    values = normal_features(100, 6)
    statistics = statistics_of(values)
    assert statistics.count == 100
    np.testing.assert_allclose(statistics.mean, values.mean(0), rtol=1e-13)
    np.testing.assert_allclose(statistics.covariance, np.cov(values, rowvar=False), rtol=1e-12)


def test_merging_is_seeing_both():
    values = normal_features(60, 5)
    left, right = statistics_of(values[:13]), statistics_of(values[13:])
    both = statistics_of(values)
    left.merge(FeatureStatistics(5))  # nothing seen: nothing changes
    left.merge(right)
    assert left.count == both.count
    np.testing.assert_allclose(left.mean, both.mean, rtol=1e-13)
    np.testing.assert_allclose(left.covariance, both.covariance, rtol=1e-12)


def test_a_large_mean_costs_no_digits():
    """Sums of raw squares would leave no digit here: 1e8² / 1 is past float64's 16."""
    values = normal_features(500, 3)
    shifted = statistics_of(values + 1e8)
    np.testing.assert_allclose(shifted.covariance, np.cov(values, rowvar=False), rtol=1e-6)


def test_torch_features_of_any_type_and_an_empty_batch():
    values = normal_features(10, 4).astype(np.float32)
    statistics = FeatureStatistics(4)
    statistics.update(torch.from_numpy(values).requires_grad_())
    statistics.update(torch.empty(0, 4))
    assert statistics.count == 10
    np.testing.assert_allclose(statistics.mean, values.astype(np.float64).mean(0), rtol=1e-13)


def test_known_moments_go_on_as_if_seen():
    values = normal_features(60, 5)
    known = FeatureStatistics.from_moments(40, values[:40].mean(0), np.cov(values[:40].T))
    known.update(values[40:])
    both = statistics_of(values)
    assert known.count == 60
    np.testing.assert_allclose(known.mean, both.mean, rtol=1e-13)
    np.testing.assert_allclose(known.covariance, both.covariance, rtol=1e-12)


def test_known_moments_must_be_moments():
    with pytest.raises(ValueError, match=r"mean \(3,\) and covariance \(2, 2\) do not fit"):
        FeatureStatistics.from_moments(5, np.zeros(3), np.eye(2))
    with pytest.raises(ValueError, match="NaN or an infinity"):
        FeatureStatistics.from_moments(5, np.zeros(2), np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="two features or more, not 1"):
        FeatureStatistics.from_moments(1, np.zeros(2), np.eye(2))


def test_what_is_returned_is_not_the_inside():
    statistics = statistics_of(normal_features(10, 4))
    before = statistics.mean
    statistics.mean[:] = 0
    statistics.covariance[:] = 0
    np.testing.assert_array_equal(statistics.mean, before)
    assert statistics.covariance.any()


def test_statistics_assert_their_contract():
    statistics = FeatureStatistics(4)
    with pytest.raises(ValueError, match="mean of no features"):
        _ = statistics.mean
    statistics.update(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="two features or more, not 1"):
        _ = statistics.covariance
    with pytest.raises(ValueError, match=r"must be \(B, 4\), not \(2, 3\)"):
        statistics.update(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="NaN or an infinity"):
        statistics.update(torch.tensor([[0.0, float("nan"), 0.0, 0.0]]))
    with pytest.raises(ValueError, match="features of 3 into those of 4"):
        statistics.merge(FeatureStatistics(3))


# ---------------------------------------------------------------------------------- contents
def test_photographs_statistics_are_over_all_and_the_sample_is_some():
    rows = photo_features("train", 60, DIM)
    some = FeatureSet(DIM, total=60, kept=10)
    some.update(torch.from_numpy(rows), range(60))
    np.testing.assert_allclose(some.statistics.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(some.statistics.covariance, np.cov(rows.T), rtol=1e-11)
    sample = some.sample()
    assert sample.shape == (10, DIM)
    assert sample.dtype == np.float32
    # each row is one of the features, and they come in the images' order
    ks = [int(np.flatnonzero((rows.astype(np.float32) == row).all(1))[0]) for row in sample]
    assert ks == sorted(set(ks))


def test_all_are_kept_where_fewer_come():
    rows = features(20)
    for total in (20, 30):
        some = FeatureSet(DIM, total, kept=30)
        some.update(rows, range(20))
        np.testing.assert_array_equal(some.sample(), rows.numpy())


def test_nothing_has_come():
    assert FeatureSet(DIM, total=5).sample().shape == (0, DIM)
    some = FeatureSet(DIM, total=5)
    some.update(torch.empty(0, DIM), [])
    assert some.count == 0


def test_seed_and_total_decide_the_sample():
    base = filled(range(50), 7).sample()
    np.testing.assert_array_equal(filled(range(50), 7).sample(), base)
    assert not np.array_equal(filled(range(50), 7, seed=1).sample(), base)
    of_more = FeatureSet(DIM, total=51, kept=12)
    of_more.update(features(50), range(50))
    assert not np.array_equal(of_more.sample(), base)


def test_every_image_is_as_likely_to_be_kept():
    """Over seeds: 300 draws of 5 of 20, each image in about a quarter of them (±4 deviations)."""
    hits = np.zeros(20)
    numbers = torch.arange(20.0)[:, None]
    for seed in range(300):
        some = FeatureSet(1, total=20, kept=5, seed=seed)
        some.update(numbers, range(20))
        hits[some.sample()[:, 0].astype(int)] += 1
    assert np.abs(hits / 300 - 0.25).max() < 4 * np.sqrt(0.25 * 0.75 / 300)


# --------------------------------------------------------------------- batches and processes
@pytest.mark.parametrize("batch", [1, 8, 50])
def test_batches_and_their_order_do_not_matter(batch):
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert_same(filled(shuffled, batch), filled(range(50), 16))


@pytest.mark.parametrize("turn", [1, -1])
def test_processes_and_the_order_of_merging_do_not_matter(turn):
    parts = [filled(range(rank, 50, 3), 4) for rank in range(3)]
    first, *others = [pickle.loads(pickle.dumps(part)) for part in parts[::turn]]
    for other in others:
        first.merge(other)
    assert_same(first, filled(range(50), 16))


def test_merging_asserts_its_contract():
    some = filled(range(20), 5)
    with pytest.raises(ValueError, match="has come before: number each"):
        some.merge(filled(range(10, 30), 5))
    with pytest.raises(ValueError, match=r"\(6, 50, 12, 1\) into those of \(6, 50, 12, 0\)"):
        some.merge(filled([], 5, seed=1))


def test_memory_does_not_grow_with_the_stream():
    def peak(total: int) -> int:
        rows = features(500)
        tracemalloc.start()
        some = FeatureSet(DIM, total, kept=100)
        for start in range(0, total, 500):
            some.update(rows, range(start, start + 500))
        some.sample()
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(5_000)  # what is imported at first use
    assert peak(50_000) < peak(5_000) + 50_000  # a byte an image would already fail


# ---------------------------------------------------------------------------------- contract
def test_features_that_are_no_numbers_are_named():
    rows = features(4)
    rows[2, 3] = torch.nan
    some = FeatureSet(DIM, total=100)
    with pytest.raises(LdmError) as error:
        some.update(rows, torch.tensor([40, 41, 42, 43]))
    text = str(error.value)
    assert text.startswith("the features of image 42 hold a NaN or an infinity (1 of 4 in its")
    assert "\n" not in text
    assert some.count == 0
    assert not len(some.sample())


def test_update_asserts_its_contract():
    some = FeatureSet(DIM, total=10)
    with pytest.raises(ValueError, match=r"must be \(3, 6\) for 3 images, not \(4, 6\)"):
        some.update(features(4), range(3))
    with pytest.raises(ValueError, match=r"8 … 11 are not within 0 … 9"):
        some.update(features(4), range(8, 12))
    with pytest.raises(ValueError, match="image 1 has come before"):
        some.update(features(4), [0, 1, 2, 1])
    some = FeatureSet(DIM, total=10)
    some.update(features(4), range(4))
    with pytest.raises(ValueError, match="image 2 has come before"):
        some.update(features(4), [5, 6, 7, 2])
    assert some.count == 4


# --------------------------------------------------------------------------------------- file
def test_a_file_gives_all_back(tmp_path):
    path = tmp_path / "deep" / "features.npz"
    some, about = filled(range(50), 16), {"data": "photos", "extractor": "größe", "n": [1, 2]}
    some.save(path, about)
    again, loaded = FeatureSet.load(path)
    assert loaded == about
    assert_same(again, some)
    assert (again.dim, again.total, again.kept, again.seed) == (DIM, 50, 12, 0)
    with np.load(path) as parts:  # as other toolkits read it
        np.testing.assert_array_equal(parts["mu"], some.statistics.mean)
        np.testing.assert_allclose(parts["sigma"], np.cov(features(50).double().T), rtol=1e-11)


def test_a_half_filled_set_goes_on_from_its_file(tmp_path):
    filled(range(20), 5).save(tmp_path / "half.npz", {})
    again, _ = FeatureSet.load(tmp_path / "half.npz")
    again.update(features(50)[20:], range(20, 50))
    assert_same(again, filled(range(50), 16))


def error_of(path) -> str:
    with pytest.raises(LdmError) as error:
        FeatureSet.load(path)
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_no_file(tmp_path):
    assert "could not read" in error_of(tmp_path / "features.npz")
    assert "could not read" in error_of(tmp_path)


@pytest.mark.parametrize("place", [0, 0.3, 0.7, 0.99])
def test_a_damaged_file(tmp_path, place):
    path = tmp_path / "features.npz"
    filled(range(50), 16).save(path, {"data": "photos"})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(place * len(whole))])
    assert "is damaged" in error_of(path)


def test_a_flipped_bit(tmp_path):
    """Anywhere in the numbers, the archive's checksums tell."""
    path = tmp_path / "features.npz"
    filled(range(50), 16).save(path, {})
    whole = bytearray(path.read_bytes())
    place = whole.index(features(50).double().mean(0).numpy()[:1].tobytes()[4:])
    whole[place] ^= 1
    path.write_bytes(whole)
    assert "is damaged" in error_of(path)


def test_other_files(tmp_path):
    path = tmp_path / "features.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    assert "is damaged" in error_of(path)
    np.save(path.open("wb"), np.zeros(3))
    assert "is damaged" in error_of(path)
    path.write_bytes(pickle.dumps({"mu": 1}))
    assert "is damaged" in error_of(path)


def rewritten(path, **changes) -> None:
    with np.load(path) as file:
        parts = dict(file)
    np.savez(path, **parts | changes)


def test_parts_that_do_not_fit_each_other(tmp_path):
    path = tmp_path / "features.npz"
    some = filled(range(50), 16)
    for name, value in (
        ("sample", some.sample()[:3]),
        ("sample", np.full_like(some.sample(), np.nan)),
        ("sample_ks", np.arange(3)),
        ("mu", np.zeros(DIM + 1)),
        ("sigma", np.full((DIM, DIM), np.nan)),
    ):
        some.save(path, {})
        rewritten(path, **{name: value})
        assert "is damaged" in error_of(path)


def test_a_file_of_a_later_format(tmp_path):
    path = tmp_path / "features.npz"
    filled(range(50), 16).save(path, {})
    with np.load(path) as parts:
        numbers = parts["numbers"]
    numbers[0] = 2
    rewritten(path, numbers=numbers)
    assert "has format 2, not 1: delete it" in error_of(path)


def test_no_file_of_a_single_image(tmp_path):
    with pytest.raises(ValueError, match="two features or more, not 1"):
        filled([0], 1).save(tmp_path / "features.npz", {})
    assert not list(tmp_path.iterdir())
