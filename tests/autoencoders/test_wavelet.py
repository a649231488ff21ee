import numpy as np
import ptwt
import pytest
import pywt
import torch
from pydantic import TypeAdapter, ValidationError

from autoencoders.wavelet import WaveletName, dwt, dwt_cascade, haar_dwt, haar_idwt, idwt
from ldm.errors import LdmError

WAVELETS = pywt.wavelist(kind="discrete")
SHORT = ["db2", "sym4", "bior2.2", "rbio3.1"]


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


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_every_wavelet_is_pywts_periodization_and_comes_back(wavelet):
    side = max(4, pywt.Wavelet(wavelet).dec_len - 2)  # the least it takes
    side += side % 2
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(1, 1, side, side + 6, generator=noise, dtype=torch.float64)
    bands = dwt(images, wavelet)
    low, edges = pywt.dwt2(images.numpy(), wavelet, mode="periodization")
    for band, expected in zip(bands, (low, *edges), strict=True):
        np.testing.assert_allclose(band.numpy(), expected, rtol=0, atol=1e-10)
    error = (idwt(bands, wavelet) - images).abs().max()
    assert error < (0.03 if wavelet == "dmey" else 1e-9)  # PyWavelets' own dmey is off as much


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_low_pass_doubles_a_flat_image_and_edges_are_empty(wavelet):
    side = pywt.Wavelet(wavelet).dec_len + 2
    low, *edges = dwt(torch.full((1, 1, side, side), 0.5, dtype=torch.float64), wavelet)
    torch.testing.assert_close(low, torch.ones_like(low), rtol=0, atol=1e-6)
    assert max(band.abs().max() for band in edges) < (1e-3 if wavelet == "dmey" else 1e-6)


@pytest.mark.filterwarnings("ignore:Level value of")
@pytest.mark.parametrize("wavelet", ["haar", *SHORT])
def test_cascade_equals_pywts_levels(images, wavelet):
    levels = dwt_cascade(images.double(), 3, wavelet)
    for level, bands in enumerate(levels, start=1):
        low, edges, *_ = pywt.wavedec2(
            images.double().numpy(), wavelet, mode="periodization", level=level
        )
        for band, expected in zip(bands, (low, *edges), strict=True):
            assert band.shape == (2, 3, 48 >> level, 64 >> level)
            np.testing.assert_allclose(band.numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("wavelet", SHORT)
def test_other_wavelets_answer_in_float32_whatever_the_autocast(images, wavelet):
    with torch.autocast("cpu", torch.bfloat16):
        bands = dwt(images, wavelet)
        back = idwt(bands, wavelet)
    assert all(torch.equal(a, b) for a, b in zip(bands, dwt(images, wavelet), strict=True))
    assert {band.dtype for band in bands} == {back.dtype} == {torch.float32}
    torch.testing.assert_close(back, images, rtol=0, atol=1e-5)
    assert dwt(images.bfloat16(), wavelet)[0].dtype == torch.float32
    assert idwt(dwt(images.double(), wavelet), wavelet).dtype == torch.float64


@pytest.mark.parametrize("wavelet", SHORT)
def test_gradients_of_other_wavelets_are_exact(wavelet):
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(1, 1, 6, 8, dtype=torch.float64, generator=noise).requires_grad_()
    bands = [band.detach().requires_grad_() for band in dwt(images, wavelet)]
    assert torch.autograd.gradcheck(lambda x: dwt(x, wavelet), images)
    assert torch.autograd.gradcheck(lambda *x: idwt(x, wavelet), bands)


def test_haar_cascade_compiles_whole(images):
    compiled = torch.compile(lambda x: dwt_cascade(x, 3), fullgraph=True, backend="eager")
    for ours, expected in zip(compiled(images), dwt_cascade(images, 3), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
@pytest.mark.parametrize("size", [(36, 32), (32, 36), (4, 8)])
def test_sides_that_cannot_be_halved_so_often_are_refused(wavelet, size):
    said = (
        f"^images of {size[0]}×{size[1]} pixels: a wavelet transform of depth 3 needs sides that "
        "are multiples of 8; crop or resize them, or lower the depth$"
    )
    with pytest.raises(LdmError, match=said):
        dwt_cascade(torch.zeros(1, 3, *size), 3, wavelet)


def test_filters_longer_than_the_image_are_refused():
    said = (
        r"^images of 32×64 pixels are too small for a transform of depth 3 by the wavelet 'db8' "
        r"\(16 taps\): sides of 56 pixels are the least; take larger images, a lower depth or a "
        "shorter wavelet$"
    )
    with pytest.raises(LdmError, match=said):
        dwt_cascade(torch.zeros(1, 3, 32, 64), 3, "db8")
    dwt_cascade(torch.zeros(1, 3, 56, 64), 3, "db8")
    with pytest.raises(LdmError, match="images of 12×12 pixels are too small"):
        idwt(tuple(torch.zeros(4, 1, 3, 6, 6)), "db8")
    with pytest.raises(LdmError, match="images of 0×8 pixels are too small"):
        dwt_cascade(torch.zeros(1, 3, 0, 8), 3)


def test_unknown_wavelets_are_refused_with_the_nearest():
    names = TypeAdapter(WaveletName)
    assert names.validate_python("db2") == "db2"
    with pytest.raises(ValidationError, match=r"no wavelet 'bior22'; did you mean 'bior2.2'\?"):
        names.validate_python("bior22")
    with pytest.raises(ValueError, match="db99"):
        dwt(torch.zeros(1, 3, 8, 8), "db99")
