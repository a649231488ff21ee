"""Where evaluations are kept."""

import pytest

from ldm.data import DataConfig
from ldm.errors import LdmError
from pipelines.measuring.evaluation import check_writable, default_path
from tests.pipelines.measuring.reconstructed import save_run


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("photos", "photos-val-64"),
        ("data/ffhq", "data-ffhq-val-64"),
        ("/sets/imagenet/val", "imagenet-val-val-64"),
        ("faces.zip", "faces-val-64"),
        ("sets/{000..009}.tar", "sets-_000..009_.tar-val-64"),
        ("/faces", "faces-val-64"),
    ],
)
def test_the_name_says_what_was_measured(tmp_path, source, name):
    run = save_run(tmp_path / "run")
    data = DataConfig(source=source)
    assert default_path(run, data, "val", 64) == run / "eval" / f"{name}.json"
    assert default_path(run / "ckpt.pt", data, "val", 64) == run / "eval" / f"{name}.json"


def test_other_weights_and_settings_have_files_of_their_own(tmp_path):
    run = save_run(tmp_path / "run")
    (run / "ckpt.pt").rename(run / "best.pt")
    path = default_path(run / "best.pt", DataConfig(), "all", 32, "first8", "my_net:vit/b")
    assert path == run / "eval" / "best-photos-all-32-first8-my_net_vit_b.json"


def test_a_place_that_cannot_be_written(tmp_path):
    check_writable(tmp_path / "new" / "x.json")
    assert list((tmp_path / "new").iterdir()) == []  # nothing is left of the trial
    (tmp_path / "file").write_text("")
    with pytest.raises(LdmError, match=r"could not write .*: give --out another file"):
        check_writable(tmp_path / "file" / "x.json")
    with pytest.raises(LdmError, match=r"is a folder: .*such as .*eval.json"):
        check_writable(tmp_path)
