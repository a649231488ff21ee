"""CompVis's UNet: random tensors by its names, and a naive forward pass straight over them.

Their code is not here to compare with. `answer` is the published structure (Dhariwal and Nichol
2021, Section 3; Rombach et al. 2022, Appendix E) in plain float64 operations on the tensors by
their own names, given only what no tensor says: which blocks resample, and the heads.
"""

import math

import torch

from diffusion.unet import UNetConfig

CASES = {
    "plain": UNetConfig(
        channels=64, multipliers=(1, 2), blocks=2, attention_factors=(2,), head_width=32
    ),
    "attention above, none below": UNetConfig(
        channels=64, multipliers=(1, 2, 2), blocks=1, attention_factors=(1, 2), head_width=16
    ),
    "scale-shift": UNetConfig(
        channels=64, multipliers=(1, 2), blocks=1, attention_factors=(1,), heads=4, scale_shift=True
    ),
    "blocks": UNetConfig(
        channels=64, multipliers=(1, 1, 2), blocks=1, attention_factors=(2,), resample_blocks=True,
        classes=5, scale_shift=True, latent_channels=3,
    ),
    "one level": UNetConfig(channels=64, multipliers=(1,), blocks=2, attention_factors=()),
}  # fmt: skip


# -------------------------------------------------------------- a checkpoint of their key names
def checkpoint(config, seed=0, meta=False):
    """Random tensors under the names and in the shapes that their UNet has, without a prefix; the
    shapes alone on the meta device."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    embedded = 4 * config.channels

    def put(name, *shape, around=0.0):
        if meta:
            tensors[name] = torch.empty(shape, device="meta")
            return
        scale = 0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
        tensors[name] = around + scale * torch.randn(shape, generator=generator)

    def layer(name, *shape):
        put(f"{name}.weight", *shape)
        put(f"{name}.bias", shape[0])

    def norm(name, width):
        put(f"{name}.weight", width, around=1.0)
        put(f"{name}.bias", width)

    def residual(name, into, out):
        norm(f"{name}.in_layers.0", into)
        layer(f"{name}.in_layers.2", out, into, 3, 3)
        layer(f"{name}.emb_layers.1", (2 if config.scale_shift else 1) * out, embedded)
        norm(f"{name}.out_layers.0", out)
        layer(f"{name}.out_layers.3", out, out, 3, 3)
        if into != out:
            layer(f"{name}.skip_connection", out, into, 1, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        layer(f"{name}.qkv", 3 * width, width, 1)
        layer(f"{name}.proj_out", width, width, 1)

    layer("time_embed.0", embedded, config.channels)
    layer("time_embed.2", embedded, embedded)
    if config.classes:
        put("label_emb.weight", config.classes, embedded)
    width, factor, row, skips = config.channels, 1, 0, [config.channels]
    layer("input_blocks.0.0", width, config.latent_channels, 3, 3)
    for level, multiplier in enumerate(config.multipliers):
        for _ in range(config.blocks):
            row += 1
            residual(f"input_blocks.{row}.0", width, multiplier * config.channels)
            width = multiplier * config.channels
            if factor in config.attention_factors:
                attention(f"input_blocks.{row}.1", width)
            skips.append(width)
        if level < len(config.multipliers) - 1:
            row, factor = row + 1, factor * 2
            if config.resample_blocks:
                residual(f"input_blocks.{row}.0", width, width)
            else:
                layer(f"input_blocks.{row}.0.op", width, width, 3, 3)
            skips.append(width)
    residual("middle_block.0", width, width)
    attention("middle_block.1", width)
    residual("middle_block.2", width, width)
    row = -1
    for level, multiplier in reversed(list(enumerate(config.multipliers))):
        for index in range(config.blocks + 1):
            row, place = row + 1, 1
            residual(f"output_blocks.{row}.0", width + skips.pop(), multiplier * config.channels)
            width = multiplier * config.channels
            if factor in config.attention_factors:
                attention(f"output_blocks.{row}.1", width)
                place = 2
            if level and index == config.blocks:
                factor //= 2
                if config.resample_blocks:
                    residual(f"output_blocks.{row}.{place}", width, width)
                else:
                    layer(f"output_blocks.{row}.{place}.conv", width, width, 3, 3)
    norm("out.0", width)
    layer("out.2", config.latent_channels, width, 3, 3)
    return tensors


# ------------------------------------------------------------------------ and its forward pass
def answer(tensors, config, x, time, labels=None):
    """Their network's answer in float64, one block after another as their names count."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def silu(x):
        return x / (1 + torch.exp(-x))

    def linear(x, name):
        return x @ tensors[f"{name}.weight"].flatten(1).T + tensors[f"{name}.bias"]

    def conv(x, name, stride=1):
        weight = tensors[f"{name}.weight"]
        padding = weight.shape[2] // 2
        return torch.conv2d(x, weight, tensors[f"{name}.bias"], stride, padding)

    def norm(x, name):
        groups = x.reshape(len(x), 32, -1)
        mean, variance = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, correction=0)
        plain = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
        weight, bias = (tensors[f"{name}.{kind}"][:, None, None] for kind in ("weight", "bias"))
        return plain * weight + bias

    def halved(x):
        return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4

    def doubled(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def residual(x, name, resized=lambda x: x):
        h = conv(resized(silu(norm(x, f"{name}.in_layers.0"))), f"{name}.in_layers.2")
        told = linear(silu(embedding), f"{name}.emb_layers.1")[:, :, None, None]
        if config.scale_shift:
            scale, shift = told[:, : h.shape[1]], told[:, h.shape[1] :]
            h = norm(h, f"{name}.out_layers.0") * (1 + scale) + shift
        else:
            h = norm(h + told, f"{name}.out_layers.0")
        h = conv(silu(h), f"{name}.out_layers.3")
        skip = f"{name}.skip_connection"
        x = resized(x)
        return h + (conv(x, skip) if f"{skip}.weight" in tensors else x)

    def attention(x, name):
        tokens = norm(x, f"{name}.norm").flatten(2).transpose(1, 2)
        rows = linear(tokens, f"{name}.qkv")  # (B, N, 3C): for every head its q, its k, its v
        heads = config.heads or x.shape[1] // config.head_width
        mixed = []
        for head in rows.chunk(heads, dim=2):
            q, k, v = head.chunk(3, dim=2)
            scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
            mixed.append(torch.softmax(scores, dim=2) @ v)
        out = linear(torch.cat(mixed, dim=2), f"{name}.proj_out")
        return x + out.transpose(1, 2).reshape(x.shape)

    def entry(x, name, resized):
        """All that stands under one number, in order; a second residual block resamples."""
        for place in range(3):
            part, after = f"{name}.{place}", place > 0
            if f"{part}.in_layers.2.weight" in tensors:
                down = resized is halved and part in halving
                x = residual(x, part, resized if after or down else lambda x: x)
            elif f"{part}.qkv.weight" in tensors:
                x = attention(x, part)
            elif f"{part}.op.weight" in tensors:
                x = conv(x, f"{part}.op", stride=2)
            elif f"{part}.conv.weight" in tensors:
                x = conv(doubled(x), f"{part}.conv")
        return x

    per_level = config.blocks + 1
    halving = [f"input_blocks.{level * per_level}.0" for level in range(1, len(config.multipliers))]
    half = config.channels // 2
    angles = time.double()[:, None] * 10_000 ** (-torch.arange(half).double() / half)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    embedding = linear(silu(linear(embedding, "time_embed.0")), "time_embed.2")
    if labels is not None:
        embedding = embedding + tensors["label_emb.weight"][labels]
    x = conv(x.double(), "input_blocks.0.0")
    skips, rows = [x], per_level * len(config.multipliers)
    for row in range(1, rows):
        x = entry(x, f"input_blocks.{row}", halved)
        skips.append(x)
    x = residual(x, "middle_block.0")
    x = residual(attention(x, "middle_block.1"), "middle_block.2")
    for row in range(rows):
        x = entry(torch.cat([x, skips.pop()], dim=1), f"output_blocks.{row}", doubled)
    assert not skips
    return conv(silu(norm(x, "out.0")), "out.2")
