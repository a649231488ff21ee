import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm.data.transforms import (
    CorruptImage,
    center_crop,
    covers,
    decode,
    enlarged,
    is_image,
    random_crop,
)
from tests.ldm.data.pictures import coordinates, encode, noise


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (64, 64), (100, 161)])
def test_center_crop_is_the_central_square_then_lanczos(height, width):
    image, side = noise(0, height, width), min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(image).crop((left, top, left + side, top + side))
    expected = np.asarray(square.resize((32, 32), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(center_crop(image, 32), expected)


@pytest.mark.parametrize(
    ("height", "width", "cut"),
    [
        (200, 100, (150, 100)),  # 3:2 is less tall: the whole width
        (150, 190, (150, 100)),  # the whole height
        (101, 200, (101, 67)),  # 67⅓, to the nearest pixel
        (96, 64, (96, 64)),
    ],
)
def test_center_crop_is_the_largest_part_of_the_proportions_then_lanczos(height, width, cut):
    image = noise(0, height, width)
    top, left = (height - cut[0]) // 2, (width - cut[1]) // 2
    part = Image.fromarray(image).crop((left, top, left + cut[1], top + cut[0]))
    expected = np.asarray(part.resize((64, 96), Image.Resampling.LANCZOS))
    found = center_crop(image, (96, 64))
    assert found.shape == (96, 64, 3)
    np.testing.assert_array_equal(found, expected)


def test_center_crop_of_the_transposed_is_transposed():
    image = noise(4, 97, 80)  # only cut, for Pillow rounds after each of its two passes
    found = center_crop(image.swapaxes(0, 1), (60, 97))
    np.testing.assert_array_equal(found, center_crop(image, (97, 60)).swapaxes(0, 1))


def test_random_crop_of_a_rectangle_reaches_every_place():
    rng, image = np.random.default_rng(0), coordinates(3, 10, 9)
    seen = set()
    for _ in range(200):
        crop = random_crop(image, (9, 7), rng)
        top, left = crop[0, 0, 1:]
        np.testing.assert_array_equal(crop, image[top : top + 9, left : left + 7])
        seen.add((int(top), int(left)))
    assert seen == {(top, left) for top in range(2) for left in range(3)}


def test_an_enlarged_image_just_covers_the_resolution():
    assert enlarged(40, 50, (96, 64)) == (96, 120)
    assert enlarged(90, 20, (96, 64)) == (288, 64)
    assert not covers(96, 63, (96, 64)) and not covers(64, 96, (96, 64))
    assert covers(96, 64, (96, 64))


def test_center_crop_at_native_size_only_cuts():
    crop = center_crop(coordinates(7, 32, 40), 32)
    assert crop[0, 0].tolist() == [7, 0, 4]
    assert crop[-1, -1].tolist() == [7, 31, 35]


def test_center_crop_with_box_is_the_mean_of_blocks():
    image = noise(1, 60, 40)
    blocks = image[10:50].reshape(10, 4, 10, 4, 3).mean(axis=(1, 3))
    # Pillow rounds after each of the two passes
    assert abs(center_crop(image, 10, "box") - blocks).max() <= 1


def test_center_crop_at_its_size_changes_nothing():
    np.testing.assert_array_equal(center_crop(noise(2, 40, 40), 40), noise(2, 40, 40))


def test_random_crop_reaches_every_place_and_stays_at_native_size():
    rng, image = np.random.default_rng(0), coordinates(3, 10, 9)
    seen = set()
    for _ in range(400):
        crop = random_crop(image, 8, rng)
        top, left = crop[0, 0, 1:]
        np.testing.assert_array_equal(crop, image[top : top + 8, left : left + 8])
        seen.add((int(top), int(left)))
    assert seen == {(top, left) for top in range(3) for left in range(2)}


RGB = noise(0)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(levels: np.ndarray) -> bytes:
    """A 16-bit RGB PNG, written by hand: Pillow writes none."""
    height, width, _ = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})],
)
def test_lossless_formats_give_the_pixels(format, options):
    decoded = decode(encode(RGB, format, **options), f".{format.lower()}")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, RGB)


def test_jpeg_is_near_the_pixels():
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    decoded = decode(encode(smooth, "JPEG", quality=100, subsampling=0), ".JPEG").astype(int)
    assert abs(decoded - smooth).max() <= 6


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(format):
    levels = np.random.default_rng(1).integers(0, 65536, (9, 7)).astype(np.uint16)
    levels[0, :4] = 0, 255, 32768, 65535
    expected = np.rint(levels.astype(float) * 255 / 65535)
    for channel in np.moveaxis(decode(encode(levels, format), f".{format}"), 2, 0):
        np.testing.assert_array_equal(channel, expected)


def test_16_bit_colour_keeps_the_high_byte():
    levels = np.random.default_rng(2).integers(0, 65536, (9, 7, 3))
    np.testing.assert_array_equal(decode(png16(levels), ".png"), levels // 256)
    np.testing.assert_array_equal(decode(png16(RGB.astype(int) * 257), ".png"), RGB)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_grey_is_repeated(format):
    grey = RGB[:, :, 0]
    np.testing.assert_array_equal(decode(encode(grey, format), ""), np.stack([grey] * 3, axis=-1))


def test_black_and_white():
    bits = RGB[:, :, 0] > 127
    expected = np.repeat(bits[..., None] * np.uint8(255), 3, axis=2)
    np.testing.assert_array_equal(decode(encode(bits), ".png"), expected)


@pytest.mark.parametrize("channels", [2, 4])
def test_transparency_lies_on_white(channels):
    pixels = np.random.default_rng(3).integers(0, 256, (20, 30, channels), dtype=np.uint8)
    pixels[0, 0, -1], pixels[0, 1, -1] = 0, 255
    alpha = pixels[..., -1:] / 255
    expected = pixels[..., :-1] * alpha + 255 * (1 - alpha)
    decoded = decode(encode(pixels), ".png")
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert abs(decoded - expected).max() <= 1


def test_palette_with_and_without_a_transparent_colour():
    indices = np.arange(4, dtype=np.uint8).reshape(2, 2)
    image = Image.fromarray(indices)
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    opaque, transparent = io.BytesIO(), io.BytesIO()
    image.save(opaque, "PNG")
    image.save(transparent, "PNG", transparency=2)
    expected = np.array([[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [100, 110, 120]]])
    np.testing.assert_array_equal(decode(opaque.getvalue(), ".png"), expected)
    expected[1, 0] = 255
    np.testing.assert_array_equal(decode(transparent.getvalue(), ".png"), expected)


def test_cmyk():
    inks = np.random.default_rng(4).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(inks, "CMYK").save(file, "TIFF")
    c_m_y, k = inks[..., :3].astype(float), inks[..., 3:].astype(float)
    expected = (255 - c_m_y) * (255 - k) / 255
    assert abs(decode(file.getvalue(), ".tif") - expected).max() <= 1


@pytest.mark.parametrize(
    ("orientation", "upright"),  # what a viewer does, EXIF 2.32, tag 0x0112
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_applied(orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encode(RGB, exif=exif), ".png"), upright(RGB))


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_the_first_frame_of_an_animation(format, options):
    frames = [Image.fromarray(noise(seed)) for seed in (5, 6)]
    file = io.BytesIO()
    frames[0].save(file, format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode(file.getvalue(), ""), noise(5))


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("batched", [False, True])
def test_npy(axes, batched):
    array = RGB.transpose(axes)
    np.testing.assert_array_equal(decode(npy(array[None] if batched else array), ".npy"), RGB)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_truncated_pictures_raise(format, kept):
    data = encode(RGB, format)
    with pytest.raises(CorruptImage):
        decode(data[: int(kept * len(data))], f".{format.lower()}")


@pytest.mark.parametrize(
    ("data", "suffix", "reason"),
    [
        (b"no image at all", ".png", "^not an image, or its header is damaged$"),
        (b"", ".png", "^not an image"),
        (npy(RGB)[:-100], ".npy", "."),
        (npy(RGB.astype(np.float32)), ".npy", r"float32 array of shape \(48, 40, 3\)"),
        (npy(RGB[:, :, 0]), ".npy", r"shape \(48, 40\)"),
        (npy(np.stack([RGB, RGB])), ".npy", r"shape \(2, 48, 40, 3\)"),
        (npy(np.array([{"a": "pickle"}])), ".npy", "object array"),
        (encode(RGB[:, :, 0].astype(np.float32), "TIFF"), ".tif", "floating-point"),
        (encode(RGB[:, :, 0].astype(np.int32) - 1, "TIFF"), ".tif", "32-bit"),
    ],
)
def test_what_cannot_be_read_says_why(data, suffix, reason):
    with pytest.raises(CorruptImage, match=reason):
        decode(data, suffix)


def test_which_names_are_images():
    assert all(
        map(
            is_image,
            [
                "a.png",
                "b/c.JPEG",
                "./d.webp",
                "e.tif",
                "f.TIFF",
                "g.bmp",
                "h.npy",
                "i.gif",
                "j.avif",
            ],
        )
    )
    assert not any(
        map(is_image, ["a.json", "png", "b/._c.png", "__MACOSX/d.png", ".cache/e.png", "f.png.txt"])
    )
