import gzip
import json
from copy import deepcopy

import pytest
import torch

from diffusion import FlowDenoiser
from ldm.checkpoint import ModelFile, load_model, save_model
from ldm.errors import LdmError, UsageError
from ldm.logbook import read_rows
from ldm.run import Run
from pipelines.doctor.timing import flops_per_image
from pipelines.latent_diffusion import LatentDiffusionPipeline
from pipelines.latents import Codec
from pipelines.train_autoencoder import train_autoencoder
from pipelines.train_diffusion import DiffusionState, snapshot_due, train_diffusion
from pipelines.validation import band_names
from tests.pipelines.kill import Killed, kill, outcome
from tests.small import autoencoder_recipe, count_graphs, diffusion_recipe


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory):
    return train_autoencoder(autoencoder_recipe(), "tiny", tmp_path_factory.mktemp("one") / "ae")


@pytest.fixture(scope="module")
def stage_two(stage_one):
    recipe = diffusion_recipe(stage_one / "ckpt.pt")
    return train_diffusion(recipe, "tiny", stage_one.parent / "ldm")


DIT = "network={type: dit, width: 32, depth: 2, heads: 2"


@pytest.mark.parametrize("option", ["plain", "edm2", "dit"])
def test_checkpointing_trains_to_the_same_bits(option, stage_one, tmp_path):
    plain, sparing = (
        train_diffusion(
            diffusion_recipe(stage_one / "ckpt.pt", *OPTIONS.get(option, []), "steps=3",
                             f"checkpointing={flag}"), "tiny", tmp_path / flag,
        )
        for flag in ("false", "true")
    )  # fmt: skip
    a, b = (load_model(folder, "diffusion") for folder in (plain, sparing))
    assert a.sha256 == b.sha256


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("network", [[], [f"{DIT}, positions: both}}"]], ids=["ldm", "dit"])
def test_networks_compile_to_a_fixed_number_of_graphs(
    checkpointing, network, stage_one, tmp_path, monkeypatch
):
    """One of the denoiser's network, and one of the encoder."""
    graphs = count_graphs(monkeypatch)
    settings = "run.compile=true", f"checkpointing={checkpointing}", *network
    recipe = diffusion_recipe(stage_one / "ckpt.pt", *settings)
    train_diffusion(recipe, "tiny", tmp_path / "run")
    assert len(graphs) == 2


def test_in_bf16_the_autoencoder_is_cast_once_and_saved_in_float32(
    stage_one, tmp_path, monkeypatch
):
    recipe = diffusion_recipe(stage_one / "ckpt.pt", "run.precision=bf16", "steps=2")
    seen, posterior = set(), Codec.posterior

    def watched(codec, images):
        seen.update(tensor.dtype for tensor in codec.autoencoder.state_dict().values())
        return posterior(codec, images)

    monkeypatch.setattr(Codec, "posterior", watched)
    ours = load_model(train_diffusion(recipe, "tiny", tmp_path / "once"), "diffusion")
    assert seen == {torch.float32, torch.bfloat16}
    assert ours.autoencoder.sha256 == load_model(stage_one, "autoencoder").sha256

    monkeypatch.setattr("ldm.run.cast_for_autocast", lambda module: module)
    theirs = load_model(train_diffusion(recipe, "tiny", tmp_path / "each"), "diffusion")
    assert (ours.sha256, ours.statistics) == (theirs.sha256, theirs.statistics)


def test_run_folder_holds_every_file(stage_one, stage_two):
    for name in ("run.json", "config.yaml", "metrics.jsonl", "result.json", "ckpt.pt",
                 "ckpt.safetensors", "state/32/state.pt", "tensorboard"):  # fmt: skip
        assert (stage_two / name).exists(), name
    assert len(list((stage_two / "pictures").glob("samples-*.png"))) == 1
    assert "loss" in read_rows(stage_two / "metrics.jsonl")[-1]
    model = load_model(stage_two, "diffusion")
    one = load_model(stage_one, "autoencoder")
    assert model.autoencoder.sha256 == one.sha256 == model.provenance["autoencoder_sha256"]
    assert len(model.statistics["mean"]) == 4


def test_ckpt_alone_samples(stage_two, tmp_path):
    file = tmp_path / "only.pt"
    file.write_bytes((stage_two / "ckpt.pt").read_bytes())
    pipe = LatentDiffusionPipeline.from_pretrained(file, "cpu", "fp32")
    images = pipe(n=3, seed=0, steps=2)
    assert images.shape == (3, 3, 32, 32) and images.abs().max() <= 1
    twin = LatentDiffusionPipeline.from_pretrained(stage_two / "ckpt.safetensors", "cpu", "fp32")
    assert torch.equal(images, twin(n=3, seed=0, steps=2))


def test_sample_depends_on_seed_and_index_alone(stage_two):
    pipe = LatentDiffusionPipeline.from_pretrained(stage_two, "cpu", "fp32")
    done = []
    together = pipe(n=5, seed=3, steps=3, batch_size=5, callback=done.append)
    apart = pipe(n=5, seed=3, steps=3, batch_size=2)
    assert (together - apart).abs().max() < 1 / 255
    assert done == [5]
    assert (together[0] - pipe(n=1, seed=4, steps=3)[0]).abs().max() > 0.01


def test_altered_autoencoder_is_refused(stage_two, tmp_path):
    model = load_model(stage_two, "diffusion")
    name = next(iter(model.autoencoder.weights))
    model.autoencoder.weights[name] += 1
    save_model(tmp_path / "ckpt.pt", model)
    with pytest.raises(LdmError, match="holds another autoencoder"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "ckpt.pt")
    alone = ModelFile(**{**vars(model), "autoencoder": None})
    save_model(tmp_path / "ckpt.pt", alone)
    with pytest.raises(LdmError, match="holds no autoencoder"):
        LatentDiffusionPipeline.from_pretrained(tmp_path / "ckpt.pt")


def test_resume_with_another_autoencoder_is_refused(stage_one, tmp_path):
    file = tmp_path / "ckpt.pt"
    file.write_bytes((stage_one / "ckpt.pt").read_bytes())
    folder = train_diffusion(diffusion_recipe(file), "tiny", tmp_path / "run")
    (folder / "result.json").unlink()
    model = load_model(file, "autoencoder")
    name = next(iter(model.weights))
    model.weights[name] += 1
    save_model(file, model)
    with pytest.raises(
        LdmError, match=r"other weights than the autoencoder that .* was started with"
    ):
        train_diffusion(diffusion_recipe(file), "tiny", tmp_path / "run")


def test_a_flow_is_not_resumed_as_an_edm(stage_one, tmp_path):
    flow = diffusion_recipe(stage_one / "ckpt.pt", "denoiser.type=flow", "steps=2")
    train_diffusion(flow, "tiny", tmp_path / "run")
    with pytest.raises(LdmError, match=r"denoiser\.type") as refused:
        train_diffusion(
            diffusion_recipe(stage_one / "ckpt.pt", "steps=2"), "tiny", tmp_path / "run"
        )
    assert "\n" not in str(refused.value)


def test_settings_that_do_not_fit_leave_no_folder(stage_one, tmp_path):
    for setting in ("resolution=40", "network.latent_channels=8", "network.classes=3"):
        with pytest.raises(UsageError, match=setting):
            train_diffusion(diffusion_recipe(stage_one, setting), "tiny", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_loss_is_logged_by_noise_level(stage_two):
    rows = read_rows(stage_two / "metrics.jsonl")
    bands = {key for row in rows for key in row if key.startswith("loss_sigma_")}
    assert len(bands) >= 4 and bands <= set(band_names().values())
    assert (stage_two / "pictures" / "loss-by-sigma.png").is_file()


OPTIONS = {
    "classes": ["data.labels=true", "label_dropout=0.5"],
    "augmented": ["augment.probability=0.3", "data.flip=false", "posterior=mean"],
    "edm2": [
        "network={type: edm2, channels: 16, multipliers: [1, 2], blocks: 1, head_width: 8, "
        "attention_factors: [2]}",
        "denoiser={uncertainty: true, noise_mean: -0.4, noise_std: 1}", "clip_norm=null",
        "lr=1e-2", "lr_schedule=inverse_sqrt", "lr_decay_images=16", "betas=[0.9, 0.99]",
    ],
    "dit": [f"{DIT}}}", "data.labels=true", "betas=[0.9, 0.95]"],
    "dit's options": [
        f"{DIT}, patch: 4, mlp: swiglu, norm: rms, positions: both, qk_norm: true}}",
        "augment.probability=0.3", "data.flip=false", "accumulate=2",
    ],
    "dit of rotations": [f"{DIT}, patch: 1, positions: rotary, mlp_ratio: 2}}"],
    "flow": [
        "denoiser={type: flow, shift: 1.5, uncertainty: true}", "data.labels=true",
        "augment.probability=0.3", "data.flip=false", "run.validate_every_steps=2",
    ],
    "uniform flow": ["denoiser={type: flow, distribution: uniform}", "posterior=mean"],
    "unet's options": ["network.scale_shift=true", "network.resample_blocks=true"],
    "schedule": ["lr_schedule=cosine", "accumulate=2", "statistics_images=null"],
    "averages": ["ema_stds=[0.05, 0.1]", "snapshots=4"],
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains_and_samples(option, stage_one, tmp_path):
    recipe = diffusion_recipe(stage_one / "ckpt.pt", *OPTIONS[option])
    folder = train_diffusion(recipe, "tiny", tmp_path / "run")
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[-1]["skipped"] == 0
    pipe = LatentDiffusionPipeline.from_pretrained(folder, "cpu", "fp32")
    assert pipe(n=2, seed=0, steps=2).isfinite().all()
    model = load_model(folder, "diffusion")
    labelled = "data.labels=true" in OPTIONS[option]
    assert len(model.statistics["classes"]) == (8 if labelled else 0)
    is_flow = option.endswith("flow")
    assert model.statistics["sigma_data"] == (1.0 if is_flow else 0.5)
    assert isinstance(pipe.denoiser, FlowDenoiser) == is_flow
    if option == "averages":
        names = sorted(path.name for path in (folder / "ema").iterdir())
        assert len(names) == 8
    if option == "schedule":
        assert rows[-1]["lr"] == pytest.approx(0, abs=1e-6)


def test_a_transformer_killed_and_resumed_ends_alike(stage_one, tmp_path, monkeypatch):
    recipe = diffusion_recipe(stage_one / "ckpt.pt", *OPTIONS["dit"])
    whole = outcome(train_diffusion(recipe, "tiny", tmp_path / "whole"), "diffusion")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, Run, "save", 16)
        train_diffusion(recipe, "tiny", tmp_path / "killed")
    assert outcome(train_diffusion(recipe, "tiny", tmp_path / "killed"), "diffusion") == whole


@pytest.fixture(scope="module")
def trained(stage_one):
    """After some steps of the options that act on the optimiser, and what it began with."""
    recipe = diffusion_recipe(stage_one / "ckpt.pt", *OPTIONS["edm2"], "accumulate=2")
    kept = {}

    class Kept(DiffusionState):
        def __init__(self, *args):
            super().__init__(*args)
            kept.update(state=self, before=deepcopy(self.objective.state_dict()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.train_diffusion.DiffusionState", Kept)
        train_diffusion(recipe, "tiny", stage_one.parent / "edm2")
    return kept["state"], kept["before"]


def test_learning_rate_follows_the_schedule(trained):
    # 32 images seen, 16 until the decay begins
    assert trained[0].optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 2**0.5)


def test_adams_steps_are_those_of_the_summed_loss(trained):
    """EDM and EDM2 sum over a latent's values, with ε = 1e-8; gradients as small as that occur."""
    optimizer, values = trained[0].optimizer, 4 * 4 * 4
    gradients, moved = torch.logspace(-12, 0, 13), []
    for scale, eps in ((1, 1e-8), (1 / values, optimizer.param_groups[0]["eps"])):
        weight = torch.nn.Parameter(torch.zeros(13))
        adam = torch.optim.Adam([weight], lr=1, eps=eps)
        for _ in range(3):
            weight.grad = gradients * scale
            adam.step()
        moved.append(weight.detach())
    torch.testing.assert_close(*moved)


def test_a_state_of_another_epsilon_resumes_with_the_right_one(trained):
    state, right = trained[0], trained[0].optimizer.param_groups[0]["eps"]
    saved = deepcopy(state.state_dict())
    saved["optimizer"]["param_groups"][0]["eps"] = 1e-8
    state.load_state_dict(saved)
    assert state.optimizer.param_groups[0]["eps"] == right < 1e-9


def test_everything_learns_and_weights_keep_their_norm(trained):
    state, before = trained
    held = [name for name in before if name.endswith("weight")]
    assert any(name.startswith("uncertainty") for name in held)
    for name, weight in state.objective.state_dict().items():
        if name in held:
            assert not torch.equal(weight, before[name]), name
            norms = weight.flatten(1).norm(dim=1) / weight[0].numel() ** 0.5
            assert (norms - 1).abs().max() < 1e-5, name


def test_gradient_is_clipped(stage_one, tmp_path, monkeypatch):
    limits = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit, *rest, **named):
        limits.append(limit)
        return clip(parameters, limit, *rest, **named)

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", spy)
    recipe = diffusion_recipe(stage_one / "ckpt.pt", "clip_norm=0.25", "steps=2")
    train_diffusion(recipe, "tiny", tmp_path / "run")
    assert limits == [0.25, 0.25]


def test_validating_and_logging_have_their_own_periods(stage_one, tmp_path):
    recipe = diffusion_recipe(
        stage_one / "ckpt.pt", "run.validate_every_steps=3", "run.log_every_steps=5"
    )
    folder = train_diffusion(recipe, "tiny", tmp_path / "run")
    rows = [row["images_seen"] // 4 for row in read_rows(folder / "metrics.jsonl")]
    assert rows == [3, 5, 6, 8]


@pytest.mark.parametrize(("steps", "snapshots"), [(63, 32), (100, 3), (5, 32), (8, 8)])
def test_number_of_snapshots(steps, snapshots):
    recipe = diffusion_recipe("none", f"steps={steps}", f"snapshots={snapshots}")
    due = [step for step in range(1, steps + 1) if snapshot_due(step, recipe)]
    assert len(due) == min(steps, snapshots) and due[-1] == steps


def test_latents_that_are_not_finite_are_an_error(stage_one, tmp_path):
    model = load_model(stage_one, "autoencoder")
    for weight in model.weights.values():
        weight.fill_(1e30)  # finite, which its latents are not
    save_model(tmp_path / "ckpt.pt", model)
    with pytest.raises(LdmError, match="latent statistics are degenerate"):
        train_diffusion(diffusion_recipe(tmp_path / "ckpt.pt"), "tiny", tmp_path / "run")


def test_stage_two_file_is_refused_as_stage_one(stage_two, tmp_path):
    with pytest.raises(LdmError, match="is a stage-two diffusion model"):
        train_diffusion(diffusion_recipe(stage_two / "ckpt.pt"), "tiny", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stage_one_file_does_not_sample(stage_one):
    with pytest.raises(LdmError, match="is a stage-one autoencoder"):
        LatentDiffusionPipeline.from_pretrained(stage_one)


# ------------------------------------------------------------------------------ traces and speed
def test_steps_are_traced_into_the_runs_folder(stage_one, tmp_path, capsys):
    recipe = diffusion_recipe(stage_one / "ckpt.pt", "run.profile=1:3", "steps=3")
    folder = train_diffusion(recipe, "tiny", tmp_path / "run")
    assert (
        f"{folder}/profile.json.gz: open it at https://ui.perfetto.dev" in capsys.readouterr().out
    )
    events = json.loads(gzip.decompress((folder / "profile.json.gz").read_bytes()))["traceEvents"]
    assert sum(event["name"] == "Optimizer.step#Adam.step" for event in events) == 2


@pytest.mark.parametrize("recipe", [diffusion_recipe, autoencoder_recipe])
def test_a_trace_past_the_last_step_is_refused(recipe):
    arguments = ["none"] if recipe is diffusion_recipe else []
    recipe(*arguments, "run.profile=0:8")
    with pytest.raises(UsageError, match=r"^run.profile: 0:9 ends after the last step, 8$"):
        recipe(*arguments, "run.profile=0:9")


def test_rows_have_the_share_of_the_peak_where_it_is_known(stage_one, tmp_path, monkeypatch):
    recipe = diffusion_recipe(stage_one / "ckpt.pt", "accumulate=2")
    assert flops_per_image(recipe, None) == {}  # of a CPU
    for place in ("ldm.run", "pipelines.doctor.timing"):
        monkeypatch.setattr(f"{place}.peak_flops", lambda *_: 1e12)
    counted = []

    def count(*arguments):
        counted.append(flops_per_image(*arguments))
        return counted[-1]

    folder = train_diffusion(recipe, "tiny", tmp_path / "run", count)
    [[(kind, flops)]] = [count.items() for count in counted]
    assert kind == (32, False) and flops > 1e6
    rows = read_rows(folder / "metrics.jsonl")
    for row in rows:
        assert row["mfu"] == pytest.approx(flops * row["images_per_second"] / 1e12, rel=1e-4)
        assert 0 <= row["data_wait"] <= 1
