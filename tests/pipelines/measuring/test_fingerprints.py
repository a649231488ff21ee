"""Images known again by their pixels."""

import numpy as np
import torch

from pipelines.measuring.statistics import Fingerprints, find_shared, identify_set
from tests.pipelines.measuring.fid_sides import pictures, to_nchw

IMAGES = to_nchw(pictures(8, 0))


def prints(images: torch.Tensor, ks: list[int] | None = None) -> np.ndarray:
    found = Fingerprints()
    found.add(images, torch.tensor(ks or range(len(images))))
    return found.in_order()


def test_equal_images_are_found_in_whatever_layout_and_order():
    others = to_nchw(pictures(5, 1))
    mixed = torch.cat([others[:2], IMAGES[[6]], others[2:], IMAGES[[1]]])
    assert find_shared(prints(mixed), prints(IMAGES)) == [2, 6]
    assert find_shared(prints(IMAGES.contiguous()), prints(mixed)) == [1, 6]
    assert find_shared(prints(others), prints(IMAGES)) == []


def test_one_level_of_one_pixel_is_another_image():
    changed = IMAGES.clone()
    changed[3, 2, 5, 7] ^= 1
    assert find_shared(prints(changed), prints(IMAGES)) == [0, 1, 2, 4, 5, 6, 7]
    assert find_shared(prints(IMAGES.flip(3)), prints(IMAGES)) == []


def test_the_order_is_that_of_the_numbers_whoever_saw_them():
    parts = [Fingerprints(), Fingerprints()]
    parts[0].add(IMAGES[[7, 0, 3]], torch.tensor([7, 0, 3]))
    parts[1].add(IMAGES[[6, 5, 4, 2, 1]], torch.tensor([6, 5, 4, 2, 1]))
    parts[0].merge(parts[1])
    assert np.array_equal(parts[0].in_order(), prints(IMAGES))
    assert identify_set(parts[0].in_order()) == identify_set(prints(IMAGES))
    assert identify_set(prints(IMAGES.flip(0))) != identify_set(prints(IMAGES))
