"""One pass over images: what it keeps, over any batches and processes, and how two compare."""

import pickle

import numpy as np
import pytest
import torch
from accelerate import PartialState

from ldm.errors import LdmError
from ldm.metrics import frechet_distance, sliced_wasserstein
from pipelines.measuring.statistics import (
    Survey,
    Surveyor,
    compare_surveys,
    drawn_images,
    gather_surveys,
)
from tests.pipelines.measuring.fid_sides import SIZE, pictures, to_nchw

CPU = torch.device("cpu")


class Thumbnails:
    """Twelve features: a 2×2 thumbnail."""

    name, sha256, dim, is_published = "thumbnails", None, 12, False

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)


def survey(images: torch.Tensor, batches: list[list[int]], total: int | None = None, **options):
    surveyor = Surveyor(total or len(images), SIZE, Thumbnails(), CPU, **options)
    for ks in batches:
        surveyor.add(images[ks], torch.tensor(ks))
    return surveyor.survey


OURS, THEIRS = to_nchw(pictures(14, 0)), to_nchw(pictures(20, 1, blur=1.4))


def test_numbers_are_those_of_the_sets():
    ours, theirs = survey(OURS, [list(range(14))]), survey(THEIRS, [list(range(20))])
    result = compare_surveys(ours, theirs, CPU)
    a, b = (Thumbnails()(side).double().numpy() for side in (OURS, THEIRS))
    direct = frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert result["fid"] == pytest.approx(direct, rel=1e-9)
    assert result["swd"] == pytest.approx(sliced_wasserstein(OURS, THEIRS), rel=1e-9)
    assert result["swd_images"] == 14 and ours.count == 14
    assert 0 <= result["precision"] <= 1 and result["kid"] > 0 and result["kid_std"] >= 0


def test_batches_order_and_processes_change_nothing():
    whole = survey(THEIRS, [list(range(20))], swd_images=6)
    parts = [
        survey(THEIRS, ks, total=20, swd_images=6)
        for ks in ([[3, 1], [19, 7, 8]], [[0, 2, *range(9, 19)]], [[4, 5, 6]])
    ]
    merged = pickle.loads(pickle.dumps(parts[0]))  # as another process's comes
    for other in parts[1:]:
        merged.merge(other)
    assert merged.count == 20
    reference = survey(OURS, [list(range(14))], swd_images=6)
    one, other = (compare_surveys(side, reference, CPU) for side in (whole, merged))
    assert other["swd"] == one["swd"] and other["swd_images"] == 6
    for name in ("fid", "kid", "precision", "recall"):
        assert other[name] == pytest.approx(one[name], rel=1e-9)


def test_patches_are_of_images_drawn_from_the_whole():
    drawn = drawn_images(20, 6)
    assert len(drawn) == 6 and drawn.tolist() == sorted(set(drawn.tolist()))
    assert drawn.tolist() != list(range(6)) and drawn_images(20, 99).tolist() == list(range(20))
    some = survey(THEIRS, [list(range(20))], swd_images=6)
    assert some.patches.count == 6 and some.features.count == 20
    alone = survey(THEIRS[drawn], [list(range(6))])  # the same images as a set of their own
    assert compare_surveys(some, alone, CPU)["swd"]["mean"] == 0


def test_what_a_side_has_not_is_not_compared():
    full = survey(OURS, [list(range(14))])
    patches = Surveyor(20, SIZE, None, CPU)
    assert patches.add(THEIRS, torch.arange(20)) is None
    result = compare_surveys(full, patches.survey, CPU)
    assert result["fid"] is result["kid"] is result["recall"] is None
    assert result["swd"]["mean"] > 0
    features = survey(THEIRS, [list(range(20))], swd_images=0)
    result = compare_surveys(full, features, CPU)
    assert result["swd"] is None and result["swd_images"] == 0 and result["fid"] > 0
    few = survey(THEIRS[:3], [[0, 1, 2]])
    result = compare_surveys(full, few, CPU)
    assert result["fid"] > 0 and result["precision"] is None and result["kid"] is None
    one = survey(THEIRS[:1], [[0]])
    result = compare_surveys(full, one, CPU)
    assert result["fid"] is result["kid"] is None and result["swd"]["mean"] > 0
    with pytest.raises(ValueError, match="keep different things"):
        full.merge(features)


def test_the_features_are_given_back():
    surveyor = Surveyor(14, SIZE, Thumbnails(), CPU)
    features = surveyor.add(OURS[:4], torch.arange(4))
    assert torch.equal(features, Thumbnails()(OURS[:4]))


def test_features_that_are_not_finite_are_refused():
    class Broken(Thumbnails):
        def __call__(self, images):
            return super().__call__(images) * torch.tensor([1.0, float("nan"), 1]).repeat(4)

    with pytest.raises(LdmError, match="NaN or an infinity"):
        Surveyor(14, SIZE, Broken(), CPU).add(OURS, torch.arange(14))


def test_images_smaller_than_a_patch():
    with pytest.raises(LdmError, match="7×7 pixels or more"):
        Surveyor(3, 4, None, CPU)


def test_one_process_gathers_itself():
    alone = Survey(None, None, 3)
    assert gather_surveys(alone, PartialState(cpu=True)) is alone
