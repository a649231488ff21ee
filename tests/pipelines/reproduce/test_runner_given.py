"""Tables of which some rows are not trained: given checkpoints, costs alone, missing weights."""

from pathlib import Path

import pytest

from ldm.errors import LdmError, UsageError
from ldm.files import write_json
from pipelines.reproduce import rows, runner
from pipelines.reproduce.rows import RowNumbers
from pipelines.reproduce.runner import reproduce, row_states
from pipelines.reproduce.tables import find_tables
from tests.ldm.data.pictures import noise, png_folder
from tests.pipelines.analysis.subjects import save

ROOT = Path("reproduce/smoke")


def run(word="t9", **how):
    [result] = reproduce(word, "smoke", **how)
    return result


def test_a_checkpoint_replaces_training(faked):
    run("t9")
    given = ROOT / "t09" / "gaussian" / "autoencoder" / "ckpt.pt"
    result = run("t4", take=[f"smc={given}"], out=Path("other"))
    assert "other/smoke/t04/smc/autoencoder" not in faked.trained
    record = result.records["smc"]
    assert record["taken"]["path"] == str(given) and record["model"]["taken"]
    assert any("Row smc is" in line for line in result.deviations)
    assert "taken: " in result.as_markdown()
    # it stays so without being said again, and gives way to another one
    count = len(faked.measured)
    run("t4", out=Path("other"))
    assert len(faked.measured) == count
    other = ROOT / "t04" / "group" / "autoencoder" / "best.pt"
    other.write_bytes((ROOT / "t04" / "group" / "autoencoder" / "ckpt.pt").read_bytes())
    result = run("t4", take=[f"smc={other}"], out=Path("other"))
    assert len(faked.measured) == count + 1 and result.records["smc"]["taken"]["path"] == str(other)


def test_bad_checkpoints_are_refused(faked):
    Path("bad.pt").write_bytes(b"PK\x03\x04 not all of it")
    with pytest.raises(LdmError, match=r"bad\.pt"):
        run("t4", take=["smc=bad.pt"])
    with pytest.raises(UsageError, match="no row 'x'"):
        run("t4", take=["x=bad.pt"])
    with pytest.raises(LdmError, match="for one table: give t2a or t2b"):
        reproduce("t2", "smoke", take=["vae=bad.pt"])
    with pytest.raises(LdmError, match="T3 measures encoders of presets"):
        run("t3", take=["sdvae=bad.pt"])
    assert not faked.trained


@pytest.mark.parametrize("is_taken", [False, True])
def test_changed_data_of_stage_two_is_refused_before_training(faked, tmp_path, is_taken):
    data = png_folder(tmp_path / "data", [noise(n, 64, 64) for n in range(24)])
    [table] = find_tables("t13")
    name = table.rows[0].name
    take = [f"{name}={save(tmp_path / 'taken') / 'ckpt.pt'}"] if is_taken else []
    for folder in (ROOT / "t13" / name).resolve(), (ROOT / "t07" / name).resolve():
        write_json(folder / "diffusion" / ".training.json", {"seconds": 1.0, "listing": "another"})
    with pytest.raises(LdmError, match="trained on other images"):
        run("t13", data=[str(data)], take=take)
    assert not faked.trained


@pytest.mark.usefixtures("faked")
def test_encoders_are_measured_again_on_another_machine(monkeypatch):
    measured = []

    def measure(table, device, how):
        measured.append(device)
        numbers = {"params": 1.0, "memory": 2.0, "images_per_second": 3.0, "gmac": 4.0}
        return {row.name: RowNumbers(numbers) for row in table.rows}

    monkeypatch.setattr(runner, "measure_costs", measure)
    run("t3", settings=["run.device=cpu"])
    run("t3", settings=["run.device=cpu"])
    assert measured == ["cpu"]
    monkeypatch.setattr(runner, "name_device", lambda device: "another machine")
    run("t3", settings=["run.device=cpu"])
    assert measured == ["cpu", "cpu"]
    with pytest.raises(UsageError, match="omit lr=1e-3"):
        run("t3", settings=["lr=1e-3"])


def test_a_row_without_its_losses_weights_is_left_out(faked, monkeypatch):
    def missing(network, instead):
        raise LdmError(f"{network} is not on this machine: {instead}")

    monkeypatch.setattr(rows, "backbone_file", missing)
    [result] = reproduce("t14", "small", settings=["loss.lpips=0"])
    assert faked.trained == ["reproduce/small/t04/group/autoencoder"]
    assert result.numbers["esrgan"]["psnr"] is None
    assert all(claim.verdict == "cannot be judged" for claim in result.claims)
    assert "VGG-19 is not on this machine" in "\n".join(result.lines)
    [table] = find_tables("t14")
    assert row_states(Path("reproduce"), table.rows[1])["small"] == "–"
    # tried again when they are there
    monkeypatch.setattr(rows, "backbone_file", lambda network, instead: Path())
    [result] = reproduce("t14", "small", settings=["loss.lpips=0"])
    assert result.numbers["esrgan"]["psnr"] == 22.0  # of the second model that was measured
