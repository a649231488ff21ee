"""How a data set's images came to their size, as far as it can be known."""

import numpy as np
from PIL import Image

from ldm.data import DataConfig, open_source
from ldm.data.prepare import prepare
from pipelines.measuring.preparation import (
    compressed_image,
    preparation,
    resize_filter,
    training_filter,
)
from tests.pipelines.measuring.fid_sides import SIZE, enlarged, pictures, write_folder

IMAGES = pictures(4, 0)


def config(path, **settings) -> DataConfig:
    return DataConfig(source=str(path), held_out=1, workers=0, **settings)


def test_what_preparation_wrote(tmp_path):
    folder = write_folder(tmp_path / "data", enlarged(IMAGES))
    assert preparation(config(folder)) is None and preparation(DataConfig()) is None
    prepare(folder, tmp_path / "shards", SIZE, "box", held_out=1, workers=0)
    for path in (tmp_path / "shards", tmp_path / "shards" / "train-00000.tar"):
        assert preparation(config(path))["filter"] == "box"


def test_the_filters_of_training(tmp_path):
    folder = write_folder(tmp_path / "data", enlarged(enlarged(IMAGES)))
    prepare(folder, tmp_path / "shards", 2 * SIZE, "box", held_out=1, workers=0)
    assert training_filter(config(tmp_path / "shards"), SIZE) == "box, then lanczos"
    assert training_filter(config(tmp_path / "shards"), 2 * SIZE) == "box"
    assert training_filter(config(folder), SIZE) == "lanczos"
    assert training_filter(config(folder), 4 * SIZE) is None
    assert training_filter(config(folder, crop="random"), SIZE) is None
    assert training_filter(config(tmp_path / "gone"), SIZE) is None
    assert training_filter(DataConfig(), SIZE) is None


def test_shards_that_were_not_resized_have_no_filter(tmp_path):
    prepare(write_folder(tmp_path / "data", IMAGES), tmp_path / "s", SIZE, held_out=1, workers=0)
    source = open_source(config(tmp_path / "s"), "train", SIZE)
    assert resize_filter(config(tmp_path / "s"), source, SIZE) is None


def test_a_compressed_image_is_found_among_others(tmp_path):
    folder = write_folder(tmp_path / "data", IMAGES)
    (folder / "broken.jpg").write_bytes(b"no image")
    large = np.asarray(Image.fromarray(IMAGES[0]).resize((50, 40)))
    Image.fromarray(large).save(folder / "large.jpg")
    source = open_source(config(folder), "all", SIZE)
    assert compressed_image(source, SIZE) is None
    assert compressed_image(source, 40) == f"{folder}/large.jpg"
