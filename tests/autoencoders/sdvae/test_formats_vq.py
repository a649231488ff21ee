"""CompVis's VQ autoencoders, against a forward pass over their tensors, and against diffusers."""

import copy

import pytest
import torch
from diffusers import VQModel
from safetensors.torch import load_file, save_file

from autoencoders import Autoencoder, AutoencoderConfig, load_autoencoder, to_diffusers
from autoencoders.sdvae.formats import to_compvis, write_compvis, write_diffusers
from autoencoders.tiling import reconstruct_tiled
from ldm.config import resolve, to_tree
from ldm.errors import LdmError, UsageError
from pipelines.bench import bench_encoders
from pipelines.exchange import export_autoencoder, import_autoencoder
from pipelines.recipes import AutoencoderRecipe
from tests.autoencoders.sdvae.compvis_vq import PUBLISHED, SIZES, Forward, checkpoint


def write(path, tensors, prefix=""):
    state = {f"{prefix}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(
        {"state_dict": state, "global_step": 7}, path
    )
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "vq-f2.ckpt", checkpoint(**SIZES))


def images(count=2, height=32, width=48):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, height, width, generator=generator) * 2 - 1


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=atol)


def set_tensors(model, tensors):
    """Give a diffusers VQModel those of a checkpoint of two levels and one block."""
    pairs = [
        ("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1"),
        ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
        ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
        ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
        ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
        ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
        ("decoder.up.0", "decoder.up_blocks.1"), ("decoder.up.1", "decoder.up_blocks.0"),
        ("encoder.down.", "encoder.down_blocks."), (".block.", ".resnets."),
        ("nin_shortcut", "conv_shortcut"), ("norm_out", "conv_norm_out"),
        ("downsample.", "downsamplers.0."), ("upsample.", "upsamplers.0."),
    ]  # fmt: skip
    state = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        is_linear = ".to_" in name and tensor.ndim == 4
        state[name] = tensor[:, :, 0, 0] if is_linear else tensor
    model.load_state_dict(state)
    return model.eval()


# --------------------------------------------------------------------------------- the numbers
@pytest.mark.parametrize("name", ["vq.ckpt", "vq.safetensors"])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@torch.no_grad()
def test_a_checkpoint_encodes_quantises_and_decodes_as_written(tmp_path, name, prefix):
    tensors = checkpoint(**SIZES)
    ae, theirs = load_autoencoder(write(tmp_path / name, tensors, prefix)), Forward(tensors)
    assert (ae.config.codes, ae.config.latent_channels, ae.downsampling) == (40, 3, 2)
    posterior, expected = ae.encode(images()), theirs.encode(images())
    close(posterior.mean, expected)
    assert posterior.logvar.eq(-30).all()
    close(ae.quantizer(expected.float()), theirs.quantise(expected), 1e-6)
    assert len({tuple(code) for code in theirs.quantise(expected).flatten(2)[0].T.tolist()}) > 5
    close(ae.decode(expected.float()), theirs.decode(expected))
    latents = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(2))
    close(ae.decode(latents), theirs.decode(latents))
    # without the codes, images differ: the comparison above sees them
    plain = copy.deepcopy(ae)
    plain.quantizer = torch.nn.Identity()
    assert (plain.decode(latents) - ae.decode(latents)).abs().mean() > 0.01


@torch.no_grad()
def test_diffusers_model_of_the_same_weights_gives_the_same(path):
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "num_vq_embeddings": 40}
    theirs = set_tensors(VQModel(
        latent_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, **sizes,
    ), checkpoint(**SIZES))  # fmt: skip
    ae, latents = load_autoencoder(path), theirs.encode(images()).latents
    close(ae.encode(images()).mean, latents, 1e-5)
    close(ae.decode(latents), theirs.decode(latents).sample, 1e-5)
    # their folder, by diffusers itself, and the checkpoint agree
    theirs.save_pretrained(path.parent / "vq")
    other = load_autoencoder(path.parent / "vq")
    close(other(images()).recon, ae(images(), sample=False).recon)


def test_published_sizes_are_found_and_counted(tmp_path):
    """VQ-f4: 55.3 M parameters, 24,576 of them codes; shapes alone, without values."""
    shapes = {n: t.shape for n, t in checkpoint(**PUBLISHED, meta=True).items()}
    state = {name: torch.zeros(1, dtype=torch.float16).expand(s) for name, s in shapes.items()}
    ae = load_autoencoder(write(tmp_path / "vq-f4.safetensors", state))
    config = ae.config
    assert (config.encoder.channels, config.encoder.multipliers) == (128, (1, 2, 4))
    assert (config.decoder.blocks, config.latent_channels, config.codes) == (2, 3, 8192)
    assert config.conv1x1 and not config.encoder.variance and ae.downsampling == 4
    expected = sum(shape.numel() for shape in shapes.values())
    assert sum(p.numel() for p in ae.parameters()) == expected == 55_322_782
    assert ae.quantizer.codes.numel() == 24_576


def test_bench_counts_its_encoder(path):
    (cost,) = bench_encoders([str(path)], 32, 2, "cpu", 1, 1).costs
    tensors = checkpoint(**SIZES).items()
    assert cost.parameters == sum(t.numel() for n, t in tensors if n.startswith("encoder."))
    assert cost.gmac > 0 and cost.peak_mib > 0


@torch.no_grad()
def test_fused_and_tiled_it_gives_the_same(path):
    ae = load_autoencoder(path)
    x = images(1)
    recon = ae(x, sample=False).recon
    close(ae.fuse()(x, sample=False).recon, recon)
    close(reconstruct_tiled(ae, x, tile=64, overlap=8), recon)
    assert reconstruct_tiled(ae, x, tile=16, overlap=8).shape == recon.shape


@torch.no_grad()
def test_it_is_the_vae_of_a_diffusers_pipeline(path):
    ae, vae = load_autoencoder(path), to_diffusers(load_autoencoder(path))
    assert vae.config.scaling_factor == 1.0  # they train on its latents as they are
    posterior = vae.encode(images()).latent_dist
    assert torch.equal(posterior.mode(), ae.encode(images()).mean)
    assert torch.equal(vae.decode(posterior.mode()).sample, ae.decode(posterior.mode()))


def test_gradients_reach_the_encoder_through_the_codes(path):
    ae = load_autoencoder(path).train()
    ae(images(), sample=False).recon.square().mean().backward()
    assert ae.encoder.conv_in.weight.grad.abs().sum() > 0
    assert ae.quantizer.codes.grad is None


# ------------------------------------------------------------------------------------ in and out
def test_it_becomes_a_model_file_and_goes_back_to_the_bit(path, tmp_path):
    import_autoencoder(str(path), tmp_path / "a.pt")
    ae = load_autoencoder(tmp_path / "a.pt")
    assert ae.settings == {"scaling_factor": 1.0}
    export_autoencoder(tmp_path / "back.safetensors", "compvis", tmp_path / "a.pt")
    theirs, back = checkpoint(**SIZES), load_file(tmp_path / "back.safetensors")
    assert back.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in back.items())
    export_autoencoder(tmp_path / "hub", "hub", tmp_path / "a.pt")
    assert Autoencoder.from_pretrained(tmp_path / "hub").config == ae.config
    with pytest.raises(LdmError, match=r"no diffusers model can .*quantizer.*--format hub can"):
        write_diffusers(tmp_path / "vae", ae)


@pytest.mark.parametrize(("variance", "codes"), [(True, 8), (False, None)])
def test_halves_of_a_vq_model_are_no_compvis_model(tmp_path, variance, codes):
    sizes = {"channels": 32, "multipliers": [1, 2], "blocks": 1}
    config = AutoencoderConfig(
        conv1x1=True, codes=codes, decoder=sizes,
        encoder={"type": "sdvae", "variance": variance, **sizes},
    )  # fmt: skip
    ae = Autoencoder(config)
    assert ae(images()).recon.shape == images().shape
    with pytest.raises(LdmError, match=r"no compvis model can .* a variance and a quantizer"):
        write_compvis(tmp_path / "a.ckpt", ae)
    assert "pre_conv.weight" in ae.state_dict()
    assert len(ae.state_dict()["pre_conv.weight"]) == (8 if variance else 4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quantize.embedding.weight": torch.zeros(40)}, "weight is (40,), not of 2 dimensions"),
        ({"quantize.embedding.weight": torch.zeros(40, 4)}, "codes is (40, 4) in the file, "),
        ({"quantize.proj.weight": torch.zeros(1)}, "quantize.proj.weight is (1,) in the file"),
        ({"quant_conv.weight": torch.zeros(3, 8, 1, 1)}, "conv.weight is (3, 8, 1, 1) in the file"),
        ({"encoder.conv_out.weight": torch.zeros(5, 64, 3, 3)}, "has 5 channels for 3 latent ones"),
        ({"encoder.down.1.attn.0.q.weight": torch.zeros(1)}, "has attention inside a level"),
    ],
)  # fmt: skip
def test_other_structures_are_refused_in_a_line(tmp_path, changes, told):
    path = write(tmp_path / "vq.ckpt", checkpoint(**SIZES) | changes)
    with pytest.raises(LdmError) as caught:
        load_autoencoder(path)
    said = str(caught.value)
    assert told in said and str(path) in said and "\n" not in said


def test_training_one_is_refused_in_a_line(path):
    tree = to_tree(load_autoencoder(path).config)
    with pytest.raises(UsageError, match="a quantizer is not trained: use a VQ") as caught:
        resolve(AutoencoderRecipe, tree)
    assert "\n" not in str(caught.value)


def test_renaming_round_trips_bit_for_bit(path):
    theirs, ours = checkpoint(**SIZES), load_autoencoder(path).state_dict()
    back = to_compvis(ours)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
