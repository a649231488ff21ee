import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from autoencoders import (
    Autoencoder,
    AutoencoderConfig,
    DiagonalGaussian,
    build_autoencoder,
    load_autoencoder,
)
from autoencoders.layers import PIXELS_AT_ONCE, SelfModulatedConv2d
from ldm.checkpoint import ModelFile, save_model
from ldm.config import list_presets, preset_summary, resolve, to_tree
from ldm.errors import LdmError, UsageError
from tests.autoencoders.parameters import count
from tests.golden import LITEVAE_ENCODER_PARAMETERS

OUR_PRESETS = {"litevae-s", "litevae-b", "litevae-m", "litevae-l", "sdvae", "sdvae-small", "tiny"}
F = {"litevae-b-f4": 4, "litevae-b-f16": 16, "demo": 4}  # 8, all others


@pytest.fixture(autouse=True)
def seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def tiny():
    return build_autoencoder("tiny", decoder={"channels": 8})


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 48) * 2 - 1


# ---------------------------------------------------------------------------------- building
@pytest.mark.parametrize("preset", list_presets("ae"))
def test_presets_build_and_say_what_they_are(preset):
    assert preset_summary("ae", preset).endswith(".")
    with torch.device("meta"):
        ae = build_autoencoder(preset)
        n_z, f = ae.config.latent_channels, ae.downsampling
        out = ae(torch.zeros(1, 3, 64, 64), noise=torch.zeros(1, n_z, 64 // f, 64 // f))
    assert f == F.get(preset, 8)
    assert out.recon.shape == (1, 3, 64, 64)


def test_no_preset_of_the_papers_is_missing():
    assert OUR_PRESETS | {"dwt", "dwt-2", *F} <= set(list_presets("ae"))


@pytest.mark.parametrize("size", "sbml")
def test_plus_presets_are_the_papers_but_for_what_they_say(size):
    net = {"group_channels": 4}
    encoder = {"shortcut": "wavelet", "extractor": net, "aggregator": net}
    with torch.device("meta"):
        plus = build_autoencoder(f"litevae-{size}-plus")
        changed = build_autoencoder(f"litevae-{size}", encoder=encoder)
    assert plus.config == changed.config
    assert count(plus.encoder) == LITEVAE_ENCODER_PARAMETERS[f"litevae-{size}"]


def test_defaults_are_litevae_b():
    assert build_autoencoder("litevae-b").config == AutoencoderConfig()


def test_tiny_is_tiny():
    assert count(build_autoencoder("tiny")) < 3.1e6


def test_overrides_reach_into_sections():
    with torch.device("meta"):
        ae = build_autoencoder(
            "litevae-b",
            latent_channels=12,
            conv1x1=True,
            decoder={"norm": "smc", "channels": 32},
            encoder={"extractor": {"channels": 8}},
        )
        plain = build_autoencoder(ae.config, conv1x1=False)
    assert ae.config.encoder.extractor.multipliers == (1, 2, 3)
    assert ae.quant_conv.weight.shape == (24, 24, 1, 1)
    assert ae.post_quant_conv.weight.shape == (12, 12, 1, 1)
    assert isinstance(ae.decoder.middle[0].conv1, SelfModulatedConv2d)
    assert isinstance(plain.quant_conv, nn.Identity)
    assert plain.config.latent_channels == 12


def test_least_channels_reach_every_group():
    net = {"channels": 32, "group_channels": 4}
    decoder = {"channels": 32, "group_channels": 4, "norm": "group"}
    with torch.device("meta"):
        for overrides in (
            {"encoder": {"extractor": net, "aggregator": net}},
            {"encoder": {"type": "sdvae", **net}},
        ):
            ae = build_autoencoder("tiny", decoder=decoder, **overrides)
            norms = [m for m in ae.modules() if isinstance(m, nn.GroupNorm)]
            assert min(m.num_channels // m.num_groups for m in norms) == 4
            assert all(any(m in part.modules() for m in norms) for part in (ae.encoder, ae.decoder))


@pytest.mark.parametrize("conv1x1", [False, True])
@pytest.mark.parametrize(
    "encoder",
    [
        {},
        {"shortcut": "wavelet"},
        {"type": "sdvae", "channels": 8},
        {"aggregator": {"type": "vit", "width": 16, "heads": 2}},
    ],
)
@torch.no_grad()
def test_mean_and_log_variance_are_adjusted_apart(encoder, conv1x1, images):
    decoder = {"channels": 8, "multipliers": [1, 2, 2, 2]}
    ae = build_autoencoder("tiny", encoder=encoder, decoder=decoder, conv1x1=conv1x1)
    before = ae.encode(images)
    ae.adjust_posterior(logvar_shift=-5)
    lower = ae.encode(images)
    assert torch.equal(lower.mean, before.mean)
    torch.testing.assert_close(lower.logvar, before.logvar - 5)
    ae.adjust_posterior(mean_gain=6)
    larger = ae.encode(images)
    assert torch.equal(larger.logvar, lower.logvar)
    by = 6 * before.mean
    if "shortcut" in encoder and not conv1x1:  # which is added after the last layer
        ae.adjust_posterior(mean_gain=1e-30)
        by = by - 5 * ae.encode(images).mean
    torch.testing.assert_close(larger.mean, by, rtol=1e-4, atol=1e-5)


def test_the_1x1_convolutions_keep_their_keys_in_files():
    ae = build_autoencoder("tiny", conv1x1=True)
    tensors = ae.state_dict()
    keys = [f"{name}.{kind}" for name in ("pre_conv", "post_conv") for kind in ("weight", "bias")]
    assert list(tensors)[-4:] == keys
    fresh = copy.deepcopy(build_autoencoder("tiny", conv1x1=True))
    fresh.load_state_dict(tensors)
    assert torch.equal(fresh.quant_conv.weight, ae.quant_conv.weight)
    assert torch.equal(fresh.post_quant_conv.bias, ae.post_quant_conv.bias)


def test_keys_a_person_types():
    tree = {"encoder": {"type": "litevae"}}
    config = resolve(
        AutoencoderConfig,
        tree,
        [
            "latent_channels=12",
            "decoder.norm=smc",
            "encoder.extractor.channels=16",
            "encoder.extractor.multipliers=[1,2,2]",
            "encoder.aggregator.blocks=1",
        ],
    )
    assert config.encoder.extractor.multipliers == (1, 2, 2)
    assert resolve(AutoencoderConfig, tree, ["encoder.type=sdvae"]).encoder.channels == 128


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"latent_chanels": 3}, "unknown key 'latent_chanels'; did you mean 'latent_channels'?"),
        ({"latent_channels": 0}, "'latent_channels': "),
        ({"encoder": {"channels": 3}}, "unknown key 'encoder.channels'"),
        ({"encoder": {"type": "vit"}}, "'encoder': "),
        ({"encoder": {"extractor": {"multipliers": []}}}, "'encoder.extractor.multipliers': "),
        ({"decoder": {"norm": "batch"}}, "'decoder.norm': "),
        ({"encoder": {"shortcut": "dwt"}}, "'encoder.shortcut': "),
        ({"encoder": {"extractor": {"group_channels": 0}}}, "'encoder.extractor.group_channels'"),
        (
            {"decoder": {"multipliers": [1, 2]}},
            "upsamples 2×, the encoder downsamples 8×: set encoder.depth=1, or give "
            "decoder.multipliers 4 entries",
        ),
        (
            {"decoder": {"output": "wavelet"}},
            "8×: set encoder.depth=4, or give decoder.multipliers 3",
        ),
    ],
)
def test_bad_values_are_one_line(overrides, said):
    with pytest.raises(UsageError) as caught:
        build_autoencoder("litevae-b", **overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_preset():
    with pytest.raises(UsageError, match="no preset 'litevae-x'; did you mean"):
        build_autoencoder("litevae-x")


# -------------------------------------------------------------------------------- running
@pytest.mark.parametrize("preset", ["tiny", "sdvae"])
def test_shapes_and_types(preset, images):
    small = {"encoder": {"channels": 8}} if preset == "sdvae" else {}
    ae = build_autoencoder(preset, decoder={"channels": 8}, **small)
    out = ae(images)
    assert out.recon.shape == images.shape
    assert out.latents.shape == out.posterior.mean.shape == (2, 4, 4, 6)
    assert out.posterior.kl().shape == (2,)


def test_forward_is_encode_draw_decode(tiny, images):
    noise = torch.randn(2, 4, 4, 6)
    out, posterior = tiny(images, noise=noise), tiny.encode(images)
    assert torch.equal(out.latents, posterior.sample(noise=noise))
    assert torch.equal(out.recon, tiny.decode(out.latents))
    assert torch.equal(tiny(images, sample=False).latents, posterior.mode())


def test_noise_belongs_to_samples(tiny, images):
    noise = torch.randn(2, 4, 4, 6)
    together = tiny(images, noise=noise).recon
    alone = tiny(images[1:], noise=noise[1:]).recon
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(30, 32), (32, 61), (9, 23)])
def test_odd_sides_are_padded_by_their_last_pixels_and_cropped(tiny, size):
    images = torch.rand(1, 3, *size) * 2 - 1
    padded = images
    while padded.shape[-2] % 8:
        padded = torch.cat([padded, padded[..., -1:, :]], dim=-2)
    while padded.shape[-1] % 8:
        padded = torch.cat([padded, padded[..., -1:]], dim=-1)
    out = tiny(images, sample=False)
    assert out.recon.shape == images.shape
    assert torch.equal(out.latents, tiny.encode(padded).mode())
    assert torch.equal(out.recon, tiny.decode(out.latents)[..., : size[0], : size[1]])


@pytest.mark.parametrize("size", [(4, 8), (8, 7), (0, 8)])
def test_sides_smaller_than_a_latent_are_refused(tiny, size):
    with pytest.raises(LdmError, match=f"{size[0]}×{size[1]} pixels are smaller than one latent"):
        tiny.encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("norm", ["group", "smc"])
def test_bf16_autocast_answers_in_float32_and_near(images, norm):
    ae = build_autoencoder("tiny", decoder={"channels": 8, "norm": norm})
    ae = ae.to(memory_format=torch.channels_last)
    noise = torch.randn(2, 4, 4, 6)
    expected = ae(images, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        out = ae(images, noise=noise)
        assert ae.decoder.conv_out(torch.zeros(1, 8, 8, 8)).dtype == torch.bfloat16
    for tensor in (out.recon, out.latents, out.posterior.mean, out.posterior.logvar):
        assert tensor.dtype == torch.float32
    assert (out.recon - expected.recon).abs().mean() < 0.05 * expected.recon.std() + 0.02


def test_every_parameter_learns(images):
    ae = build_autoencoder("tiny", conv1x1=True, decoder={"channels": 8})
    out = ae(images, noise=torch.randn(2, 4, 4, 6))
    (out.recon.square().mean() + out.posterior.kl().mean()).backward()
    # softmax ignores a shift shared by all keys: the keys' bias alone has no gradient
    learning = {n: p for n, p in ae.named_parameters() if not n.endswith("key.bias")}
    for name, parameter in learning.items():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("output", ["image", "wavelet"])
def test_fused_it_answers_the_same_and_cannot_be_saved(images, tmp_path, output):
    multipliers = [1, 2, 4] if output == "wavelet" else [1, 2, 4, 8]
    decoder = {"channels": 8, "norm": "smc", "output": output, "multipliers": multipliers}
    ae = build_autoencoder("tiny", decoder=decoder).eval()
    fused = ae.fuse()
    with torch.no_grad():
        expected = ae(images, sample=False).recon
        torch.testing.assert_close(fused(images, sample=False).recon, expected, rtol=0, atol=1e-5)
    assert not any(isinstance(part, SelfModulatedConv2d) for part in fused.modules())
    with pytest.raises(LdmError, match="save the one that it was fused from"):
        fused.save_pretrained(tmp_path / "fused")
    assert any(parameter.requires_grad for parameter in ae.parameters())
    ae.state_dict()


@pytest.mark.parametrize("preset", ["litevae-s", "tiny"])
@torch.no_grad()
def test_one_image_of_one_latent(preset):
    ae = build_autoencoder(preset, decoder={"channels": 8}).eval()
    assert ae(torch.zeros(1, 3, 8, 8), sample=False).recon.isfinite().all()


@torch.no_grad()
def test_many_images_go_through_a_few_at_a_time(tiny, monkeypatch):
    seen, forward = [], tiny.encoder.forward
    monkeypatch.setitem(PIXELS_AT_ONCE, "litevae", 2 * 32 * 32)
    monkeypatch.setattr(tiny.encoder, "forward", lambda x: seen.append(len(x)) or forward(x))
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    together = tiny.eval()(images, sample=False)
    assert seen == [2, 2, 1]
    alone = torch.cat([tiny(image[None], sample=False).recon for image in images])
    torch.testing.assert_close(together.recon, alone, rtol=0, atol=1e-5)
    with torch.enable_grad():
        seen.clear()
        tiny(images)
    assert seen == [5]


# ---------------------------------------------------------------------------- posterior
@pytest.fixture
def posterior(rng):
    return DiagonalGaussian.from_moments(torch.randn(3, 8, 4, 5, generator=rng))


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def test_kl_is_that_of_torch_distributions(posterior):
    normal = Normal(posterior.mean.double(), (0.5 * posterior.logvar.double()).exp())
    expected = kl_divergence(normal, Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    assert posterior.kl().shape == (3,)
    torch.testing.assert_close(posterior.kl().double(), expected, rtol=1e-6, atol=0)


def test_kl_to_itself_is_zero():
    zeros = torch.zeros(2, 4, 3, 3)
    assert DiagonalGaussian(zeros, zeros).kl().tolist() == [0, 0]


def test_moments_are_mean_then_logvar():
    moments = torch.arange(8.0).view(1, 8, 1, 1)
    posterior = DiagonalGaussian.from_moments(moments)
    assert posterior.mean.flatten().tolist() == [0, 1, 2, 3]
    assert posterior.logvar.flatten().tolist() == [4, 5, 6, 7]


def test_logvar_is_clamped_and_all_is_finite_float32():
    posterior = DiagonalGaussian.from_moments(torch.tensor([0.0, 0.0, -1e4, 1e4]).view(1, 4, 1, 1))
    assert posterior.logvar.flatten().tolist() == [-30, 20]
    assert posterior.kl().isfinite().all()
    half = DiagonalGaussian.from_moments(torch.ones(1, 4, 1, 1, dtype=torch.bfloat16))
    assert half.mean.dtype == half.logvar.dtype == half.sample().dtype == torch.float32


def test_samples_have_its_mean_and_spread(rng):
    posterior = DiagonalGaussian(
        torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), -1.0)
    )
    draws = posterior.sample(generator=rng)
    # 40,000 draws: five standard errors
    assert abs(draws.mean().item() - 3) < 5 * 0.607 / 200
    assert abs(draws.std().item() - 0.6065) < 5 * 0.607 / 283


def test_noise_given_is_the_noise_used(posterior, rng):
    noise = torch.randn(3, 4, 4, 5, generator=rng)
    expected = posterior.mean + posterior.logvar.exp().sqrt() * noise
    torch.testing.assert_close(posterior.sample(noise=noise), expected)
    torch.testing.assert_close(posterior.sample(noise=torch.zeros_like(noise)), posterior.mode())


def test_a_generator_repeats_its_draws(posterior):
    first, second = (posterior.sample(generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, posterior.mode())


def test_noise_that_would_broadcast_is_refused(posterior):
    with pytest.raises(ValueError, match=r"noise \(3, 4, 1, 1\) for latents \(3, 4, 4, 5\)"):
        posterior.sample(noise=torch.zeros(3, 4, 1, 1))


# -------------------------------------------------------------------------------- files
def write(path, ae, kind="autoencoder", config=None, weights=None):
    config = to_tree(ae.config) if config is None else config
    save_model(path, ModelFile(kind, config, ae.state_dict() if weights is None else weights))


@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt.safetensors", ""])
def test_a_file_gives_the_same_model(tmp_path, tiny, images, name):
    write(tmp_path / "ckpt.pt", tiny)
    state_before = torch.random.get_rng_state()
    loaded = load_autoencoder(tmp_path / name)
    assert torch.equal(torch.random.get_rng_state(), state_before)
    assert loaded.config == tiny.config
    assert not loaded.training
    expected = tiny.eval().encode(images).mean
    assert torch.equal(loaded.encode(images).mean, expected)
    state = tiny.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_state_dict_round_trip(tiny, images):
    twin = Autoencoder(tiny.config)
    twin.load_state_dict(tiny.state_dict())
    assert torch.equal(twin(images, sample=False).recon, tiny(images, sample=False).recon)


def test_half_precision_files_are_read_as_float32(tmp_path, tiny):
    half = {name: tensor.bfloat16() for name, tensor in tiny.state_dict().items()}
    write(tmp_path / "ckpt.pt", tiny, weights=half)
    dtypes = {parameter.dtype for parameter in load_autoencoder(tmp_path).parameters()}
    assert dtypes == {torch.float32}


def refusal(path):
    with pytest.raises(LdmError) as caught:
        load_autoencoder(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_there(tmp_path):
    assert "no checkpoint at" in refusal(tmp_path / "none.pt")
    assert "holds no ckpt.pt" in refusal(tmp_path)


def test_the_other_stage(tmp_path, tiny):
    write(tmp_path / "ckpt.pt", tiny, kind="diffusion")
    assert "is a stage-two diffusion model" in refusal(tmp_path / "ckpt.pt")


def test_a_newer_format(tmp_path, tiny):
    write(tmp_path / "ckpt.pt", tiny)
    tree = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    torch.save(tree | {"format": 99}, tmp_path / "ckpt.pt")
    assert "has format 99" in refusal(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file(tmp_path, tiny, name, kept):
    write(tmp_path / "ckpt.pt", tiny)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: math.floor(len(content) * kept)])
    assert "damaged" in refusal(tmp_path / name)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code of the file was run",))


def test_a_file_that_would_run_code(tmp_path):
    torch.save({"format": 1, "kind": "autoencoder", "weights": Bomb()}, tmp_path / "ckpt.pt")
    assert "loading it would run code" in refusal(tmp_path / "ckpt.pt")


def test_a_config_of_another_version(tmp_path, tiny):
    write(tmp_path / "ckpt.pt", tiny, config=to_tree(tiny.config) | {"flow": True})
    said = refusal(tmp_path)
    assert "is not one of this version: unknown key 'flow'" in said
    assert str(tmp_path) in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"decoder.conv_out.bias": torch.zeros(4)},
            "decoder.conv_out.bias is (4,) in the file, (3,) in the model",
        ),
        (
            {"decoder.conv_out.bias": None},
            "decoder.conv_out.bias is none in the file, (3,) in the model",
        ),
        ({"extra": torch.zeros(2, 2)}, "extra is (2, 2) in the file, none in the model"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, tiny, change, said):
    weights = {k: v for k, v in (tiny.state_dict() | change).items() if v is not None}
    write(tmp_path / "ckpt.pt", tiny, weights=weights)
    assert said in refusal(tmp_path)
