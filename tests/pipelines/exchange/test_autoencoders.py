"""`ldm import` and `ldm export`: models of others in, ours out, and all the way round."""

import inspect
import json
import re
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import pytest
import torch
import typer
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from typer.testing import CliRunner

from autoencoders import build_autoencoder, load_autoencoder, to_diffusers
from autoencoders.sdvae.formats import to_compvis, write_compvis, write_diffusers
from ldm.checkpoint import ModelFile, load_model, save_model
from ldm.cli.exchange import export_model, import_model
from ldm.config import to_tree
from ldm.errors import LdmError, UsageError
from pipelines.exchange import export_autoencoder, import_autoencoder
from pipelines.latents import Codec, measure_latents
from tests import small
from tests.pipelines.exchange import foreign_models

app = typer.Typer(pretty_exceptions_enable=False)
app.command("import")(import_model)
app.command("export")(export_model)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder to be in, and no Hub."""

    def fail(*_args, **_kwargs):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sdvae():
    return small.sdvae()


def same(ae, other):
    state = other.state_dict()
    assert ae.config == other.config
    assert all(torch.equal(tensor, state[name]) for name, tensor in ae.state_dict().items())


def ours(path, ae):
    save_model(path, ModelFile("autoencoder", to_tree(ae.config), ae.state_dict()))
    return path


def run(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_format_becomes_a_model_file(tmp_path, sdvae):
    write_diffusers(tmp_path / "diffusers", sdvae, 0.3)
    write_compvis(tmp_path / "kl.ckpt", sdvae)
    for source, form, file in (
        ("diffusers", "diffusers", tmp_path / "diffusers" / "diffusion_pytorch_model.safetensors"),
        ("kl.ckpt", "compvis", tmp_path / "kl.ckpt"),
    ):
        out = tmp_path / f"{form}.pt"
        written = import_autoencoder(source, out)
        assert written == [out, out.with_suffix(".safetensors")]
        for path in written:
            same(load_autoencoder(path), sdvae)
        said = load_model(out, "autoencoder").provenance
        assert "recipe" not in said
        assert said["imported"]["source"] == source and said["imported"]["format"] == form
        assert said["imported"]["sha256"] == {file.name: sha256(file.read_bytes()).hexdigest()}
        assert said["imported"].get("scaling_factor") == (0.3 if form == "diffusers" else None)
        assert said["versions"]["torch"]


def test_imported_model_serves_stage_two(tmp_path, sdvae):
    """Its latents are measured, standardised and undone, as training does first."""
    write_diffusers(tmp_path / "vae", sdvae)
    import_autoencoder("vae", tmp_path / "vae.pt")
    ae = load_autoencoder(tmp_path / "vae.pt")
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = measure_latents([ae.encode(images)])
    codec = Codec(ae, mean, std)
    z = codec.encode(images, torch.zeros(4, 4, 8, 8))
    assert z.shape == (4, 4, 8, 8) and z.mean().abs() < 0.05
    with torch.no_grad():
        expected = ae.decode(ae.encode(images).mode()).clamp(-1, 1)
    torch.testing.assert_close(codec.decode(z), expected, rtol=0, atol=1e-4)


def test_export_and_import_round_trip_bit_for_bit(tmp_path, sdvae):
    model = ours(tmp_path / "ckpt.pt", sdvae)
    for form, out in (("diffusers", "a"), ("hub", "b"), ("compvis", "c.safetensors")):
        export_autoencoder(tmp_path / out, form, model)
        import_autoencoder(str(tmp_path / out), tmp_path / f"{form}.pt")
        same(load_autoencoder(tmp_path / f"{form}.pt"), sdvae)
    identities = {load_model(p, "autoencoder").sha256 for p in tmp_path.glob("*.pt")}
    assert len(identities) == 1


@pytest.mark.parametrize(("given", "expected"), [(None, 0.3), (0.7, 0.7)])
def test_scaling_factor_of_an_imported_model_is_exported(tmp_path, sdvae, given, expected):
    write_diffusers(tmp_path / "a", sdvae, 0.3)
    import_autoencoder("a", tmp_path / "a.pt")
    export_autoencoder(tmp_path / "b", "diffusers", tmp_path / "a.pt", given)
    assert AutoencoderKL.load_config(tmp_path / "b")["scaling_factor"] == expected


SAID = {
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "latents_mean": [0.0, 0.1, 0.2, 0.3],
    "latents_std": [1.0, 1.1, 1.2, 1.3], "force_upcast": False, "sample_size": 1024,
}  # fmt: skip


@pytest.mark.parametrize("way", [["a.pt"], ["a.pt", "b.pt"], ["a.pt", "hub", "b.pt"], ["hub"], []])
def test_usage_settings_survive_every_format(sdvae, way):
    write_diffusers(Path("source"), sdvae, imported=SAID)
    last = "source"
    for step in way:
        if step.endswith(".pt"):
            import_autoencoder(last, Path(step))
        else:
            export_autoencoder(Path(step), "hub", Path(last))
        last = step
    export_autoencoder(Path("out"), "diffusers", Path(last))
    config = AutoencoderKL.load_config("out")
    assert {key: config[key] for key in SAID} == SAID
    same(load_autoencoder("out"), sdvae)


@pytest.mark.parametrize("conv1x1", [True, False])
def test_export_keeps_the_whole_config_of_the_source(conv1x1):
    source = AutoencoderKL(
        block_out_channels=(32, 64), latent_channels=16, layers_per_block=2, **SAID | {
            "latents_mean": [0.1] * 16, "latents_std": [1.1] * 16,
        }, use_quant_conv=conv1x1, use_post_quant_conv=conv1x1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    source.save_pretrained("source")
    import_autoencoder("source", Path("a.pt"))
    export_autoencoder(Path("out"), "diffusers", Path("a.pt"))
    found, expected = (AutoencoderKL.from_pretrained(path) for path in ("out", "source"))
    arguments = inspect.signature(AutoencoderKL.__init__).parameters.keys() - {"self"}
    assert len(arguments) > 15
    for key in arguments:
        one, other = found.config[key], expected.config[key]
        assert one == other or list(one) == list(other), key
    theirs = source.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_scale_of_a_whole_compvis_model_is_kept(suffix):
    foreign_models.write_compvis(Path(f"whole{suffix}"))
    import_autoencoder(f"whole{suffix}", Path("a.pt"))
    export_autoencoder(Path("out"), "diffusers", Path("a.pt"))
    expected = pytest.approx(foreign_models.SCALE)
    assert AutoencoderKL.load_config("out")["scaling_factor"] == expected
    assert to_diffusers(load_autoencoder("a.pt")).config.scaling_factor == expected


def test_a_loaded_model_saves_the_settings_it_came_with(sdvae):
    write_diffusers(Path("source"), sdvae, imported=SAID)
    load_autoencoder("source").save_pretrained("hub")
    export_autoencoder(Path("out"), "diffusers", Path("hub"))
    config = AutoencoderKL.load_config("out")
    assert {key: config[key] for key in SAID} == SAID


def test_null_settings_are_dropped(sdvae):
    write_diffusers(Path("vae"), sdvae)
    config = json.loads(Path("vae/config.json").read_text("utf-8"))
    Path("vae/config.json").write_text(json.dumps(config | dict.fromkeys(SAID)))
    import_autoencoder("vae", Path("a.pt"))
    assert not SAID.keys() & load_model("a.pt", "autoencoder").provenance["imported"].keys()
    export_autoencoder(Path("out"), "diffusers", Path("a.pt"))
    assert AutoencoderKL.load_config("out")["scaling_factor"] == 0.18215


NAN = float("nan")


@pytest.mark.parametrize("of_hub", [False, True])
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("scaling_factor", [NAN, float("inf"), 0, -1, 10**400, "x", "1", [], {}, True]),
        ("shift_factor", [NAN, float("inf"), "x", [], [1.0]]),
        ("latents_mean", [NAN, 0, "x", [], [0.0], [NAN] * 4, ["0"] * 4]),
        ("latents_std", [NAN, 0, "x", [], [1.0], [0.0] * 4, [-1.0] * 4, [NAN] * 4]),
        ("sample_size", [NAN, 0, -1, 0.5, "x", [], [0], {}, True]),
        ("force_upcast", [NAN, 2, "x", [], {}]),
    ],
)
def test_settings_that_cannot_be_are_refused_at_import(sdvae, of_hub, key, values):
    if of_hub:
        sdvae.save_pretrained("vae", {"scaling_factor": 0.3})
    else:
        write_diffusers(Path("vae"), sdvae)
    path = Path("vae/config.json")
    described = json.loads(path.read_text("utf-8"))
    usage = described["imported"] if of_hub else described
    for value in values:
        usage[key] = value
        path.write_text(json.dumps(described))
        with pytest.raises(LdmError, match=f"vae.*({key}|a number is too large)") as caught:
            import_autoencoder("vae", Path("a.pt"))
        assert "\n" not in str(caught.value) and not Path("a.pt").exists()


@pytest.mark.parametrize("source", ["diffusers", "hub", "kl.ckpt", "kl.safetensors", "ours.pt"])
def test_weights_that_are_not_finite_are_refused_at_import(sdvae, source):
    with torch.no_grad():
        sdvae.encoder.conv_in.bias[0] = NAN
    if source == "diffusers":
        write_diffusers(Path(source), sdvae)
    elif source == "hub":
        sdvae.save_pretrained(source)
    elif source == "ours.pt":
        ours(Path(source), sdvae)
    else:
        write_compvis(Path(source), sdvae)
    told = rf"{source}.* is damaged: tensor encoder\.conv_in\.bias has values that are NaN"
    with pytest.raises(LdmError, match=told):
        import_autoencoder(source, Path("a.pt"))
    assert not Path("a.pt").exists()


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_weights_of_eight_bits_are_imported_as_float32(sdvae, suffix):
    path = Path(f"kl{suffix}")
    theirs = to_compvis(sdvae.state_dict())
    eight = {n: t.contiguous().to(torch.float8_e4m3fn) for n, t in theirs.items()}
    save_file(eight, path) if suffix == ".safetensors" else torch.save(eight, path)
    import_autoencoder(str(path), Path("a.pt"))
    loaded = to_compvis(load_autoencoder("a.pt").state_dict())
    for name, tensor in eight.items():
        assert torch.equal(loaded[name], tensor.float())


def test_source_on_the_hub_is_recorded(tmp_path, sdvae, monkeypatch):
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "cache" / "models--them--sd" / "snapshots" / commit
    write_diffusers(snapshot / "vae", sdvae, 0.3)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: str(snapshot))
    import_autoencoder("them/sd", Path("a.pt"), subfolder="vae/", revision="v2")
    first = load_model("a.pt", "autoencoder").provenance["imported"]
    assert (first["source"], first["subfolder"], first["revision"], first["commit"]) == (
        "them/sd", "vae", "v2", commit
    )  # fmt: skip
    import_autoencoder("a.pt", Path("b.pt"))
    second = load_model("b.pt", "autoencoder").provenance["imported"]
    assert second["source"] == "a.pt" and second["imported"] == first
    assert not {"subfolder", "revision", "commit"} & second.keys()
    assert second["scaling_factor"] == 0.3


def test_hub_format_expresses_any_autoencoder(tmp_path):
    ae = build_autoencoder("tiny", decoder={"channels": 8})
    model = ours(tmp_path / "ckpt.pt", ae)
    with pytest.raises(LdmError, match=r"encoder\.type=litevae; --format hub can"):
        export_autoencoder(tmp_path / "a", "diffusers", model)
    export_autoencoder(tmp_path / "a", "hub", model)
    same(load_autoencoder(tmp_path / "a"), ae)


# ------------------------------------------------------------------------ the command line
def test_the_commands_say_what_they_wrote_and_what_comes_next(sdvae):
    write_diffusers(Path("vae"), sdvae)
    out = run("import", "vae", "models/sd.pt")
    assert re.search(r"^wrote models/sd\.pt \(\d+\.\d MiB\)$", out, re.MULTILINE)
    assert re.search(r"^wrote models/sd\.safetensors", out, re.MULTILINE)
    assert out.endswith("next: ldm train-diffusion --ae models/sd.pt\n")
    out = run("export", "models/sd.pt", "again")
    assert re.search(r"^wrote again/config\.json \(\d+\.\d KiB\)$", out, re.MULTILINE)
    assert out.endswith("next: diffusers.AutoencoderKL.from_pretrained('again')\n")
    out = run("export", "models/sd.pt", "hub", "--format", "hub")
    assert out.endswith("next: hf upload OWNER/NAME hub\n")
    out = run("export", "models/sd.pt", "kl.ckpt", "--format", "compvis")
    assert out.startswith("wrote kl.ckpt (")


def test_the_newest_run_is_exported_where_none_is_named(tmp_path, sdvae):
    folder = tmp_path / "runs" / "one"
    ours(folder / "ckpt.pt", sdvae)
    (folder / "run.json").write_text(json.dumps({"kind": "autoencoder"}))
    assert "wrote out/config.json" in run("export", "out")
    same(load_autoencoder("out"), sdvae)


def test_existing_files_are_kept_without_force(tmp_path, sdvae):
    write_diffusers(tmp_path / "vae", sdvae)
    run("import", "vae", "a.pt")
    for words in (["import", "vae", "a.pt"], ["export", "a.pt", "vae"]):
        with pytest.raises(LdmError, match="exists: give another name, or --force"):
            run(*words)
        run(*words, "--force")
    (tmp_path / "a.pt").unlink()  # the twin alone is somebody's, too
    with pytest.raises(LdmError, match=r"a\.safetensors exists"):
        run("import", "vae", "a.pt")


@pytest.fixture
def a_run(sdvae):
    """The newest run, which a forgotten OUT would export over itself."""
    folder = Path("runs/x")
    ours(folder / "ckpt.pt", sdvae)
    (folder / "run.json").write_text(json.dumps({"kind": "autoencoder"}))
    save_model(Path("stage-two.pt"), ModelFile("diffusion", {}, {"w": torch.zeros(1)}))
    yield folder


def everything():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize(
    ("out", "form"),
    [
        ("runs/x/ckpt.pt", "compvis"), ("runs/x/ckpt.pt", "diffusers"), ("runs/x", "hub"),
        ("runs/x", "diffusers"), ("runs/x/ckpt.safetensors", "compvis"),
        ("stage-two.safetensors", "compvis"), ("runs/x/ckpt.pt", "hub"),
    ],
)  # fmt: skip
def test_forgotten_out_is_refused_and_writes_nothing(a_run, out, form, force):
    before = everything()
    with pytest.raises(UsageError, match=rf"^{out} is a model, and OUT is missing: ldm export"):
        run("export", out, "--format", form, *force)
    assert everything() == before


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize(
    ("model", "out", "form"),
    [
        ("runs/x", "runs/x", "hub"), ("runs/x/ckpt.pt", "runs/x", "diffusers"),
        ("runs/x", "runs/x/ckpt.safetensors", "compvis"), ("vae", "runs/x", "hub"),
    ],
)  # fmt: skip
def test_run_is_never_overwritten(sdvae, a_run, model, out, form, force):
    write_diffusers(Path("vae"), sdvae)
    before = everything()
    with pytest.raises(UsageError, match=rf"^{out} is a run or a model of yours: give OUT"):
        run("export", model, out, "--format", form, *force)
    assert everything() == before


@pytest.mark.parametrize(
    ("model", "out", "form"),
    [("vae", "vae", "hub"), ("vae", "./vae/", "diffusers"), ("kl.ckpt", "kl.ckpt", "compvis"),
     ("vae", "vae/diffusion_pytorch_model.safetensors", "compvis")],
)  # fmt: skip
def test_exported_model_is_never_overwritten(sdvae, model, out, form):
    write_diffusers(Path("vae"), sdvae)
    write_compvis(Path("kl.ckpt"), sdvae)
    before = everything()
    with pytest.raises(
        UsageError, match="is the folder of the model to export: give OUT another name"
    ):
        run("export", model, out, "--format", form, "--force")
    assert everything() == before


def test_the_help_names_the_ending_to_give():
    told = CliRunner().invoke(app, ["import", "--help"], env={"COLUMNS": "200"}).output
    assert "OUT.pt" in told
    told = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "200"}).output
    assert "or SD-VAE's 0.18215" in told


@pytest.mark.parametrize(
    ("words", "kind", "told"),
    [
        (["import", "vae", "a.ckpt"], UsageError, "a.ckpt: the file to write must end in .pt"),
        (["import", "nowhere", "a.pt"], LdmError, "no model at nowhere"),
        (["import", "me/vae", "a.pt"], LdmError, "could not be fetched from the Hugging Face Hub"),
        (["import", "vae", "a.pt", "--subfolder", "x"], LdmError, "no checkpoint at vae/x"),
        (["export", "a", "b", "c"], UsageError, "expected [MODEL] OUT, got 3 paths"),
        (["export", "vae", "b.pt"], UsageError, "--format diffusers writes a folder"),
        (["export", "vae", "b", "--format", "compvis"], UsageError, "writes a .safetensors or"),
        *(
            (["export", "vae", "b", "--scaling-factor", number], UsageError, "above 0 and finite")
            for number in ("0", "inf", "nan")
        ),
        (["export", "vae", "b.pt", "--format", "compvis"], UsageError, "writes a .safetensors or"),
        (["export", "vae", "b.pt", "--format", "hub"], UsageError, "--format hub writes a folder"),
        (["import", "vae", "a.pt", "--revision", "v2"], UsageError, "vae is on this machine"),
        (["export", "b"], LdmError, "no autoencoder run with ckpt.pt under runs/"),
    ],
)
def test_wrong_arguments_are_refused_in_a_line(tmp_path, sdvae, words, kind, told):
    write_diffusers(tmp_path / "vae", sdvae)
    with pytest.raises(kind, match=re.escape(told)) as caught:
        run(*words)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"vae"}


def test_unknown_format_is_refused(tmp_path):
    with pytest.raises(UsageError, match="must be one of diffusers, compvis, hub"):
        export_autoencoder(tmp_path / "a", "onnx")
