"""Autoencoders of diffusers' other classes: small, of random weights, always the same."""

from collections.abc import Callable

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    ModelMixin,
    VQModel,
)

DOWN, UP = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2


def tiny() -> AutoencoderTiny:
    widths, blocks = (8, 8, 8), (1, 1, 1)
    return AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        num_encoder_blocks=blocks, num_decoder_blocks=blocks,
    )  # fmt: skip


def dc() -> AutoencoderDC:
    kinds, scales = ("ResBlock", "EfficientViTBlock"), ((), (5,))
    return AutoencoderDC(
        latent_channels=8, attention_head_dim=8, scaling_factor=0.4,
        encoder_block_types=kinds, decoder_block_types=kinds,
        encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
    )  # fmt: skip


def asymmetric() -> AsymmetricAutoencoderKL:
    return AsymmetricAutoencoderKL(
        down_block_types=DOWN, down_block_out_channels=(8, 16), up_block_types=UP,
        up_block_out_channels=(8, 24), norm_num_groups=4,
    )  # fmt: skip


def consistency() -> ConsistencyDecoderVAE:
    return ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 16), encoder_down_block_types=DOWN,
        encoder_norm_num_groups=4, encoder_layers_per_block=1,
        decoder_block_out_channels=(8, 16), decoder_layers_per_block=1, decoder_norm_num_groups=4,
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
    )  # fmt: skip


def vq() -> VQModel:
    return VQModel(
        block_out_channels=(8, 16), down_block_types=DOWN, up_block_types=UP, norm_num_groups=4,
        latent_channels=4, vq_embed_dim=3, num_vq_embeddings=32,
    )  # fmt: skip


OTHERS: dict[str, Callable[[], ModelMixin]] = {
    "AutoencoderTiny": tiny,
    "AutoencoderDC": dc,
    "AsymmetricAutoencoderKL": asymmetric,
    "ConsistencyDecoderVAE": consistency,
    "VQModel": vq,
}
DETERMINISTIC = ("AutoencoderTiny", "AutoencoderDC", "VQModel")


def make(name: str) -> ModelMixin:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OTHERS[name]().eval().requires_grad_(False)
