"""Augmentation against matrices written from the paper's table, splines and exact cases."""

import math

import numpy as np
import pytest
import pywt
import torch
from pydantic import ValidationError
from scipy import ndimage
from skimage import data

from diffusion.augment import (
    AUGMENT_PARAMETERS,
    MIDPOINT,
    AugmentConfig,
    augment,
    augmentation_matrix,
    draw_augmentation,
)
from ldm.errors import LdmError

X_FLIP, Y_FLIP, SCALE, COS, SIN, ALONG, ACROSS, RIGHT, DOWN = range(AUGMENT_PARAMETERS)
ALWAYS = AugmentConfig(probability=1.0)
QUARTER = {COS: -1.0, SIN: 1.0}  # a quarter turn anticlockwise
EVERYTHING = {
    X_FLIP: 1.0,
    Y_FLIP: 1.0,
    SCALE: -0.7,
    COS: math.cos(0.6) - 1,
    SIN: math.sin(0.6),
    ALONG: 0.5,
    ACROSS: -1.1,
    RIGHT: 0.4,
    DOWN: -0.9,
}


def parameters(*rows):
    table = torch.zeros(len(rows), AUGMENT_PARAMETERS)
    for i, row in enumerate(rows):
        for column, value in row.items():
            table[i, column] = value
    return table


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def photo(height=96, width=128, blur=1.5):
    """A piece of a photograph (1, 3, H, W), blurred by `blur` pixels."""
    image = data.astronaut()[60 : 60 + height, 150 : 150 + width] / 127.5 - 1
    image = ndimage.gaussian_filter(image, (blur, blur, 0))
    return torch.from_numpy(image).float().permute(2, 0, 1)[None]


def table_six(row, height, width):
    """The 2-D transforms of Table 6 multiplied in float64, for a₀ … a₇ found from a row."""

    def scale_2d(x, y):
        return np.diag([x, y, 1.0])

    def rotate_2d(a):
        return np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])

    def translate_2d(x, y):
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])

    a = [row.get(column, 0.0) for column in range(AUGMENT_PARAMETERS)]
    a0, a1, a2 = a[:3]
    a3 = math.atan2(a[SIN], a[COS] + 1)
    a4, a5 = math.atan2(a[ACROSS], a[ALONG]), math.hypot(a[ALONG], a[ACROSS])
    if a[ACROSS] == 0:  # along the horizontal, where the sign of a₅ is known
        a4, a5 = 0.0, a[ALONG]
    x_flip = scale_2d(1 - 2 * a0, 1)
    y_flip = scale_2d(1, 1 - 2 * a1)
    scaling = scale_2d((2**0.2) ** a2, (2**0.2) ** a2)
    rotation = rotate_2d(-a3)
    stretch = scale_2d((2**0.2) ** a5, 1 / (2**0.2) ** a5)
    anisotropy = rotate_2d(a4) @ stretch @ rotate_2d(-a4)
    translation = translate_2d(a[RIGHT] / 8 * width, a[DOWN] / 8 * height)
    return translation @ anisotropy @ rotation @ scaling @ y_flip @ x_flip


def warp(image, matrix):
    """A smooth image (3, H, W) moved by a matrix: splines of order 5 over its reflections."""
    height, width = image.shape[-2:]
    y, x = np.mgrid[:height, :width]
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    points = np.stack([x.ravel() - centre[0], y.ravel() - centre[1], np.ones(x.size)])
    source = np.linalg.inv(matrix) @ points
    at = [source[1] + centre[1], source[0] + centre[0]]
    channels = [ndimage.map_coordinates(c, at, order=5, mode="mirror") for c in image.double()]
    return torch.from_numpy(np.stack(channels).reshape(image.shape))


def psnr(a, b):
    return 10 * math.log10(4 / (a.double() - b.double()).square().mean())


# ------------------------------------------------------------------------------ the transforms
def test_zeros_give_the_same_tensor():
    images = noise(3, 3, 16, 24)
    assert augment(images, parameters({}, {}, {})) is images


def test_flips_copy_the_pixels_whatever_the_other_rows_are():
    images = noise(5, 3, 17, 24)
    kept = images.clone()
    rows = {X_FLIP: 1.0}, {Y_FLIP: 1.0}, {X_FLIP: 1.0, Y_FLIP: 1.0}, {}, EVERYTHING
    out = augment(images, parameters(*rows))
    assert torch.equal(out[0], images[0].flip(2))
    assert torch.equal(out[1], images[1].flip(1))
    assert torch.equal(out[2], images[2].flip(1, 2))
    assert torch.equal(out[3], images[3])
    assert not torch.allclose(out[4], images[4], atol=0.1)
    assert torch.equal(images, kept)  # the input is left alone


def test_a_whole_number_of_pixels_is_a_shift_of_any_image():
    images = noise(1, 3, 32, 48)
    out = augment(images, parameters({RIGHT: 5 * 8 / 48, DOWN: -3 * 8 / 32}))
    torch.testing.assert_close(out[..., :-3, 5:], images[..., 3:, :-5], atol=1e-4, rtol=0)
    # what comes in from outside is reflected about the outermost pixel
    inside = images[..., 3:, 1:6].flip(-1)
    torch.testing.assert_close(out[..., :-3, :5], inside, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", [31, 32])
def test_a_quarter_turn_is_rot90_of_any_image(side):
    images = noise(1, 3, side, side)
    out = augment(images, parameters(QUARTER))
    torch.testing.assert_close(out, images.rot90(1, (2, 3)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "row",
    [
        {SCALE: 1.5},
        {SCALE: -1.5},
        {COS: math.cos(2.0) - 1, SIN: math.sin(2.0)},
        {ALONG: 1.0, ACROSS: 0.7},
        {ALONG: -1.3},
        {RIGHT: 0.33, DOWN: 2.5},
        EVERYTHING,
    ],
)
def test_resampling_agrees_with_splines_up_to_the_borders(row):
    images = photo()
    out = augment(images, parameters(row))
    assert psnr(out[0], warp(images[0], table_six(row, 96, 128))) > 50


def test_the_matrix_is_that_of_the_papers_table():
    rows = EVERYTHING, {SCALE: 1.0, RIGHT: 1.0}, QUARTER | {ALONG: 2.0, DOWN: 1.0}, {}
    matrices = augmentation_matrix(parameters(*rows), 40, 56)
    assert matrices.dtype == torch.float64
    for matrix, row in zip(matrices, rows, strict=True):
        np.testing.assert_allclose(matrix, table_six(row, 40, 56), rtol=0, atol=1e-6)


def test_what_each_column_does_to_a_point():
    def moved(row, x, y):
        matrix = augmentation_matrix(parameters(row), 80, 160)[0]
        return (matrix @ torch.tensor([x, y, 1.0], dtype=torch.float64))[:2].tolist()

    assert moved({X_FLIP: 1.0}, 3.0, 4.0) == [-3, 4]
    assert moved({Y_FLIP: 1.0}, 3.0, 4.0) == [3, -4]
    assert moved({SCALE: 5.0}, 3.0, 4.0) == pytest.approx([6, 8])
    assert moved(QUARTER, 3.0, 0.0) == pytest.approx([0, -3])  # from the right to the top
    assert moved({ALONG: 5.0}, 3.0, 4.0) == pytest.approx([6, 2])
    assert moved({ALONG: -5.0}, 3.0, 4.0) == pytest.approx([1.5, 8])
    assert moved({ACROSS: 5.0}, 3.0, 4.0) == pytest.approx([1.5, 8])
    assert moved({RIGHT: 1.0, DOWN: -1.0}, 3.0, 4.0) == [3 + 20, 4 - 10]


def test_an_off_centre_dot_lands_where_the_matrix_says():
    height, width = 64, 96
    y, x = np.mgrid[:height, :width]
    dot = np.exp(-((x - 40) ** 2 + (y - 38) ** 2) / (2 * 2.0**2))
    out = augment(torch.from_numpy(dot)[None, None], parameters(EVERYTHING))[0, 0].numpy()
    landed = np.array([(out * x).sum(), (out * y).sum()]) / out.sum()
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    expected = table_six(EVERYTHING, height, width) @ [*([40, 38] - centre), 1]
    np.testing.assert_allclose(landed, expected[:2] + centre, atol=0.01)
    # flips and turns keep its sum, zooming multiplies it
    assert out.sum() / dot.sum() == pytest.approx(4 ** (0.2 * EVERYTHING[SCALE]), rel=0.01)


def test_detail_too_fine_for_a_smaller_picture_fades_instead_of_aliasing():
    wave = torch.cos(torch.arange(128) * 0.9 * math.pi).expand(1, 1, 128, 128)
    half = {SCALE: -5.0}
    assert augment(wave, parameters(half))[..., 48:80, 48:80].abs().max() < 0.02
    coarse = torch.cos(torch.arange(128) * 0.1 * math.pi).expand(1, 1, 128, 128)
    assert augment(coarse, parameters(half))[..., 48:80, 48:80].abs().max() > 0.95


def test_the_filter_is_a_wavelets_low_pass_and_its_mirror_image():
    low = np.array(pywt.Wavelet("sym4").rec_lo)
    both = np.convolve(low, low[::-1])[7:]  # from its middle
    np.testing.assert_allclose(both[1::2], MIDPOINT, atol=1e-9)
    np.testing.assert_allclose(both[0::2], [1, 0, 0, 0], atol=1e-9)


# ---------------------------------------------------------------------- what a caller relies on
def test_a_result_depends_on_its_own_row_alone():
    images = noise(7, 3, 24, 20)
    drawn = draw_augmentation(0, range(7), ALWAYS)
    together = augment(images, drawn)
    alone = [augment(images[i : i + 1], drawn[i : i + 1]) for i in range(7)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)
    assert torch.equal(augment(images, drawn.clone()), together)


def test_many_images_are_resampled_in_parts(monkeypatch):
    images, drawn = noise(5, 3, 16, 16), draw_augmentation(1, range(5), ALWAYS)
    whole = augment(images, drawn)
    monkeypatch.setattr("diffusion.augment.PIXELS_CPU", 2 * 16 * 16)
    torch.testing.assert_close(augment(images, drawn), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(4, 4), (64, 64), (16, 200)])
def test_far_moves_stay_in_range_and_finite(size):
    images = noise(3, 3, *size).sign()
    rows = {RIGHT: 300.0, DOWN: -77.7}, {SCALE: -25.0}, {SCALE: 25.0, ALONG: 9.0}
    out = augment(images, parameters(*rows))
    assert out.shape == images.shape
    assert out.abs().max() <= 1  # false also of NaN


def test_dtype_and_layout_are_kept():
    images = photo(32, 32).repeat(3, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    rows = parameters({}, {X_FLIP: 1.0}, EVERYTHING)
    out = augment(images, rows)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, augment(images.contiguous(), rows), atol=1e-6, rtol=0)
    low = augment(images.bfloat16(), rows)
    assert low.dtype == torch.bfloat16
    # the arithmetic itself is in float32: only the input and the output are rounded
    torch.testing.assert_close(low, augment(images.bfloat16().float(), rows).bfloat16())
    torch.testing.assert_close(augment(images.double(), rows).float(), out, atol=1e-4, rtol=0)


def test_autocast_changes_no_bit():
    images, drawn = noise(2, 3, 16, 16), draw_augmentation(0, range(2), ALWAYS)
    with torch.autocast("cpu", torch.bfloat16):
        inside = augment(images, drawn)
    assert torch.equal(inside, augment(images, drawn))


def test_errors_say_what_is_wrong():
    with pytest.raises(LdmError, match=r"\(1, 9\) for 2 images: they must be \(2, 9\)"):
        augment(noise(2, 3, 8, 8), parameters({}))
    with pytest.raises(LdmError, match="images of 8×3 are too small"):
        augment(noise(1, 3, 3, 8), parameters({SCALE: 1.0}))
    assert augment(noise(1, 3, 3, 8), parameters({X_FLIP: 1.0})).shape == (1, 3, 3, 8)


# ------------------------------------------------------------------------------------ the draws
def test_a_draw_is_a_function_of_seed_and_image():
    drawn = draw_augmentation(7, range(100), ALWAYS)
    assert drawn.shape == (100, AUGMENT_PARAMETERS)
    assert drawn.dtype == torch.float32
    assert torch.equal(draw_augmentation(7, [93, 4], ALWAYS), drawn[[93, 4]])
    assert torch.equal(draw_augmentation(7, torch.tensor([5]), ALWAYS), drawn[5:6])
    assert (draw_augmentation(8, [4], ALWAYS) != drawn[4:5])[:, SCALE:].all()


def test_no_probability_no_augmentation():
    assert AugmentConfig().probability == 0
    assert not draw_augmentation(0, range(50), AugmentConfig()).any()


def test_each_transform_is_enabled_on_its_own_with_its_probability():
    drawn = draw_augmentation(0, range(8000), AugmentConfig(probability=0.15))
    on = drawn != 0
    enabled = on[:, [Y_FLIP, SCALE, SIN, ALONG, RIGHT]].double()
    error = 4 * math.sqrt(0.15 * 0.85 / 8000)  # four standard deviations
    expected = torch.tensor([0.075, 0.15, 0.15, 0.15, 0.15]).double()
    torch.testing.assert_close(enabled.mean(0), expected, atol=error, rtol=0)
    assert on[:, X_FLIP].double().mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(8000))
    assert torch.equal(on[:, COS], on[:, SIN])
    assert not (on[:, ACROSS] & ~on[:, ALONG]).any()
    level = ~on[:, ACROSS][on[:, ALONG]]  # half of the axes are horizontal
    assert level.double().mean() == pytest.approx(0.5, abs=2 / math.sqrt(len(level)))
    assert torch.equal(on[:, RIGHT], on[:, DOWN])
    correlation = torch.corrcoef(torch.cat([on[:, :1].double(), enabled], dim=1).T)
    assert (correlation - torch.eye(6)).abs().max() < 4 / math.sqrt(8000)


def test_columns_are_distributed_as_in_the_paper():
    drawn = draw_augmentation(0, range(8000), ALWAYS).double()
    assert set(drawn[:, :2].unique().tolist()) == {0, 1}
    # half of the axes are horizontal: E[cos²] = ½ + ¼, E[sin²] = ¼
    for column, std in ((SCALE, 1), (RIGHT, 1), (DOWN, 1), (ALONG, 0.75**0.5), (ACROSS, 0.5)):
        assert drawn[:, column].mean() == pytest.approx(0, abs=0.05)
        assert drawn[:, column].std() == pytest.approx(std, rel=0.05)
    angle = torch.atan2(drawn[:, SIN], 1 + drawn[:, COS])
    torch.testing.assert_close(
        torch.hypot(drawn[:, SIN], 1 + drawn[:, COS]), torch.ones(8000).double()
    )
    assert angle.std() == pytest.approx(math.pi / math.sqrt(3), rel=0.03)  # U(−π, π)
    stretch = torch.hypot(drawn[:, ALONG], drawn[:, ACROSS])
    assert stretch.square().mean() == pytest.approx(1, rel=0.06)  # |N(0, 1)|
    assert stretch.mean() == pytest.approx(math.sqrt(2 / math.pi), rel=0.03)
    random = drawn[:, [X_FLIP, Y_FLIP, SCALE, SIN, ALONG, ACROSS, RIGHT, DOWN]]
    correlation = torch.corrcoef(random.T) - torch.eye(8)
    assert correlation.abs().max() < 4.5 / math.sqrt(8000)


def test_horizontal_stretches_go_both_ways():
    drawn = draw_augmentation(0, range(4000), ALWAYS)
    level = drawn[drawn[:, ACROSS] == 0]
    assert level[:, ALONG].double().mean() == pytest.approx(0, abs=4 / math.sqrt(len(level)))
    alone = torch.zeros_like(level)
    alone[:, ALONG] = level[:, ALONG]
    matrix = augmentation_matrix(alone, 64, 64)
    torch.testing.assert_close(matrix[:, 0, 0].log2(), 0.2 * level[:, ALONG].double())
    assert not matrix[:, 0, 1].any()


@pytest.mark.parametrize(
    ("strength", "columns"),
    [
        ("x_flip", [X_FLIP]),
        ("y_flip", [Y_FLIP]),
        ("scale", [SCALE]),
        ("rotation", [COS, SIN]),
        ("anisotropy", [ALONG, ACROSS]),
        ("translation", [RIGHT, DOWN]),
    ],
)
def test_a_strength_of_zero_turns_off_one_transform_and_leaves_the_others(strength, columns):
    full = draw_augmentation(0, range(40), ALWAYS)
    without = draw_augmentation(0, range(40), AugmentConfig(probability=1, **{strength: 0}))
    assert full[:, columns].any()
    full[:, columns] = 0
    assert torch.equal(without, full)


def test_strengths_scale_the_draws():
    half = AugmentConfig(probability=1, scale=0.1, rotation=0.5, anisotropy=0.1, translation=1 / 16)
    full, drawn = (draw_augmentation(0, range(40), c).double() for c in (ALWAYS, half))
    columns = [SCALE, ALONG, ACROSS, RIGHT, DOWN]
    torch.testing.assert_close(drawn[:, columns], full[:, columns] / 2)
    angles = [torch.atan2(d[:, SIN], 1 + d[:, COS]) for d in (full, drawn)]
    torch.testing.assert_close(angles[1], angles[0] / 2, atol=1e-6, rtol=1e-5)


def test_a_config_out_of_range_is_refused():
    for bad in ({"probability": 1.5}, {"scale": -0.1}, {"rotation": 2}, {"shear": 0.1}):
        with pytest.raises(ValidationError):
            AugmentConfig(**bad)
