"""A table from beginning to end, with a faked trainer: what is built, and what is up to date."""

import json
import pickle
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from ldm.errors import Interrupted, LdmError, UsageError
from ldm.metrics.inception import SHA256
from pipelines.reproduce import rows, runner
from pipelines.reproduce.output import SEEDS
from pipelines.reproduce.runner import reproduce, row_states
from pipelines.reproduce.tables import find_tables
from tests.ldm.data.pictures import encode, noise, png_folder

ROOT = Path("reproduce/smoke")


def patch_weights(monkeypatch, find):
    """Let `find` say whether Inception's published weights are on this machine."""
    for module in (rows, runner):
        monkeypatch.setattr(module, "published_weights", find)


def run(word="t9", **how):
    [result] = reproduce(word, "smoke", **how)
    return result


def test_a_table_is_trained_measured_and_written(faked):
    result = run()
    assert faked.trained == [
        f"reproduce/smoke/{name}/autoencoder"
        for name in ("t04/group", "t09/gaussian", "t01/imagenet128-nz12-litevae")
    ]
    assert result.numbers["gaussian"]["psnr"] == 22.0
    text = (ROOT / "t09" / "table.md").read_text("utf-8")
    tree = json.loads((ROOT / "t09" / "table.json").read_text("utf-8"))
    assert text.startswith("# T9: High-frequency losses") and "29.73" in text and "23.00" in text
    assert [row["here"]["numbers"]["psnr"] for row in tree["rows"]] == [21.0, 22.0, 23.0]
    assert [row["paper"]["psnr"] for row in tree["rows"]] == [29.33, 29.64, 29.73]
    assert tree["claims"][0]["verdict"] == "cannot be judged"  # smoke is too short
    assert tree["scale"] == "smoke" and tree["versions"]["torch"] and tree["machine"]
    record = json.loads((ROOT / "t09" / "baseline" / "row.json").read_text("utf-8"))
    assert record["trained_in"] == "reproduce/smoke/t04/group/autoencoder"
    assert record["asked"]["trained"]["recipe"]["loss"]["gaussian"] == 0


def test_rows_are_compared_image_by_image(faked):
    [result] = reproduce("t9", "small")
    [comparison] = [f for f in result.claims[0].comparisons if f.column == "psnr"]
    assert comparison.error == 0 and comparison.verdict == "holds", (
        "every image is better by as much"
    )
    page = (Path("reproduce/small/t09") / "table.md").read_text("utf-8")
    assert "PSNR: 22.00 against 21.00 (+1.00 ± 0.00), the paper's" in page


def test_a_finished_run_without_its_model_is_an_error(faked):
    run()
    (ROOT / "t09" / "gaussian" / "row.json").unlink()
    (ROOT / "t09" / "gaussian" / "autoencoder" / "ckpt.pt").unlink()
    with pytest.raises(LdmError, match=r"autoencoder is finished, but its ckpt\.pt is missing"):
        run()


def test_out_must_not_be_a_file(faked):
    Path("notes.txt").touch()
    with pytest.raises(LdmError, match=r"notes\.txt is a file\): give --out another folder"):
        run(out=Path("notes.txt"))
    assert not faked.trained


@pytest.mark.parametrize("lose", [Path.unlink, lambda path: path.write_bytes(b"damaged")])
def test_a_row_without_its_images_numbers_is_measured_again(faked, lose):
    reproduce("t9", "small")
    lose(Path("reproduce/small/t09/gaussian/images.npz"))
    [again] = reproduce("t9", "small")
    assert again.claims[0].comparisons[0].error == 0
    assert len(faked.measured) == 4


def test_finished_rows_are_reused(faked):
    first = run()
    again = run()
    assert len(faked.trained) == 3 and len(faked.measured) == 3
    assert again.numbers == first.numbers


def test_every_seed_is_trained_and_pooled(faked, monkeypatch, capsys):
    kept = []
    train = rows.train_autoencoder
    monkeypatch.setattr(
        rows, "train_autoencoder",
        lambda recipe, *how, **more: kept.append(recipe.run.seed) or train(recipe, *how, **more),
    )  # fmt: skip
    [result] = reproduce("t4", "small", seeds=3)
    assert "T4, seed 2, row 1 of 2: Group Norm" in capsys.readouterr().out
    assert kept == [0, 0, 1, 1, 2, 2]
    assert faked.trained[2:4] == [
        f"reproduce/seed-1/small/t04/{name}/autoencoder" for name in ("group", "smc")
    ]
    # 21 and 22 of the first seed, then 23 and 24, 25 and 26
    assert result.numbers["group"]["psnr"] == (23.0, 2.0)
    assert result.records["smc"]["seeds"]["psnr"] == [22.0, 24.0, 26.0]
    np.testing.assert_allclose(result.each["smc"]["psnr"], 24.0)
    page = Path("reproduce/small/t04/table.md").read_text("utf-8")
    assert "PSNR: 24.00 against 23.00 (+1.00 ± 0.00), the paper's 29.32 against 29.24" in page
    assert "| 24.00 ± 2.00 |" in page
    assert (
        SEEDS.format(2) in page and "of the others: reproduce/seed-1/small/t04/table.md, " in page
    )
    alone = Path("reproduce/seed-2/small/t04/table.md").read_text("utf-8")
    assert "Settings: run.seed=2." in alone and "26.00 against 25.00" in alone
    assert reproduce("t4", "small", seeds=3)[0].numbers == result.numbers
    assert len(kept) == 6


def test_a_number_that_one_seed_lacks_is_not_pooled(faked):
    reproduce("t4", "small")
    faked.lacks = ("rfid", "lpips", "ssim")
    [result] = reproduce("t4", "small", seeds=2)
    assert result.numbers["smc"]["ssim"] is None and result.records["smc"]["missing"]["ssim"]
    assert set(result.each["smc"]) == {"k", "psnr"}
    assert "SSIM" in "".join(result.lines)


def test_what_seeds_and_our_rows_do_not_fit(tmp_path):
    for word, how, told in (
        ("t3", {"seeds": 2}, "T3 trains nothing: omit --seeds"),
        ("t4", {"seeds": 2, "settings": ["run.seed=4"]}, "omit --take and run.seed"),
        ("f3", {"seeds": 2}, "--seeds and --ours are for tables: omit them for f3"),
        ("t4", {"ours": True}, "T4 has no rows of ours; these have: T1, T2a, T2b"),
    ):
        with pytest.raises(UsageError, match=told):
            reproduce(word, "small", out=tmp_path, **how)


def test_seeds_refuse_a_row_of_a_given_checkpoint_before_they_train(faked):
    [result] = reproduce("t4", "small")
    trained = Path(result.records["smc"]["trained_in"]) / "ckpt.pt"
    reproduce("t4", "small", take=[f"smc={trained}"])
    count = len(faked.trained)
    with pytest.raises(UsageError, match="row 'smc' was measured with --take: give --out another"):
        reproduce("t4", "small", seeds=2)
    assert len(faked.trained) == count


def test_our_rows_are_built_beside_the_papers(faked):
    [result] = reproduce("t2b", "small", ours=True)
    assert list(result.records) == ["vae", "vae-small", "litevae-b", "litevae-b-plus"]
    page = Path("reproduce/small/t02b/table.md").read_text("utf-8")
    assert "| LiteVAE-B-plus " in page and "(+3.00 ± 0.00), not the paper's" in page
    [papers] = reproduce("t2b", "small")
    assert list(papers.records) == ["vae", "vae-small", "litevae-b"] and len(faked.measured) == 4


def test_tables_share_trainings(faked):
    run("t9")
    run("t15")
    assert faked.trained[3:] == ["reproduce/smoke/t15/with/autoencoder"]
    assert len(faked.measured) == 5  # each row is measured by its own


def test_an_interrupted_row_resumes(faked):
    faked.stops = 1
    with pytest.raises(Interrupted):
        run()
    [table] = find_tables("t9")
    states = [row_states(Path("reproduce"), row)["smoke"] for row in table.rows]
    assert states == ["begun", "–", "–"]
    assert not (ROOT / "t09" / "table.md").exists()
    run()
    assert faked.trained[:2] == ["reproduce/smoke/t04/group/autoencoder"] * 2
    states = [row_states(Path("reproduce"), row) for row in table.rows]
    assert states == [{"smoke": "done", "small": "–", "paper": "–"}] * 3
    run_folder = ROOT / "t04" / "group" / "autoencoder"
    assert json.loads((run_folder / ".training.json").read_text("utf-8"))["seconds"] >= 0


def test_another_recipe_in_the_same_folder_is_refused(faked):
    run()
    with pytest.raises(LdmError, match=r"another configuration \(batch_size\): give --out"):
        run(settings=["batch_size=2"])
    run(settings=["batch_size=2"], out=Path("elsewhere"))
    assert len(faked.trained) == 6


def test_changed_data_is_refused(faked, tmp_path):
    data = png_folder(tmp_path / "data", [noise(n, 64, 64) for n in range(24)])
    run(data=[str(data)])
    run(data=[str(data)])
    assert len(faked.measured) == 3
    (data / "0000.png").write_bytes(encode(noise(99, 64, 64)[:, :48]))
    with pytest.raises(LdmError, match=r"trained on other images than those now in .*/data:"):
        run(data=[str(data)])
    assert len(faked.trained) == 3, "refused before anything is trained"
    run(data=[str(data)], out=Path("elsewhere"))
    assert len(faked.trained) == 6 and len(faked.measured) == 6
    for name in ("t04/group", "t09/gaussian", "t01/imagenet128-nz12-litevae"):
        shutil.rmtree(ROOT / name / "autoencoder")  # as the message says
    run(data=[str(data)])
    assert len(faked.trained) == 9 and len(faked.measured) == 9


def test_a_score_of_zero_is_kept(faked):
    faked.scores = {"ssim": 0.0}
    reproduce("t4", "small")
    with np.load("reproduce/small/t04/smc/images.npz") as each:
        assert set(each) == {"k", "psnr", "ssim"} and not each["ssim"].any()


def test_changed_data_of_a_killed_run_is_refused(faked, tmp_path, monkeypatch):
    data = png_folder(tmp_path / "data", [noise(n, 64, 64) for n in range(24)])

    def killed(recipe, preset, folder, perceptual):
        faked.train(recipe, preset, folder)
        noted.append(json.loads((folder / ".training.json").read_text("utf-8")))
        raise KeyboardInterrupt

    noted = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rows, "train_autoencoder", killed)
        run(data=[str(data)])
    assert len(noted[0]["listing"]) == 64
    (data / "0000.png").unlink()
    with pytest.raises(LdmError, match="was trained on other images than those now in"):
        run(data=[str(data)])


def test_finished_rows_need_no_data(faked, tmp_path):
    data = png_folder(tmp_path / "data", [noise(n, 64, 64) for n in range(24)])
    first = run(data=[str(data)])
    data.rename(tmp_path / "moved")
    assert run(data=[str(data)]).numbers == first.numbers and len(faked.measured) == 3


def test_display_settings_rebuild_nothing(faked):
    run()
    run(settings=["run.log_every_steps=1", "data.workers=2"])
    assert len(faked.measured) == 3


def test_lacking_numbers_are_measured_once_weights_are_there(faked, monkeypatch):
    [result] = reproduce("t4", "small")
    assert result.numbers["smc"]["rfid"] is None and len(faked.measured) == 2
    reproduce("t4", "small")
    assert len(faked.measured) == 2
    monkeypatch.setattr(rows, "has_backbone", lambda network: network == "VGG-16")
    faked.lacks = ("rfid",)
    [result] = reproduce("t4", "small")
    assert len(faked.measured) == 4 and len(faked.trained) == 2
    assert result.numbers["smc"]["lpips"] is not None
    # and once more for those of Inception, when they are given
    Path("inception.pt").touch()
    faked.lacks = ()
    [result] = reproduce("t4", "small", weights=Path("inception.pt"))
    assert len(faked.measured) == 6 and result.numbers["smc"]["rfid"] is not None


def test_no_table_mixes_two_networks(faked, monkeypatch):
    """rFIDs of the published Inception and of another file do not compare."""
    faked.lacks = ()
    patch_weights(monkeypatch, lambda: Path("inception.pt"))
    other = Path("other.pt")
    other.write_bytes(b"other")
    reproduce("t4", "small")
    reproduce("t4", "small", weights=other)
    assert len(faked.measured) == 4 and len(faked.trained) == 2
    reproduce("t4", "small", weights=other)
    assert len(faked.measured) == 4
    other.write_bytes(b"a third")
    reproduce("t4", "small", weights=other)
    assert len(faked.measured) == 6
    [result] = reproduce("t4", "small")  # the published one again
    assert len(faked.measured) == 8 and len(faked.trained) == 2
    assert {record["extractor"]["sha256"] for record in result.records.values()} == {SHA256}
    # which network it would be is of no matter where no number is of one
    faked.lacks = ("rfid",)
    patch_weights(monkeypatch, lambda: None)
    reproduce("t9", "small")
    reproduce("t9", "small", weights=other)
    assert len(faked.measured) == 8 + 3 + 3  # lacked for want of weights, and these are there
    other.write_bytes(b"a fourth")
    reproduce("t9", "small", weights=other)
    assert len(faked.measured) == 8 + 3 + 3


def test_an_rfid_is_kept_while_no_network_could_replace_it(faked, monkeypatch):
    faked.lacks = ()
    other = Path("other.pt")
    other.write_bytes(b"other")
    reproduce("t4", "small", weights=other)
    patch_weights(monkeypatch, lambda: None)
    [result] = reproduce("t4", "small")
    assert len(faked.measured) == 2 and result.numbers["smc"]["rfid"]


def test_a_taken_checkpoint_that_changed_is_refused(faked):
    run()
    given = Path("given")
    (ROOT / "t04/group/autoencoder").rename(given)
    run("t4", take=[f"group={given}"])
    (ROOT / "t04/group/images.npz").unlink()
    (given / "ckpt.pt").write_bytes((ROOT / "t09/gaussian/autoencoder/ckpt.pt").read_bytes())
    with pytest.raises(LdmError, match=r"row 'group' was measured with given.*another model now"):
        run("t4")


def test_forced_measurements_are_repeated_without_force(faked):
    faked.seen = True
    reproduce("t4", "small", force=True)
    reproduce("t4", "small", force=True)
    assert len(faked.measured) == 2
    with pytest.raises(LdmError, match="give --force"):
        reproduce("t4", "small")
    faked.seen = False
    reproduce("t4", "small")
    assert len(faked.trained) == 2 and len(faked.measured) == 2 + 1 + 2
    # --force that nothing needs makes no difference
    reproduce("t4", "small", force=True)
    assert len(faked.measured) == 5


def test_force_matters_for_an_rfid_of_few_images(faked):
    """That it would is no reason where it was not asked."""
    faked.features, faked.lacks = 2048, ("rfid", "lpips")
    Path("inception.pt").touch()
    for force, measured in ((False, 2), (False, 2), (True, 4), (True, 4)):
        reproduce("t4", "small", weights=Path("inception.pt"), force=force)
        assert len(faked.measured) == measured


def test_rows_of_an_older_format_are_measured_again_and_not_trained(faked):
    run("t9")
    given = ROOT / "t09" / "gaussian" / "autoencoder" / "ckpt.pt"
    run("t4", take=[f"smc={given}"], out=Path("other"))
    trained, measured = len(faked.trained), len(faked.measured)
    for path in (*Path("reproduce").rglob("row.json"), *Path("other").rglob("row.json")):
        record = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(record | {"format": 2}), "utf-8")
    run("t9")
    result = run("t4", out=Path("other"))
    assert len(faked.trained) == trained and len(faked.measured) == measured + 5
    assert result.records["smc"]["taken"]["path"] == str(given), "as given before"
    path = Path("other/smoke/t04/smc/row.json")
    path.write_text(path.read_text("utf-8").replace('"format": 3', '"format": 2'), "utf-8")
    given.rename("elsewhere.pt")
    with pytest.raises(LdmError, match=r"row 'smc' was measured with .*, which is missing: give"):
        run("t4", out=Path("other"))


def test_provenance_is_that_of_the_rows(faked, monkeypatch):
    """Not what made the page, which may be long after."""
    run()
    path = ROOT / "t09" / "gaussian" / "row.json"
    record = json.loads(path.read_text("utf-8"))
    record |= {"command": "ldm reproduce t1", "created": "2020-01-01T00:00:00+00:00"}
    record["versions"]["ldm"] = "0.0.1"
    path.write_text(json.dumps(record), "utf-8")
    run()
    assert len(faked.measured) == 3, "a difference of version alone rebuilds nothing"
    page = (ROOT / "t09" / "table.md").read_text("utf-8")
    made = page.split("## Provenance")[1].splitlines()
    assert "- command of gaussian: ldm reproduce t1" in made
    assert any(line.startswith("- command of baseline, wavelet: ") for line in made)
    assert any(line.startswith("- versions of gaussian: ") and "ldm 0.0.1" in line for line in made)
    assert sum(line.startswith("- machine: ") for line in made) == 1, "they agree"
    [row] = [line for line in made if line.startswith("| gaussian")]
    assert row.endswith("| 2020-01-01T00:00:00+00:00 |")


def test_the_main_process_decides_what_to_build(faked, tmp_path, monkeypatch):
    """As another one, on whose machine there are other weights, sees it."""
    answers = []

    def main(ranks, make):
        answers.append(pickle.dumps(make()))
        return pickle.loads(answers[-1])

    def other(ranks, make):
        return pickle.loads(answers.pop(0))

    def missing(network, instead):
        raise LdmError(f"{network} is not on this machine: {instead}")

    settings = ["loss.lpips=0"]
    reproduce("t14", "small", settings=settings)
    (tmp_path / "here" / "other").mkdir(parents=True)
    shutil.copytree("reproduce", "here/reproduce")
    shutil.copytree("reproduce", "here/other/reproduce")
    for row in ("esrgan", "lpips"):
        shutil.rmtree(f"here/reproduce/small/t14/{row}", ignore_errors=True)
    monkeypatch.setattr(rows, "backbone_file", lambda network, instead: Path())
    monkeypatch.setattr(runner, "from_main", main)
    monkeypatch.chdir("here")
    before = len(faked.measured)
    reproduce("t14", "small", settings=settings)
    done = len(faked.measured) - before
    assert done and len(answers) >= 2
    monkeypatch.chdir("other")
    monkeypatch.setattr(rows, "backbone_file", missing)
    monkeypatch.setattr(runner, "from_main", other)
    [result] = reproduce("t14", "small", settings=settings)
    assert len(faked.measured) - before == 2 * done and not answers
    assert result.numbers["esrgan"]["psnr"] is not None


def test_missing_numbers_that_weights_would_not_give_are_kept(faked, monkeypatch):
    """An rFID of few images is missing though Inception is there."""
    Path("inception.pt").touch()
    faked.lacks = ("rfid",)
    for _ in range(2):
        reproduce("t4", "small", weights=Path("inception.pt"))
    assert len(faked.measured) == 2


def test_a_missing_rfid_leaves_its_claim_open(faked):
    [result] = reproduce("t4", "small")
    [claim] = result.claims
    by_column = {comparison.column: comparison for comparison in claim.comparisons}
    assert by_column["rfid"].verdict == "cannot be judged"
    assert by_column["rfid"].why == "no weights"
    assert by_column["psnr"].verdict == "holds"
    assert claim.verdict == "cannot be judged"
    text = "\n".join(result.lines)
    assert "- rFID, LPIPS: no weights" in text and "| SWD" in text.replace("  ", " ")


# ---------------------------------------------------------------------------------- tables
def test_both_halves_of_a_table_are_built(faked):
    results = reproduce("t2", "smoke")
    assert [result.table.number for result in results] == ["T2a", "T2b"]
    sizes = [results[0].numbers[row]["params"] for row in ("s", "b", "m", "l")]
    assert sizes == sorted(sizes) and sizes[0] > 0


def test_bad_words_are_refused_before_anything_is_written(faked):
    for how, told in (
        ({"word": "t99"}, "choose from T1"),
        ({"word": "t4", "settings": ["lr=fast"]}, "lr"),
        ({"word": "t4", "settings": ["steps=6"]}, "did you mean 'phases.0.steps'"),
        ({"word": "f6", "settings": ["phases.0.steps=6"]}, "did you mean 'steps'"),
        ({"word": "t9", "settings": ["loss.gaussian=0"]}, "the same"),
        ({"word": "t4", "data": ["cifar=x"]}, "data sets"),
    ):
        with pytest.raises(UsageError, match=told):
            reproduce(scale="smoke", **how)
    with pytest.raises(UsageError, match="--scale huge: it must be one of smoke, small, paper"):
        reproduce("t4", "huge")
    assert not Path("reproduce").exists()


# ------------------------------------------------------------------------------ for real
@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty folder, no published weights, and no network."""

    def refuse(*_, **__):
        raise AssertionError("the network is asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_table_4_is_built_for_real():
    shorter = ["phases.0.steps=6"]
    [result] = reproduce("t4", "smoke", settings=shorter)
    smc, group = result.numbers["smc"], result.numbers["group"]
    assert 5 < smc["psnr"] < 25 and smc["psnr"] != group["psnr"] and smc["swd"] > 0
    assert smc["rfid"] is smc["lpips"] is None  # what stood in is not shown
    folder = Path("reproduce/smoke/t04")
    evaluated = json.loads((folder / "smc" / "evaluation.json").read_text("utf-8"))
    assert evaluated["evaluations"][0]["numbers"]["rfid"] > 0  # but it ran
    written = (folder / "smc" / "autoencoder" / "ckpt.pt").stat().st_mtime_ns
    text = (folder / "table.md").read_text("utf-8")
    [again] = reproduce("t4", "smoke", settings=shorter)
    assert again.numbers == result.numbers
    assert (folder / "smc" / "autoencoder" / "ckpt.pt").stat().st_mtime_ns == written
    for part in ("29.32", f"{smc['psnr']:.2f}", "cannot be judged", "6 steps at 32²"):
        assert part in text, part


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
def test_table_6_is_built_for_real():
    [result] = reproduce("t6", "smoke", settings=["phases.0.steps=2"])
    for row in ("vae", "litevae"):
        assert len(result.numbers[row]) == 5
        assert all(spread >= 0 for _, spread in result.numbers[row].values())
        assert result.numbers[row]["mmd_25"][0] > 0
    tree = json.loads(Path("reproduce/smoke/t06/table.json").read_text("utf-8"))
    assert tree["rows"][0]["here"]["trained_in"] == "reproduce/smoke/t01/ffhq256-vae/autoencoder"
    assert tree["settings"] == ["phases.0.steps=2"]
