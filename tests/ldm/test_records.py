"""Files that are read back: bounds, schemas, arrays, and the names of damaged ones."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pydantic import Field

from ldm import records
from ldm.errors import LdmError, escape
from ldm.records import (
    ArrayFile,
    Count,
    Schema,
    checked,
    read_arrays,
    read_each,
    read_json,
    read_tree,
)


class Sizes(Schema):
    count: Count
    names: list[str] = Field(default_factory=list)
    scale: float = 1.0


def test_missing_keys_get_defaults_and_others_are_kept(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"count": 3, "scale": 2, "newer": [1]}')
    found = checked(Sizes, read_json(path), path)
    assert (found.count, found.names, found.scale) == (3, [], 2.0)
    assert read_tree(path, Sizes) == {"count": 3, "scale": 2, "newer": [1]}
    assert read_tree(tmp_path / "none.json", Sizes) is None
    assert read_tree(path / "below.json", Sizes) is None


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"count": "3"}', "count: "), (b'{"count": -1}', "count: "), (b"{}", "count: "),
        (b'{"count": true}', "count: "), (b'{"count": 1e400}', "count: "),
        (b'{"count": 1, "scale": NaN}', "scale: "), (b'{"count": 1, "names": [1]}', "names.0: "),
        (b"[]", "dictionary"), (b"null", "null"), (b"3", "dictionary"), (b"{", "not JSON"),
        (b"", "not JSON"), (b"\xff\xfe\x00", "not UTF-8"), (b"[" * 10**6, "deeper"),
        (b"[" * 99 + b"]" * 99, "deeper"), (b'{"a": ' * 500 + b"1" + b"}" * 500, "deeper"),
        (b'{"count": 1%s}' % (b"0" * 400), "too large"),
        (b'{"count": 1%s}' % (b"0" * 9000), "not JSON"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line_that_names_it_and_the_entry(tmp_path, content, what):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(LdmError, match=r"what to do$") as raised:
        read_tree(path, Sizes, "what to do")
    text = str(raised.value)
    assert text.startswith(f"{path} is damaged") and what in text and "\n" not in text


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path, monkeypatch):
    (tmp_path / "large.json").write_bytes(b"[" + b" " * 2000 + b"]")
    with pytest.raises(LdmError, match="larger than"):
        read_json(tmp_path / "large.json", limit=1000)
    with pytest.raises(LdmError, match="could not read"):
        read_json(tmp_path)
    with pytest.raises(LdmError, match="could not read"):
        read_json(Path("a\0b"))


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as pack:
        for name, data in members.items():
            pack.writestr(f"{name}.npy", data)
    return path


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def test_arrays_are_read_as_numpy_reads_them(tmp_path):
    given = {"a": np.arange(6).reshape(2, 3), "b": np.asfortranarray(np.eye(3)), "c": np.array(2.5)}
    np.savez(tmp_path / "plain.npz", **given)
    np.savez_compressed(tmp_path / "small.npz", **given)
    for name in ("plain.npz", "small.npz"):
        found = read_arrays(tmp_path / name)
        assert found.keys() == given.keys()
        assert all((found[key] == given[key]).all() for key in given)


def test_damaged_arrays_are_refused_before_memory_is_requested(tmp_path):
    good = npy(np.arange(4.0))
    assert b"(4,)" in good
    for number, data in enumerate((
        b"", b"x" * 200, good[:-1], good[:40], npy(np.array([{}])),
        good.replace(b"(4,), }     ", b"(99999999,)}"), good.replace(b"(4,)", b"(-4)"),
        good.replace(b"(4,)", b"[4, "), good.replace(b"<f8", b"O88"), good.replace(b"(4,)", b"((((")
    )):  # fmt: skip
        path = npz(tmp_path / f"{number}.npz", a=data)
        with pytest.raises(LdmError, match="is damaged"):
            read_arrays(path)
    with pytest.raises(LdmError, match="larger than the file"):
        read_arrays(npz(tmp_path / "bomb.npz", a=bytes(2 * records.LIMIT)))
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(LdmError, match="is damaged"):
        read_arrays(tmp_path / "text.npz")
    with pytest.raises(LdmError, match="could not read"):
        read_arrays(tmp_path / "none.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_row_by_row(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4), np.uint8)
    save(tmp_path / "x.npz", images, mean=np.arange(3.0))
    file = ArrayFile(tmp_path / "x.npz")
    assert file.headers == {"arr_0": ((5, 3, 4), np.uint8), "mean": ((3,), np.float64)}
    assert all((a == b).all() for a, b in zip(file.rows("arr_0"), images, strict=True))
    assert (file.read("mean") == np.arange(3)).all()


def test_headers_that_lie_and_pickles_are_refused(tmp_path):
    good = npy(np.arange(4.0))
    for number, data in enumerate((
        b"", b"x" * 200, good[:-1], npy(np.array([{}])), npy(np.asfortranarray(np.eye(3))),
        good.replace(b"(4,), }     ", b"(99999999,)}"), good.replace(b"(4,)", b"(-4)"),
        b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + bytes(99),
    )):  # fmt: skip
        with pytest.raises(LdmError, match=r"is damaged or no \.npz of arrays") as error:
            ArrayFile(npz(tmp_path / f"{number}.npz", a=data))
        assert "\n" not in str(error.value)
    with zipfile.ZipFile(tmp_path / "lzma.npz", "w", zipfile.ZIP_LZMA) as pack:
        pack.writestr("a.npy", good)
    with pytest.raises(LdmError, match="compressed by another method"):
        ArrayFile(tmp_path / "lzma.npz")


def test_bytes_that_change_below_a_good_header_are_an_error(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.arange(4.0))
    content = bytearray(path.read_bytes())
    content[content.index(np.float64(3).tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(LdmError, match="is damaged"):
        list(ArrayFile(path).rows("a"))


def test_a_scan_names_three_damaged_files_once_and_counts_the_rest(tmp_path, capsys):
    paths = [tmp_path / f"{i}.json" for i in range(6)]
    for path in paths[1:]:
        path.write_text("{")
    paths[0].write_text(json.dumps({"count": 1}))
    for _ in range(2):
        assert list(read_each(paths, lambda path: read_tree(path, Sizes))) == paths[:1]
    lines = capsys.readouterr().err.splitlines()
    assert [str(path) in line for path, line in zip(paths[1:], lines[:3], strict=False)] == [
        True
    ] * 3
    assert len(lines) == 4 and "2 more" in lines[3]


def test_what_could_forge_a_line_is_escaped():
    foreign = "a\x1b[2K\r\nerror: b\u202ec\u2028\udcff\x9b\ud800"
    assert escape(foreign) == r"a\x1b[2K\r\nerror: b\u202ec\u2028\xff\x9b\ud800"
    assert escape("naïve σ² 图 \\n", "") == "naïve σ² 图 \\n"
    assert escape("a\nb", "\n") == "a\nb"
    assert str(LdmError(foreign)) == escape(foreign) == escape(escape(foreign))
