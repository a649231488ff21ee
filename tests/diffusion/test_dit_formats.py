"""DiT by other people's names: diffusers' DiTTransformer2DModel, and the authors' checkpoints."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file
from torch import nn

from diffusion.dit import DiT, DiTConfig, coordinates, rotation, sincos
from diffusion.dit_formats import (
    VARIANCE,
    config_from_authors,
    config_from_diffusers,
    diffusers_config,
    find_denoiser,
    frequencies,
    read_checkpoint,
    read_diffusers,
    to_diffusers,
    write_diffusers,
)
from diffusion.flow import FlowConfig
from ldm.errors import LdmError, UsageError

CONFIG = DiTConfig(width=48, depth=3, heads=3, classes=5, grid=4, frequency_shift=1)
CASES = {
    "classes": CONFIG,
    "no classes": CONFIG.model_copy(update={"classes": 0}),
    "patches of 4": CONFIG.model_copy(update={"patch": 4, "latent_channels": 3, "grid": 3}),
    "single latents": CONFIG.model_copy(update={"patch": 1}),
}
EVERY = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def scrambled(network, seed=0):
    """Random numbers everywhere: the layers that begin at 0 would hide all others."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5, generator=generator)
    return network.eval()


def build(config=CONFIG):
    return scrambled(DiT(config))


def inputs(config, side=None):
    side = side or config.grid * config.patch
    x = torch.randn(3, config.latent_channels, side, side, generator=torch.manual_seed(1))
    time = torch.tensor([0.0, 17.0, 999.0])
    ours = torch.tensor([config.classes - 1, 0, -1]) if config.classes else None
    theirs = torch.tensor([config.classes - 1, 0, config.classes] if config.classes else [0] * 3)
    return x, time, ours, theirs


def refusal(call):
    with pytest.raises(LdmError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------- diffusers
@EVERY
@torch.no_grad()
def test_diffusers_gives_our_answer_with_our_weights(config, tmp_path):
    ours = build(config)
    write_diffusers(tmp_path / "dit", ours)
    theirs, problems = DiTTransformer2DModel.from_pretrained(
        tmp_path / "dit", output_loading_info=True
    )
    assert not any(problems[key] for key in ("missing_keys", "unexpected_keys"))
    x, time, labels, their_labels = inputs(config)
    expected = theirs.eval()(x, time, class_labels=their_labels).sample
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(x, time, labels), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_positions_at_another_size_are_diffusers(tmp_path):
    ours = build()
    write_diffusers(tmp_path / "dit", ours)
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "dit").eval()
    for side in (4, 12):
        x, time, labels, their_labels = inputs(CONFIG, side)
        expected = theirs(x, time, class_labels=their_labels).sample
        torch.testing.assert_close(ours(x, time, labels), expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_frequencies_of_the_authors_are_one_setting_away_in_diffusers(tmp_path):
    ours = build(CONFIG.model_copy(update={"frequency_shift": 0}))
    write_diffusers(tmp_path / "dit", ours)
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "dit").eval()
    x, time, labels, their_labels = inputs(CONFIG)
    expected = ours(x, time, labels)
    assert (theirs(x, time, class_labels=their_labels).sample - expected).abs().max() > 0.1
    told = frequencies(ours.config)["frequencies"]
    assert "norm1.emb.time_proj.downscale_freq_shift = 0 in every one of transformer_b" in told
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    answer = theirs(x, time, class_labels=their_labels).sample
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-5)
    assert frequencies(CONFIG) == {}


@EVERY
def test_what_was_written_is_read_bit_for_bit(config, tmp_path):
    network = build(config)
    write_diffusers(tmp_path / "dit", network)
    again, weights, _ = read_diffusers(tmp_path / "dit")
    assert again == config
    kept = network.state_dict()
    assert list(weights) == list(kept)
    assert all(torch.equal(weights[name], kept[name]) for name in kept)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "Transformer2DModel"])
@torch.no_grad()
def test_a_folder_of_diffusers_without_its_variance_gives_its_first_half(name, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=24, num_layers=2, out_channels=8,
            sample_size=8, num_embeds_ada_norm=5,
        )  # fmt: skip
    for parameter in theirs.transformer_blocks[1].norm1.emb.parameters():
        parameter.requires_grad_(False)
    scrambled(theirs)
    theirs.transformer_blocks[1].norm1.emb = theirs.transformer_blocks[0].norm1.emb
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"_class_name": name}))
    config, weights, notes = read_diffusers(tmp_path)
    assert (config.width, config.heads, config.depth, config.grid) == (48, 2, 2, 4)
    assert notes[0] == VARIANCE
    assert "network.frequency_shift=1" in notes[1]
    network = DiT(config).eval()
    network.load_state_dict(weights)
    x, time, labels, their_labels = inputs(config)
    expected = theirs(x, time, class_labels=their_labels).sample[:, :4]
    assert expected.std() > 0.5
    # one of a block's norms has 1e-5 there where we have 1e-6
    torch.testing.assert_close(network(x, time, labels), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"mlp": "swiglu"}, "its mlp is swiglu, not gelu"),
        ({"norm": "rms"}, "its norm is rms, not layer"),
        ({"positions": "both"}, "its positions is both, not sincos"),
        ({"qk_norm": True}, "its qk_norm is True, not False"),
        ({"mlp_ratio": 2.0}, "its mlp_ratio is 2.0, not 4.0"),
        ({"grid": (4, 2)}, "it is not of square latents"),
        ({"grid": None}, "it is not of square latents"),
    ],
)
def test_networks_that_diffusers_cannot_express_are_refused(change, told):
    config = CONFIG.model_copy(update=change)
    message = refusal(lambda: diffusers_config(config, [8, 4]))
    assert message == f"no diffusers DiTTransformer2DModel can express this network: {told}"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"_class_name": "PixArtTransformer2DModel"}, "_class_name is 'PixArtTransformer2DModel'"),
        ({"norm_type": "ada_norm"}, "norm_type is 'ada_norm', only 'ada_norm_zero' is supported"),
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu'"),
        ({"cross_attention_dim": 768}, "cross_attention_dim is 768"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"norm_eps": 1e-3}, "norm_eps is 0.001"),
        ({"out_channels": 5}, "out_channels is 5, only 4 or 8 is supported"),
        ({"num_layers": 65}, "'depth'"),
        ({"patch_size": 0}, "'patch'"),
        ({"attention_head_dim": 30}, "width: 90 is no multiple of 4"),
        ({"sample_size": [8, 8]}, "sample_size is [8, 8], not a whole number"),
        ({"num_attention_heads": "x"}, "num_attention_heads is 'x', not a whole number"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm is None, not a whole number"),
    ],
)
def test_other_structures_are_refused(change, told, tmp_path):
    write_diffusers(tmp_path, build())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change))
    message = refusal(lambda: read_diffusers(tmp_path))
    assert f"{path} describes no network to load here: " in message and told in message


def test_blocks_that_embed_the_noise_level_differently_are_refused(tmp_path):
    write_diffusers(tmp_path, build())
    weights = to_diffusers(build().state_dict(), CONFIG)
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.weight"
    weights = {key: tensor.clone() for key, tensor in weights.items()}
    weights[name] += 1
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    message = refusal(lambda: read_diffusers(tmp_path))
    assert f"does not fit its own config: {name} is not that of the first block" in message
    assert DiTConfig(**config_from_diffusers(diffusers_config(CONFIG)).model_dump()) == CONFIG


# ------------------------------------------------------------------ the authors' checkpoints
AUTHORS = {
    "dit": DiTConfig(width=384, depth=2, heads=6, classes=5, grid=4),
    "no classes": DiTConfig(width=384, depth=1, heads=6, grid=4, patch=4),
    "turned": DiTConfig(width=96, depth=2, heads=4, classes=3, grid=4, positions="both"),
    "normalised": DiTConfig(width=96, depth=1, heads=3, classes=3, grid=4, qk_norm=True, patch=1),
    "lightning": DiTConfig(
        width=96, depth=2, heads=4, classes=3, grid=4, patch=1, mlp="swiglu", norm="rms",
        positions="both", qk_norm=True, latent_channels=6,
    ),
    "narrow mlp": DiTConfig(width=384, depth=1, heads=6, classes=3, grid=2, mlp_ratio=1.7),
}  # fmt: skip


def authors_tensors(config, variance=True):
    """A checkpoint by the names that the authors' code gives: (tensors, ours)."""
    network = build(config)
    told = {
        "patches": "x_embedder.proj", "embed.linear_in": "t_embedder.mlp.0",
        "embed.linear_out": "t_embedder.mlp.2", "embed.classes": "y_embedder.embedding_table",
        "last.norm": "final_layer.norm_final", "last.linear": "final_layer.linear",
        "last.modulation": "final_layer.adaLN_modulation.1",
    }  # fmt: skip
    inside = {
        "attention.qkv": "attn.qkv", "attention.proj": "attn.proj",
        "attention.query_norm": "attn.q_norm", "attention.key_norm": "attn.k_norm",
        "mlp.linear_in": "mlp.w12" if config.mlp == "swiglu" else "mlp.fc1",
        "mlp.linear_out": "mlp.w3" if config.mlp == "swiglu" else "mlp.fc2",
        "modulation": "adaLN_modulation.1", "norm1": "norm1", "norm2": "norm2",
    }  # fmt: skip
    for index in range(config.depth):
        told |= {f"blocks.{index}.{a}": f"blocks.{index}.{b}" for a, b in inside.items()}
    tensors = {}
    for name, tensor in network.state_dict().items():
        layer, _, part = name.rpartition(".")
        tensors[f"{told[layer]}.{part}"] = tensor
    if not config.classes:  # a model of one class, and no row for none
        row = torch.randn(1, config.width, generator=torch.manual_seed(2))
        tensors["y_embedder.embedding_table.weight"] = row
    at = coordinates(config.grid, config.grid, torch.device("cpu"))
    tensors["pos_embed"] = sincos(at, at, config.width).float()[None]
    if config.positions == "both":
        turns = rotation(at, at, config.width // config.heads)
        for name, table in zip(("cos", "sin"), turns, strict=True):
            tensors[f"feat_rope.freqs_{name}"] = table.float().repeat_interleave(2, dim=1)
    if variance:
        for part in ("weight", "bias"):
            name, c = f"final_layer.linear.{part}", config.latent_channels
            mean = tensors[name].unflatten(0, (-1, c))
            tensors[name] = torch.cat([mean, torch.full_like(mean, 9)], dim=1).flatten(0, 1)
    return tensors, network


WRAPPED = {
    "plain": lambda tensors: tensors,
    "training": lambda tensors: {
        "model": {name: tensor + 1 for name, tensor in tensors.items()}, "ema": tensors,
        "opt": {"state": {}}, "args": None,
    },
    "ddp": lambda tensors: {"ema": {f"module.{name}": t for name, t in tensors.items()}},
}  # fmt: skip


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("name", AUTHORS)
def test_a_checkpoint_of_the_authors_is_read_bit_for_bit(name, wrapped, tmp_path):
    tensors, network = authors_tensors(AUTHORS[name])
    torch.save(WRAPPED[wrapped](tensors), tmp_path / "dit.pt")
    config, weights, notes = read_checkpoint(tmp_path / "dit.pt")
    (tmp_path / "dit.pt").write_bytes(b"")  # everything has been taken out of the file
    assert notes[0] == VARIANCE
    guessed = not {"feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight"} & tensors.keys()
    assert len(notes) == 1 + guessed
    assert not guessed or f"have {AUTHORS[name].heads} heads, as the pub" in notes[1]
    kept = network.state_dict()
    if not AUTHORS[name].classes:
        kept["embed.linear_out.bias"] += tensors["y_embedder.embedding_table.weight"][0]
    assert config.hidden_width == AUTHORS[name].hidden_width
    assert config == AUTHORS[name].model_copy(update={"mlp_ratio": config.mlp_ratio})
    assert all(torch.equal(weights[key], kept[key]) for key in kept)


def test_a_network_without_a_variance_is_read_whole(tmp_path):
    tensors, network = authors_tensors(AUTHORS["dit"], variance=False)
    save_file(tensors, tmp_path / "sit.safetensors")
    _, weights, notes = read_checkpoint(tmp_path / "sit.safetensors", 6)
    assert notes == [] and torch.equal(weights["last.linear.weight"], network.last.linear.weight)


def test_the_published_network_is_found_in_its_shapes():
    shapes = {
        "x_embedder.proj.weight": (1152, 4, 2, 2), "blocks.0.mlp.fc2.weight": (1152, 4608),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "blocks.0.adaLN_modulation.1.weight": (6912, 1152),
        **{f"blocks.{i}.attn.proj.bias": (1152,) for i in range(28)},
    }  # fmt: skip
    at = coordinates(16, 16, torch.device("cpu"))
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    table = sincos(at, at, 1152).float()[None]
    found = config_from_authors(tensors | {"pos_embed": table})
    assert found == DiTConfig(width=1152, depth=28, heads=16, classes=1000, grid=16)
    half = config_from_authors(tensors | {"pos_embed": table.half()})
    assert half == found


@pytest.mark.parametrize(
    ("change", "heads", "told"),
    [
        ({"pos_embed": torch.zeros(1, 16, 384)}, None, "its pos_embed is not the table of sinus"),
        ({"pos_embed": torch.zeros(1, 15, 384)}, None, "its pos_embed is not the table"),
        ({"pos_embed": None}, None, "its pos_embed is not the table"),
        ({"blocks.0.adaLN_modulation.1.weight": torch.zeros(4 * 384, 384)}, None, "no shifts"),
        ({"blocks.0.attn.qkv.weight": None}, None, "blocks.0.attn.qkv.weight"),
        ({"projector.weight": torch.zeros(1)}, None, "projector.weight"),
        ({"blocks.9.attn.qkv.weight": torch.zeros(1)}, None, "blocks.2."),
        ({"final_layer.linear.bias": None}, None, "final_layer.linear.bias"),
        ({"final_layer.linear.weight": torch.zeros(20, 384)}, None, "final_layer.linear.weight"),
        ({"y_embedder.embedding_table.weight": torch.zeros(5)}, None, "embedding_table.weight is"),
        ({"blocks.0.mlp.fc2.weight": None}, None, "tensor blocks.0.mlp.fc2.weight is none"),
        ({}, 5, "heads: 5 do not divide the 384 channels of width"),
        ({"feat_rope.freqs_cos": torch.ones(16, 64)}, None, "its feat_rope.freqs_cos is not the t"),
    ],
)
def test_other_checkpoints_are_refused_in_a_line(change, heads, told, tmp_path):
    tensors = authors_tensors(AUTHORS["dit"])[0] | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    torch.save(tensors, tmp_path / "dit.pt")
    message = refusal(lambda: read_checkpoint(tmp_path / "dit.pt", heads))
    assert f"{tmp_path}/dit.pt cannot be read: " in message and told in message


def test_heads_of_no_published_width_must_be_given(tmp_path):
    config = DiTConfig(width=96, depth=1, heads=4, classes=3, grid=4)
    torch.save(authors_tensors(config)[0], tmp_path / "dit.pt")
    message = refusal(lambda: read_checkpoint(tmp_path / "dit.pt"))
    assert message.endswith("no tensor shows the heads of its 96 channels: give --heads")
    assert read_checkpoint(tmp_path / "dit.pt", 4)[0] == config
    torch.save(authors_tensors(AUTHORS["turned"])[0], tmp_path / "dit.pt")
    message = refusal(lambda: read_checkpoint(tmp_path / "dit.pt", 2))
    assert message.endswith("its tensor feat_rope.freqs_cos is that of 4 heads, not 2")


def test_the_denoiser_is_chosen_or_assumed():
    denoiser, notes = find_denoiser(None, AUTHORS["dit"])
    # Peebles and Xie 2023, Section 4: T = 1000, linear, 1e-4 to 2e-2
    assert (denoiser.timesteps, denoiser.beta_start, denoiser.beta_end) == (1000, 1e-4, 0.02)
    assert (denoiser.schedule, denoiser.prediction) == ("linear", "epsilon")
    assert "DiT is assumed, for a SiT give --denoiser flow" in notes[0]
    assert find_denoiser("discrete", AUTHORS["lightning"]) == (denoiser, [])
    flow = FlowConfig(distribution="uniform", time_scale=1, reversed=True)
    assert find_denoiser(None, AUTHORS["turned"]) == (flow, [])
    assert find_denoiser("flow", AUTHORS["dit"]) == (flow, [])
    with pytest.raises(UsageError, match="--denoiser edm: must be discrete or flow"):
        find_denoiser("edm", AUTHORS["dit"])
