"""UNet weights as the diffusers library names them (its `UNet2DModel`), both ways.

A folder of theirs holds `config.json` and `diffusion_pytorch_model.safetensors`, or `.bin` as older
versions wrote it. Their model takes as its `timestep` what ours takes as `c_noise`. The tensors are
the same, bit for bit, but that our attention keeps its queries, keys and values in one matrix, and
that "no class", which ours knows as −1, must be a class of its own there: a last row of zeros.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffusion.unet import UNet, UNetConfig
from diffusion.unet2d_config import config_from_diffusers, diffusers_config
from ldm.checkpoint import Damaged, refuse_overstated, shown
from ldm.errors import LdmError
from ldm.files import to_json, write_together
from ldm.foreign import read_foreign

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
PICKLED_FILE = "diffusion_pytorch_model.bin"

# what a part of a block is called there; where nothing is said, the same
RESIDUAL = {"shift": "time_emb_proj", "skip": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "proj": "to_out.0", "qkv": "to_"}
# what their attention was called at first, as the published models of 2022 have it
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


# --------------------------------------------------------------------------------- weights
def to_diffusers(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Weights of our UNet under the names of diffusers' `UNet2DModel`.

    What embeds augmentations stays behind: without one it adds nothing.
    """
    names, theirs = dict(_modules(config)), {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        if module == "embed.augment":
            continue
        if module == "embed.classes":
            tensor = torch.cat([tensor, tensor.new_zeros(1, tensor.shape[1])])
        if module.endswith(".qkv"):
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                theirs[f"{names[module]}{letter}.{kind}"] = part
        else:
            theirs[f"{names[module]}.{kind}"] = tensor
    return theirs


def from_diffusers(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Weights of a `UNet2DModel`, with old or new attention names, under ours.

    Raises:
        LdmError: a tensor that the config describes is not there or has another shape, or there is
            one that it does not describe.
    """
    left = {_modern(name): tensor for name, tensor in weights.items()}
    names, ours = dict(_modules(config)), {}

    def take(name: str, shape: torch.Size) -> Tensor:
        if name not in left:
            raise LdmError(f"it has no tensor {name}, which its config describes")
        if left[name].shape != shape:
            raise LdmError(f"its tensor {name} is {tuple(left[name].shape)}, not {tuple(shape)}")
        return left.pop(name)

    with torch.device("meta"):
        expected = UNet(config).state_dict()
    for name, tensor in expected.items():
        module, _, kind = name.rpartition(".")
        if module.endswith(".qkv"):
            third = tensor.chunk(3)[0].shape
            ours[name] = torch.cat([take(f"{names[module]}{x}.{kind}", third) for x in "qkv"])
        else:
            ours[name] = take(f"{names[module]}.{kind}", tensor.shape)
    if left:
        raise LdmError(f"it has a tensor {shown(next(iter(left)))} that its config does not name")
    return ours


def _modules(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Every module of ours that can have weights, and what it is called there."""
    levels = len(config.multipliers)
    yield "embed.linear_in", "time_embedding.linear_1"
    yield "embed.linear_out", "time_embedding.linear_2"
    yield "embed.classes", "class_embedding"
    yield "enter.0", "conv_in"
    for level in range(levels):
        for index in range(config.blocks):
            yield from _block(f"encoder.{level}.{index}", f"down_blocks.{level}", index)
        for index in range(config.blocks + 1):
            yield from _block(f"decoder.{level}.{index}", f"up_blocks.{level}", index)
    yield from _block("middle_in", "mid_block", 0)
    yield from _block("middle_out", "mid_block", 1)
    for level in range(levels - 1):
        down, up = f"down_blocks.{level}.downsamplers.0", f"up_blocks.{level}.upsamplers.0"
        if config.resample_blocks:
            yield from _residual(f"enter.{level + 1}", down)
            yield from _residual(f"leave.{level}", up)
        else:
            yield f"enter.{level + 1}", f"{down}.conv"
            yield f"leave.{level}.conv", f"{up}.conv"
    yield f"leave.{levels - 1}.0", "conv_norm_out"
    yield f"leave.{levels - 1}.2", "conv_out"


def _block(ours: str, level: str, index: int) -> Iterator[tuple[str, str]]:
    yield from _residual(f"{ours}.residual", f"{level}.resnets.{index}")
    for part, name in ATTENTION.items():
        yield f"{ours}.attention.{part}", f"{level}.attentions.{index}.{name}"


def _residual(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for part in ("norm1", "conv1", "shift", "norm2", "conv2", "skip"):
        yield f"{ours}.{part}", f"{theirs}.{RESIDUAL.get(part, part)}"


def _modern(name: str) -> str:
    if ".attentions." in name:
        for old, new in OLD_ATTENTION.items():
            name = name.replace(f".{old}.", f".{new}.")
    return name


# --------------------------------------------------------------------------------- folders
def read_diffusers(folder: Path) -> tuple[UNetConfig, dict[str, Tensor]]:
    """A diffusers `UNet2DModel` folder as (our config, weights by our names).

    Raises:
        LdmError: it is no UNet2DModel, of a structure that is not our UNet's, or has no weights
            that can be read.
    """
    try:
        config = config_from_diffusers(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError, LdmError) as error:
        raise LdmError(f"{folder}/config.json describes no UNet to load here: {error}") from error
    there = [path for name in (WEIGHTS_FILE, PICKLED_FILE) if (path := folder / name).is_file()]
    if not there:
        raise LdmError(f"{folder} holds neither {WEIGHTS_FILE} nor {PICKLED_FILE}")
    path = there[0]
    weights = _read_safetensors(path) if path.name == WEIGHTS_FILE else _read_pickle(path)
    try:
        return config, from_diffusers(weights, config)
    except LdmError as error:
        raise LdmError(f"{path} does not fit its own config: {error}") from error


def write_diffusers(folder: Path, network: UNet, sample_size: int | None = None) -> list[Path]:
    """Write a folder for diffusers' `UNet2DModel.from_pretrained`; what was written.

    Raises:
        LdmError: theirs cannot express this network, or the folder cannot be written.
    """
    from safetensors.torch import save

    described = diffusers_config(network.config, sample_size)
    weights = to_diffusers(network.state_dict(), network.config)
    payload = save(
        {name: tensor.cpu().contiguous() for name, tensor in weights.items()},
        metadata={"format": "pt"},
    )
    paths = [folder / WEIGHTS_FILE, folder / "config.json"]
    write_together(
        {
            paths[0]: lambda file: file.write(payload),
            paths[1]: lambda file: file.write(to_json(described)),
        }
    )
    return paths


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path} is truncated or damaged: copy or write it again") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    tree = read_foreign(path)
    tree = tree if isinstance(tree, dict) else {}
    weights = {
        name: value
        for name, value in tree.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    refuse_overstated(weights, path)
    # cloned: they are to outlive the file that they lie in
    return {name: tensor.clone() for name, tensor in weights.items()}
