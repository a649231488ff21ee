"""CompVis's `AutoencoderKL`, written down anew after Rombach et al. 2022, Appendix G."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


def norm(width):
    return nn.GroupNorm(32, width, eps=1e-6)


class Block(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.norm1, self.conv1 = norm(a), nn.Conv2d(a, b, 3, 1, 1)
        self.norm2, self.conv2 = norm(b), nn.Conv2d(b, b, 3, 1, 1)
        if a != b:
            self.nin_shortcut = nn.Conv2d(a, b, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        b, c, h, w = x.shape
        y = self.norm(x)
        q, k, v = (conv(y).reshape(b, c, h * w) for conv in (self.q, self.k, self.v))
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / c**0.5, dim=2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(b, c, h, w))


class Mid(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block_1, self.attn_1 = Block(width, width), Attention(width)
        self.block_2 = Block(width, width)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Conv(nn.Module):
    def __init__(self, width, stride):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride, 0 if stride == 2 else 1)


class Level(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.block = nn.ModuleList(Block(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList()


class Down(nn.Module):
    def __init__(self, ch, mult, blocks, z):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, 1, 1)
        self.down = nn.ModuleList()
        width = ch
        for i, m in enumerate(mult):
            level = Level([width] + [ch * m] * blocks)
            width = ch * m
            if i < len(mult) - 1:
                level.downsample = Conv(width, 2)
            self.down.append(level)
        self.mid, self.norm_out = Mid(width), norm(width)
        self.conv_out = nn.Conv2d(width, 2 * z, 3, 1, 1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Up(nn.Module):
    def __init__(self, ch, mult, blocks, z):
        super().__init__()
        width = ch * mult[-1]
        self.conv_in, self.mid = nn.Conv2d(z, width, 3, 1, 1), Mid(width)
        levels = {}
        for i in reversed(range(len(mult))):
            levels[i] = Level([width] + [ch * mult[i]] * (blocks + 1))
            width = ch * mult[i]
            if i:
                levels[i].upsample = Conv(width, 1)
        self.up = nn.ModuleList(levels[i] for i in range(len(mult)))
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return self.conv_out(F.silu(self.norm_out(x)))


class KL(nn.Module):
    def __init__(self, ch=32, mult=(1, 2, 3), blocks=1, z=4):
        super().__init__()
        self.encoder, self.decoder = Down(ch, mult, blocks, z), Up(ch, mult, blocks, z)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * z, 2 * z, 1), nn.Conv2d(z, z, 1)

    def moments(self, x):
        return self.quant_conv(self.encoder(x))

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))
