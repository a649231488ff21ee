import numpy as np
import pytest
from PIL import Image

from ldm.data.transforms import center_crop, mirror, random_crop
from tests.ldm.data.pictures import coordinates, noise


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (64, 64), (100, 161)])
def test_center_crop_is_the_central_square_then_lanczos(height, width):
    image, side = noise(0, height, width), min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image).crop((left, top, left + side, top + side))
    expected = np.asarray(square.resize((32, 32), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(center_crop(image, 32), expected)


def test_center_crop_at_native_size_only_cuts():
    crop = center_crop(coordinates(7, 32, 40), 32)
    assert crop[0, 0].tolist() == [7, 0, 4]
    assert crop[-1, -1].tolist() == [7, 31, 35]


def test_center_crop_with_box_is_the_mean_of_blocks():
    image = noise(1, 60, 40)
    blocks = image[10:50].reshape(10, 4, 10, 4, 3).mean(axis=(1, 3))
    # Pillow rounds after each of the two passes
    assert abs(center_crop(image, 10, "box") - blocks).max() <= 1


def test_center_crop_at_its_size_changes_nothing():
    np.testing.assert_array_equal(center_crop(noise(2, 40, 40), 40), noise(2, 40, 40))


def test_random_crop_reaches_every_place_and_stays_at_native_size():
    rng, image = np.random.default_rng(0), coordinates(3, 10, 9)
    seen = set()
    for _ in range(400):
        crop = random_crop(image, 8, rng)
        top, left = crop[0, 0, 1:]
        np.testing.assert_array_equal(crop, image[top : top + 8, left : left + 8])
        seen.add((int(top), int(left)))
    assert seen == {(top, left) for top in range(3) for left in range(2)}


def test_mirror():
    assert mirror(coordinates(0, 4, 6))[2, 0].tolist() == [0, 2, 5]


@pytest.mark.parametrize(
    "cut", [center_crop, lambda i, r: random_crop(i, r, np.random.default_rng(0))]
)
def test_nothing_is_enlarged(cut):
    with pytest.raises(ValueError, match="40×48 is smaller than 41×41"):
        cut(noise(0, 48, 40), 41)
