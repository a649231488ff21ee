import pytest
import torch

from ldm.data import DataConfig, open_source, sheet_images
from ldm.errors import LdmError
from tests.ldm.data.pictures import Coded


def shown(source, count):
    """Which images, by the index coded in their pixels."""
    images = sheet_images(source, 16, count)
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, 16, 16)
    return images[:, 0, 0, 0].tolist()


def test_the_first_images_cut_from_the_centre():
    assert shown(Coded(20), 4) == [0, 1, 2, 3]
    assert shown(Coded(3), 8) == [0, 1, 2]
    image = sheet_images(Coded(1, height=16, width=20), 16, 1)[0]
    assert image[:, 0, 0].tolist() == [0, 0, 2] and image[:, -1, -1].tolist() == [0, 15, 17]


def test_a_corrupt_one_is_replaced_by_the_next_good_one():
    assert shown(Coded(20, corrupt={0, 2}), 4) == [1, 3, 4, 5]
    assert shown(Coded(20, corrupt=range(19)), 4) == [19]
    assert shown(Coded(3, corrupt={1}), 3) == [0, 2]


def test_none_that_can_be_read():
    with pytest.raises(LdmError, match=r"no image can be read, not even image 0 \(truncated\)"):
        sheet_images(Coded(5, corrupt=range(5)), 16, 2)


def test_one_too_small():
    with pytest.raises(LdmError, match="image 0 is 20×24, smaller than the 32×32 asked for"):
        sheet_images(Coded(5), 32, 2)


def test_photographs():
    assert sheet_images(open_source(DataConfig(), "val", 64), 64, 8).shape == (8, 3, 64, 64)
