"""Import and export of diffusion models on the command line: output and invalid options."""

import re
from pathlib import Path

import pytest

from ldm.cli.exchange import export_model, import_model
from ldm.cli.train import sample
from ldm.errors import LdmError, UsageError
from tests.pipelines.exchange.foreign_models import SIZE, write_compvis, write_diffusers
from tests.pipelines.exchange.test_diffusion_dit import write_checkpoint


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_checkpoint_is_imported_sampled_and_its_network_exported(capsys):
    write_compvis(Path("model.ckpt"))
    import_model("model.ckpt", Path("out.pt"), diffusion=True, resolution=str(SIZE))
    printed = capsys.readouterr().out
    assert re.search(r"^wrote out\.pt \(\d+\.\d MiB\)$", printed, re.MULTILINE)
    assert re.search(r"^UNet of [\d,]+ parameters, no classes; latents 4 × 8 × 8", printed, re.M)
    assert "it predicts epsilon; 20 noise levels, β 0.01 to 0.5 (scaled_linear)\n" in printed
    assert "give --head-width or --heads\n" in printed
    assert printed.endswith("next: ldm sample out.pt\n")

    sample(Path("out.pt"), n=2, steps=2, out=Path("images"), device="cpu")
    assert len(list(Path("images").rglob("*.png"))) == 3  # and the grid
    capsys.readouterr()

    export_model([Path("out.pt"), Path("unet")], "unet")
    printed = capsys.readouterr().out
    assert re.search(r"^wrote unet/ldm\.json \(\d+\.\d KiB\)$", printed, re.MULTILINE)
    assert "unet/ldm.json documents the timestep input, the prediction type" in printed
    assert printed.endswith("next: diffusers.UNet2DModel.from_pretrained('unet')\n")


def test_a_transformer_is_imported_beside_its_autoencoder_and_exported(capsys):
    write_checkpoint()
    import_model("dit.pt", Path("out.pt"), diffusion=True, ae="vae", denoiser="discrete")
    printed = capsys.readouterr().out
    assert re.search(r"^DiT of [\d,]+ parameters, 5 classes; latents 4 × 8 × 8", printed, re.M)
    assert "its last layer has twice the channels" in printed
    assert printed.endswith("next: ldm sample out.pt\n")
    export_model([Path("out.pt"), Path("dit")], "transformer")
    printed = capsys.readouterr().out
    assert "dit/ldm.json documents the timestep input, the prediction type" in printed
    assert printed.endswith("next: diffusers.DiTTransformer2DModel.from_pretrained('dit')\n")


def test_a_folder_is_imported_over_what_is_there_by_force(capsys):
    write_diffusers(Path("pipeline"))
    Path("out.pt").write_bytes(b"")
    import_model("pipeline", Path("out.pt"), diffusion=True, force=True)
    printed = capsys.readouterr().out
    assert f"images {SIZE}×{SIZE}" in printed and "--heads" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 32}, "--resolution needs --diffusion"),
        ({"head_width": 32}, "--head-width needs --diffusion"),
        ({"heads": 8}, "--heads needs --diffusion"),
        ({"scale_factor": 1.0}, "--scale-factor needs --diffusion"),
        ({"ae": "vae"}, "--ae needs --diffusion"),
        ({"denoiser": "discrete"}, "--denoiser needs --diffusion"),
        ({"diffusion": True, "ae": "vae"}, "no checkpoint of a DiT: leave out --ae and --denoiser"),
        ({"diffusion": True, "subfolder": "vae"}, "--subfolder applies to autoencoders only"),
        ({"diffusion": True, "revision": "v2"}, "--revision applies to autoencoders only"),
        (
            {"diffusion": True, "heads": 8, "head_width": 8},
            "--head-width and --heads exclude each other",
        ),
    ],
)
def test_options_that_do_not_go_together(options, message):
    write_compvis(Path("model.ckpt"))
    with pytest.raises(UsageError) as caught:
        import_model("model.ckpt", Path("out.pt"), **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in Path().iterdir()] == ["model.ckpt"]


def test_an_export_is_of_its_own_stage():
    write_compvis(Path("model.ckpt"))
    import_model("model.ckpt", Path("vae.pt"))
    import_model("model.ckpt", Path("whole.pt"), diffusion=True, resolution=str(SIZE))
    with pytest.raises(LdmError, match="a stage-two diffusion model is needed here"):
        export_model([Path("vae.pt"), Path("out")], "unet")
    with pytest.raises(LdmError, match="a stage-one autoencoder is needed here"):
        export_model([Path("whole.pt"), Path("out")], "diffusers")
    with pytest.raises(UsageError, match="--scaling-factor needs --format diffusers"):
        export_model([Path("whole.pt"), Path("out")], "unet", scaling_factor=0.5)
    assert not Path("out").exists()
