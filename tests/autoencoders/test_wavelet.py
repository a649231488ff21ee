import ptwt
import pytest
import torch

from autoencoders.wavelet import haar_dwt, haar_idwt
from ldm.errors import LdmError


@pytest.fixture
def images():
    return torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def test_one_block_by_hand():
    a, b, c, d = 1.0, 2.0, 5.0, 11.0
    bands = haar_dwt(torch.tensor([[[[a, b], [c, d]]]]))
    assert [band.item() for band in bands] == [19 / 2, -13 / 2, -7 / 2, 5 / 2]


def test_equals_ptwt(images):
    expected_low, expected_edges = ptwt.wavedec2(images, "haar", level=1)
    for band, expected in zip(haar_dwt(images), (expected_low, *expected_edges), strict=True):
        torch.testing.assert_close(band, expected, rtol=0, atol=1e-6)


def test_cascade_equals_ptwt_level_by_level(images):
    low = images
    for level in (1, 2, 3):
        low, *edges = haar_dwt(low)
        expected_low, expected_edges, *_ = ptwt.wavedec2(images, "haar", level=level)
        for band, expected in zip((low, *edges), (expected_low, *expected_edges), strict=True):
            torch.testing.assert_close(band, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inverse_returns_the_images(images, layout):
    images = images.to(memory_format=layout)
    torch.testing.assert_close(haar_idwt(haar_dwt(images)), images, rtol=0, atol=1e-6)


def test_inverse_equals_ptwt(images):
    bands = tuple(torch.randn(4, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    expected = ptwt.waverec2((bands[0], bands[1:]), "haar")
    torch.testing.assert_close(haar_idwt(bands), expected, rtol=0, atol=1e-6)


def test_energy_is_kept(images):
    energy = sum(band.square().sum() for band in haar_dwt(images))
    torch.testing.assert_close(energy, images.square().sum())


def test_float32_under_autocast_and_float64_kept(images):
    with torch.autocast("cpu", torch.bfloat16):
        bands = haar_dwt(images)
        back = haar_idwt(bands)
    assert all(torch.equal(a, b) for a, b in zip(bands, haar_dwt(images), strict=True))
    assert back.dtype == torch.float32
    assert haar_dwt(images.bfloat16())[0].dtype == torch.float32
    assert haar_dwt(images.double())[0].dtype == torch.float64


def test_gradients_are_exact():
    images = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(haar_dwt, images)
    assert torch.autograd.gradcheck(lambda x: haar_idwt(haar_dwt(x)), images)


@pytest.mark.parametrize("size", [(5, 4), (4, 5), (1, 1)])
def test_odd_sides_are_refused(size):
    with pytest.raises(LdmError, match=f"{size[0]}×{size[1]} has an odd one: crop or resize"):
        haar_dwt(torch.zeros(1, 3, *size))
