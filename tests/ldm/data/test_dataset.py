import pytest
from PIL import Image

from ldm.config import resolve
from ldm.data import DataConfig, holds_out, open_source
from ldm.data.dataset import held_out_count
from ldm.data.prepare import prepare
from ldm.errors import LdmError, UsageError
from tests.ldm.data.pictures import class_folder, encode, noise, png_folder, zip_file


def names(config, split):
    source = open_source(config, split, 32)
    return [source.name(i)[-8:] for i in range(len(source))]


def test_the_photographs_are_the_default():
    assert len(open_source(DataConfig(), "train", 64)) == 8
    assert len(open_source(DataConfig(), "all", 64)) == 8
    assert open_source(DataConfig(), "val", 64).load(0).shape == (64, 64, 3)


def test_the_last_by_name_are_held_out(tmp_path):
    folder = png_folder(tmp_path / "a", [noise(n) for n in range(41)])
    config = DataConfig(source=str(folder))
    assert names(config, "all") == [f"{n:04d}.png" for n in range(41)]
    assert names(config, "train") == [f"{n:04d}.png" for n in range(39)]
    assert names(config, "val") == ["0039.png", "0040.png"]  # one in twenty
    five = DataConfig(source=str(folder), held_out=5)
    assert names(five, "val") == [f"{n:04d}.png" for n in range(36, 41)]
    source = open_source(five, "val", 32)
    assert (source.load(4) == noise(40)).all()


def test_with_labels_every_so_many_th_is_held_out(tmp_path):
    files = {
        f"{c}/{n:04d}.png": noise(n) for c, n in zip("a" * 30 + "b" * 10, range(40), strict=True)
    }
    folder = class_folder(tmp_path / "a", files)
    config = DataConfig(source=str(folder), labels=True)
    assert names(config, "val") == ["0019.png", "0039.png"]
    assert len(names(config, "train")) == 38
    four = DataConfig(source=str(folder), labels=True, held_out=4)
    assert names(four, "val") == ["0009.png", "0019.png", "0029.png", "0039.png"]
    assert sorted(names(four, "train") + names(four, "val")) == names(four, "all")


@pytest.mark.parametrize(
    ("count", "held_out"),
    [(2, 1), (19, 1), (40, 2), (70_000, 10_000), (30_000, 5_000), (1_281_167, 10_000)],
)
def test_how_many_are_held_out_where_nothing_is_said(count, held_out):
    assert held_out_count(count, None) == held_out


def test_zip_folder_and_shards_are_told_apart(tmp_path):
    path = zip_file(tmp_path / "x.zip", {f"{n:04d}.png": encode(noise(n)) for n in range(4)})
    assert names(DataConfig(source=str(path)), "train") == ["0000.png", "0001.png", "0002.png"]


def test_a_path_that_is_not_there_says_what_to_do(tmp_path):
    with pytest.raises(LdmError) as error:
        open_source(DataConfig(source=str(tmp_path / "ffhq")), "train", 128)
    assert str(error.value) == (
        f"data.source: {tmp_path}/ffhq does not exist: create it with `ldm data prepare SRC "
        f"{tmp_path}/ffhq --size 128`, or use the built-in photographs, "
        "data.source=photos"
    )


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.rar").write_bytes(b"")
    with pytest.raises(LdmError, match=r"not a folder of images or tables, a \.zip or a \.tar"):
        open_source(DataConfig(source=str(tmp_path / "x.rar")), "train", 32)


def test_a_split_that_leaves_nothing(tmp_path):
    folder = str(png_folder(tmp_path / "a", [noise(0)]))
    with pytest.raises(UsageError, match="holding out 1 of 1 images leaves none to train on"):
        open_source(DataConfig(source=folder), "train", 32)
    nothing_held_out = DataConfig(source=folder, held_out=0)
    assert len(open_source(nothing_held_out, "train", 32)) == 1
    with pytest.raises(UsageError, match=r"no images are held out .*: set data\.held_out"):
        open_source(nothing_held_out, "val", 32)


def test_whether_images_are_held_out_is_known_beforehand(tmp_path):
    folder = png_folder(tmp_path / "a", [noise(n) for n in range(3)])
    prepare(folder, tmp_path / "none", size=32, held_out=0, workers=0)
    prepare(folder, tmp_path / "some", size=32, held_out=1, workers=0)
    for source, held_out, expected in [
        ("photos", None, True), (folder, None, True), (folder, 0, False), (folder, 2, True),
        (tmp_path / "none", None, False), (tmp_path / "none", 1, True),
        (tmp_path / "some", None, True), (tmp_path / "some", 0, False),
        (tmp_path / "some" / "val-{00000..00000}.tar", 0, False),
    ]:  # fmt: skip
        config = DataConfig(source=str(source), held_out=held_out)
        assert holds_out(config) is expected
        if expected:
            assert len(open_source(config, "val", 32))
        else:
            with pytest.raises(UsageError, match="no images are held out"):
                open_source(config, "val", 32)


def test_held_out_does_not_apply_to_the_photographs():
    with pytest.raises(UsageError, match="the built-in photographs hold out their right thirds"):
        open_source(DataConfig(held_out=3), "train", 32)


@pytest.mark.parametrize("override", ["workers=-1", "held_out=-1", "crop=middle", "flips=true"])
def test_bad_values_are_refused(override):
    with pytest.raises(UsageError, match=override.partition("=")[0]):
        resolve(DataConfig, {}, [override])


def test_shards_prepared_smaller_than_asked_for_are_told_before_anything_is_read(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / "in" / f"{i}.png")
    prepare(tmp_path / "in", tmp_path / "out", size=32, workers=0)
    config = DataConfig(source=str(tmp_path / "out"))
    assert len(open_source(config, "train", 32)) == 3
    with pytest.raises(LdmError, match=r"was prepared at 32×32, .*prepare it with --size 64"):
        open_source(config, "train", 64)
