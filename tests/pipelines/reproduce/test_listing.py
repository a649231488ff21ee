import shutil
from pathlib import Path

import pytest

from ldm.data.prepare import prepare
from pipelines.reproduce.rows import listing_identity
from tests.ldm.data.pictures import encode, noise, png_folder, zip_file


@pytest.fixture
def images(tmp_path):
    return png_folder(tmp_path / "images", [noise(n) for n in range(5)])


def test_the_same_images_elsewhere(images, tmp_path):
    known = listing_identity(str(images))
    assert len(known) == 64 and listing_identity(f"{images}/") == known
    shutil.copytree(images, tmp_path / "copied")
    assert listing_identity(str(tmp_path / "copied")) == known


def test_other_images_under_the_same_path(images):
    known = listing_identity(str(images))
    last = sorted(images.iterdir())[-1]
    content = last.read_bytes()
    last.write_bytes(content + b"x")
    changed = listing_identity(str(images))
    last.write_bytes(content)
    assert changed != known == listing_identity(str(images))
    last.rename(images / "renamed.png")
    renamed = listing_identity(str(images))
    (images / "renamed.png").unlink()
    assert len({known, renamed, listing_identity(str(images))}) == 3


def test_a_relative_folder_of_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("None", "images"):
        folder = png_folder(Path(name), [noise(0)])
        known = listing_identity(name)
        (folder / "0000.png").write_bytes(encode(noise(1)[:20]))
        assert listing_identity(name) != known, name


def test_archives(images, tmp_path):
    archive = zip_file(tmp_path / "a.zip", {"a.png": encode(noise(0)), "b.png": encode(noise(1))})
    known = listing_identity(str(archive))
    shutil.move(archive, tmp_path / "moved.zip")
    assert listing_identity(str(tmp_path / "moved.zip")) == known
    prepare(images, tmp_path / "shards", size=32, held_out=1, workers=0)
    prepare(images, tmp_path / "fewer", size=16, held_out=1, workers=0)
    assert listing_identity(str(tmp_path / "shards")) != listing_identity(str(tmp_path / "fewer"))


def test_an_image_that_cannot_be_seen_hides_no_other(images):
    (images / "gone.png").symlink_to("nowhere")
    known = listing_identity(str(images))
    (images / "0000.png").write_bytes(encode(noise(9)[:20]))
    assert listing_identity(str(images)) != known


def test_what_is_not_there_is_not_known(tmp_path):
    assert listing_identity(str(tmp_path / "nothing")) is None
    assert listing_identity("photos") == "photos"
