"""A latent model: classifier-free guidance and autoguidance."""

import weakref
from itertools import pairwise

import pytest
import torch

import pipelines.sampling.model as module
from diffusion.samplers import sample_heun
from diffusion.schedules import karras_sigmas
from ldm.checkpoint import load_model
from ldm.config import drop_defaults
from ldm.seeds import normal
from tests.pipelines.untrained import CLASSES, load, make_model, pipeline, said

FEW = {"steps": 3}


@pytest.fixture
def pipe():
    return pipeline(0)


@pytest.fixture
def other():
    """Another network on the same latents."""
    return pipeline(1)


@pytest.fixture
def conditional():
    return pipeline(0, CLASSES)


def guided(strong, weak, scale, low=0.0):
    """The formula, with no regard to which of the two need be asked."""

    def denoise(x, sigma):
        if sigma <= low:
            return strong(x, sigma)
        return weak(x, sigma) + scale * (strong(x, sigma) - weak(x, sigma))

    noise = normal(0, "sample", range(2), (4, 4, 4))
    return sample_heun(denoise, noise, karras_sigmas(3))


def test_settings_that_earlier_versions_lacked_leave_no_trace_in_the_identity(
    tmp_path, monkeypatch
):
    """Samples of an earlier version's model must be found again as its own."""
    hashed, sha256 = [], module.new_sha256
    monkeypatch.setattr(module, "new_sha256", lambda data: (hashed.append(data), sha256(data))[1])
    load(make_model(tmp_path, 0))
    (text,) = hashed
    late = "group_channels", "shortcut", "reduction", "codes", "variance", "embedding_multiplier"
    for key in map(str.encode, late):
        assert key not in text, key
    tree = {"key": 1, "a": {"key": 2}, "b": [{"c": 0}], "d": {"e": {"key": 1, "f": 3}}}
    drop_defaults(tree, {"key": 1})
    assert tree == {"a": {"key": 2}, "b": [{"c": 0}], "d": {"e": {"f": 3}}}


def test_classifier_free_guidance(conditional):
    labels = torch.tensor([2, 2])
    z = guided(
        lambda x, sigma: conditional.denoiser(x, sigma, labels), conditional.denoiser, 3.0, 0.5
    )
    made = conditional(2, labels="emu", guidance=3, interval=(0.5, 90), **FEW)
    torch.testing.assert_close(made, conditional.codec.decode(z), atol=1e-5, rtol=0)
    assert not torch.equal(made, conditional(2, labels="emu", guidance=3, **FEW))
    assert torch.equal(conditional(2, labels=2, guidance=1, **FEW), conditional(2, labels=2, **FEW))


def test_autoguidance(pipe, other):
    z = guided(pipe.denoiser, other.denoiser, 2.0)
    made = pipe(2, guidance=2, guide=other, **FEW)
    torch.testing.assert_close(made, pipe.codec.decode(z), atol=1e-5, rtol=0)


def test_autoguidance_by_a_path_without_classes(conditional, tmp_path):
    plain = make_model(tmp_path, 1)
    labels = torch.tensor([1, 1])
    z = guided(lambda x, sigma: conditional.denoiser(x, sigma, labels), load(plain).denoiser, 2.0)
    made = conditional(2, labels=1, guidance=2, guide=plain, **FEW)
    torch.testing.assert_close(made, conditional.codec.decode(z), atol=1e-5, rtol=0)


def test_guidance_of_the_first_channels(pipe, other):
    def towards(x, sigma):
        strong, weak = pipe.denoiser(x, sigma), other.denoiser(x, sigma)
        return torch.cat([(weak + 2 * (strong - weak))[:, :3], strong[:, 3:]], dim=1)

    z = sample_heun(towards, normal(0, "sample", range(2), (4, 4, 4)), karras_sigmas(3))
    made = pipe(2, guidance=2, guide=other, guided_channels=3, **FEW)
    torch.testing.assert_close(made, pipe.codec.decode(z), atol=1e-5, rtol=0)
    told = said(lambda: pipe(1, guidance=2, guide=other, guided_channels=5))
    assert told == "guided_channels=5: the latents have 4 channels"


FLOW = {"settings": ("denoiser={type: flow, shift: 2, time_scale: 30}",), "sigma_data": 1.0}


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_flow_follows_its_velocity_in_time(tmp_path, sampler):
    flow = load(make_model(tmp_path, 0, **FLOW))
    x_t, times = normal(0, "sample", range(2), (4, 4, 4)), [1, 4 / 5, 1 / 2, 0]  # 2t / (1 + t)

    def velocity(x_t, t):
        return flow.denoiser.network(x_t, torch.full((2,), 30.0 * t))

    with torch.no_grad():
        for t, following in pairwise(times):
            v = velocity(x_t, t)
            x_next = x_t + (following - t) * v
            if sampler == "heun" and following:
                x_next = x_t + (following - t) * (v + velocity(x_next, following)) / 2
            x_t = x_next
    made = flow(2, sampler=sampler, **FEW)
    torch.testing.assert_close(made, flow.codec.decode(x_t), atol=1e-4, rtol=0)
    assert torch.equal(made, flow(2, sampler=sampler, schedule="flow", shift=2, **FEW))
    assert not torch.allclose(made, flow(2, sampler=sampler, shift=1, **FEW), atol=1e-3)


@pytest.mark.parametrize("sampler", ["heun", "euler", "dpmpp-2m"])
def test_a_flow_edits_and_paints(tmp_path, sampler):
    flow, guide = (load(make_model(tmp_path / str(seed), seed, **FLOW)) for seed in (0, 1))
    images, how = flow(2, seed=7, **FEW), {"sampler": sampler, **FEW}
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    painted = flow.inpaint(images, mask, **how)
    assert torch.equal(painted[..., 16:], images[..., 16:])
    some, all_of_it = (flow.edit(images, strength, **how) for strength in (0.67, 1))
    assert torch.equal(all_of_it, flow(2, **how))
    assert some.isfinite().all() and not torch.equal(some, all_of_it)
    guided = flow(2, guidance=2, guide=guide, interval=(0.1, 5), **how)
    assert guided.isfinite().all() and not torch.equal(guided, flow(2, **how))


def test_a_flow_and_an_edm_do_not_guide_each_other(pipe, tmp_path):
    flow = load(make_model(tmp_path, 1, **FLOW))
    for one, guide in ((pipe, flow), (flow, pipe)):
        assert "other statistics" in said(lambda a=one, b=guide: a(1, guidance=2, guide=b))


@pytest.mark.parametrize("precisions", [("fp32", "bf16"), ("bf16", "fp32")])
def test_guide_may_have_another_precision(precisions):
    pipe, guide = (pipeline(seed).to("cpu", p) for seed, p in enumerate(precisions))
    assert pipe(1, guidance=2, guide=guide, **FEW).isfinite().all()


def test_guide_gets_the_class(conditional):
    guide, labels = pipeline(1, CLASSES), torch.tensor([2, 2])
    z = guided(
        lambda x, sigma: conditional.denoiser(x, sigma, labels),
        lambda x, sigma: guide.denoiser(x, sigma, labels),
        2.0,
    )
    made = conditional(2, labels="emu", guidance=2, guide=guide, **FEW)
    torch.testing.assert_close(made, conditional.codec.decode(z), atol=1e-5, rtol=0)
    # unlike without a class
    z = guided(lambda x, sigma: conditional.denoiser(x, sigma, labels), guide.denoiser, 2.0)
    assert (made - conditional.codec.decode(z)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"autoencoder_seed": 1}, "the guide has another autoencoder than this model"),
        ({"std": 4.1}, "other statistics of the latents"),
        ({"mean": 0.2}, "other statistics of the latents"),
        ({"sigma_data": 1.0}, "other statistics of the latents"),
        ({"settings": ("resolution=64",)}, "latents of another shape, (4, 8, 8) against (4, 4, 4)"),
        ({"classes": ("cow",)}, "other classes"),
    ],
)
def test_guide_of_other_latents_is_refused(pipe, tmp_path, how, message):
    guide = make_model(tmp_path, 1, **how)
    assert message in said(lambda: pipe(1, guidance=2, guide=guide))


def test_guide_may_have_slightly_other_statistics(pipe, tmp_path):
    guide = make_model(tmp_path / "anew", 1, std=4.02, mean=0.01)
    assert pipe(1, guidance=2, guide=guide, **FEW).isfinite().all()
    # given twice the standard deviation, of latents that vary twice as much: the same z
    scaled = make_model(tmp_path / "scaled", 1, std=8.0, sigma_data=1.0)
    assert pipe(1, guidance=2, guide=scaled, **FEW).isfinite().all()


# ----------------------------------------------------------- guidance that would do nothing
def test_unconditional_label_cannot_be_guided(conditional):
    for labels in (-1, [1, -1]):
        told = said(lambda labels=labels: conditional(2, labels=labels, guidance=2))
        assert "label -1 is the unconditional model" in told and "a guide" in told
    assert len(conditional(1, labels=-1, guidance=2, guide=pipeline(1), **FEW)) == 1


def test_model_without_label_dropout_cannot_guide_itself(tmp_path):
    knows = load(make_model(tmp_path, 0, CLASSES, settings=("label_dropout=0",)))
    assert "trained with label_dropout=0" in said(lambda: knows(1, labels=1, guidance=2))
    assert len(knows(1, labels=1, guidance=2, guide=pipeline(1), **FEW)) == 1
    assert len(knows(1, labels=1, **FEW)) == 1


def test_guide_must_denoise_the_guided_levels(pipe, tmp_path):
    levels = "denoiser={type: discrete, beta_start: 0.00085, beta_end: 0.012}"
    guide = load(make_model(tmp_path, 1, settings=(levels,)))
    low, high = guide.denoiser.sigma_min, guide.denoiser.sigma_max
    told = said(lambda: pipe(1, guidance=2, guide=guide))
    assert f"σ from 0.002 to 80, and it denoises {low:g} to {high:g}: narrow the interval" in told
    how = {"guidance": 2, "guide": guide, **FEW}
    assert "σ from 0.002 to" in said(lambda: pipe(1, interval=(0, 9), **how))
    assert len(pipe(1, interval=(low, 5.0), **how)) == 1
    assert len(pipe(1, sigma_min=low, sigma_max=high, **how)) == 1
    assert "it denoises" in said(lambda: pipe(1, churn=9, sigma_min=low, sigma_max=high, **how))


def test_in_bf16_networks_are_cast_once_and_stay_float32(model, monkeypatch):
    pipe = load(model)
    whole = pipe(n=2, steps=2)
    once = pipe.to(precision="bf16")(n=2, steps=2)
    for part in (pipe.denoiser, pipe.codec):
        assert {tensor.dtype for tensor in part.state_dict().values()} == {torch.float32}
    monkeypatch.setattr(module, "cast_for_autocast", lambda network: network)
    assert torch.equal(pipe.to(precision="bf16")(n=2, steps=2), once)
    assert not torch.equal(once, whole)
    assert torch.equal(pipe.to(precision="fp32")(n=2, steps=2), whole)


def test_the_file_is_let_go(model, monkeypatch):
    files = []

    def read(*arguments):
        file = load_model(*arguments)
        files.append(weakref.ref(file))
        return file

    monkeypatch.setattr(module, "load_model", read)
    pipe = load(model)
    assert files[0]() is None and pipe.device.type == "cpu"
