"""Whole latent diffusion models in, networks out: sampled, and against other people's samplers."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from autoencoders.sdvae.formats import latent_statistics
from diffusion.schedules import SCHEDULES
from ldm.checkpoint import load_model
from ldm.errors import LdmError, UsageError
from ldm.seeds import normal
from pipelines import LatentDiffusionPipeline
from pipelines.exchange import export_network, import_diffusion
from pipelines.sample import sample_images
from pipelines.sampling.settings import Sampling
from tests.diffusion.compvis_unet import answer, checkpoint
from tests.pipelines.exchange.foreign_models import (
    LEVELS,
    SCALE,
    SIZE,
    UNET,
    compvis_tensors,
    diffusers_pipeline,
    first_stage,
    write_compvis,
    write_diffusers,
)
from tests.pipelines.untrained import make_model

SHAPE = (4, SIZE // 2, SIZE // 2)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def imported(source, **options):
    """The pipeline of a source, through a file."""
    import_diffusion(str(source), Path("out.pt"), **options)
    return LatentDiffusionPipeline.from_pretrained("out.pt", "cpu", "fp32")


def at_whole_time_steps(monkeypatch, alpha_bars):
    """Let sampling visit the noise levels of the network's own time steps, from the last."""
    sigmas = ((1 - alpha_bars.double()) / alpha_bars.double()).sqrt().flip(0)

    def levels(steps, sigma_min, sigma_max):
        assert steps == len(sigmas)
        # the table was rounded: no level outside what the denoiser knows
        return torch.cat([sigmas.clamp(sigma_min, sigma_max), sigmas.new_zeros(1)])

    monkeypatch.setitem(SCHEDULES, "karras", levels)


# ------------------------------------------------------------------------------ CompVis in
@pytest.mark.parametrize("source", ["model.ckpt", "model.safetensors"])
@torch.no_grad()
def test_a_checkpoint_gives_the_images_of_ddim_over_its_own_tensors(monkeypatch, source):
    """Song et al. 2021 (arXiv 2010.02502), Equation 12 with σ_t = 0, in float64."""
    state = compvis_tensors()
    pipe = imported(write_compvis(Path(source), state), resolution=SIZE)
    alpha_bars = state["alphas_cumprod"].double()
    tensors = checkpoint(UNET, seed=1)  # the moving average

    x = normal(5, "sample", [0, 1], SHAPE).double() * (1 - alpha_bars[-1]).sqrt()
    for t in reversed(range(LEVELS.timesteps)):
        epsilon = answer(tensors, UNET, x, torch.full((2,), t))
        x0 = (x - (1 - alpha_bars[t]).sqrt() * epsilon) / alpha_bars[t].sqrt()
        before = alpha_bars[t - 1] if t else torch.tensor(1.0).double()
        x = before.sqrt() * x0 + (1 - before).sqrt() * epsilon
    expected = first_stage().decode(x.float() / SCALE)
    assert expected.std() > 0.05 and (expected.abs() < 1).float().mean() > 0.9

    at_whole_time_steps(monkeypatch, alpha_bars)
    images = pipe(n=2, seed=5, steps=LEVELS.timesteps, sampler="euler")
    torch.testing.assert_close(images, expected.clamp(-1, 1), rtol=0, atol=1e-3)


@torch.no_grad()
def test_latents_are_scaled_between_the_two_stages():
    pipe, kl = imported(write_compvis(Path("model.ckpt")), resolution=SIZE), first_stage()
    z = normal(0, "z", [0, 1], SHAPE)
    expected = kl.decode(z / SCALE).clamp(-1, 1)
    torch.testing.assert_close(pipe.codec.decode(z), expected, rtol=0, atol=1e-4)
    images = normal(0, "images", [0], (3, SIZE, SIZE)).clamp(-1, 1)
    mean, _ = kl.moments(images).chunk(2, dim=1)
    torch.testing.assert_close(pipe.encode(images), mean * SCALE, rtol=0, atol=1e-4)


@torch.no_grad()
def test_classes_and_heads_are_the_networks():
    config = UNET.model_copy(update={"classes": 3, "heads": 4})
    state = compvis_tensors(config)
    pipe = imported(write_compvis(Path("model.ckpt"), state), resolution=SIZE, heads=4)
    assert (pipe.classes.count, pipe.classes.names) == (3, ("0", "1", "2"))
    x, t = normal(1, "x", [0, 1], SHAPE), 7
    sigma = ((1 - state["alphas_cumprod"][t]) / state["alphas_cumprod"][t]).sqrt()
    labels = torch.tensor([2, 0])
    tensors = checkpoint(config, seed=1)
    # Karras et al. 2022, Table 1, column "VP"
    theirs = answer(tensors, config, x / (1 + sigma**2).sqrt(), torch.full((2,), t), labels)
    expected = (x - sigma * theirs).float()
    torch.testing.assert_close(pipe.denoiser(x, sigma, labels), expected, rtol=0, atol=1e-3)
    one, other = (pipe(n=1, steps=3, labels=[name]) for name in ("2", "0"))
    assert not torch.equal(one, other)


def test_file_records_its_source_and_statistics():
    path = write_compvis(Path("model.ckpt"))
    paths, notes = import_diffusion("model.ckpt", Path("out.pt"), SIZE)
    assert paths == [Path("out.pt"), Path("out.safetensors")]
    assert any("latents 4 × 8 × 8, times 0.25; images 16×16" in line for line in notes)
    assert any("20 noise levels, β 0.01 to 0.5 (scaled_linear)" in line for line in notes)
    assert any("give --head-width or --heads" in line for line in notes)
    for out in paths:
        file = load_model(out, "diffusion")
        assert file.statistics == {
            "mean": [0.0] * 4, "std": [4.0] * 4, "sigma_data": 1.0, "classes": []
        }  # fmt: skip
        said = file.provenance["imported"]
        assert said == {
            "source": "model.ckpt", "format": "compvis", "scale_factor": SCALE,
            "sha256": {"model.ckpt": sha256(path.read_bytes()).hexdigest()},
        }  # fmt: skip
        assert file.config["data"]["source"] == "unknown"


@pytest.mark.parametrize("sampler", ["heun", "euler", "dpmpp-2m"])
@pytest.mark.parametrize("schedule", ["karras", "cosine", "linear"])
def test_every_sampler_runs_over_the_levels_that_it_knows(sampler, schedule):
    pipe = imported(write_compvis(Path("model.ckpt")), resolution=SIZE)
    alpha_bars = compvis_tensors()["alphas_cumprod"].double()
    first, last = ((1 - alpha_bars) / alpha_bars).sqrt()[[0, -1]].tolist()
    assert pipe.denoiser.sigma_min == pytest.approx(first, rel=1e-4)
    assert pipe.denoiser.sigma_max == pytest.approx(last, rel=1e-4)
    images = pipe(n=1, steps=3, sampler=sampler, schedule=schedule)
    assert images.shape == (1, 3, SIZE, SIZE) and images.isfinite().all() and images.std() > 0
    with pytest.raises(UsageError, match="sigma_max=80: this model denoises"):
        pipe(n=1, sigma_max=80.0)


def test_imported_model_samples_into_files():
    import_diffusion(str(write_compvis(Path("model.ckpt"))), Path("out.pt"), SIZE)
    sample_images(Path("out.pt"), 2, Path("images"), device="cpu", steps=2)
    assert len(list(Path("images").rglob("*.png"))) == 3  # and the grid


# ---------------------------------------------------------------------------- diffusers in
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_folder_gives_the_images_of_their_pipeline(monkeypatch, prediction):
    theirs = diffusers_pipeline(prediction_type=prediction)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained("pipeline")
    pipe = imported("pipeline")
    generator = torch.Generator().manual_seed(3)
    expected = theirs(
        2, generator, num_inference_steps=LEVELS.timesteps, output_type="np", return_dict=False
    )[0]
    expected = torch.from_numpy(expected).permute(0, 3, 1, 2) * 2 - 1
    assert expected.std() > 0.05 and (expected.abs() < 1).float().mean() > 0.9

    alpha_bars = theirs.scheduler.alphas_cumprod.double()
    at_whole_time_steps(monkeypatch, alpha_bars)
    noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
    # they begin with noise alone, we with noise · σ: x_T = noise is √(1 − ᾱ) of it
    noise = noise / (1 - alpha_bars[-1]).sqrt().float()
    how = Sampling(steps=LEVELS.timesteps, sampler="euler")
    images = pipe.sample(range(2), 0, how, noise=noise)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-3)


def test_resolution_overrides_that_of_the_folder():
    write_diffusers(Path("pipeline"), classes=3)
    pipe = imported("pipeline")
    assert pipe.recipe.resolution == SIZE and pipe.classes.count == 3
    files = load_model("out.pt", "diffusion").provenance["imported"]["sha256"]
    assert set(files) == {f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")}
    assert imported("pipeline", resolution=32, force=True)(n=1, steps=2).shape == (1, 3, 32, 32)


def test_statistics_of_each_channel_are_undone():
    write_diffusers(Path("pipeline"))
    path = Path("pipeline/vae/config.json")
    mean, std = [0.0, 0.5, -1.0, 2.0], [1.0, 2.0, 3.0, 0.5]
    said = {"latents_mean": mean, "latents_std": std}
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | said))
    pipe, vae = imported("pipeline"), diffusers_pipeline().vqvae
    z = normal(0, "z", [0], SHAPE)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    with torch.no_grad():
        # as diffusers' pipelines do
        expected = vae.decode(z * std / SCALE + mean).sample.clamp(-1, 1)
    torch.testing.assert_close(pipe.codec.decode(z), expected, rtol=0, atol=1e-4)


SAID = {"scaling_factor": SCALE}


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        (SAID, None, (SCALE, [0.0] * 4, [1.0] * 4)),
        (SAID, 0.5, (0.5, [0.0] * 4, [1.0] * 4)),
        ({}, 1.0, (1.0, [0.0] * 4, [1.0] * 4)),
        (SAID | {"shift_factor": 0.1}, None, (SCALE, [0.1] * 4, [1.0] * 4)),
        (
            SAID | {"latents_mean": [0, 1, 2, 3.5], "latents_std": [1, 2, 3, 4]}, None,
            (SCALE, [0, 1, 2, 3.5], [1, 2, 3, 4]),
        ),
    ],
)  # fmt: skip
def test_statistics_of_latents(settings, given, expected):
    assert latent_statistics(settings, given, 4, Path("model")) == expected


# -------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "model has no scale for its latents: give --scale-factor"),
        ({"scaling_factor": 0}, "model scales its latents by 0, not a number above 0: correct"),
        ({"scaling_factor": float("nan")}, "by nan, not a number above 0"),
        ({"scaling_factor": [1]}, "by [1], not a number above 0"),
        ({"scaling_factor": [1.0, 1.0]}, "by [1.0, 1.0], not a number above 0"),
        ({"scaling_factor": "1"}, "by 1, not a number above 0"),
        ({"scaling_factor": True}, "by True, not a number above 0"),
        (SAID | {"latents_mean": [0.0]}, "are not 4 numbers"),
        (SAID | {"latents_std": [1, 1, 1, 0]}, "are not 4 numbers"),
        (SAID | {"shift_factor": "x"}, "are not 4 numbers"),
        (SAID | {"shift_factor": "0.5"}, "are not 4 numbers"),
    ],
)
def test_other_statistics_are_refused_in_a_line(settings, told):
    with pytest.raises(LdmError, match=r"^model") as caught:
        latent_statistics(settings, None, 4, Path("model"))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_source_without_a_scale_needs_one():
    state = {name: t for name, t in compvis_tensors().items() if name != "scale_factor"}
    write_compvis(Path("model.ckpt"), state)
    with pytest.raises(LdmError, match=r"model\.ckpt has no scale for its latents: give --scale"):
        import_diffusion("model.ckpt", Path("out.pt"), SIZE)
    import_diffusion("model.ckpt", Path("out.pt"), SIZE, scale_factor=1.0)
    assert load_model("out.pt", "diffusion").statistics["std"] == [1.0] * 4


@pytest.mark.parametrize(
    ("source", "options", "kind", "told"),
    [
        ("model.ckpt", {"resolution": 30}, UsageError, "resolution 30: must be a multiple of 4"),
        ("model.ckpt", {"resolution": 0}, UsageError, "--resolution 0: must be at least 1"),
        ("model.ckpt", {"heads": -1}, UsageError, "--heads -1: must be at least 1"),
        ("model.ckpt", {"head_width": 8, "heads": 2}, UsageError, "exclude each other: give"),
        ("model.ckpt", {"heads": 3}, LdmError, "must divide the 128 channels at factor 2"),
        ("model.ckpt", {"scale_factor": 0.0}, UsageError, "--scale-factor 0.0: must be above 0"),
        ("model.ckpt", {"scale_factor": float("nan")}, UsageError, "--scale-factor nan"),
        ("pipeline", {"heads": 2}, UsageError, "pipeline says its heads: leave out --head-width"),
        ("nowhere", {}, LdmError, "no model at nowhere: --diffusion takes a file or a folder on"),
        ("narrow.ckpt", {}, LdmError, "its UNet is for latents of 4 channels, its autoencoder's h"),
    ],
)  # fmt: skip
def test_refused_import_is_one_line_and_writes_nothing(source, options, kind, told):
    if source == "pipeline":
        write_diffusers(Path("pipeline"))
    elif source == "model.ckpt":
        write_compvis(Path(source))
    elif source == "narrow.ckpt":
        narrow = {f"first_stage_model.{n}": t for n, t in first_stage(3).state_dict().items()}
        write_compvis(Path(source), compvis_tensors() | narrow)
    with pytest.raises(kind) as caught:
        import_diffusion(source, Path("out.pt"), **options)
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not list(Path().glob("*out*"))


def test_existing_files_and_the_source_are_kept():
    source = write_compvis(Path("model.safetensors"))
    before = source.read_bytes()
    for force in (False, True):
        with pytest.raises(UsageError, match=r"model\.safetensors is the model to import"):
            import_diffusion("./model.safetensors", Path("model.pt"), SIZE, force=force)
    Path("out.pt").write_bytes(b"mine")
    with pytest.raises(LdmError, match=r"out\.pt exists"):
        import_diffusion("model.safetensors", Path("out.pt"), SIZE)
    assert (source.read_bytes(), Path("out.pt").read_bytes()) == (before, b"mine")
    import_diffusion("model.safetensors", Path("out.pt"), SIZE, force=True)
    assert load_model("out.pt", "diffusion").sha256


# ------------------------------------------------------------------------------------ out
# wide enough for 32 groups in every norm, as diffusers wants it
WIDE = "network={channels: 64, multipliers: [1, 2], blocks: 1, head_width: 16}"


def evaluate(formula, **numbers):
    """Evaluate a formula of ldm.json, its words replaced by Python's."""
    formula = formula.replace("^", "**").replace("sigma sigma_data", "sigma * sigma_data")
    formula = formula.replace("time_scale sigma", "time_scale * sigma")
    return eval(formula, {"sqrt": lambda x: x**0.5, "ln": torch.log, **numbers})


def told_denoiser(folder, x, sigma, label=None):
    """D(x; σ) by diffusers' network, and nothing but what its folder says."""
    told = json.loads((folder / "ldm.json").read_text("utf-8"))
    terms, sigma_data = told["denoiser"], told["latents"]["sigma_data"]
    assert terms["equation"] == "D(x; sigma) = c_skip x + c_out F(c_in x, timestep)"
    numbers = {"sigma": sigma, "sigma_data": sigma_data, **terms["config"]}
    skip, out, c_in = (evaluate(terms[name], **numbers) for name in ("c_skip", "c_out", "c_in"))
    if terms["config"]["type"] != "discrete":
        time = evaluate(terms["timestep"], **numbers)
    else:
        time = torch.tensor(11.0)  # the caller's σ is its level's
        assert terms["timestep"].startswith("t between 0 and timesteps - 1 of which sqrt((1 - al")
    none = told["classes"]["class_of_none"]
    if label is not None:
        label = torch.tensor([none if label == -1 else label] * len(x))
    network = UNet2DModel.from_pretrained(folder).eval()
    return skip * x + out * network(c_in * x, time, class_labels=label).sample


@pytest.mark.parametrize("names", [(), ("cat", "dog")])
@torch.no_grad()
def test_exported_network_denoises_as_ldm_json_describes(names):
    model = make_model(Path("run"), 0, names, settings=(WIDE,))
    out = Path("unet")
    written = export_network(out, model)
    assert {path.name for path in written} == {
        "config.json", "diffusion_pytorch_model.safetensors", "ldm.json"
    }  # fmt: skip
    assert all(path.is_file() for path in written)
    pipe = LatentDiffusionPipeline.from_pretrained(model, "cpu", "fp32")
    x, sigma = 2 * normal(0, "x", [0, 1], pipe.latent_shape), torch.tensor(1.7)
    for label in (1, -1) if names else (None,):
        given = None if label is None else torch.tensor([label, label])
        expected = pipe.denoiser(x, sigma, given)
        theirs = told_denoiser(out, x, sigma, label)
        torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    told = json.loads((out / "ldm.json").read_text("utf-8"))
    assert told["classes"]["names"] == list(names)
    assert told["latents"]["std"] == [4.0] * 4 and told["latents"]["shape"] == [4, 4, 4]
    assert (told["denoiser"]["sigma_min"], told["denoiser"]["sigma_max"]) == (0.002, 80)
    assert told["sha256"] == pipe.sha256
    assert told["images"]["autoencoder_sha256"] == pipe.autoencoder_sha256
    assert UNet2DModel.load_config(out)["sample_size"] == 4


@pytest.mark.parametrize("convention", ["shift: 2", "time_scale: 1, reversed: true"])
@torch.no_grad()
def test_an_exported_flow_denoises_as_ldm_json_describes(convention):
    settings = (WIDE, f"denoiser={{type: flow, {convention}}}")
    model = make_model(Path("run"), 0, settings=settings, sigma_data=1.0)
    export_network(Path("unet"), model)
    pipe = LatentDiffusionPipeline.from_pretrained(model, "cpu", "fp32")
    x, sigma = 2 * normal(0, "x", [0, 1], pipe.latent_shape), torch.tensor(1.7)
    theirs = told_denoiser(Path("unet"), x, sigma)
    torch.testing.assert_close(theirs, pipe.denoiser(x, sigma), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_imported_network_is_exported_unchanged(prediction):
    write_diffusers(Path("pipeline"), prediction_type=prediction)
    pipe = imported("pipeline")
    export_network(Path("unet"), Path("out.pt"))
    ours, theirs = (UNet2DModel.from_pretrained(at) for at in ("unet", "pipeline/unet"))
    kept = theirs.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in ours.state_dict().items())
    sigma = pipe.denoiser.log_sigmas[11].exp().float()
    x = 2 * normal(0, "x", [0, 1], SHAPE)
    expected = pipe.denoiser(x, sigma)
    torch.testing.assert_close(told_denoiser(Path("unet"), x, sigma), expected, rtol=0, atol=1e-4)


def test_newest_run_is_exported_by_default():
    folder = make_model(Path("runs/one"), 0, settings=(WIDE,))
    (folder / "run.json").write_text(json.dumps({"kind": "diffusion"}))
    assert Path("unet/ldm.json") in export_network(Path("unet"))
    with pytest.raises(UsageError, match="runs/one is a model, and OUT is missing"):
        export_network(folder)


def everything():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("model", "out", "kind", "told"),
    [
        (
            "edm2",
            "unet",
            LdmError,
            "edm2 has a network of type edm2, which no diffusers UNet2DMode",
        ),
        ("one", "one", UsageError, "one is a run or a model of yours: give OUT another name"),
        ("one", "unet.pt", UsageError, "unet.pt: --format unet writes a folder"),
        ("one", "full", LdmError, "exists: give another name, or --force"),
        ("loose/a.pt", "loose", LdmError, "exists: give another name"),
        ("nowhere", "unet", LdmError, "no model at nowhere: it is no file or folder here"),
        ("narrow", "unet", LdmError, "its widths are normalised in unequal numbers of groups"),
        (None, "unet", LdmError, "no diffusion run with ckpt.pt under runs/"),
    ],
)
def test_refused_export_is_one_line_and_writes_nothing(model, out, kind, told):
    make_model(Path("one"), 0, settings=(WIDE,))
    make_model(Path("loose"), 0, settings=(WIDE,))
    for name in ("ckpt.pt", "ckpt.safetensors"):
        Path("loose", name).rename(Path("loose", f"a{Path(name).suffix}"))
    make_model(Path("narrow"), 0)
    edm2 = "network={type: edm2, channels: 16, multipliers: [1, 2], blocks: 1, head_width: 16}"
    make_model(Path("edm2"), 0, settings=(edm2,))
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    before = everything()
    with pytest.raises(kind) as caught:
        export_network(Path(out), model and Path(model))
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert everything() == before


def test_folder_of_the_model_is_never_overwritten():
    make_model(Path("loose"), 0, settings=(WIDE,))
    Path("loose/ckpt.pt").rename("loose/a.pt")
    with pytest.raises(UsageError, match="loose is the folder of the model to export"):
        export_network(Path("loose"), Path("loose/a.pt"), force=True)


def test_a_network_is_written_with_its_description_or_not_at_all():
    make_model(Path("one"), 0, settings=(WIDE,))
    Path("unet/ldm.json").mkdir(parents=True)
    with pytest.raises(LdmError, match=r"could not write unet/ldm\.json"):
        export_network(Path("unet"), Path("one"), force=True)
    assert list(Path("unet").iterdir()) == [Path("unet/ldm.json")]
