"""Training that starts with weights: fine-tuning an autoencoder, distilling an encoder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from autoencoders import Autoencoder, build_autoencoder, load_autoencoder
from autoencoders.losses.objective import TeacherPosterior, latent, logvar
from autoencoders.sdvae.formats import write_compvis
from ldm.checkpoint import ModelFile, fingerprint, load_model, save_model
from ldm.config import to_tree, validate
from ldm.data import batches, evaluation_batches, open_source
from ldm.distributed import make_accelerator
from ldm.errors import LdmError, UsageError
from ldm.images import to_float, to_uint8
from ldm.metrics import psnr
from ldm.run import Run
from ldm.run_folder import latest_state
from pipelines import finetune
from pipelines.exchange import export_autoencoder
from pipelines.recipes import AutoencoderRecipe, load_recipe
from pipelines.report.report import write_report
from pipelines.train_autoencoder import AutoencoderState, train_autoencoder, train_step
from pipelines.validation import compare_with_teacher
from tests.autoencoders import other_models
from tests.autoencoders.sdvae import compvis_vq
from tests.small import sdvae

SETTINGS = [
    "phases=[{resolution: 32, steps: 4}]", "batch_size=4", "data.source=photos", "loss.lpips=0",
    "lr=1e-3", "warmup_images=0", "ema_half_life_images=8", "validate_images=4",
    "discriminator={channels: 4, multipliers: [1, 2, 2]}", "teacher.statistics_images=8",
    "run={precision: fp32, log_every_steps: 2, validate_every_steps: 4, save_every_steps: 2}",
]  # fmt: skip
STUDENT = ["encoder.depth=1", "encoder.extractor.channels=8", "encoder.aggregator.channels=8"]
"""A small LiteVAE encoder for the latents of `source`."""


@pytest.fixture
def source(tmp_path) -> Path:
    """A diffusers folder with scaling, shift and a licence."""
    ae = sdvae()
    ae.settings = {"scaling_factor": 0.7, "shift_factor": 0.1, "force_upcast": False}
    path = tmp_path / "source.pt"
    known = {"imported": ae.settings}
    model = ModelFile("autoencoder", to_tree(ae.config), ae.state_dict(), {}, known)
    save_model(path, model)
    export_autoencoder(tmp_path / "vae", "diffusers", path)
    (tmp_path / "vae/README.md").write_text("---\nlicense: openrail++\n---\n# A VAE\n")
    return tmp_path / "vae"


def fine_tuning(source: Path | str, *settings: str, preset: str = "finetune") -> AutoencoderRecipe:
    return load_recipe("recipes", preset, [*SETTINGS, f"init.source={str(source)!r}", *settings])


def distillation(source: Path | str, *settings: str) -> AutoencoderRecipe:
    words = [*SETTINGS, *STUDENT, f"teacher.source={str(source)!r}", *settings]
    return load_recipe("recipes", "distil-s", words)


def begin(recipe: AutoencoderRecipe, folder: Path) -> tuple[Run, AutoencoderState]:
    run = Run(folder, recipe.run, make_accelerator("cpu"))
    recipe, given = finetune.read_given(recipe)
    state = AutoencoderState(recipe, run, {}, given)
    state.prepare(run)
    return run, state


def some_images(count: int = 4, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def part(ae: Autoencoder, name: str) -> str:
    prefixes = finetune.PARTS[name]
    return fingerprint({k: v for k, v in ae.state_dict().items() if k.startswith(prefixes)})


# ------------------------------------------------------------------------------ beginning
@pytest.mark.parametrize("form", ["folder", "run", "pt", "safetensors", "compvis", "hub"])
def test_training_begins_from_every_format(form, source, tmp_path):
    ae = load_autoencoder(source)
    if form == "run":
        shutil.copytree(
            train_autoencoder(fine_tuning(source), folder=tmp_path / "r"), tmp_path / "run"
        )
        ae = load_autoencoder(tmp_path / "run")
    path = {
        "folder": source, "run": tmp_path / "run", "pt": tmp_path / "source.pt",
        "safetensors": tmp_path / "source.safetensors", "compvis": tmp_path / "kl.ckpt",
        "hub": tmp_path / "hub",
    }[form]  # fmt: skip
    if form == "compvis":
        write_compvis(path, ae)
    if form == "hub":
        ae.save_pretrained(path)
    recipe = fine_tuning(path, "train=all")
    assert recipe.model == ae.config
    _, state = begin(recipe, tmp_path)
    for begun in (state.autoencoder, state.ema.ema_model):
        assert fingerprint(begun.state_dict()) == fingerprint(ae.state_dict())
    # and learns from there
    images = some_images()
    before = (ae(images, sample=False).recon - images).abs().mean()
    after = (state.autoencoder(images, sample=False).recon - images).abs().mean()
    torch.testing.assert_close(before, after)


def test_a_preset_keeps_its_own_architecture(source):
    same = ["encoder={channels: 32, multipliers: [1, 2], blocks: 1}"]
    same += ["decoder={channels: 32, multipliers: [1, 2], blocks: 1}"]
    words = [*SETTINGS, f"init.source={str(source)!r}"]
    recipe = load_recipe("ae", "sdvae", [*words, *same])
    assert recipe.model == load_autoencoder(source).config and recipe.train == "all"
    assert load_recipe("ae", "sdvae", words).encoder.channels == 128


def test_what_does_not_fit_is_named_with_both_shapes(source, tmp_path):
    wide = fine_tuning(source, "encoder.channels=64")
    with pytest.raises(LdmError) as error:
        begin(wide, tmp_path)
    assert str(error.value) == (
        f"{source} does not fit this autoencoder: tensor encoder.conv_in.weight is (32, 3, 3, 3) "
        "in the file, (64, 3, 3, 3) in the model: init.parts=[decoder] train=all, or omit the "
        "preset and its settings, for the architecture of the weights"
    )
    with pytest.raises(UsageError, match="train=decoder keeps the encoder"):
        fine_tuning(source, "encoder.channels=64", "init.parts=[decoder]")
    recipe = fine_tuning(source, "encoder.channels=64", "init.parts=[decoder]", "train=all")
    _, state = begin(recipe, tmp_path)
    assert not state.origin.keys() & {"scaling_factor", "shift_factor"}  # of other latents
    assert part(state.autoencoder, "decoder") == part(load_autoencoder(source), "decoder")
    with pytest.raises(LdmError, match=r"decoder.conv_in.weight.*init.parts=\[encoder\]"):
        begin(fine_tuning(source, "decoder.channels=64"), tmp_path)
    with pytest.raises(LdmError, match=r"in the model: omit the preset"):
        begin(fine_tuning(source, "latent_channels=8"), tmp_path)


def test_a_setting_that_no_tensor_shows_must_fit_too(tmp_path):
    begun = build_autoencoder("dwt", encoder={"depth": 1}, decoder={"multipliers": [1, 1]})
    begun.save_pretrained(tmp_path / "dwt")
    with pytest.raises(LdmError, match=r"encoder\.wavelet is haar in the file, db2 in the model"):
        begin(fine_tuning(tmp_path / "dwt", "encoder.wavelet=db2"), tmp_path)


def test_groups_must_be_equal_and_not_the_setting_that_made_them(tmp_path):
    sizes = {"channels": 128, "multipliers": [1, 1], "blocks": 1}
    wide = build_autoencoder("sdvae", encoder=sizes, decoder=sizes)
    wide.save_pretrained(tmp_path / "wide")  # 32 groups of 4
    begin(fine_tuning(tmp_path / "wide", "decoder.group_channels=4"), tmp_path)
    with pytest.raises(LdmError, match=r"decoder\.group_channels is 1 in the file, 8 in the model"):
        begin(fine_tuning(tmp_path / "wide", "decoder.group_channels=8"), tmp_path)


def test_only_a_new_encoder_without_a_teacher_begins_with_another_posterior(source, tmp_path):
    def posterior_of(*words):
        torch.manual_seed(0)
        encoder = "encoder={channels: 32, multipliers: [1, 2], blocks: 1}"
        sizes = [encoder, encoder.replace("encoder", "decoder"), "conv1x1=true", *words]
        recipe = load_recipe("recipes", "finetune", [*SETTINGS, "train=all", *sizes])
        ae = begin(recipe, tmp_path)[1].autoencoder
        posterior = ae.encode(some_images())
        return posterior.mean, posterior.logvar

    def change(gain, shift):
        return f"init.mean_gain={gain}", f"init.logvar={shift}"

    begun = f"init.source={str(source)!r}"
    for words in (["encoder.type=sdvae"], [begun, "init.parts=[decoder]"]):
        mean, logvar = posterior_of(*words)
        for gain, shift in ((1, -5), (6, 0), (6, -5)):
            changed = posterior_of(*words, *change(gain, shift))
            torch.testing.assert_close(changed, (gain * mean, logvar + shift))
    changes = change(6, -5)
    torch.testing.assert_close(posterior_of(begun, *changes), posterior_of(begun), rtol=0, atol=0)
    teachers = [begin(distillation(source, *words), tmp_path)[1] for words in ([], changes)]
    a, b = (fingerprint(state.autoencoder.quant_conv.state_dict()) for state in teachers)
    assert a == b


@pytest.mark.parametrize("word", ["init={{source: {0!r}}}", "init.source={0!r}"])
def test_both_spellings_of_a_setting_take_its_architecture(word, source):
    recipe = load_recipe("recipes", "finetune", [*SETTINGS, word.format(str(source))])
    assert recipe.model == load_autoencoder(source).config


def test_the_decoder_of_an_encoder_without_weights_learns(tmp_path):
    begun = build_autoencoder("dwt", encoder={"depth": 1}, decoder={"multipliers": [1, 1]})
    begun.save_pretrained(tmp_path / "dwt")
    _, state = begin(fine_tuning(tmp_path / "dwt"), tmp_path)
    assert fingerprint(state.autoencoder.state_dict()) == fingerprint(begun.state_dict())
    assert finetune.learned(state.autoencoder.decoder)


def test_parts_that_are_not_there_are_refused(tmp_path):
    ae = build_autoencoder("dwt", decoder={"channels": 8, "blocks": 1})
    ae.save_pretrained(tmp_path / "dwt")
    with pytest.raises(LdmError, match="has no weights for the encoder"):
        begin(fine_tuning(tmp_path / "dwt", "init.parts=[encoder]"), tmp_path)
    with pytest.raises(UsageError, match=r"init\.parts"):
        fine_tuning(tmp_path / "dwt", "init.parts=[middle]")
    with pytest.raises(UsageError, match=r"init\.parts"):
        fine_tuning(tmp_path / "dwt", "init.parts=[]")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init.source=a", "teacher.source=b"], "exclude each other"),
        (["teacher.source=SOURCE", "train=all", *STUDENT], "with a teacher only the encoder"),
        (["teacher.source=SOURCE"], "upsamples 2×.*encoder.depth=1"),
        (["init.source=/nowhere/vae"], "/nowhere/vae"),
        (
            ["teacher.source=SOURCE", *STUDENT, "loss.l1=0", "adversarial.weight=0.1"],
            "loss: one of l1, l2, lpips, esrgan must be above 0",
        ),
        (["best_by=lpips", "train=all", "phases=[{resolution: 8, steps: 1}]"], "best_by=lpips"),
        (["encoder.type=dwt", "latent_channels=12", "init.logvar=-5"], "set it to 0"),
        (["encoder.type=dwt", "latent_channels=12", "init.mean_gain=6"], "set it to 1"),
        (["init.logvar=-31"], r"init\.logvar"),
        (["init.mean_gain=0"], r"init\.mean_gain"),
        (["init.mean_gain=inf"], r"init\.mean_gain"),
        (["train=decoder", "encoder.type=litevae"], "needs weights for the rest.*--from"),
        (["encoder.type=dwt", "latent_channels=12", "train=encoder"], "dwt encoder has no weights"),
        (["loss.lpips=1", "train=all", "phases=[{resolution: 8, steps: 1}]"], "below 16"),
        (
            ["loss={lpips: 1, lpips_network: alex}", "phases=[{resolution: 24, steps: 1}]"],
            "below 31",
        ),
    ],
)
def test_what_cannot_be_is_one_line(words, message, source, tmp_path):
    words = [word.replace("SOURCE", str(source)) for word in words]
    preset = "distil-s" if any("teacher" in word for word in words) else "finetune"
    with pytest.raises(LdmError, match=message) as error:
        begin(load_recipe("recipes", preset, [*SETTINGS, *words]), tmp_path)
    assert "\n" not in str(error.value)


def test_a_source_that_holds_nan_is_refused(source, tmp_path):
    ae = load_autoencoder(source)
    with torch.no_grad():
        ae.decoder.conv_out.bias[1] = float("nan")
    ae.save_pretrained(tmp_path / "nan")
    with pytest.raises(LdmError, match=r"decoder.conv_out.bias.*NaN"):
        fine_tuning(tmp_path / "nan")


# ----------------------------------------------------------------------------- what learns
@pytest.mark.parametrize("conv1x1", [True, False])
def test_a_decoder_learns_and_latents_stay_equal_to_the_bit(conv1x1, tmp_path):
    sizes = {"channels": 8, "multipliers": [1, 2], "blocks": 1}
    before = build_autoencoder(
        "sdvae", conv1x1=conv1x1, encoder={"type": "sdvae", **sizes}, decoder=sizes
    )
    before.save_pretrained(tmp_path / "before")
    recipe = fine_tuning(tmp_path / "before", "adversarial={weight: 0.1, start: 0}")
    folder = train_autoencoder(recipe, folder=tmp_path / "run")
    for name in ("ckpt.pt", "ckpt.safetensors", "best.pt"):
        after, images = load_autoencoder(folder / name), some_images()
        assert torch.equal(before.eval().encode(images).mean, after.encode(images).mean)
        assert torch.equal(before.encode(images).logvar, after.encode(images).logvar)
        assert part(before, "encoder") == part(after, "encoder")
        for a, b in zip(before.decoder.parameters(), after.decoder.parameters(), strict=True):
            assert not torch.equal(a, b)
        if conv1x1:
            assert not torch.equal(before.post_quant_conv.weight, after.post_quant_conv.weight)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all("kl" not in row and "latent" not in row for row in rows)


@pytest.mark.parametrize("train", ["decoder", "encoder"])
def test_what_is_frozen_takes_no_part(train, source, tmp_path):
    run, state = begin(fine_tuning(source, f"train={train}", "adversarial.weight=0"), tmp_path)
    ae, still = state.autoencoder, "encoder" if train == "decoder" else "decoder"
    frozen = {name for name in ae.state_dict() if name.startswith(finetune.PARTS[still])}
    before = {name: tensor.clone() for name, tensor in ae.state_dict().items()}
    train_step(run, state, some_images(), range(4), ramp=0.0)
    state.advance()
    after = ae.state_dict()
    assert {name for name in after if torch.equal(before[name], after[name])} == frozen
    learned = [p for group in state.opt_autoencoder.param_groups for p in group["params"]]
    assert {id(p) for p in learned} == {id(p) for p in ae.parameters() if p.requires_grad}
    for module in (getattr(ae, still), ae.quant_conv if still == "encoder" else ae.post_quant_conv):
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    # the average has the very same tensors of what is frozen, and its own of what learns
    averaged = {
        name: tensor.data_ptr() for name, tensor in state.ema.ema_model.state_dict().items()
    }
    assert {
        n for n, tensor in ae.state_dict().items() if averaged[n] == tensor.data_ptr()
    } == frozen
    kl = finetune.loss_weights(state.recipe, ae).kl
    assert kl == (0 if train == "decoder" else 1e-6)


@pytest.mark.parametrize("train", ["all", "decoder", "encoder"])
def test_the_gradient_ratio_is_taken_where_something_learns(train, source, tmp_path):
    recipe = fine_tuning(source, f"train={train}", "adversarial={weighting: adaptive, weight: 0.5}")
    run, state = begin(recipe, tmp_path)
    terms = train_step(run, state, some_images(), range(4), ramp=1.0)
    assert 0 < float(terms["gradient_ratio"]) < float("inf")
    last = finetune.last_learned(state.autoencoder, recipe)
    weight = {"encoder": state.autoencoder.quant_conv}.get(
        train, state.autoencoder.decoder.conv_out
    )
    assert last is weight.weight


def test_a_decoder_of_ours_learns_beside_another_encoder(tmp_path):
    other_models.tiny().save_pretrained(tmp_path / "tiny")
    with pytest.raises(UsageError, match="encoders of type diffusers are not trained"):
        fine_tuning(tmp_path / "tiny", "train=encoder")
    teacher = to_tree(load_autoencoder(tmp_path / "tiny").config)
    tree = to_tree(load_recipe("recipes", "finetune", SETTINGS)) | {
        "latent_channels": 4, "encoder": teacher["encoder"],
        "decoder": {"channels": 8, "multipliers": [1, 1, 2], "blocks": 1},
        "init": {"source": str(tmp_path / "tiny"), "parts": ["encoder"]},
    }  # fmt: skip
    recipe = validate(AutoencoderRecipe, tree)
    theirs = load_autoencoder(tmp_path / "tiny").encode(some_images()).mean
    ours = load_autoencoder(train_autoencoder(recipe, folder=tmp_path / "run"))
    assert torch.equal(ours.encode(some_images()).mean, theirs)


# ------------------------------------------------------------------- provenance, exports
def test_an_export_keeps_all_that_the_source_had(source, tmp_path):
    run = train_autoencoder(fine_tuning(source), folder=tmp_path / "run")
    export_autoencoder(tmp_path / "out", "diffusers", run)
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", source))
    assert ours == theirs and ours["scaling_factor"] == 0.7 and ours["force_upcast"] is False
    assert load_autoencoder(run).settings["shift_factor"] == 0.1


@pytest.mark.parametrize("how", [fine_tuning, distillation])
def test_provenance_reaches_checkpoint_card_and_report(how, source, tmp_path):
    run = train_autoencoder(how(source), folder=tmp_path / "run")
    origin = load_model(run, "autoencoder").provenance
    sha256 = fingerprint(load_autoencoder(source).state_dict())
    facts = {"source": str(source), "license": "openrail++", "sha256": sha256}
    assert facts.items() <= origin["imported"].items()
    key = "init" if how is fine_tuning else "teacher"
    assert origin["recipe"][key]["sha256"] == sha256
    export_autoencoder(tmp_path / "hub", "hub", run)
    card = (tmp_path / "hub/README.md").read_text()
    assert 'license: "openrail++"\n---' in card and str(source) in card and sha256 in card
    page = write_report([run], tmp_path / "report.html", images=1, device="cpu").read_text()
    assert all(fact in page for fact in (source.name, "openrail++", sha256))


def test_a_licence_is_kept_by_what_is_made_of_it_and_never_guessed(source, tmp_path):
    run = train_autoencoder(distillation(source), folder=tmp_path / "run")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nAnother project.\n")
    tuned = train_autoencoder(fine_tuning(run / "ckpt.pt"), folder=tmp_path / "tuned")
    origin = load_model(tuned, "autoencoder").provenance["imported"]
    assert origin["license"] == "openrail++" and origin["imported"]["source"] == str(source)
    shutil.copy(tmp_path / "source.pt", tmp_path / "plain.pt")  # beside that README
    _, given = finetune.read_given(fine_tuning(tmp_path / "plain.pt"))
    assert "license" not in given.origin


# ------------------------------------------------------------------------------ resuming
def test_a_resume_needs_the_same_source(source, tmp_path):
    begun = fine_tuning(source, "phases=[{resolution: 32, steps: 6}]")
    run, out = train_autoencoder(begun, folder=tmp_path / "run"), tmp_path / "run"
    (out / "result.json").unlink()
    moved = shutil.copytree(source, tmp_path / "moved")
    again = fine_tuning(moved, "phases=[{resolution: 32, steps: 6}]")
    assert train_autoencoder(again, folder=out) == run  # the same weights elsewhere
    (out / "result.json").unlink()
    other = load_autoencoder(source)
    with torch.no_grad():
        other.decoder.conv_out.bias += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(LdmError, match=r"another configuration \(init.sha256\)"):
        train_autoencoder(
            fine_tuning(tmp_path / "other", "phases=[{resolution: 32, steps: 6}]"), folder=out
        )
    with pytest.raises(LdmError, match=r"holds other weights than init.sha256"):
        begin(fine_tuning(source, f"init.sha256={'0' * 64!r}"), tmp_path)


@pytest.mark.parametrize("how", [fine_tuning, distillation])
def test_a_resumed_run_gives_the_bits_of_an_unbroken_one(how, source, tmp_path):
    whole = train_autoencoder(how(source), folder=tmp_path / "whole")
    broken = shutil.copytree(whole, tmp_path / "broken")
    for name in ("result.json", "ckpt.pt", "ckpt.safetensors", "best.pt", "best.safetensors"):
        (broken / name).unlink()
    shutil.rmtree(latest_state(broken / "state"))
    train_autoencoder(how(source), folder=broken)
    a, b = (load_model(run, "autoencoder") for run in (whole, broken))
    assert a.sha256 == b.sha256
    assert a.provenance.get("teacher_latent_std") == b.provenance.get("teacher_latent_std")


# ------------------------------------------------------------------------------- a teacher
def test_the_decoder_of_a_student_is_its_teachers(source, tmp_path):
    recipe = distillation(source)
    teacher = load_autoencoder(source)
    assert recipe.train == "encoder" and recipe.encoder.type == "litevae"
    for key in ("latent_channels", "conv1x1", "decoder"):
        assert getattr(recipe, key) == getattr(teacher.config, key)
    run = train_autoencoder(recipe, folder=tmp_path / "run")
    student = load_autoencoder(run)
    assert part(student, "decoder") == part(teacher, "decoder")
    assert torch.equal(student.quant_conv.weight, teacher.quant_conv.weight)
    assert student.settings == teacher.settings  # scaling and shift


def test_terms_are_those_of_the_teachers_posterior(source, tmp_path):
    run, state = begin(distillation(source), tmp_path)
    state.latent_std.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    images = some_images()
    student, teacher = (ae.encode(images) for ae in (state.autoencoder, load_autoencoder(source)))
    terms = train_step(run, state, images, range(4), ramp=0.0)
    difference = (student.mean - teacher.mean).detach().double().numpy()
    by_channel = np.abs(difference).mean(axis=(0, 2, 3)) / [0.5, 1.0, 2.0, 4.0]
    assert terms["latent"].item() == pytest.approx(by_channel.mean(), rel=1e-5)
    logvars = (student.logvar - teacher.logvar).detach().double().numpy()
    assert terms["logvar"].item() == pytest.approx(np.abs(logvars).mean(), rel=1e-5)
    decoded = load_autoencoder(source).decode(student.mean)  # no noise
    assert terms["l1"].item() == pytest.approx((decoded - images).abs().mean().item(), rel=1e-5)
    assert "kl" not in terms


@pytest.mark.parametrize("term", ["latent", "logvar", "l1", "wavelet", "adversarial"])
def test_every_term_reaches_the_encoder_and_nothing_else(term, source, tmp_path):
    weights = dict.fromkeys(("l1", "latent", "logvar", "gaussian", "wavelet"), 0.0)
    adversarial = 1.0 if term == "adversarial" else 0.0
    # one of the first is needed; this one has no gradient to speak of
    weights |= {"l1": 1e-30, term: 1.0}
    weights.pop("adversarial", None)
    words = [f"loss.{name}={value}" for name, value in weights.items()]
    run, state = begin(distillation(source, *words, f"adversarial.weight={adversarial}"), tmp_path)
    gradients = {}
    for name, parameter in state.autoencoder.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda g, name=name: gradients.update({name: g.norm().item()}))
    decoder = part(state.autoencoder, "decoder")
    train_step(run, state, some_images(), range(4), ramp=1.0)
    assert gradients and all(name.startswith("encoder.") for name in gradients)
    assert sum(norm > 1e-12 for norm in gradients.values()) > 0.9 * len(gradients)
    assert part(state.autoencoder, "decoder") == decoder


def test_a_student_approaches_its_teacher(source, tmp_path):
    run, state = begin(distillation(source, "lr=3e-3"), tmp_path)
    images, losses = some_images(4, 16), []
    for _ in range(100):
        losses.append(train_step(run, state, images, range(4), ramp=0.0))
        state.advance()
    for term in ("latent", "logvar"):
        assert losses[-1][term] < 0.6 * losses[0][term]


def test_the_unit_is_the_teachers_deviation_over_the_data(source, tmp_path):
    recipe = distillation(source, "data={source: photos, crop: random, flip: false}")
    run, state = begin(recipe, tmp_path)
    photos = open_source(recipe.data, "train", 32)
    std = finetune.measure_teacher(run, recipe, state.teacher, photos)
    stream = batches(photos, recipe.data, 32, 0, 0, 8, 4)
    teacher = load_autoencoder(source)
    with torch.no_grad():
        means = [teacher.encode(to_float(batch.images)).mean for batch in stream]
    numbers = torch.cat(means).double().transpose(0, 1).flatten(1).numpy()
    assert std.tolist() == pytest.approx(numbers.std(axis=1).tolist(), rel=1e-5)
    trained = load_model(train_autoencoder(recipe, folder=tmp_path / "run"), "autoencoder")
    assert trained.provenance["teacher_latent_std"] == pytest.approx(std.tolist())


def test_an_untrained_teacher_is_refused(tmp_path):
    ae = sdvae()
    with torch.no_grad():
        ae.quant_conv.weight.zero_()
    ae.save_pretrained(tmp_path / "flat")
    with pytest.raises(LdmError, match=r"standard deviations 0, .* one that is trained is needed"):
        train_autoencoder(distillation(tmp_path / "flat"), folder=tmp_path / "run")


def test_the_comparison_is_that_of_a_loop(source, tmp_path):
    _, state = begin(distillation(source), tmp_path)
    student, teacher = state.autoencoder.eval(), load_autoencoder(source)
    recipe = distillation(source)
    held_out = open_source(recipe.data, "val", 32)
    found = compare_with_teacher(
        student, state.teacher, held_out, 32, 3, torch.device("cpu"), limit=5
    )
    ours, theirs, scores = [], [], []
    for batch in evaluation_batches(held_out, 32, 1, 5):
        images = to_float(batch.images)
        with torch.no_grad():
            s, t = student.encode(images).mean, teacher.encode(images).mean
            recon, target = (to_float(to_uint8(teacher.decode(z))) for z in (s, t))
        scores.append((psnr(images, target).item(), psnr(recon, target).item()))
        ours.append(s.double().numpy()[0])
        theirs.append(t.double().numpy()[0])
    a, b = (np.stack(each).transpose(1, 0, 2, 3).reshape(4, -1) for each in (ours, theirs))
    errors = np.sqrt(((a - b) ** 2).mean(1)) / b.std(1)
    correlations = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]
    assert [found[f"latent_error_{c}"] for c in range(4)] == pytest.approx(errors.tolist())
    assert [found[f"latent_correlation_{c}"] for c in range(4)] == pytest.approx(
        correlations, rel=1e-4
    )
    assert found["latent_error"] == pytest.approx(errors.mean())
    assert found["latent_correlation"] == pytest.approx(min(correlations), rel=1e-4)
    means = np.mean(scores, axis=0)
    assert [found["teacher_psnr"], found["psnr_to_teacher"]] == pytest.approx(
        means.tolist(), rel=1e-5
    )


@pytest.mark.parametrize("kind", ["tiny", "dc", "asymmetric", "consistency", "vq", "compvis"])
def test_teachers_of_other_classes(kind, tmp_path, capsys):
    path = tmp_path / kind
    if kind == "compvis":  # VQ, its convolution after the encoder of three channels
        torch.save({"state_dict": compvis_vq.checkpoint(**compvis_vq.SIZES)}, path)
    else:
        getattr(other_models, kind)().save_pretrained(path)
    teacher = load_autoencoder(path)
    recipe = distillation(path, f"encoder.depth={teacher.downsampling.bit_length() - 1}")
    student = load_autoencoder(train_autoencoder(recipe, folder=tmp_path / "run"))
    assert student.config.decoder == teacher.config.decoder
    assert part(student, "decoder") == part(teacher, "decoder")
    latents = teacher.encode(some_images(1)).mean
    torch.testing.assert_close(student.decode(latents), teacher.decode(latents))
    what = "latents, before the nearest codes," if kind in ("vq", "compvis") else "posterior"
    assert f"the encoder learns the {what} of {path}" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(UsageError, match=r"not trained: use .* as --teacher"):
        fine_tuning(path)


def test_terms_are_zero_for_the_teacher_itself():
    posterior = sdvae().encode(some_images())
    target = TeacherPosterior(posterior, torch.rand(4) + 0.5)
    assert latent(posterior, target) == 0 and logvar(posterior, target) == 0
