"""The Laplacian pyramid against scipy's convolution, and its own inverse."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from ldm.metrics.swd import expand, laplacian_pyramid, pyramid_resolutions, shrink

KERNEL = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(
    ("resolution", "levels"),
    [(256, [256, 128, 64, 32, 16]), (64, [64, 32, 16]), (48, [48, 24]), (50, [50, 25]), (16, [16])],
)
def test_levels_end_at_16(resolution, levels):
    assert pyramid_resolutions(resolution) == levels


def test_shrink_is_scipys_convolution_mirrored():
    image = noise(1, 1, 12, 20)
    expected = ndimage.convolve(image[0, 0].numpy(), KERNEL, mode="mirror")[::2, ::2]
    np.testing.assert_allclose(shrink(image)[0, 0].numpy(), expected, atol=1e-14)


def test_expand_is_scipys_convolution_mirrored():
    image = noise(1, 1, 6, 10)
    sparse = np.zeros((12, 20))
    sparse[::2, ::2] = image[0, 0].numpy()
    expected = ndimage.convolve(sparse, 4 * KERNEL, mode="mirror")
    np.testing.assert_allclose(expand(image)[0, 0].numpy(), expected, atol=1e-14)


def test_the_pyramid_adds_up_to_the_image():
    images = noise(2, 3, 64, 32)
    pyramid = laplacian_pyramid(images, 3)
    assert [band.shape[-2:] for band in pyramid] == [(64, 32), (32, 16), (16, 8)]
    detail, coarser, rest = pyramid
    sum_up = detail + expand(coarser + expand(rest))
    torch.testing.assert_close(sum_up, images, rtol=0, atol=1e-14)


def test_a_flat_image_has_no_detail():
    *bands, rest = laplacian_pyramid(torch.full((1, 3, 64, 64), 0.7), 3)
    assert max(band.abs().max().item() for band in bands) < 1e-6
    torch.testing.assert_close(rest, torch.full((1, 3, 16, 16), 0.7))


def test_an_odd_edge_cannot_be_halved():
    with pytest.raises(ValueError, match="16×15: an edge is odd"):
        shrink(torch.zeros(1, 3, 16, 15))
