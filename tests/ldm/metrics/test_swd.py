"""Sliced Wasserstein distance and Laplacian pyramid against scipy."""

import pickle

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from ldm.errors import LdmError
from ldm.images import to_float
from ldm.metrics import PatchDescriptors, sliced_wasserstein
from ldm.metrics.swd import (
    compare_descriptors,
    expand,
    laplacian_pyramid,
    normalise_colours,
    pyramid_resolutions,
    shrink,
    sliced_distance,
    unit_directions,
)

SMALL = {"patches": 16, "projections": 16, "repeats": 2}


def textures(count: int, seed: int, blur: float = 1.0, size: int = 32) -> torch.Tensor:
    """Blurred colour noise (count, 3, size, size) uint8."""
    draw = np.random.default_rng(seed)
    noise = draw.standard_normal((count, 3, size, size))
    noise = ndimage.gaussian_filter(noise, (0, 0, blur, blur))
    return torch.from_numpy((noise / noise.std() * 50 + 128).clip(0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------- one slice
def test_each_slice_is_scipys_distance():
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((200, 147)), draw.standard_normal((200, 147)) * 1.5 + 0.3
    directions = unit_directions(0, repeat=0, projections=20)
    expected = np.mean(
        [stats.wasserstein_distance(a @ v, b @ v) for v in directions.double().numpy().T]
    )
    found = sliced_distance(torch.from_numpy(a).float(), torch.from_numpy(b).float(), directions)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_shift_moves_every_projection_by_its_share():
    """All points moved by s: on a line v the distance is exactly |s · v|."""
    draw = np.random.default_rng(1)
    a, shift = draw.standard_normal((50, 147)), draw.standard_normal(147)
    directions = unit_directions(3, repeat=1, projections=40)
    expected = np.abs(shift @ directions.double().numpy()).mean()
    found = sliced_distance(
        torch.from_numpy(a).float(), torch.from_numpy(a + shift).float(), directions
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_unit_directions_are_unit_vectors_that_differ_by_repeat():
    first, second = unit_directions(0, 0, 8), unit_directions(0, 1, 8)
    assert first.shape == (147, 8)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(8))
    assert not torch.equal(first, second)


# ------------------------------------------------------------------------------ descriptors
def test_the_whole_distance_from_the_patches():
    """Every step after the patches again, in numpy float64 and scipy."""
    sides = []
    for images in (textures(6, 0), textures(6, 1, blur=1.4)):
        side = PatchDescriptors(32, patches=8, seed=5)
        side.update(images)
        sides.append(side)
    found = compare_descriptors(*sides, seed=5, projections=4, repeats=3)
    assert list(found) == ["32", "16", "mean"]
    for index, resolution in enumerate(("32", "16")):
        clouds = []
        for side in sides:
            patches = side.level(index, 6).double().numpy()  # (48, 3, 49)
            mean, std = patches.mean((0, 2)), patches.std((0, 2))
            clouds.append(((patches - mean[:, None]) / std[:, None]).reshape(48, 147))
        repeats = [
            np.mean([stats.wasserstein_distance(*(c @ v for c in clouds)) for v in vs.numpy().T])
            for vs in (unit_directions(5, repeat, 4) for repeat in range(3))
        ]
        assert found[resolution] == pytest.approx(1e3 * np.mean(repeats), rel=1e-4)


def test_patches_are_pieces_of_the_pyramids_levels():
    """At 16² there is one level, the image itself: each patch must be found in it."""
    images = textures(2, 0, size=16)
    side = PatchDescriptors(16, patches=5)
    side.update(images)
    floats = to_float(images)
    windows = floats.unfold(2, 7, 1).unfold(3, 7, 1)  # (2, 3, 10, 10, 7, 7)
    for number, patch in enumerate(side.level(0, 2).float().reshape(-1, 3, 7, 7)):
        image = windows[number // 5].permute(1, 2, 0, 3, 4)  # (10, 10, 3, 7, 7)
        nearest = (image - patch).abs().amax((-1, -2, -3)).min()
        assert nearest <= 5e-4  # half precision


def test_batches_do_not_matter():
    images = textures(7, 0)
    whole, parts = PatchDescriptors(32, patches=4), PatchDescriptors(32, patches=4)
    whole.update(images)
    for part in (*images.split(3), images[:0]):
        parts.update(part)
    assert whole.count == parts.count == 7
    for index in range(2):
        assert torch.equal(whole.level(index, 7), parts.level(index, 7))


def test_numbered_images_come_in_any_order_and_from_any_process():
    images, numbers = textures(9, 0), torch.tensor([40, 3, 17, 5, 21, 8, 30, 11, 2])
    whole = PatchDescriptors(32, patches=4)
    whole.update(images[numbers.argsort()], numbers.sort().values)
    ranks = [PatchDescriptors(32, patches=4) for _ in range(2)]
    for rank, mine in zip(ranks, (slice(0, 5), slice(5, 9)), strict=True):
        for some, ks in zip(images[mine].split(2), numbers[mine].split(2), strict=True):
            rank.update(some, ks)
    merged = ranks[1]
    merged.merge(pickle.loads(pickle.dumps(ranks[0])))
    assert merged.count == 9
    for index in range(2):
        assert torch.equal(merged.level(index, 9), whole.level(index, 9))
        # the first images are those of the lowest numbers
        assert torch.equal(merged.level(index, 4), whole.level(index, 9)[: 4 * 4])


def test_numbers_from_0_are_what_comes_without_numbers():
    images = textures(5, 0)
    plain, numbered = PatchDescriptors(32, patches=4), PatchDescriptors(32, patches=4)
    plain.update(images[:2])
    plain.update(images[2:])
    numbered.update(images.flip(0), range(4, -1, -1))
    assert all(torch.equal(plain.level(i, 5), numbered.level(i, 5)) for i in range(2))
    # places belong to the number
    moved = PatchDescriptors(32, patches=4)
    moved.update(images, range(1, 6))
    assert not torch.equal(plain.level(0, 5), moved.level(0, 5))


def test_a_flat_colour_stays_flat():
    patches = torch.full((10, 3, 49), 0.3)
    patches[:, 1] = torch.randn(10, 49, generator=torch.Generator().manual_seed(0))
    values = normalise_colours(patches).reshape(10, 3, 49)
    assert values[:, [0, 2]].abs().max() < 1e-2
    assert values[:, 1].std().item() == pytest.approx(1, rel=1e-2)


# -------------------------------------------------------------------------------- distance
def test_gaussian_images_have_a_closed_form():
    """Noise of one deviation against noise whose pixels share a part ρ of their variance.

    Patches, normalised, are N(0, I) and N(0, (1 − ρ) I + ρ J), J all ones within each colour. Along
    v they are Gaussians of deviation 1 and s, whose W₁ is |1 − s| √(2/π). One per cent is allowed
    for 3,000 images of 8 patches, some of which overlap.
    """
    draw, rho, count = torch.Generator().manual_seed(0), 0.6, 3000
    own, others = (torch.randn(count, 3, 16, 16, generator=draw) for _ in range(2))
    shared = torch.randn(count, 3, 1, 1, generator=draw)
    mixed = (1 - rho) ** 0.5 * others + rho**0.5 * shared
    found = sliced_wasserstein(own * 0.2, mixed * 0.2, patches=8, projections=64, repeats=2)

    directions = torch.cat([unit_directions(0, repeat, 64) for repeat in range(2)], dim=1)
    sums = directions.reshape(3, 49, -1).sum(1).square().sum(0)  # vᵀ J v
    expected = (1 - (1 - rho + rho * sums).sqrt()).abs().mean().item() * (2 / np.pi) ** 0.5
    assert found["16"] == pytest.approx(1e3 * expected, rel=0.01)


def in_the_same_places(images, others):
    """The distance of two sets whose patches are cut from the same places."""
    sides = [PatchDescriptors(32, patches=16) for _ in range(2)]
    for side, batch in zip(sides, (images, others), strict=True):
        side.update(batch)
    return compare_descriptors(*sides, projections=16, repeats=2)


def test_equal_patches_are_at_zero():
    images = textures(8, 0)
    assert in_the_same_places(images, images) == {"32": 0.0, "16": 0.0, "mean": 0.0}


def test_the_sets_patches_are_drawn_apart():
    """Of an image and its blurred copy, patches in the same places are too near each other."""
    images = textures(8, 0)
    blurred = ndimage.gaussian_filter(images.numpy(), (0, 0, 1, 1))
    blurred = torch.from_numpy(blurred)
    assert sliced_wasserstein(images, images, **SMALL)["mean"] > 0
    near, apart = in_the_same_places(images, blurred), sliced_wasserstein(images, blurred, **SMALL)
    assert apart["16"] > near["16"]


def test_it_sees_a_blur_where_the_detail_is_lost():
    sharp, same = textures(64, 0), textures(64, 1)
    blurred = textures(64, 2, blur=2)
    near = sliced_wasserstein(sharp, same, projections=32, repeats=1)
    far = sliced_wasserstein(sharp, blurred, projections=32, repeats=1)
    assert far["32"] > 3 * near["32"]
    assert far["mean"] > near["mean"]


def test_brightness_and_contrast_are_normalised_away():
    images = to_float(textures(8, 0))
    assert in_the_same_places(images, images * 0.5 + 0.25)["mean"] < 1  # half precision alone


def test_the_seed_decides():
    a, b = textures(8, 0), textures(8, 1)
    again = [sliced_wasserstein(a, b, seed=seed, **SMALL) for seed in (0, 0, 1)]
    assert again[0] == again[1]
    assert again[0] != again[2]


def test_iterables_of_batches_and_floats_give_what_a_tensor_gives():
    a, b = textures(8, 0), textures(8, 1)
    whole = sliced_wasserstein(a, b, **SMALL)
    assert sliced_wasserstein(a.split(3), iter(to_float(b).split(5)), **SMALL) == whole


def test_the_larger_set_is_cut_to_the_smaller():
    a, b = textures(9, 0), textures(6, 1)
    assert sliced_wasserstein(a, b, **SMALL) == sliced_wasserstein(a[:6], b, **SMALL)
    assert sliced_wasserstein(b, a, **SMALL) == sliced_wasserstein(b, a[:6], **SMALL)


def test_the_mean_is_over_levels():
    result = sliced_wasserstein(textures(4, 0), textures(4, 1), **SMALL)
    assert result["mean"] == pytest.approx((result["32"] + result["16"]) / 2)


# ---------------------------------------------------------------------------------- errors
def test_no_images():
    with pytest.raises(LdmError, match="of no images: give both sets some"):
        sliced_wasserstein([], textures(2, 0))
    with pytest.raises(LdmError, match="of no images: give both sets some"):
        sliced_wasserstein(textures(2, 0), textures(2, 0)[:0])
    with pytest.raises(LdmError, match="of no images: give both sets some"):
        compare_descriptors(PatchDescriptors(32), PatchDescriptors(32))


def test_images_smaller_than_a_patch():
    with pytest.raises(LdmError, match="7×7 pixels or more, not 6×6"):
        sliced_wasserstein(torch.zeros(2, 3, 6, 6), torch.zeros(2, 3, 6, 6))


def test_sizes_that_do_not_fit():
    side = PatchDescriptors(32)
    with pytest.raises(ValueError, match=r"must be \(B, C, 32, 32\), not \(2, 3, 16, 16\)"):
        side.update(textures(2, 0, size=16))
    with pytest.raises(ValueError, match="other resolutions"):
        compare_descriptors(side, PatchDescriptors(16))
    with pytest.raises(ValueError, match="2 images need as many numbers, not 3"):
        side.update(textures(2, 0), range(3))


def test_every_image_comes_once():
    side, other = PatchDescriptors(32, patches=2), PatchDescriptors(32, patches=2)
    side.update(textures(3, 0), [4, 5, 6])
    with pytest.raises(ValueError, match="image 5 has come before"):
        side.update(textures(2, 0), [3, 5])
    other.update(textures(2, 0), [6, 7])
    with pytest.raises(ValueError, match="image 6 has come before"):
        side.merge(other)
    with pytest.raises(ValueError, match="seeds do not merge"):
        side.merge(PatchDescriptors(32, patches=2, seed=1))


# ----------------------------------------------------------------------------------------- pyramid
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


def test_images_of_another_height_than_width():
    assert pyramid_resolutions((96, 64)) == [(96, 64), (48, 32), (24, 16)]
    a, b = (torch.rand(3, 3, 48, 32, generator=torch.manual_seed(n)) * 2 - 1 for n in (0, 1))
    assert list(sliced_wasserstein(a, b)) == ["48x32", "24x16", "mean"]
    descriptors = PatchDescriptors((48, 32), patches=500)
    row, column = torch.arange(48.0)[:, None] / 48, torch.arange(32.0) / 48
    descriptors.update(torch.stack([row + 0 * column, column + 0 * row, 0 * row * column])[None])
    # of the coarsest level, where no detail is subtracted: patches from its far corners
    rows, columns = descriptors.level(1, 1)[:, :2, 24].max(0).values.tolist()
    assert rows > columns + 0.2
    with pytest.raises(ValueError, match=r"must be \(B, C, 48, 32\)"):
        descriptors.update(torch.zeros(1, 3, 32, 48))
