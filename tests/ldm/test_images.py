import errno

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import LdmError
from ldm.images import assert_range, grid, latents_as_rgb, save_grid, to_float, to_uint8


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    images = to_float(levels)
    assert images.min() == -1 and images.max() == 1
    assert torch.equal(to_uint8(images), levels)


def test_rounding_is_to_the_nearest_and_clipped():
    values = torch.tensor([-2.0, -1.0, 0.0039, 1.0, 3.0])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255]


def test_types_are_not_guessed():
    with pytest.raises(TypeError):
        to_float(torch.zeros(3, 4, 4))
    with pytest.raises(TypeError):
        to_uint8(torch.zeros(3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("bad", [255.0, float("nan"), -3.0])
def test_range_is_asserted(bad):
    with pytest.raises(ValueError, match="must lie in"):
        assert_range(torch.tensor([0.0, bad]))


def test_grid_lays_images_in_rows(tmp_path):
    images = torch.stack([torch.full((3, 4, 4), level) for level in (-1.0, -0.5, 0.0, 0.5, 0.9)])
    sheet = grid(images, columns=2, gap=1)
    assert sheet.shape == (3, 14, 9)
    assert sheet[0, 0, 5] == -0.5 and sheet[0, 5, 0] == 0.0 and sheet[0, 10, 0] == 0.9
    assert (sheet[:, 4] == 1).all() and (sheet[:, 10:, 5:] == 1).all()
    save_grid(images, tmp_path / "a" / "sheet.png", 2)
    assert np.array(Image.open(tmp_path / "a" / "sheet.png")).shape[2] == 3


def test_latents_are_stretched_and_survive_one_channel():
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 7 + 3
    shown = latents_as_rgb(latents)
    assert shown.shape == (2, 3, 8, 8) and shown.min() == -1 and shown.max() == 1
    assert latents_as_rgb(latents[:, :1]).shape == (2, 3, 8, 8)
    assert torch.isfinite(latents_as_rgb(torch.zeros(1, 4, 2, 2))).all()


def test_a_sheet_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, images = tmp_path / "sheet.png", torch.zeros(2, 3, 4, 4)
    save_grid(images, path, 2)
    before = path.read_bytes()

    def full(self, file, format):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(LdmError, match=r"sheet\.png \(No space left on device\): free disk space"):
        save_grid(images, path, 1)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
