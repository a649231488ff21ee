"""Images known again by their pixels, whatever file they lie in."""

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image

from ldm.data.sources import FolderSource
from ldm.errors import LdmError
from pipelines.measuring import checks as overlap
from pipelines.measuring.checks import find_overlap
from tests.pipelines.measuring.reconstructed import crops, save_images


@pytest.fixture
def ranks():
    return PartialState(cpu=True)


def folders(tmp_path, ours: list[np.ndarray], theirs: list[np.ndarray]):
    save_images(tmp_path / "ours", ours, ".bmp")
    save_images(tmp_path / "theirs", theirs)
    return FolderSource(tmp_path / "ours"), FolderSource(tmp_path / "theirs")


def test_copies_under_other_names_and_formats(tmp_path, ranks):
    images = crops(9)
    ours, theirs = folders(tmp_path, images[5:], images[:7])
    found = find_overlap(ours, theirs, 32, ranks)
    assert (found.shared, found.held_out, found.train) == (2, 4, 7)
    assert (found.held_out_of, found.train_of) == (4, 7)
    assert found.example == f"{tmp_path}/ours/000.bmp"
    assert found.to_tree()["shared"] == 2


def test_one_level_of_one_pixel_is_another_image(tmp_path, ranks):
    changed = crops(1)[0].copy()
    changed[3, 4, 1] ^= 1
    ours, theirs = folders(tmp_path, [changed], crops(1))
    found = find_overlap(ours, theirs, 32, ranks)
    assert found.shared == 0 and found.example is None


def test_what_is_compared_is_what_is_measured(tmp_path, ranks):
    """A training image that was prepared at the resolution, and the larger one it was made of."""
    (large,) = crops(1, size=64)
    prepared = np.asarray(Image.fromarray(large).resize((32, 32), Image.Resampling.LANCZOS))
    ours, theirs = folders(tmp_path, [large], [prepared])
    assert find_overlap(ours, theirs, 32, ranks).shared == 1


def test_the_first_of_the_held_out_alone(tmp_path, ranks):
    images = crops(6)
    ours, theirs = folders(tmp_path, images[:4], images[3:])
    assert find_overlap(ours, theirs, 32, ranks, limit=3).shared == 0
    assert find_overlap(ours, theirs, 32, ranks, limit=9).shared == 1


def test_of_large_sets_some_are_drawn(tmp_path, ranks, monkeypatch):
    """Of a split that lies wholly in the other some are found; those drawn are in their order."""
    monkeypatch.setattr(overlap, "COMPARED", 6)
    ours, theirs = folders(tmp_path, crops(9), crops(9))
    found = find_overlap(ours, theirs, 32, ranks)
    assert (found.held_out, found.train, found.held_out_of, found.train_of) == (6, 6, 9, 9)
    assert found.shared == 6  # of equally many the same are drawn
    assert found.example.endswith(".bmp")


def test_training_images_too_small(tmp_path, ranks):
    ours, theirs = folders(tmp_path, crops(2, size=48), crops(2, size=32))
    with pytest.raises(LdmError, match="is 32×32, smaller than the 48×48"):
        find_overlap(ours, theirs, 48, ranks)
