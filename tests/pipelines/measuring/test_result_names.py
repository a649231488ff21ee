"""How results are named."""

import re
from pathlib import Path

import pytest

from ldm.files import write_json
from pipelines.measuring.options import Measuring, fid_path, path_without_fid


@pytest.mark.parametrize(
    ("other", "split", "how", "name"),
    [
        (None, None, {}, "fid"),
        (None, "all", {"bootstrap": 9, "force": True, "batch_size": 3}, "fid"),
        ("photos", None, {}, "fid-photos"),
        ("ffhq1024", None, {}, "fid-ffhq1024"),
        ("sets/faces", "val", {}, "fid-sets-faces-#-val"),
        (None, "train", {"limit": 8, "features": "my_net:vit/b"}, "fid-train-first8-my_net_vit_b"),
        (None, None, {"mode": "legacy-tensorflow"}, "fid-legacy-tensorflow"),
    ],
)
def test_a_word_for_all_that_is_not_as_by_default(other, split, how, name):
    path = fid_path(Path("x/fid.json"), other, split, Measuring(**how))
    assert path.parent == Path("x")
    assert re.sub("-[0-9a-f]{6}(?=[-.])", "-#", path.name) == f"{name}.json"


def test_beside_an_archive_and_a_model():
    for plain, named in (("x.zip.fid.json", "x.zip.fid-photos.json"),
                         ("a b.zip.fid.json", "a b.zip.fid-photos.json"),
                         ("seed0-steps18-n9.json", "seed0-steps18-n9-photos.json")):  # fmt: skip
        assert fid_path(Path(plain), "photos", None, Measuring()) == Path(named)


def test_a_result_without_an_fid_takes_no_place_of_one(tmp_path):
    path = tmp_path / "fid.json"
    assert path_without_fid(path) == path
    for held in ({"fid": None}, {"format": 2}, []):
        write_json(path, held)
        assert path_without_fid(path) == path
    path.write_text("{")
    assert path_without_fid(path) == path
    write_json(path, {"fid": 0.0})
    assert path_without_fid(path) == tmp_path / "fid-swd.json"
