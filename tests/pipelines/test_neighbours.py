"""The nearest training images, against distances computed one by one in NumPy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from ldm.data import DataConfig, open_source
from ldm.errors import LdmError, UsageError
from ldm.images import to_float
from pipelines.neighbours import _embedding, find_neighbours
from pipelines.sampling.model import LatentModel
from pipelines.sampling.sample_folder import SampleFolder, image_name
from tests.pipelines.untrained import SIZE, make_model

TRAIN, HELD_OUT = 12, 3


def pictures(count: int, seed: int) -> np.ndarray:
    """Blurred colour noise (count, SIZE, SIZE, 3) uint8."""
    noise = np.random.default_rng(seed).standard_normal((count, SIZE, SIZE, 3))
    noise = ndimage.gaussian_filter(noise, (0, 3, 3, 0))
    return (noise / noise.std() * 60 + 128).clip(0, 255).astype(np.uint8)


def save(folder, images, name=lambda i: f"{i:03d}.png"):
    for i, image in enumerate(images):
        path = folder / name(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


@pytest.fixture
def data(tmp_path):
    """15 images, the last 3 held out; no image at 4."""
    save(tmp_path / "data", pictures(TRAIN + HELD_OUT, seed=1))
    return {"source": str(tmp_path / "data"), "held_out": HELD_OUT, "workers": 0, "flip": True}


@pytest.fixture
def samples(tmp_path, model, data):
    """Training image 7 and 2, the latter mirrored, both with noise on them, and a new image."""
    learnt, noise = pictures(TRAIN + HELD_OUT, seed=1), np.random.default_rng(5)
    made = np.stack([learnt[7], learnt[2][:, ::-1], pictures(1, seed=9)[0]]).astype(float)
    made[:2] += noise.normal(0, 2, made[:2].shape)
    folder = tmp_path / "samples"
    save(folder, made.clip(0, 255).astype(np.uint8), lambda i: folder / image_name(i))
    sha256 = LatentModel.from_pretrained(model, "cpu").sha256
    of = {"path": str(model), "sha256": sha256}
    mark = {"format": 1, "n": 3, "model": of, "data": data}
    (folder / "samples.json").write_text(json.dumps(mark))
    return folder


def load(folder, pattern) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob(pattern))])


def as_points(space: str, images: np.ndarray, model) -> np.ndarray:
    """The space in which distances are root mean squares."""
    if space == "pixels":
        return images.reshape(len(images), -1).astype(float)  # 32×32 is not brought down
    codec = LatentModel.from_pretrained(model, "cpu", "fp32").codec
    batch = to_float(torch.from_numpy(images).permute(0, 3, 1, 2))
    mean = codec.autoencoder.encode(batch).mean
    return (mean / codec.std).flatten(1).double().numpy()


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_neighbours_are_those_of_a_direct_search(samples, model, data, tmp_path, space):
    result = find_neighbours(samples, count=3, nearest=4, space=space, batch_size=5, device="cpu")
    images = load(tmp_path / "data", "*.png")
    learnt, held_out = images[:TRAIN], images[TRAIN:]
    queries = as_points(space, np.concatenate([load(samples, "*/*.png"), held_out]), model)
    both = [as_points(space, side, model) for side in (learnt, learnt[:, :, ::-1].copy())]
    apart = np.stack(
        [np.sqrt(((queries[:, None] - side[None]) ** 2).mean(2)) for side in both]
    )  # (2, queries, TRAIN)
    for i, row in enumerate(result["samples"]):
        order = apart[:, i].min(0).argsort()[:4]
        assert [near["index"] for near in row["nearest"]] == order.tolist()
        assert [near["mirrored"] for near in row["nearest"]] == [
            bool(apart[1, i, j] < apart[0, i, j]) for j in order
        ]
        expected = apart[:, i].min(0)[order]
        assert [near["distance"] for near in row["nearest"]] == pytest.approx(expected, rel=1e-4)
    nearest = apart.min(0).min(1)
    assert result["held_out_nearest"] == pytest.approx(nearest[3:], rel=1e-4)
    medians = result["median_nearest"]
    assert medians["samples"] == pytest.approx(np.median(nearest[:3]), rel=1e-4)
    assert medians["held_out"] == pytest.approx(np.median(nearest[3:]), rel=1e-4)


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_memorised_images_are_found(samples, tmp_path, space):
    result = find_neighbours(samples, count=3, space=space, device="cpu")
    (seven, two, new) = (row["nearest"][0] for row in result["samples"])
    assert (seven["index"], seven["mirrored"]) == (7, False)
    assert seven["name"] == f"{tmp_path}/data/007.png"
    assert (two["index"], two["mirrored"]) == (2, True)
    assert max(seven["distance"], two["distance"]) < 0.3 * new["distance"]
    assert json.loads((samples / "neighbours.json").read_text()) == result


def test_the_sheet_shows_samples_and_neighbours(samples, tmp_path):
    find_neighbours(samples, count=2, nearest=2, space="pixels", device="cpu")
    sheet = np.asarray(Image.open(samples / "neighbours.png")).astype(int)
    step = SIZE + 2
    assert sheet.shape == (2 * step - 2, 3 * step - 2, 3)
    two = np.asarray(Image.open(tmp_path / "data" / "002.png"))[:, ::-1]
    assert np.array_equal(sheet[step:, step : step + SIZE], two)
    assert np.array_equal(sheet[:SIZE, :SIZE], load(samples, "*/*.png")[0])


def test_images_much_longer_than_high_have_pixels_to_compare(samples):
    embed = _embedding("pixels", SampleFolder(samples), None, torch.device("cpu"))
    assert embed(torch.zeros(2, 3, 4, 512)).shape == (2, 3 * 64)


def test_the_batch_size_changes_nothing(samples):
    one, two = (
        find_neighbours(samples, space="latents", batch_size=size, device="cpu") for size in (1, 64)
    )
    for a, b in zip(one["samples"], two["samples"], strict=True):
        for near, other in zip(a["nearest"], b["nearest"], strict=True):
            assert near["index"] == other["index"]
            assert near["distance"] == pytest.approx(other["distance"], rel=1e-4)


def test_photographs_are_searched_by_windows(samples):
    """Crops are random there: a crop is found where windows lie, and nearly so between them."""
    source = open_source(DataConfig(), "train", SIZE)
    cat = source.load(2)
    corner = SIZE // 2 * 5, SIZE // 2 * 3
    exact = cat[corner[0] : corner[0] + SIZE, corner[1] : corner[1] + SIZE]
    flush = cat[-SIZE:, -SIZE:]
    save(samples, [exact, flush], lambda i: samples / image_name(i))
    result = find_neighbours(samples, "photos", count=2, space="pixels", device="cpu")
    near, last = (row["nearest"][0] for row in result["samples"])
    assert near["distance"] == last["distance"] == 0
    assert near["index"] == last["index"] == 2
    assert near["window"] == corner
    assert last["window"] == (cat.shape[0] - SIZE, cat.shape[1] - SIZE)
    assert near["name"] == "photograph 'chelsea'"
    assert result["median_nearest"]["held_out"] > 0
    sheet = np.asarray(Image.open(samples / "neighbours.png"))
    assert np.array_equal(sheet[:SIZE, SIZE + 2 : 2 * SIZE + 2], exact)


def test_random_crops_are_searched_by_windows_past_a_corrupt_image(samples, data, tmp_path, caplog):
    large = np.random.default_rng(3).integers(0, 256, (SIZE + 20, 2 * SIZE, 3), np.uint8)
    folder = tmp_path / "large"
    save(folder, [large] * 101)
    (folder / "050.png").write_bytes(b"")
    save(samples, [large[20:, SIZE // 2 : SIZE // 2 + SIZE]], lambda i: samples / image_name(i))
    config = {"source": str(folder), "crop": "random", "held_out": 0, "workers": 0}
    mark = json.loads((samples / "samples.json").read_text())
    (samples / "samples.json").write_text(json.dumps(mark | {"data": config}))
    result = find_neighbours(samples, count=1, nearest=101, space="pixels", device="cpu")
    found = [near for near in result["samples"][0]["nearest"] if near["distance"] == 0]
    assert {near["window"] for near in found} == {(20, SIZE // 2)}
    assert [near["index"] for near in found] == [i for i in range(101) if i != 50]
    assert "skipped a corrupt image" in caplog.text
    assert result["median_nearest"]["held_out"] is None


def test_moved_data_is_split_and_mirrored_as_in_training(samples, tmp_path):
    """Split and mirrored as in training."""
    (tmp_path / "data").rename(tmp_path / "moved")
    how = {"count": 3, "nearest": 1, "space": "pixels", "device": "cpu"}
    result = find_neighbours(samples, str(tmp_path / "moved"), **how)
    near = [row["nearest"][0] for row in result["samples"]]
    assert [(n["index"], n["mirrored"]) for n in near[:2]] == [(7, False), (2, True)]
    assert len(result["held_out_nearest"]) == HELD_OUT
    told = {"source": str(tmp_path / "moved"), "flip": True, "held_out": HELD_OUT}
    assert told.items() <= result["data"].items()
    # other data, of which so many cannot be held out: its own split
    save(tmp_path / "other", pictures(HELD_OUT, seed=2))
    result = find_neighbours(samples, str(tmp_path / "other"), **how)
    assert result["data"]["flip"] and result["data"]["held_out"] is None
    assert len(result["held_out_nearest"]) == 1


def test_a_second_search_ignores_the_sheet_of_the_first(tmp_path, data):
    """Pictures that an earlier search wrote do not count as samples."""
    save(tmp_path / "plain", pictures(2, seed=0))
    one, two = (
        find_neighbours(tmp_path / "plain", data["source"], space="pixels", device="cpu")
        for _ in range(2)
    )
    assert (tmp_path / "plain" / "neighbours.png").is_file()
    assert one["samples"] == two["samples"]


def test_fewer_training_images_than_requested_are_all_found(samples):
    result = find_neighbours(samples, count=1, nearest=50, space="pixels", device="cpu")
    assert len(result["samples"]) == 1
    assert len(result["samples"][0]["nearest"]) == TRAIN


@pytest.mark.parametrize("name", ["count", "nearest", "batch_size"])
def test_numbers_below_one_are_refused(samples, name):
    with pytest.raises(UsageError, match="0: must be at least 1"):
        find_neighbours(samples, **{name: 0})


def test_samples_that_name_neither_data_nor_model_need_options(tmp_path, data):
    save(tmp_path / "plain", pictures(2, seed=0))
    with pytest.raises(UsageError, match="does not name its model's training data: give --data"):
        find_neighbours(tmp_path / "plain", device="cpu")
    with pytest.raises(
        UsageError, match="does not name its model: give --model, or --space pixels"
    ):
        find_neighbours(tmp_path / "plain", data["source"], device="cpu")
    result = find_neighbours(tmp_path / "plain", data["source"], space="pixels", device="cpu")
    assert len(result["samples"]) == 2
    assert result["data"]["flip"] is False


def test_another_model_is_refused(samples, tmp_path):
    other = make_model(tmp_path / "other", 1)
    with pytest.raises(LdmError, match=r"is not the model that .* was sampled from"):
        find_neighbours(samples, model=other, device="cpu")
    assert not (samples / "neighbours.json").exists()


def test_another_autoencoder_is_another_model(samples, tmp_path):
    mark = json.loads((samples / "samples.json").read_text())
    path = Path(mark["model"]["path"])
    mark["model"] |= LatentModel.from_pretrained(path, "cpu").identifiers
    (samples / "samples.json").write_text(json.dumps(mark))
    find_neighbours(samples, count=1, device="cpu")
    other = make_model(tmp_path / "other", 0, autoencoder_seed=1)
    with pytest.raises(LdmError, match=r"is not the model that .* was sampled from"):
        find_neighbours(samples, model=other, device="cpu")


def test_a_model_that_is_gone_is_an_error(samples):
    mark = json.loads((samples / "samples.json").read_text())
    mark["model"]["path"] = "runs/gone"
    (samples / "samples.json").write_text(json.dumps(mark))
    with pytest.raises(LdmError, match=r"no model at runs/gone"):
        find_neighbours(samples, device="cpu")


def test_a_model_of_another_size_is_refused(model, tmp_path, data):
    small = pictures(2, seed=0)[:, :16, :16]
    save(tmp_path / "small", small)
    with pytest.raises(LdmError, match="makes images of another size"):
        find_neighbours(tmp_path / "small", data["source"], model=model, device="cpu")
