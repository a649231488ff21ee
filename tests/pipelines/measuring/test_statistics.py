"""Statistics of a set over any batches and processes, the distances of two, and the extractor."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState

from ldm import distributed, logbook
from ldm.errors import LdmError, UsageError
from ldm.images import Hashes, find_shared, hash_images, pack_hashes
from ldm.metrics import frechet_distance, sliced_wasserstein
from pipelines.measuring import statistics
from pipelines.measuring.statistics import (
    SEED,
    MeasureOptions,
    SetStatistics,
    accumulate,
    compare_sets,
    draw_images,
    find_extractor,
    gather_statistics,
    load_on_all,
)
from tests.pipelines.measuring.fid_sides import SIZE, pictures, to_nchw

CPU = torch.device("cpu")
OURS, THEIRS = to_nchw(pictures(14, 0)), to_nchw(pictures(20, 1, blur=1.4))


class Thumbnails:
    """Twelve features: a 2×2 thumbnail."""

    name, sha256, dim, mode, is_published = "thumbnails", None, 12, None, False

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def take_in(images: torch.Tensor, batches: list[list[int]], total: int | None = None, **options):
    found = SetStatistics(total or len(images), SIZE, Thumbnails(), **options)
    for ks in batches:
        found.update(images[ks], torch.tensor(ks), Thumbnails())
        found.hashes |= hash_images(images[ks], torch.tensor(ks))
    return found


# ------------------------------------------------------------------------------- distances
def test_numbers_are_those_of_the_sets():
    ours = take_in(OURS, [list(range(14))])
    theirs = take_in(THEIRS, [list(range(20))], patch_seed=SEED + 1)
    result = compare_sets(ours, theirs, CPU)
    a, b = (Thumbnails()(side).double().numpy() for side in (OURS, THEIRS))
    direct = frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert result["fid"] == pytest.approx(direct, rel=1e-9)
    assert result["swd"] == pytest.approx(sliced_wasserstein(OURS, THEIRS), rel=1e-9)
    assert result["swd_images"] == 14 and ours.features.count == 14
    assert 0 <= result["precision"] <= 1 and result["kid"] > 0 and result["kid_std"] >= 0


def test_batches_order_and_processes_change_nothing():
    whole = take_in(THEIRS, [list(range(20))], swd_images=6)
    parts = [
        take_in(THEIRS, ks, total=20, swd_images=6)
        for ks in ([[3, 1], [19, 7, 8]], [[0, 2, *range(9, 19)]], [[4, 5, 6]])
    ]
    merged = pickle.loads(pickle.dumps(parts[0]))  # as another process's comes
    for other in parts[1:]:
        merged.merge(other)
    assert merged.features.count == 20 and merged.hashes == whole.hashes
    reference = take_in(OURS, [list(range(14))], swd_images=6)
    one, other = (compare_sets(side, reference, CPU) for side in (whole, merged))
    assert other["swd"] == one["swd"] and other["swd_images"] == 6
    for name in ("fid", "kid", "precision", "recall"):
        assert other[name] == pytest.approx(one[name], rel=1e-9)


def test_patches_are_of_images_drawn_from_the_whole():
    drawn = draw_images(20, 6)
    assert len(drawn) == 6 and drawn.tolist() == sorted(set(drawn.tolist()))
    assert drawn.tolist() != list(range(6)) and draw_images(20, 99).tolist() == list(range(20))
    some = take_in(THEIRS, [list(range(20))], swd_images=6)
    assert some.patches.count == 6 and some.features.count == 20
    alone = take_in(THEIRS[drawn], [list(range(6))])  # the same images as a set of their own
    assert compare_sets(some, alone, CPU)["swd"]["mean"] == 0


def test_a_distance_without_its_statistics_is_none():
    full = take_in(OURS, [list(range(14))])
    patches = SetStatistics(20, SIZE, None)
    patches.update(THEIRS, torch.arange(20))
    result = compare_sets(full, patches, CPU)
    assert result["fid"] is result["kid"] is result["recall"] is None
    assert result["swd"]["mean"] > 0
    features = take_in(THEIRS, [list(range(20))], swd_images=0)
    result = compare_sets(full, features, CPU)
    assert result["swd"] is None and result["swd_images"] == 0 and result["fid"] > 0
    few = take_in(THEIRS[:3], [[0, 1, 2]])
    result = compare_sets(full, few, CPU)
    assert result["fid"] > 0 and result["precision"] is None and result["kid"] is None
    one = take_in(THEIRS[:1], [[0]])
    result = compare_sets(full, one, CPU)
    assert result["fid"] is result["kid"] is None and result["swd"]["mean"] > 0
    with pytest.raises(ValueError, match="keep different things"):
        full.merge(features)


def test_every_feature_is_kept_where_asked_for():
    found = take_in(OURS, [[0, 1, 2], [3, 4]], every_feature=True)
    assert np.array_equal(np.concatenate(found.every_feature), Thumbnails()(OURS[:5]))
    assert take_in(OURS, [[0]]).every_feature is None


def test_features_that_are_not_finite_are_refused():
    class Broken(Thumbnails):
        def __call__(self, images):
            return super().__call__(images) * torch.tensor([1.0, float("nan"), 1]).repeat(4)

    with pytest.raises(LdmError, match="NaN or an infinity"):
        SetStatistics(14, SIZE, Broken()).update(OURS, torch.arange(14), Broken())


def test_images_smaller_than_a_patch_are_refused():
    with pytest.raises(LdmError, match="7×7 pixels or more"):
        SetStatistics(3, 4, None)


def test_one_process_gathers_itself():
    alone = SetStatistics(3, SIZE)
    assert gather_statistics(alone, PartialState(cpu=True)) is alone


def test_a_failing_pass_ends_its_progress_bar(monkeypatch):
    bars = []

    def bar(*args):
        bars.append(original(*args))
        return bars[-1]

    class Broken:
        what, resolution = "broken", SIZE

        def __len__(self):
            return 9

        def batches(self, *share):
            raise LdmError("one is gone")
            yield

    original = logbook.progress_bar
    monkeypatch.setattr(logbook, "progress_bar", bar)
    with pytest.raises(LdmError, match="one is gone"):
        accumulate(Broken(), PartialState(cpu=True), batch_size=3)
    assert not bars[0].live.is_started


# ------------------------------------------------------------------------------------ hashes
def hashes(images: torch.Tensor, ks: list[int] | None = None) -> Hashes:
    return hash_images(images, torch.tensor(ks or range(len(images))))


IMAGES = OURS[:8]


def test_equal_images_are_found_in_any_layout_and_order():
    others = THEIRS[:5]
    mixed = torch.cat([others[:2], IMAGES[[6]], others[2:], IMAGES[[1]]])
    assert find_shared(hashes(mixed), hashes(IMAGES)) == [2, 6]
    assert find_shared(hashes(IMAGES.contiguous()), hashes(mixed)) == [1, 6]
    assert find_shared(hashes(others), hashes(IMAGES)) == []


def test_one_level_of_one_pixel_makes_another_image():
    changed = IMAGES.clone()
    changed[3, 2, 5, 7] ^= 1
    assert find_shared(hashes(changed), hashes(IMAGES)) == [0, 1, 2, 4, 5, 6, 7]
    assert find_shared(hashes(IMAGES.flip(3)), hashes(IMAGES)) == []


def test_the_hash_of_a_set_depends_on_the_order_of_its_numbers_alone():
    parts = hashes(IMAGES[[7, 0, 3]], [7, 0, 3]) | hashes(IMAGES[[6, 5, 4, 2, 1]], [6, 5, 4, 2, 1])
    assert pack_hashes(parts) == pack_hashes(hashes(IMAGES))
    assert pack_hashes(hashes(IMAGES.flip(0))) != pack_hashes(hashes(IMAGES))


# ------------------------------------------------------------------------------------ options
@pytest.mark.parametrize("given", [{"features": "a:b"}, {"mode": "legacy-tensorflow"}])
def test_no_fid_excludes_options_of_features(given):
    with pytest.raises(UsageError, match="--no-fid excludes --weights, --features and --mode"):
        MeasureOptions(fid=False, **given)


# -------------------------------------------------------------------- on every process or none
class Ranks:
    """Two processes in turn: the other one hears what the main one returned."""

    def __init__(self, monkeypatch):
        self.heard = None
        monkeypatch.setattr(statistics, "from_main", self.from_main)

    def from_main(self, ranks, make):
        if ranks.is_main_process:
            self.heard = make()
        return self.heard


MAIN, OTHER = (
    SimpleNamespace(is_main_process=rank == 0, process_index=rank, num_processes=2)
    for rank in (0, 1)
)


def test_available_weights_are_loaded_by_every_process(monkeypatch):
    Ranks(monkeypatch)
    loads = iter("ab")
    assert load_on_all(lambda: next(loads), MAIN) == ("a", None)
    assert load_on_all(lambda: next(loads), OTHER) == ("b", None)


def test_missing_weights_are_searched_for_by_the_main_process_alone(monkeypatch):
    Ranks(monkeypatch)
    tried = []

    def load():
        tried.append(1)
        raise LdmError("no weights")

    assert load_on_all(load, MAIN) == load_on_all(load, OTHER) == (None, "no weights")
    assert len(tried) == 1


def test_weights_missing_on_one_process_are_used_by_none(monkeypatch):
    """Else the one would leave while the others wait for its share."""
    Ranks(monkeypatch)
    reasons = []
    monkeypatch.setattr(statistics, "gather_object", lambda mine: reasons + mine)

    def load():
        raise LdmError("not on this machine")

    assert load_on_all(lambda: "a", MAIN) == ("a", None)
    assert load_on_all(load, OTHER) == (None, "not on this machine")
    reasons.append("not on this machine")  # as the main process hears it
    assert load_on_all(lambda: "a", MAIN) == (None, "not on this machine")


def test_a_bug_on_one_process_ends_all(monkeypatch):
    """It is no missing file, and raised on that one alone would leave the others waiting."""
    Ranks(monkeypatch)
    told = []

    def load():
        raise KeyError("a bug")

    assert load_on_all(lambda: "a", MAIN) == ("a", None)
    monkeypatch.setattr(distributed, "gather_object", lambda mine: told.extend(mine) or told)
    with pytest.raises(KeyError):
        load_on_all(load, OTHER)
    assert [str(error) for error in told] == ["process 1 failed: KeyError: 'a bug'"]


def test_a_wrong_mode_is_a_usage_error(monkeypatch):
    Ranks(monkeypatch)
    with pytest.raises(UsageError, match="mode 'x' does not exist"):
        find_extractor(MeasureOptions(mode="x"), 32, CPU, MAIN)


def test_requested_weights_must_be_there_on_every_process(monkeypatch, tmp_path):
    Ranks(monkeypatch)
    for rank in (MAIN, OTHER):
        with pytest.raises(LdmError, match=r"no Inception weights at .*x.pt"):
            find_extractor(MeasureOptions(weights=tmp_path / "x.pt"), 32, CPU, rank)
