"""Every kind of file that we read back, altered in many ways: it is read, or one line names it."""

import base64
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from autoencoders import build_autoencoder, load_autoencoder
from ldm.config import to_tree
from ldm.data import DataConfig, open_source
from ldm.data.loader import read_preparation
from ldm.data.prepare import prepare
from ldm.errors import LdmError
from ldm.logbook import cut_rows, read_rows
from ldm.metrics.features import FeatureSet
from ldm.run_folder import differences, new_or_unfinished, newest_run
from pipelines.analysis.gradients import read_curve
from pipelines.fid import path_without_fid
from pipelines.latents import check_cache
from pipelines.measuring.reference import _load_kept, open_statistics
from pipelines.report.records import numbers_section, read_records
from pipelines.report.report import curves_section, settings_section
from pipelines.reproduce import runner
from pipelines.reproduce.output import Result
from pipelines.reproduce.plan import BuildPlan, load_scale
from pipelines.reproduce.tables import find_tables
from pipelines.sampling.sample_folder import SampleFolder, trained_on
from tests.pipelines.report.run_folders import TILES, stage_one
from tests.small import autoencoder_recipe, diffusion_recipe

TIMES = 30
ESC = "\x1b[2K\rdone"

VALUES: list[Any] = [
    None, True, -1, 0, 7, 10**6, 2**63, 10**200, 0.5, 1e308, math.nan, math.inf, "", "word", ESC,
    "a\0b", "../../x", "x" * 5000, "\udcff", [], ["a"], [[]], [1, 2, 3], {}, {"a": {}}, {"": None},
]  # fmt: skip
CONTENTS = [
    b"", b"null", b"[]", b"3", b'"word"', b"{", b"\xff\xfe\x00", bytes(range(256)), b"[" * 10**5,
    b'{"a":' * 5000, b"[" * 300 + b"]" * 300, b'{"n": 1' + b"0" * 5000 + b"}", b"NaN", b"\n" * 99,
]  # fmt: skip
YAML = [
    b"a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n", b"- " * 20_000, b"a: {" * 20_000,
    b"x: 0x" + b"f" * 5000, b"1:1:1", b"x: 2024-13-45", b"!!python/object:os.system x", b"{1: 2}",
    b"#" * 200_000, b"? " * 9000, b"x: !!timestamp y", b"[a, b]: c", b"x: '\xff'",
]  # fmt: skip


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all entries of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def altered(tree: dict, draw: random.Random, most: float = math.inf) -> dict:
    """A copy of a tree with an entry that is another, gone, or one too many."""
    tree = json.loads(json.dumps(tree))
    *above, last = draw.choice([*places(tree)])
    section = tree
    for key in above:
        section = section[key]
    if draw.random() < 0.2:
        del section[last]
    else:
        values = [v for v in VALUES if not isinstance(v, int) or v <= most]
        section[last] = draw.choice(values)
    return tree


def mutations(good: bytes, draw: random.Random, most: float = math.inf) -> Iterator[bytes]:
    """Contents that are nearly that of a good file, or far from it."""
    yield from CONTENTS
    if good[:1] == b"{" and b"\n{" not in good:
        for _ in range(2 * TIMES):
            yield json.dumps(altered(json.loads(good), draw, most)).encode()
    elif good[:1] == b"{":  # rows
        for _ in range(TIMES):
            rows = [json.loads(line) for line in good.splitlines()]
            at = draw.randrange(len(rows))
            rows[at] = altered(rows[at], draw)
            yield "\n".join(map(json.dumps, rows)).encode()
    elif good[:2] != b"PK":
        yield from YAML
        for _ in range(TIMES):
            tree = altered(yaml.safe_load(good), draw)
            yield yaml.safe_dump(tree, allow_unicode=False).encode(errors="replace")
    for _ in range(TIMES):
        data = bytearray(good)
        for _ in range(draw.choice((1, 1, 4))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        yield bytes(data[: draw.randrange(len(data))] if draw.random() < 0.2 else data)


def survives(path: Path, *reads: Callable[[], Any], most: float = math.inf) -> None:
    """Let readers meet a file in many states: each works, or raises one line that names it.

    No number is set above `most`: sizes of networks have bounds of their own.
    """
    good, draw = path.read_bytes(), random.Random(path.name)
    refused = 0
    for content in mutations(good, draw, most):
        path.write_bytes(content)
        for read in reads:
            try:
                read()
            except LdmError as error:
                text = str(error)
                named = path.name in text or path.parent.name in text
                assert named and text.isprintable(), (content[:300], text)
                refused += 1
            except Exception as error:
                raise AssertionError((type(error), str(error)[:200], content[:600])) from error
    path.write_bytes(good)
    for read in reads:
        read()
    assert refused > 5


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run() -> Path:
    folder = stage_one(Path("runs/one"), model=False)
    rows = [{"images_seen": n, "gradient_ratio": 0.5, "adversarial_weight": 1.0} for n in (40, 48)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def page(folder: Path) -> Callable[[], str]:
    """The parts of a report that show the files of a run."""

    def write() -> str:
        records = read_records([folder])
        return numbers_section(records) + settings_section(records)

    return write


def test_run_json(run):
    config = autoencoder_recipe(TILES)
    survives(
        run / "run.json",
        lambda: new_or_unfinished("autoencoder", "tiny", config, run),
        page(run),
    )
    (run / "run.json").write_text("{")
    other = stage_one(Path("runs/two"), model=False)
    assert newest_run("autoencoder", "config.yaml") == other


def test_config_yaml(run):
    config = autoencoder_recipe(TILES)
    survives(
        run / "config.yaml",
        lambda: differences(run, config),
        lambda: read_curve(run),
        page(run),
    )


def test_metrics(run):
    path = run / "metrics.jsonl"

    def cut():
        before = path.read_bytes()
        cut_rows(path, 40)
        path.write_bytes(before)

    survives(path, lambda: read_rows(path), cut, lambda: read_curve(run), page(run))
    rows = [{"images_seen": 2**53, "loss": 10**99, "lr": 1e99, "gradient_ratio": 1e-320}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curves_section(read_records([run]))
    read_curve(run)


@pytest.mark.parametrize("name", ["result.json", "eval/val.json", "samples/a/fid.json"])
def test_results(run, name):
    number = {"fid": 3.5, "kid": {"mean": 0.1, "std": 0.01}, "psnr": 20.0}
    trees = {
        "result.json": {"images_seen": 32, "psnr": 20.5, "best": {"images_seen": 16, "psnr": 21}},
        "eval/val.json": {
            "format": 1,
            "evaluations": [{
                "model": {"path": "a/ckpt.pt", "sha256": "0" * 64}, "data": {"source": "x"},
                "split": "val", "resolution": 32, "count": 9, "numbers": number, "notes": ["a b"],
                "doubtful": {"rfid": "few"}, "extractor": {"name": "x", "is_published": False},
                "prepared": {"size": 64}, "mode": "clean",
            }],
        },
        "samples/a/fid.json": {
            "samples": {"count": 9, "fingerprint": "0" * 64, "filter": None}, **number,
            "reference": {"what": "x", "count": 9, "data": {"source": "y"}}, "warnings": ["w"],
            "fid_interval": {"std": 0.2}, "details": {"kid_std": 0.1}, "resolution": 32,
        },
    }  # fmt: skip
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(trees[name]))

    def read():
        text = page(run)()
        record = read_records([run])[0]
        numbers_section([record])
        for note in record.notes:
            raise LdmError(note)
        return text

    survives(path, read, lambda: path_without_fid(path))


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (40, 40), (9 * i, 50, 99)).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", ["manifest.json", "train-00000.tar.json"])
def test_prepared_data(name):
    source = pictures(Path("pictures"), 8)
    prepared = Path("prepared")
    settings = {"size": 32, "held_out": 2, "shard_size": 4, "workers": 0}
    prepare(source, prepared, **settings)
    config = DataConfig(source=str(prepared))
    shards = {path.name: path.read_bytes() for path in prepared.iterdir()}

    def again():
        prepare(source, prepared, **settings)

    def opened():
        for split in ("train", "val"):
            open_source(config, split, 32)
        read_preparation(config)

    def restored():
        for path, content in shards.items():
            if path != name:
                (prepared / path).write_bytes(content)

    reads = [opened] if name == "manifest.json" else [again, restored]
    survives(prepared / name, *reads)


def test_samples_json(model):
    from pipelines.sample import sample_images

    folder = sample_images(model, 2, Path("drawn"), steps=1, device="cpu")
    source = pictures(Path("pictures"), 4)
    path = folder / "samples.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"data": to_tree(DataConfig(source=str(source)))}))

    def read():
        trained_on(SampleFolder(folder))

    def resume():
        sample_images(model, 2, folder, steps=1, device="cpu")

    survives(path, read)
    draw = random.Random(0)
    for _ in range(6):
        path.write_text(json.dumps(altered(manifest, draw)))
        try:
            resume()
        except LdmError as error:
            assert "drawn" in str(error)


@pytest.mark.parametrize("content", [*CONTENTS, b'{"name": []}'])
def test_a_sample_shard_with_a_damaged_sidecar_is_written_again(content, model):
    from pipelines.sample import sample_images

    folder = sample_images(model, 2, Path("drawn"), steps=1, device="cpu", files="shards")
    path = folder / "train-00000.tar.json"
    good = path.read_bytes()
    path.write_bytes(content)
    sample_images(model, 2, folder, steps=1, device="cpu", files="shards")
    assert path.read_bytes() == good


def test_cache_manifest():
    from pipelines import latents

    source = pictures(Path("pictures"), 4)
    recipe = diffusion_recipe(
        Path("none"), f"data.source={source}", "data.crop=center", "cache=cached"
    )
    images = open_source(recipe.data, "train", 32)
    Path("cached").mkdir()
    path = Path("cached") / latents.MANIFEST
    path.write_text(json.dumps(latents._identity(recipe, images, "fp32", "0" * 64)))
    survives(path, lambda: check_cache(recipe, images, "fp32", "0" * 64))


@pytest.fixture
def table():
    [table] = find_tables("t4")
    plan = BuildPlan(load_scale("smoke"), (), (), Path("tables"))
    return table, plan, plan.targets(table, ())


def test_row_json(table):
    table, plan, targets = table
    target = targets[0]
    request = target.request(plan.scale.protocol) | {"listings": {"photos": "0" * 64}}
    record = {
        "format": runner.FORMAT, "state": "done", "each": [], "asked": request, "lacked": [],
        "numbers": dict.fromkeys(table.columns, 0.5), "missing": {table.columns[0]: "no"},
        "notes": ["n"], "count": 8, "extractor": None, "force": None, "counted": [],
        "model": None, "taken": None, "trained_in": "x", "machine": "m",
        "seconds": {"training": 1.0, "measuring": 2.0}, "created": "c", "platform": "p",
        "versions": {"python": "3"}, "tf32": False,
    }  # fmt: skip
    path = target.folder / runner.RECORD
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    assert runner.up_to_date(target, request, None, plan) == record

    def read():
        runner.row_states(Path("tables"), target.row)
        found = runner.up_to_date(target, request, None, plan)
        if found is not None:
            records = {other.row.name: found for other in targets}
            result = Result(table, plan, targets, records, {}, 1.0)
            json.dumps(result.to_tree())
            assert result.as_markdown() and result.lines

    survives(path, read)


def test_numbers_of_each_image(table):
    folder = Path("row")
    folder.mkdir()
    given = {"k": np.arange(4), "psnr": np.ones(4), "lpips": np.zeros(4, np.float32)}
    np.savez(folder / runner.EACH, **given)
    good = (folder / runner.EACH).read_bytes()
    draw = random.Random(0)
    whole = 0
    for content in mutations(good, draw):
        (folder / runner.EACH).write_bytes(content)
        each = runner._read_each(folder)
        whole += bool(each)
        assert all(values.shape == (4,) for values in each.values())
    assert whole < TIMES


def kept_features(path: Path) -> dict:
    features = FeatureSet(3, 6, 4)
    features.update(torch.rand(6, 3, generator=torch.manual_seed(0)), range(6))
    extractor = {"sha256": "0" * 64, "mode": "clean", "dim": 3}
    about = {
        "identity": {"extractor": extractor, "content": "0" * 64, "resolution": 32},
        "reference": {"what": "x", "count": 6, "split": "all", "filter": None},
        "fingerprints": base64.b64encode(bytes(48)).decode(),
    }  # fmt: skip
    features.save(path, about)
    return about


class Network:
    """An extractor by name alone."""

    sha256, mode, dim, name, is_published = "0" * 64, "clean", 3, "x", False


def test_features():
    path = Path("features.npz")
    about = kept_features(path)

    def given():
        open_statistics(str(path), Network(), None)

    survives(path, lambda: FeatureSet.load(path), given)
    parts = dict(np.load(path))
    for name in parts:
        for value in (
            np.zeros(0), np.array(7), np.zeros((2, 2, 2)), np.array(["a"]), np.full(6, np.nan),
            np.full(6, 2**62), np.full(6, -1), np.array([1, 3, 10**12, 10**11, 0, 10**12]),
            np.zeros((0, 0)), np.frombuffer(b'{"identity": []}', np.uint8),
            np.frombuffer(b"[" * 9999, np.uint8), np.zeros(3, "complex64"),
        ):  # fmt: skip
            np.savez(path, **(parts | {name: value}))
            try:
                given()
            except LdmError as error:
                assert "features.npz" in str(error)
            else:
                assert name in ("mu", "sample_ks"), (name, value)
    draw = random.Random(0)
    for _ in range(2 * TIMES):
        text = json.dumps(altered(about, draw)).encode()
        np.savez(path, **(parts | {"about": np.frombuffer(text, np.uint8)}))
        for read in (given, lambda: _load_kept(path, about["identity"])):
            try:
                read()
            except LdmError as error:
                assert "features.npz" in str(error)


def test_config_json_of_ours():
    from autoencoders.pretrained import HubMixin

    ae = build_autoencoder(autoencoder_recipe().model)
    assert isinstance(ae, HubMixin)
    folder = Path("saved")
    ae.save_pretrained(folder, {"scaling_factor": 0.5})
    survives(folder / "config.json", lambda: load_autoencoder(folder), most=8)


@pytest.mark.slow
def test_config_json_of_a_pipeline():
    from tests.pipelines.untrained import load, pipeline

    folder = Path("saved")
    pipeline().save_pretrained(folder, samples=0)
    survives(folder / "config.json", lambda: load(folder), most=8)


def test_config_json_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    folder = Path("foreign")
    diffusers.AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4,
    ).save_pretrained(folder)  # fmt: skip
    survives(folder / "config.json", lambda: load_autoencoder(folder), most=8)
