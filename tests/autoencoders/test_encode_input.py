"""Images that `Autoencoder.encode` refuses, each in one line."""

import pytest
import torch

from autoencoders import Autoencoder
from ldm.errors import LdmError
from tests.small import autoencoder_recipe

GOOD = torch.zeros(2, 3, 16, 16)


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return Autoencoder(autoencoder_recipe().model).eval()


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (GOOD[0], r"images have shape \(3, 16, 16\): give \(B, 3, H, W\)"),
        (GOOD[:, :1], r"images have shape \(2, 1, 16, 16\): give \(B, 3, H, W\)"),
        (GOOD.permute(0, 2, 3, 1), r"images have shape \(2, 16, 16, 3\)"),
        (GOOD.byte(), r"images are torch\.uint8: give floats in \[−1, 1\]"),
        (GOOD.long(), r"images are torch\.int64"),
        (GOOD + 255, "images have values from 255 to 255: give them in"),
        (GOOD - 128, "images have values from -128 to -128"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(autoencoder, images, told):
    for _ in range(2):  # the second time, too
        with pytest.raises(LdmError, match=told) as caught:
            autoencoder.encode(images)
        assert "\n" not in str(caught.value)


def test_reconstructions_and_noise_may_exceed_the_range(autoencoder):
    assert autoencoder.encode(GOOD + 1.5).mean.isfinite().all()
    assert len(autoencoder.encode(GOOD[:0]).mean) == 0


def test_the_range_is_read_back_once(autoencoder, monkeypatch):
    read, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda self: read.append(1) or item(self))
    for _ in range(3):
        autoencoder.encode(GOOD)
    assert len(read) == 2, "the lowest and the highest value of the first call"
