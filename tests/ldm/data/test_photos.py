"""The photographs inside scikit-image: what is trained on, what is held out, and their classes."""

import numpy as np
import pytest
from skimage import data

from ldm.data import DataConfig, open_source, photos
from ldm.data.photos import PHOTOGRAPHS, PhotoSource


def test_the_photographs_are_classes():
    source = open_source(DataConfig(labels=True), "val", 64)
    assert f"'{source.classes[source.label(3)]}'" in source.name(3)


# ------------------------------------------------------------------------------- photographs
@pytest.fixture
def coded(monkeypatch):
    """Photographs whose pixels hold (row, column) in base 256, of the sizes of the real ones."""

    def photograph(name):
        height, width = real(name).shape[:2]
        row, column = np.indices((height, width))
        # rows need 1411 values and columns too: 11 bits each in 24
        code = row * 2048 + column
        return np.stack([code >> 16, code >> 8 & 255, code & 255], axis=-1).astype(np.uint8)

    real = photos._photograph
    monkeypatch.setattr(photos, "_photograph", photograph)
    photos._part.cache_clear()
    yield
    photos._part.cache_clear()


def decoded(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    code = image.astype(int) @ np.array([65536, 256, 1])
    return code // 2048, code % 2048


def test_training_has_the_left_two_thirds_of_eight_photographs():
    source = PhotoSource("train", 64)
    assert len(source) == 8
    astronaut = data.astronaut()
    np.testing.assert_array_equal(source.load(0), astronaut[:, :342])
    assert source.name(0) == "photograph 'astronaut'"


def test_all_has_the_whole_photographs_and_of_the_stereo_pair_the_left_view():
    source = PhotoSource("all", 64)
    assert len(source) == 8
    np.testing.assert_array_equal(source.load(1), data.coffee())
    np.testing.assert_array_equal(source.load(7), data.stereo_motorcycle()[0])


def test_training_never_sees_the_held_out_third_and_tiles_do_not_overlap(coded):
    train, tiles = PhotoSource("train", 128), PhotoSource("val", 128)
    seen = {name: decoded(train.load(i))[1].max() for i, name in enumerate(PHOTOGRAPHS)}
    claimed = {name: set() for name in PHOTOGRAPHS}
    for index in range(len(tiles)):
        name = tiles._regions[index][0]
        rows, columns = decoded(tiles.load(index))
        assert rows.shape == (128, 128)
        assert columns.min() > seen[name]
        pixels = set((rows * 2048 + columns).ravel().tolist())
        assert len(pixels) == 128 * 128
        assert not pixels & claimed[name]
        claimed[name] |= pixels
    assert all(claimed.values())


def test_the_first_sixteen_tiles_show_every_photograph_twice():
    tiles = PhotoSource("val", 64)
    names = [tiles.name(index) for index in range(16)]
    assert len(set(names)) == 16
    assert all(sum(f"'{photograph}'" in name for name in names) == 2 for photograph in PHOTOGRAPHS)


@pytest.mark.parametrize("split", ["train", "val", "all"])
def test_what_is_smaller_than_the_resolution_is_enlarged_just_enough(split):
    source = PhotoSource(split, 512)
    shapes = [source.load(index).shape for index in range(len(source))]
    assert all(min(height, width) >= 512 for height, width, _ in shapes)
    if split == "train":
        assert shapes[PHOTOGRAPHS.index("chelsea")] == (512, 514, 3)  # from 300×301
        assert shapes[PHOTOGRAPHS.index("retina")] == (1411, 941, 3)  # large enough as it is
    if split == "val":
        assert set(shapes) == {(512, 512, 3)}


def test_the_photographs_cannot_be_changed_by_accident():
    with pytest.raises(ValueError, match="read-only"):
        PhotoSource("train", 64).load(0)[0, 0, 0] = 1


def test_the_first_tiles_show_every_photograph_and_not_its_corner_alone():
    tiles = PhotoSource("val", 64)
    first = [tiles.name(i) for i in range(8)]
    assert all(any(name in text for text in first) for name in PHOTOGRAPHS)
    assert sum("row 0, column 0 " in text for text in first) < 4
    assert first == [PhotoSource("val", 64).name(i) for i in range(8)]


def test_with_labels_each_photograph_is_a_class():
    for split in ("train", "val", "all"):
        source, without = (PhotoSource(split, 64, labels) for labels in (True, False))
        assert source.classes == PHOTOGRAPHS and without.classes == ()
        for index in range(len(source)):
            assert f"'{PHOTOGRAPHS[source.label(index)]}'" in source.name(index)
            assert without.label(index) == -1


# ------------------------------------------------------------------------------------- split


@pytest.mark.usefixtures("coded")
def test_tiles_of_another_height_than_width_do_not_overlap():
    source, seen = PhotoSource("val", (96, 64)), set()
    for index in range(len(source)):
        rows, columns = decoded(source.load(index))
        assert rows.shape == (96, 64)
        place = (source.name(index).split("'")[1], rows[0, 0], columns[0, 0])
        assert rows[-1, 0] - rows[0, 0] == 95 and columns[0, -1] - columns[0, 0] == 63
        seen.add(place)
    assert len(seen) == len(source)
    assert PhotoSource("train", (96, 64)).load(0).shape == PhotoSource("train", 64).load(0).shape
