"""Where evaluations are kept."""

import re
from pathlib import Path

import pytest

from ldm.data import DataConfig
from ldm.errors import LdmError, UsageError
from pipelines.measuring.evaluation import Job, check_writable, default_path, default_paths
from tests.pipelines.measuring.reconstructed import save_run


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("photos", "photos-val-64"),
        ("data/ffhq", "data-ffhq-#-val-64"),
        ("/sets/imagenet/val", "imagenet-val-#-val-64"),
        ("/faces.zip", "faces.zip-#-val-64"),
        ("sets/{000..009}.tar", "sets-_000..009_.tar-#-val-64"),
        ("/faces", "faces-#-val-64"),
    ],
)
def test_the_name_says_what_was_measured(tmp_path, source, name):
    run = save_run(tmp_path / "run")
    data = DataConfig(source=source)
    path = default_path(run, data, "val", 64)
    assert re.sub("-[0-9a-f]{6}-", "-#-", path.name) == f"{name}.json"
    assert path == default_path(run / "ckpt.pt", data, "val", 64) and path.parent == run / "eval"


def test_other_data_has_a_file_of_its_own(tmp_path, monkeypatch):
    sources = ("/a/x/val", "/b/x/val", "/a/x-val", "/faces", "/faces.zip", "./photos", "photos")
    paths = {default_path(tmp_path, DataConfig(source=s), "val", 64) for s in sources}
    assert len(paths) == len(sources)
    monkeypatch.chdir(tmp_path)
    one, same = (
        default_path(tmp_path, DataConfig(source=source), "val", 64)
        for source in ("x/val", str(tmp_path / "x" / "val"))
    )
    assert one == same


def test_other_weights_and_settings_have_files_of_their_own(tmp_path):
    run = save_run(tmp_path / "run")
    (run / "ckpt.pt").rename(run / "best.pt")
    path = default_path(run / "best.pt", DataConfig(), "all", 32, "first8", "my_net:vit/b")
    assert path == run / "eval" / "best-photos-all-32-first8-my_net_vit_b.json"


def jobs(*models: Path) -> list[Job]:
    return [Job(model, {}, DataConfig(), "val", 64, None, {}) for model in models]


def test_files_of_one_folder_do_not_overwrite_each_other(tmp_path, monkeypatch):
    names = ("vae.pt", "vae.safetensors", "vae.ckpt", "ckpt.pt", "ckpt.safetensors")
    for name in names:
        (tmp_path / name).touch()
    paths = default_paths(jobs(*(tmp_path / name for name in names)), "no-fid")
    assert [path.name.removesuffix("photos-val-64-no-fid.json") for path in paths] == [
        "vae-", "vae.safetensors-", "vae.ckpt-", "", "ckpt.safetensors-"
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for twice in (tmp_path / "ckpt.pt", Path("ckpt.pt")):
        with pytest.raises(UsageError) as refused:
            default_paths(jobs(tmp_path, twice))
        told = f"{tmp_path} and {twice} would both be written to "
        assert str(refused.value).startswith(told) and "give --out" in str(refused.value)


def test_a_place_that_cannot_be_written(tmp_path):
    check_writable(tmp_path / "new" / "x.json")
    assert list((tmp_path / "new").iterdir()) == []  # nothing is left of the trial
    (tmp_path / "file").write_text("")
    with pytest.raises(LdmError, match=r"could not write .*: give --out another file"):
        check_writable(tmp_path / "file" / "x.json")
    with pytest.raises(LdmError, match=r"is a folder: .*such as .*eval.json"):
        check_writable(tmp_path)
