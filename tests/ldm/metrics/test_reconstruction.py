"""PSNR and SSIM against scikit-image, on photographs."""

import numpy as np
import pytest
import torch
from skimage import data, metrics

from ldm.errors import LdmError
from ldm.images import to_float, to_uint8
from ldm.metrics import psnr, ssim


def photographs() -> torch.Tensor:
    """Four crops (4, 3, 96, 80) of photographs, in [−1, 1]."""
    places = [(data.astronaut(), 60, 180), (data.coffee(), 100, 200), (data.chelsea(), 50, 100)]
    places.append((data.rocket(), 100, 250))
    crops = [photo[top : top + 96, left : left + 80] for photo, top, left in places]
    return to_float(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2))


def damaged(images: torch.Tensor, amount: float) -> torch.Tensor:
    """The images with noise, and a blur along one axis."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    blurred = (images + images.roll(1, -1)) / 2
    return (blurred + amount * noise).clamp(-1, 1)


def as_numpy(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize("amount", [0.0, 0.02, 0.3])
def test_psnr_is_scikit_images(amount):
    images = photographs()
    recon = damaged(images, amount)
    expected = [
        metrics.peak_signal_noise_ratio(as_numpy(x), as_numpy(y), data_range=2)
        for x, y in zip(images, recon, strict=True)
    ]
    assert psnr(images, recon).numpy() == pytest.approx(expected, rel=1e-12)


def test_psnr_of_a_known_error():
    images = torch.zeros(1, 3, 4, 4)
    # an error of 0.02 everywhere: 20 log₁₀(2 / 0.02) = 40 dB
    assert psnr(images, images + 0.02).item() == pytest.approx(40, abs=1e-5)


def test_psnr_of_identical_images_is_infinite():
    images = photographs()
    recon = images.clone()
    recon[1] += 0.01
    values = psnr(images, recon)
    assert torch.isinf(values).tolist() == [True, False, True, True]


@pytest.mark.parametrize("amount", [0.0, 0.02, 0.3])
def test_ssim_is_scikit_images_of_the_pixels(amount):
    images = photographs()
    pixels, recon_pixels = to_uint8(images), to_uint8(damaged(images, amount))
    expected = [
        metrics.structural_similarity(
            x.permute(1, 2, 0).numpy(),
            y.permute(1, 2, 0).numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            channel_axis=2,
        )
        for x, y in zip(pixels, recon_pixels, strict=True)
    ]
    found = ssim(to_float(pixels), to_float(recon_pixels))
    assert found.numpy() == pytest.approx(expected, abs=1e-7)


def test_ssim_of_flat_images_compares_their_luminance():
    """Wang et al. 2004, Equation 6: pixels 100 and 150 of 255, no texture."""
    x, y = (
        torch.full((1, 3, 12, 12), level / 127.5 - 1, dtype=torch.float64) for level in (100, 150)
    )
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(x, y).item() == pytest.approx(expected, rel=1e-9)


def test_ssim_at_the_size_of_its_window():
    images = photographs()[:, :, :11, :11]
    assert ssim(images, images).tolist() == pytest.approx([1.0] * 4, abs=1e-12)


def test_ssim_needs_a_window():
    small = torch.zeros(1, 3, 16, 8)
    with pytest.raises(LdmError, match="11×11 pixels or more, not 16×8: evaluate at a higher"):
        ssim(small, small)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_batches_must_match(metric):
    with pytest.raises(ValueError, match="two batches"):
        metric(torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16))
    with pytest.raises(TypeError, match="floats in"):
        metric(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16))
