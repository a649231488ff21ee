"""What is said of a diffusers folder that cannot be loaded."""

import json

import pytest
import torch
from safetensors.torch import save_file

from autoencoders import load_autoencoder
from autoencoders.sdvae.formats import PICKLED_FILE, WEIGHTS_FILE, groups_of, weights_files
from ldm.errors import LdmError

CONFIG = {
    "_class_name": "AutoencoderKL",
    "latent_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
}


def refusal(folder, config, weights=None):
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        save_file(weights, folder / WEIGHTS_FILE)
    with pytest.raises(LdmError) as caught:
        load_autoencoder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "VQModel"}, "_class_name is not AutoencoderKL"),
        (
            {"norm_num_groups": 16},
            "norm_num_groups is 16; here widths [32, 64] are normalised in 32",
        ),
        ({"block_out_channels": [16, 32]}, "normalised in unequal numbers of groups"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types has AttnDown"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "up_block_types has"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False"),
        ({"use_quant_conv": False}, "one of the two 1×1 convolutions"),
        ({"block_out_channels": [64, 96]}, "are not multiples of the first"),
        ({"block_out_channels": [0, 32]}, "are not multiples of the first"),
        ({"block_out_channels": []}, "are not multiples of the first"),
        ({"block_out_channels": "wide"}, "describes no SD-VAE"),
    ],
)
def test_a_config_of_another_structure(tmp_path, change, said):
    assert said in refusal(tmp_path, CONFIG | change)


def test_a_config_that_is_none(tmp_path):
    assert "has no layers_per_block" in refusal(
        tmp_path, {key: value for key, value in CONFIG.items() if key != "layers_per_block"}
    )
    assert "not a JSON object" in refusal(tmp_path, ["no", "config"])
    nothing = {"x": torch.zeros(1)}
    assert "'latent_channels': " in refusal(tmp_path, CONFIG | {"latent_channels": -4}, nothing)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LdmError, match=r"config\.json describes no SD-VAE"):
        load_autoencoder(tmp_path)


def test_no_safetensors(tmp_path):
    assert f"holds no {WEIGHTS_FILE}: save it again" in refusal(tmp_path, CONFIG)


def test_a_pickle_alone_is_not_read(tmp_path):
    (tmp_path / PICKLED_FILE).write_bytes(b"")
    assert f"{PICKLED_FILE} is a pickle, which diffusers' save_pre" in refusal(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["", ".fp16"], [""]),
        ([".non_ema", ".fp16"], [".fp16"]),
        (["-00001-of-00002", "-00002-of-00002"], ["-00001-of-00002", "-00002-of-00002"]),
        *(
            ([*shards, ".z"], list(shards))
            for shards in (
                (".fp16-00001-of-00002", ".fp16-00002-of-00002"),
                ("-00001-of-00002.fp16", "-00002-of-00002.fp16"),  # as older versions wrote it
            )
        ),
        (
            ["-00001-of-00002", "-00001-of-00002.fp16", "-00002-of-00002"],
            ["-00001-of-00002", "-00002-of-00002"],
        ),
        (["-00001-of-00001", ""], [""]),
    ],
)
def test_the_plain_file_then_shards_then_a_variant(tmp_path, there, taken):
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    for kind in there:
        (tmp_path / f"{stem}{kind}.safetensors").touch()
    assert [path.name for path in weights_files(tmp_path)] == [
        f"{stem}{kind}.safetensors" for kind in taken
    ]


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        (["-00001-of-00003", "-00003-of-00003"], "shard 2 of 3"),
        (["-00002-of-00002"], "shard 1 of 2"),
        (["-00001-of-00002.fp16"], "shard 2 of 2"),
        ([".fp16-00001-of-00002"], "shard 2 of 2"),
    ],
)
def test_a_missing_shard_is_named(tmp_path, there, missing):
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    for kind in there:
        (tmp_path / f"{stem}{kind}.safetensors").touch()
    said = refusal(tmp_path, CONFIG)
    assert f"lacks {missing}, beside {stem}{there[0]}.safetensors: copy or fetch" in said


@pytest.mark.parametrize(
    ("widths", "groups"), [((32, 64, 96), 32), ((16, 48), 16), ((16, 32), None), ((8, 24), 8)]
)
def test_the_number_of_groups(widths, groups):
    assert groups_of(widths) == groups


def test_a_truncated_file(tmp_path):
    (tmp_path / WEIGHTS_FILE).write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert "truncated or damaged" in refusal(tmp_path, CONFIG)


def test_the_first_tensor_that_differs_is_named(tmp_path):
    said = refusal(tmp_path, CONFIG, {"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)})
    assert "encoder.conv_in.weight is (8, 3, 3, 3) in the file, (32, 3, 3, 3) in the model" in said
