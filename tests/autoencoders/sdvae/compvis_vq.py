"""CompVis's `VQModelInterface`: random tensors by its names, and a forward pass over them.

Their code is not here to compare with. `encode`, `quantise` and `decode` are the published
structure (Esser et al. 2021, Section 3.1; Rombach et al. 2022, Appendix G) in plain float64
operations on the tensors by their own names, given nothing else.
"""

import re

import torch

SIZES = {"ch": 32, "mult": (1, 2), "blocks": 1, "z": 3, "codes": 40}
PUBLISHED = {"ch": 128, "mult": (1, 2, 4), "blocks": 2, "z": 3, "codes": 8192}
"""VQ-f4, the first stage of the latent diffusion models of FFHQ and CelebA-HQ."""


# -------------------------------------------------------------- a checkpoint of their key names
def checkpoint(ch, mult, blocks, z, codes, seed=0, meta=False):
    """Random tensors by the names and in the shapes of their model, without a prefix; the shapes
    alone on the meta device."""
    generator, tensors = torch.Generator().manual_seed(seed), {}

    def put(name, *shape, around=0.0, scale=0.1):
        if meta:
            tensors[name] = torch.empty(shape, device="meta")
        else:
            tensors[name] = around + scale * torch.randn(shape, generator=generator)

    def conv(name, out, into, side):
        put(f"{name}.weight", out, into, side, side, scale=(into * side * side) ** -0.5)
        put(f"{name}.bias", out)

    def norm(name, width):
        put(f"{name}.weight", width, around=1.0)
        put(f"{name}.bias", width)

    def block(name, into, out):
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", out, into, 3)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out, 3)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def middle(name, width):
        block(f"{name}.block_1", width, width)
        norm(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.attn_1.{part}", width, width, 1)
        block(f"{name}.block_2", width, width)

    width = ch
    conv("encoder.conv_in", ch, 3, 3)
    for level, multiplier in enumerate(mult):
        for i in range(blocks):
            block(f"encoder.down.{level}.block.{i}", width, ch * multiplier)
            width = ch * multiplier
        if level < len(mult) - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width, 3)
    middle("encoder.mid", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", z, width, 3)
    conv("decoder.conv_in", width, z, 3)
    middle("decoder.mid", width)
    for level in reversed(range(len(mult))):
        for i in range(blocks + 1):
            block(f"decoder.up.{level}.block.{i}", width, ch * mult[level])
            width = ch * mult[level]
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", 3, width, 3)
    conv("quant_conv", z, z, 1)
    conv("post_quant_conv", z, z, 1)
    put("quantize.embedding.weight", codes, z, scale=1.0)
    return tensors


# ------------------------------------------------------------------------ and its forward pass
class Forward:
    """Their model's answers in float64; `tensors` have its own names, without a prefix."""

    def __init__(self, tensors):
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def encode(self, images):
        """Images (B, 3, H, W) → latents before the quantizer (B, z, h, w)."""
        x = self._conv(images.double(), "encoder.conv_in")
        for level in range(self._count(r"encoder\.down\.(\d+)\.")):
            x = self._blocks(x, f"encoder.down.{level}")
            name = f"encoder.down.{level}.downsample.conv"
            if f"{name}.weight" in self.tensors:
                padded = torch.nn.functional.pad(x, (0, 1, 0, 1))
                x = self._conv(padded, name, stride=2, padding=0)
        x = self._middle(x, "encoder.mid")
        x = self._conv(self._silu(self._norm(x, "encoder.norm_out")), "encoder.conv_out")
        return self._conv(x, "quant_conv")

    def quantise(self, latents):
        """Latents (B, z, h, w) → the nearest codes, in their place."""
        book = self.tensors["quantize.embedding.weight"]  # (codes, z)
        distances = (latents.double()[:, None] - book[:, :, None, None]).square().sum(2)
        return book[distances.argmin(1)].permute(0, 3, 1, 2)

    def decode(self, latents):
        """Latents (B, z, h, w), quantised first → images (B, 3, H, W)."""
        x = self._conv(self.quantise(latents), "post_quant_conv")
        x = self._middle(self._conv(x, "decoder.conv_in"), "decoder.mid")
        for level in reversed(range(self._count(r"decoder\.up\.(\d+)\."))):
            x = self._blocks(x, f"decoder.up.{level}")
            if level:
                doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self._conv(doubled, f"decoder.up.{level}.upsample.conv")
        return self._conv(self._silu(self._norm(x, "decoder.norm_out")), "decoder.conv_out")

    def _count(self, pattern):
        return 1 + max(int(m[1]) for name in self.tensors if (m := re.match(pattern, name)))

    def _silu(self, x):
        return x / (1 + torch.exp(-x))

    def _conv(self, x, name, stride=1, padding=None):
        weight = self.tensors[f"{name}.weight"]
        padding = weight.shape[2] // 2 if padding is None else padding
        return torch.conv2d(x, weight, self.tensors[f"{name}.bias"], stride, padding)

    def _norm(self, x, name):
        groups = x.reshape(len(x), 32, -1)
        mean, variance = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, correction=0)
        plain = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
        weight, bias = (self.tensors[f"{name}.{k}"][:, None, None] for k in ("weight", "bias"))
        return plain * weight + bias

    def _block(self, x, name):
        h = self._conv(self._silu(self._norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = self._conv(self._silu(self._norm(h, f"{name}.norm2")), f"{name}.conv2")
        skip = f"{name}.nin_shortcut"
        return h + (self._conv(x, skip) if f"{skip}.weight" in self.tensors else x)

    def _blocks(self, x, level):
        for i in range(self._count(rf"{re.escape(level)}\.block\.(\d+)\.")):
            x = self._block(x, f"{level}.block.{i}")
        return x

    def _middle(self, x, name):
        x = self._block(x, f"{name}.block_1")
        y = self._norm(x, f"{name}.attn_1.norm")
        q, k, v = (self._conv(y, f"{name}.attn_1.{part}").flatten(2) for part in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, dim=2)  # (B, N, N)
        mixed = (v @ weights.transpose(1, 2)).reshape(x.shape)
        return self._block(x + self._conv(mixed, f"{name}.attn_1.proj_out"), f"{name}.block_2")
