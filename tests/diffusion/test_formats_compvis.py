"""UNets of CompVis's checkpoints, against a naive forward pass straight over their keys."""

import math

import pytest
import torch
from safetensors.torch import save_file

from diffusion.formats import FIRST, PREFIXES, config_from_compvis, from_compvis, read_compvis
from diffusion.unet import UNet, UNetConfig
from ldm.errors import LdmError
from ldm.foreign import find_prefix
from tests.diffusion.compvis_unet import CASES, answer, checkpoint

EVERY = pytest.mark.parametrize("case", list(CASES))


def built(config, weights):
    with torch.device("meta"):
        network = UNet(config)
    network.load_state_dict(weights, assign=True)
    return network.eval()


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# ----------------------------------------------------------------------------------- tests
@EVERY
def test_config_and_outputs_equal_theirs(case):
    expected = CASES[case]
    tensors = checkpoint(expected)
    heads = {"head_width": expected.head_width, "heads": expected.heads}
    config = config_from_compvis(tensors, **heads)
    assert config == expected
    network = built(config, from_compvis(tensors, config))
    x, time = normal(2, config.latent_channels, 8, 12), torch.tensor([3.0, 999.0])
    labels = torch.tensor([4, 0]) if config.classes else None
    theirs = answer(tensors, config, x, time, labels)
    assert theirs.std() > 0.1
    limit = 1e-5 * theirs.abs().max().item()
    # a double's network, so that all that differs is a mistake, then as it is used
    ours = network.double()(x.double(), time.double(), labels)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=limit)
    with torch.no_grad():
        ours = network.float()(x, time, labels)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=10 * limit)


def test_the_published_ffhq_is_our_default():
    with torch.device("meta"):
        like = UNet(UNetConfig())
    shapes = [tuple(tensor.shape) for tensor in like.state_dict().values()]
    sizes = checkpoint(UNetConfig(), meta=True)
    assert sum(math.prod(tensor.shape) for tensor in sizes.values()) == 274_060_196
    assert config_from_compvis(sizes) == UNetConfig()
    weights = from_compvis(sizes, UNetConfig())
    assert [tuple(tensor.shape) for tensor in weights.values()] == shapes


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_moving_average_of_a_whole_checkpoint_is_preferred(suffix, tmp_path):
    config = CASES["plain"]
    plain, averaged = checkpoint(config), checkpoint(config, seed=1)
    tree = {f"model.diffusion_model.{name}": tensor for name, tensor in plain.items()}
    tree |= {
        f"model_ema.diffusion_model{name.replace('.', '')}": tensor
        for name, tensor in averaged.items()
    }
    tree |= {"first_stage_model.decoder.conv_in.weight": torch.zeros(2, 2, 3, 3)}
    tree |= {"betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.9999)}
    path = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": tree, "global_step": 3, "callbacks": object}, path)
    else:
        save_file(tree, path)
    assert find_prefix(tree, PREFIXES, FIRST) == "model.diffusion_model."
    found, weights = read_compvis(path)
    assert found == config
    expected = from_compvis(averaged, config)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_bare_unet_is_read(tmp_path):
    tensors = checkpoint(CASES["one level"])
    save_file(tensors, tmp_path / "unet.safetensors")
    config, weights = read_compvis(tmp_path / "unet.safetensors")
    assert config == CASES["one level"]
    assert torch.equal(weights["enter.0.weight"], tensors["input_blocks.0.0.weight"])


# -------------------------------------------------------------------------------- refusals
def changed(**changes):
    """The plain checkpoint with tensors exchanged, added, or (None) taken away."""
    tensors = checkpoint(CASES["plain"])
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"input_blocks__4__1__transformer_blocks__0__attn1__to_q__weight": torch.zeros(1)},
            "it has cross-attention (input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight)",
        ),
        (
            {"out__2__weight": torch.zeros(8, 64, 3, 3)},
            "it answers 8 channels to 4: it also predicts",
        ),
        ({"out__2__weight": None}, "tensor out.2.weight is none, not of 4 dimensions"),
        ({"input_blocks__0__0__weight": torch.zeros(64)}, "is (64,), not of 4 dimensions"),
        (
            {"input_blocks__1__0__out_layers__3__weight": torch.zeros(96, 96, 3, 3)},
            "its widths [96, 128] are not multiples of the first one, 64",
        ),
        ({"input_blocks__6__0__op__weight": torch.zeros(1)}, "do not divide into levels"),
        (
            {"output_blocks__0__1__in_layers__2__weight": torch.zeros(1)},
            "do not divide into levels",
        ),
        (
            {"middle_block__0__in_layers__0__bias": None},
            "tensor middle_block.0.in_layers.0.bias is none in the file, (128,) in the model",
        ),
        (
            {"middle_block__0__in_layers__0__bias": torch.zeros(7)},
            "tensor middle_block.0.in_layers.0.bias is (7,) in the file, (128,) in the model",
        ),
        (
            {"middle_block__1__more__weight": torch.zeros(1)},
            "tensor middle_block.1.more.weight is (1,) in the file, none in the model",
        ),
        ({"input_blocks__0__0__weight": None}, "holds no UNet of CompVis' latent diffusion"),
    ],
)
def test_other_structures_are_refused_in_a_line(tensors, said, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(changed(**tensors), path)
    with pytest.raises(LdmError) as caught:
        read_compvis(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_widths_of_other_groups_and_heads_that_do_not_fit_are_refused():
    config = UNetConfig(channels=48, multipliers=(1,), blocks=1, head_width=16)
    tensors = checkpoint(config, meta=True)
    with pytest.raises(LdmError, match="32 groups do not divide its widths"):
        config_from_compvis(tensors, head_width=16)
    with pytest.raises(LdmError, match="must divide the 48 channels"):
        config_from_compvis(tensors, head_width=32)
    with pytest.raises(LdmError, match="must divide the 48 channels"):
        config_from_compvis(tensors, heads=5)


@pytest.mark.parametrize("content", [b"no checkpoint", b"\x80\x02}q\x00."])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_file_that_is_no_checkpoint_is_refused(content, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(LdmError, match=str(path)):
        read_compvis(path)
    torch.save([torch.zeros(1)], path := tmp_path / "list.ckpt")
    with pytest.raises(LdmError, match="holds no UNet"):
        read_compvis(path)
