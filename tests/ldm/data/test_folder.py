import numpy as np
import pytest

from ldm.data.sources import FolderSource
from ldm.data.transforms import CorruptImage
from ldm.errors import LdmError
from tests.ldm.data.pictures import encode, noise


def test_images_are_found_however_deep_and_sorted_by_relative_path(tmp_path):
    for number, name in enumerate(["b/2.png", "a.JPG", "b/10.png", "b/c/1.webp", "z.npy"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, noise(number).transpose(2, 0, 1)[None])
        else:
            format = {".png": "PNG", ".JPG": "JPEG", ".webp": "WEBP"}[path.suffix]
            path.write_bytes(encode(noise(number), format))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.JPG").write_bytes(b"macOS leaves these")
    source = FolderSource(tmp_path)
    names = ["a.JPG", "b/10.png", "b/2.png", "b/c/1.webp", "z.npy"]
    assert [source.name(i) for i in range(len(source))] == [f"{tmp_path}/{n}" for n in names]
    np.testing.assert_array_equal(source.load(1), noise(2))
    np.testing.assert_array_equal(source.load(4), noise(4))


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(encode(noise(0)))
    images = tmp_path / "images"
    images.mkdir()
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    (images / "loop").symlink_to(images)
    source = FolderSource(images)
    assert [source.name(i) for i in range(len(source))] == [f"{images}/linked/1.png"]


def test_a_file_that_is_gone_counts_as_corrupt(tmp_path):
    (tmp_path / "1.png").write_bytes(encode(noise(0)))
    source = FolderSource(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(CorruptImage, match="No such file"):
        source.load(0)


def test_a_folder_without_images_says_what_is_read(tmp_path):
    (tmp_path / "labels.csv").write_text("")
    with pytest.raises(LdmError, match=r"holds no images: \.png \.jpg .*\.npy are read"):
        FolderSource(tmp_path)
