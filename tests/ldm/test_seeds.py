from itertools import chain

import numpy as np
import pytest
import torch

from ldm.seeds import Order, generator, normal, permuted, torch_seed


def test_a_row_depends_on_its_own_number_alone():
    together = normal(3, "noise", [5, 6, 7], (4, 8, 8))
    apart = torch.cat([normal(3, "noise", [k], (4, 8, 8)) for k in (5, 6, 7)])
    assert torch.equal(together, apart)
    assert together.dtype == torch.float32 and together.shape == (3, 4, 8, 8)


def test_seed_purpose_and_number_each_make_another_stream():
    base = normal(0, "noise", [0], (1000,))
    for other in (normal(1, "noise", [0], (1000,)), normal(0, "sigma", [0], (1000,)),
                  normal(0, "noise", [1], (1000,))):  # fmt: skip
        correlation = torch.corrcoef(torch.cat([base, other]))[0, 1]
        assert abs(correlation) < 0.15


def test_draws_are_standard_normal():
    from scipy.stats import kstest

    draws = normal(0, "noise", range(64), (16, 16)).flatten().numpy()
    assert kstest(draws, "norm").pvalue > 0.01
    scalars = normal(0, "sigma", range(4000), ()).numpy()
    assert scalars.shape == (4000,) and kstest(scalars, "norm").pvalue > 0.01


def test_the_stream_is_philox_and_stays_the_same():
    """A run that is resumed years later must see the same images."""
    values = generator(0, "crop", 7).integers(0, 1000, 4)
    assert np.array_equal(values, generator(0, "crop", 7).integers(0, 1000, 4))
    assert 0 <= torch_seed(0, "dropout", 1) < 2**63
    assert torch_seed(0, "dropout", 1) != torch_seed(0, "dropout", 2)


# ------------------------------------------------------------------------------- permutations
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 16, 17, 64, 65, 1000, 4097])
def test_a_permutation_has_every_element_once(count):
    for k in range(3):
        assert sorted(permuted(5, "order", k, i, count) for i in range(count)) == list(range(count))


def test_permutations_of_another_seed_purpose_or_k_differ():
    def order(*key):
        return [permuted(*key, i, 100) for i in range(100)]

    orders = [
        order(0, "order", 0),
        order(1, "order", 0),
        order(0, "shards", 0),
        order(0, "order", 1),
    ]
    assert len({tuple(each) for each in orders}) == 4
    # a random permutation of 100 leaves one element in its place
    assert all(sum(i == p for i, p in enumerate(each)) < 8 for each in orders)


@pytest.mark.parametrize("count", [6, 37, 2**20 + 7])
def test_every_place_is_as_likely_for_every_element(count):
    """Over many keys: the place of one element, and the distance of two neighbours' places."""
    from scipy.stats import chisquare

    bins, draws = min(count, 12), 3000
    places = np.array([[permuted(0, "x", k, i, count) for i in (0, 1)] for k in range(draws)])
    apart = (places[:, 1] - places[:, 0]) % count - 1
    for values, kinds in ((places[:, 0], count), (places[:, 1], count), (apart, count - 1)):
        found = np.bincount(values * bins // kinds, minlength=bins)
        expected = np.bincount(np.arange(kinds) * bins // kinds, minlength=bins) * draws / kinds
        possible = expected > 0
        found, expected = found[possible], expected[possible]
        assert chisquare(found, expected).pvalue > 1e-4
    assert places.min() >= 0 and places.max() < count


def test_neighbours_are_unrelated_within_a_permutation():
    order = np.array([permuted(0, "order", 0, i, 5000) for i in range(5000)])
    shuffled = order / 5000
    for lag in (1, 2, 16, 64):
        assert abs(np.corrcoef(shuffled[:-lag], shuffled[lag:])[0, 1]) < 0.05


def test_permutations_stay_the_same():
    """A run that is resumed years later must see the same images."""
    assert [permuted(0, "order", 0, i, 10) for i in range(10)] == [5, 6, 8, 3, 1, 7, 0, 2, 9, 4]
    assert [permuted(3, "order", 1, i, 2**40) for i in range(3)] == [
        183284052166,
        366799961458,
        857359199899,
    ]


# ------------------------------------------------------------------------------ order of shards
@pytest.mark.parametrize("streams", [1, 3, 16, 500])
@pytest.mark.parametrize("window", [1, 2, 50])
def test_each_epoch_has_every_image_once(streams, window):
    counts = np.array([7, 0, 12, 5, 1, 0, 30, 9])
    order = Order(counts, streams, window)
    truth = sorted((shard, n) for shard, count in enumerate(counts) for n in range(count))
    epochs = [[order.find(3, k) for k in range(e * 64, e * 64 + 64)] for e in range(3)]
    assert all(sorted(epoch) == truth for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = Order(counts, streams, window)
    assert [again.find(3, k) for k in reversed(range(192))] == list(chain(*epochs))[::-1]
    assert [again.find(4, k) for k in range(64)] != epochs[0]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_a_process_needs_few_shards_at_a_time(world):
    counts = np.full(64, 10)
    order = Order(counts, streams=8, window=2)
    for rank in range(world):
        for start in range(0, 1280, 80):  # ten images of each stream
            ks = range(start + rank, start + 80, world)
            used = {order.find(0, k)[0] for k in ks}
            # a window of two shards in each of its streams, or the end of one and a new one
            assert len(used) <= 2 * 2 * 8 // world


def test_images_of_a_window_are_shuffled_together():
    order = Order(np.full(8, 100), streams=2, window=2)
    first = [order.find(0, k) for k in range(0, 400, 2)]  # the first window of stream 0
    shard = [s for s, _ in first]
    assert len(set(shard)) == 2 and shard[:100].count(shard[0]) + shard[100:].count(shard[0]) > 60
    assert 30 < shard[:100].count(shard[0]) < 70, "both from the beginning"
    assert [n for _, n in first] != sorted(n for _, n in first)


@pytest.mark.parametrize("streams", [1, 3, 8])
def test_windows_name_the_shards_of_their_images_and_their_successors(streams):
    counts = np.array([7, 0, 12, 5, 1, 0, 30, 9])
    order = Order(counts, streams, window=2)
    for k in range(200):
        window = order.window(1, k)
        assert order.find(1, k)[0] in window.shards and window.next > k
        later = order.window(1, window.next)
        assert later.first != window.first
        between = range(k + streams, window.next, streams)
        assert all(order.window(1, j).first == window.first for j in between if j // 64 == k // 64)
