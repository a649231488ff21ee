"""Images that are not 8-bit RGB, from file to batch."""

import io
import logging

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from ldm.config import validate
from ldm.data import DataConfig, evaluation_batches, open_source, sheet_images, transforms
from ldm.data.dataset import check_data, find_pixels
from ldm.data.loader import FaultCount
from ldm.data.prepare import prepare
from ldm.data.shards import read_manifest
from ldm.data.sources import FolderSource
from ldm.data.transforms import CorruptImage, OtherChannels, center_crop, decode, resize
from ldm.errors import LdmError, UsageError
from ldm.images import Pixels, file_suffix, from_pixels
from tests.ldm.data.pictures import encode, noise, png_folder
from tests.ldm.data.test_transforms import npy, png16

DEEP = np.random.default_rng(0).integers(0, 65536, (48, 40), np.uint16)


def pages(*images: np.ndarray) -> bytes:
    """A TIFF with a page for each image."""
    first, *others = map(Image.fromarray, images)
    file = io.BytesIO()
    first.save(file, "TIFF", save_all=True, append_images=others)
    return file.getvalue()


def files(path, images: dict[str, bytes]):
    path.mkdir()
    for name, data in images.items():
        (path / name).write_bytes(data)
    return path


# ------------------------------------------------------------------------------------ decoding
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_every_level(format):
    decoded = decode(encode(DEEP, format), "", 1, "uint16")
    assert decoded.dtype == np.uint16
    np.testing.assert_array_equal(decoded[..., 0], DEEP)
    np.testing.assert_array_equal(decode(encode(DEEP, format), "", 3, "uint16")[..., 2], DEEP)


def test_16_bit_colour_keeps_the_low_byte():
    levels = np.random.default_rng(2).integers(0, 65536, (9, 7, 3))
    decoded = decode(png16(levels), ".png", 3, "uint16")
    assert decoded.dtype == np.uint16
    np.testing.assert_array_equal(decoded, levels)


def test_8_bits_stay_8_bits():
    for keep in ("uint8", "uint16", "float32"):
        decoded = decode(encode(noise(0)), ".png", 3, keep)
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, noise(0))


def test_grey_stays_grey_and_colour_becomes_its_luminance():
    grey, colour = noise(0)[..., 0], noise(1)
    np.testing.assert_array_equal(decode(encode(grey), "", 1)[..., 0], grey)
    luminance = np.asarray(Image.fromarray(colour).convert("L"))
    np.testing.assert_array_equal(decode(encode(colour), "", 1)[..., 0], luminance)
    wide = decode(png16(colour.astype(int) * 257), "", 1, "uint16")[..., 0]
    assert abs(wide / 257 - luminance).max() <= 0.51


@pytest.mark.parametrize("mode", ["L", "1"])
@pytest.mark.parametrize("channels", [2, 4])
def test_8_bit_grey_does_not_pass_for_several_channels(mode, channels):
    image = Image.fromarray(noise(0)[..., 0]).convert(mode)
    with pytest.raises(OtherChannels, match=rf"an image of 1 channel.s., not {channels}"):
        decode(encode(np.asarray(image)), ".png", channels)


@pytest.mark.parametrize("compression", [None, "tiff_adobe_deflate"])
def test_floating_point_tiff_keeps_its_values(compression):
    values = np.random.default_rng(3).normal(size=(9, 7)).astype(np.float32)
    data = encode(values, "TIFF", compression=compression)
    np.testing.assert_array_equal(decode(data, "", 1, "float32")[..., 0], values)


@pytest.mark.parametrize("top", [200, 65535, 65536])
def test_32_bit_pixels_have_one_type_whatever_their_values(top):
    values = np.linspace(0, top, 63).astype(np.int32).reshape(9, 7)
    decoded = decode(encode(values, "TIFF"), "", 1, "float32")
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded[..., 0], values)


def test_32_bit_pixels_that_fit_16_bits_need_no_range(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.int32).reshape(8, 8)
    folder = files(tmp_path / "f", {"a.tif": encode(values, "TIFF")})
    config = DataConfig(source=str(folder), channels=1)
    source = open_source(config, "all", 8)
    assert find_pixels(source, config) == Pixels(type="uint16")
    np.testing.assert_array_equal(source.load(0)[..., 0], values)


def test_pages_of_a_tiff_are_channels_where_they_are_as_many():
    layers = [DEEP, DEEP[::-1], DEEP // 2, DEEP // 3]
    np.testing.assert_array_equal(
        decode(pages(*layers), "", 4, "uint16"), np.stack(layers, axis=-1)
    )
    np.testing.assert_array_equal(decode(pages(*layers), "", 1, "uint16")[..., 0], DEEP)
    with pytest.raises(OtherChannels, match=r"an image of 1 channel.s., not 5: set image_channels"):
        decode(pages(*layers), "", 5, "uint16")


def test_of_three_grey_pages_the_first_is_read_in_colour():
    layers = [noise(i)[..., 0] for i in range(3)]
    np.testing.assert_array_equal(
        decode(pages(*layers), "", 3), np.repeat(layers[0][..., None], 3, axis=2)
    )


@pytest.mark.parametrize("shape", [(5, 9, 7), (9, 7, 5), (1, 5, 9, 7)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float64, np.int16])
def test_arrays_of_any_number_of_channels_and_any_type(shape, dtype):
    array = (np.random.default_rng(4).random(shape) * 200).astype(dtype)
    decoded = decode(npy(array), ".npy", 5, "float32")
    expected = array.reshape(shape[-3:])
    expected = expected if shape[-1] == 5 else expected.transpose(1, 2, 0)
    kept = dtype in (np.uint8, np.uint16)
    assert decoded.dtype == (dtype if kept else np.float32)
    np.testing.assert_array_equal(decoded, expected.astype(decoded.dtype))


@pytest.mark.parametrize("keep", ["uint16", "float32"])
def test_arrays_of_the_other_byte_order_are_of_the_same_type(keep):
    decoded = decode(npy(DEEP.astype(">u2")), ".npy", 1, keep)
    assert decoded.dtype == np.dtype("=u2")
    np.testing.assert_array_equal(decoded[..., 0], DEEP)
    with pytest.raises(CorruptImage, match=r"is neither uint8 nor uint16: set data.range for its"):
        decode(npy(DEEP.astype(np.int32)), ".npy", 1, "uint16")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_corrupt(value):
    array = np.full((8, 8), 0.5, np.float32)
    array[2, 3] = value
    with pytest.raises(CorruptImage, match="not finite"):
        decode(npy(array), ".npy", 1, "float32")
    with pytest.raises(CorruptImage, match="not finite"):
        decode(encode(array, "TIFF"), ".tif", 1, "float32")


@pytest.mark.parametrize("filter", ["lanczos", "box", "bicubic"])
def test_deep_images_are_resized_as_8_bit_ones_are(filter):
    wave = (np.sin(np.arange(60) / 7)[:, None] + np.cos(np.arange(40) / 5)) * 60 + 127
    byte = wave.round().astype(np.uint8)[..., None]
    small = resize(byte, 20, 16, filter)[..., 0].astype(float)
    deep = resize(byte.astype(np.uint16) * 257, 20, 16, filter)[..., 0] / 257
    assert abs(deep - small).max() <= 1
    assert abs(resize(byte.astype(np.float32), 20, 16, filter)[..., 0] - deep).max() < 0.01


def test_grey_crops_are_the_crops_of_the_channel():
    np.testing.assert_array_equal(
        center_crop(noise(0)[..., :1], 16)[..., 0],
        center_crop(np.repeat(noise(0)[..., :1], 3, axis=2), 16)[..., 0],
    )


# ------------------------------------------------------------------------------------- range
def test_a_type_maps_its_least_and_its_largest_to_the_ends():
    for dtype, top in ((np.uint8, 255), (np.uint16, 65535)):
        ends = from_pixels(np.array([0, top], dtype))
        assert ends.dtype == np.float32 and ends.tolist() == [-1, 1]
    assert from_pixels(np.array([5.0, 10, 15, 99], np.float32), (5, 15)).tolist() == [-1, 0, 1, 1]


@pytest.mark.parametrize("range", [None, (100.0, 4200.0)])
def test_every_16_bit_level_survives_the_round_trip(range):
    pixels = Pixels(type="uint16", range=range)
    low, high = map(int, pixels.bounds)
    levels = np.arange(low, high + 1, dtype=np.uint16).reshape(1, 1, -1)
    images = torch.from_numpy(from_pixels(levels, range))
    np.testing.assert_array_equal(pixels.to_array(images)[..., 0], levels[0])
    assert torch.equal(pixels.round(images + 1e-6), pixels.round(images))


def test_a_range_is_two_numbers_in_order():
    with pytest.raises(ValueError, match="the lower first"):
        Pixels(range=(3, 3))


@pytest.mark.parametrize("range", [[5, 1], [5, 5], "foo", [1], [0, 1e31], [0, float("nan")], None])
def test_a_wrong_range_is_refused_in_one_line(range):
    with pytest.raises(UsageError, match=r"^'range': must be type, measured, or two numbers") as e:
        validate(DataConfig, {"range": range})
    assert str(e.value).count("'") <= 4 and "\n" not in str(e.value)
    assert validate(DataConfig, {"range": [1, 5]}).range == (1, 5)


def test_values_for_missing_data_are_named(tmp_path):
    array = np.zeros((8, 8), np.float32)
    array[1] = -3e38
    folder = files(tmp_path / "f", {"a.npy": npy(array)})
    config = DataConfig(source=str(folder), channels=1, range="measured", workers=0)
    with pytest.raises(LdmError, match=r"from -3e\+38 to 0 look like a mark for missing data: set"):
        find_pixels(open_source(config, "all", 8), config)


@pytest.mark.parametrize("split", ["all", "train", "val"])
def test_floats_without_a_range_are_refused_with_the_way_out(split, tmp_path):
    data = npy(np.zeros((8, 8), np.float32))
    folder = files(tmp_path / "f", {"a.npy": data, "b.npy": data})
    config = DataConfig(source=str(folder), channels=1)
    with pytest.raises(LdmError, match=r"set data.range .* data.range=\[0,1\], or to measured"):
        find_pixels(open_source(config, split, 8), config)


def test_the_range_is_measured_once_and_kept(tmp_path):
    folder = png_folder(tmp_path / "f", [DEEP // 16 + 7, DEEP // 32 + 9])
    config = DataConfig(source=str(folder), channels=1, range="measured", workers=0)
    source, other = (open_source(config, "all", 32) for _ in range(2))
    ranks = PartialState(cpu=True)
    pixels = check_data(ranks, tmp_path, source, config, other)
    wanted = (float((DEEP // 32 + 9).min()), float((DEEP // 16 + 7).max()))
    wanted = (min(wanted[0], float((DEEP // 16 + 7).min())), wanted[1])
    assert (pixels.type, pixels.range) == ("uint16", wanted) and other.range == wanted
    (folder / "0000.png").write_bytes(encode(DEEP))  # under the same name
    fresh = open_source(config, "all", 32)
    assert check_data(ranks, tmp_path, fresh, config) == pixels and fresh.range == wanted


def test_8_bit_rgb_leaves_no_trace_in_a_run_folder(tmp_path):
    config = DataConfig(source=str(png_folder(tmp_path / "f", [noise(0)])))
    source = open_source(config, "all", 8)
    assert check_data(PartialState(cpu=True), tmp_path, source, config) == Pixels()
    assert "pixels" not in (tmp_path / "data.json").read_text()


# ------------------------------------------------------------------------------------ loading
def test_batches_of_8_bits_are_bytes_and_deeper_ones_floats(tmp_path):
    plain = FolderSource(png_folder(tmp_path / "p", [noise(0), noise(1)]))
    assert sheet_images(plain, 16, 2).dtype == torch.uint8
    mixed = FolderSource(png_folder(tmp_path / "m", [noise(0), DEEP]))
    batch = next(iter(evaluation_batches(mixed, 40, 2))).images
    assert batch.dtype == torch.float32 and batch.shape == (2, 3, 40, 40)
    assert torch.equal(batch[1, 0], torch.from_numpy(from_pixels(DEEP[4:44])))
    assert torch.equal(batch[0, 1], torch.from_numpy(from_pixels(noise(0)[4:44, :, 1])))


def test_an_image_of_other_channels_is_named_and_not_corrupt(tmp_path):
    folder = files(tmp_path / "f", {"a.npy": npy(np.zeros((5, 8, 8), np.uint8))})
    source = open_source(DataConfig(source=str(folder), channels=4), "all", 8)
    with pytest.raises(LdmError, match=r"a.npy is a uint8 array .* not an image of 4 channel"):
        sheet_images(source, 8, 1)


def test_an_array_of_another_shape_among_colour_images_is_corrupt(tmp_path):
    folder = png_folder(tmp_path / "f", [noise(0), noise(1)])
    (folder / "a.npy").write_bytes(npy(np.zeros((48, 40), np.uint8)))
    source = open_source(DataConfig(source=str(folder)), "all", 8)
    assert len(sheet_images(source, 8, 3)) == 2


def test_channels_that_contradict_the_model_are_refused():
    class Model:
        image_channels, pixels = 3, Pixels()

    with pytest.raises(UsageError, match=r"data.channels is 1, and image_channels 3"):
        DataConfig(channels=1).of(Model())


def test_photographs_can_be_grey():
    source = open_source(DataConfig(channels=1), "train", 32)
    assert source.load(0).shape[2] == 1


# ------------------------------------------------------------------------------ large images
def test_a_large_image_is_counted_by_itself(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(transforms, "MAX_PIXELS", 1000)
    folder = png_folder(tmp_path / "f", [noise(0, 10, 10)] * 3 + [noise(1)])
    counted = FaultCount(4)
    with caplog.at_level(logging.WARNING, "ldm"):
        list(evaluation_batches(FolderSource(folder), 8, 2, faults=counted))
    assert not counted.found
    assert "too large: 40×48 pixels, more than 1,000: cut it into tiles" in caplog.text
    assert "corrupt" not in caplog.text


def test_only_large_images_end_in_a_line_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(transforms, "MAX_PIXELS", 1000)
    folder = png_folder(tmp_path / "f", [noise(1)])
    from ldm.data import batches

    config = DataConfig(source=str(folder), workers=0)
    with pytest.raises(LdmError, match=r"too large: 40×48 pixels.*cut them into tiles"):
        next(batches(FolderSource(folder), config, 8, 0, 0, 2, 2))


def test_the_limits_of_size_are_those_that_the_documentation_states():
    assert transforms.MAX_PIXELS == 2**28 == 16_384**2
    assert transforms.MAX_BYTES == 2**31


def test_a_large_header_is_believed_where_the_file_is_large():
    side = 9000
    transforms._check_pixels(side, side, side * side // transforms.PIXELS_A_BYTE + 1)
    with pytest.raises(CorruptImage, match=r"9000×9000 pixels in a file of 1,000 bytes"):
        transforms._check_pixels(side, side, 1000)


# ------------------------------------------------------------------------------------ shards
def cut(array: np.ndarray) -> np.ndarray:
    return array[4:44]  # the central square of 48 × 40


@pytest.mark.parametrize(
    ("kind", "channels"), [("uint16", 1), ("float32", 1), ("uint16", 4), ("uint8", 1)]
)
def test_shards_keep_depth_and_channels(kind, channels, tmp_path):
    rng = np.random.default_rng(5)
    arrays = [(rng.random((48, 40, channels)) * 250).astype(kind) for _ in range(4)]
    folder = files(tmp_path / "f", {f"{i}.npy": npy(a) for i, a in enumerate(arrays)})
    manifest = prepare(folder, tmp_path / "s", 40, workers=0, held_out=1, channels=channels)
    assert manifest.get("dtype", "uint8") == kind and manifest.get("channels", 3) == channels
    config = DataConfig(source=str(tmp_path / "s"), channels=channels, range=(0, 250))
    source = open_source(config, "all", 40)
    assert source.name(0).endswith(file_suffix(kind, channels))
    for i, array in enumerate(arrays):
        loaded = source.load(i)
        assert loaded.dtype == kind
        np.testing.assert_array_equal(loaded, cut(array))
    prepare(folder, tmp_path / "t", 40, workers=0, held_out=1, channels=channels)
    for name in ("train-00000.tar", "manifest.json"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "t" / name).read_bytes()


def test_a_manifest_of_8_bit_rgb_is_as_it_was(tmp_path):
    folder = png_folder(tmp_path / "f", [noise(0), noise(1)])
    prepare(folder, tmp_path / "s", 32, workers=0, held_out=0)
    manifest = read_manifest(tmp_path / "s")
    assert manifest is not None and not {"channels", "dtype"} & manifest.keys()
