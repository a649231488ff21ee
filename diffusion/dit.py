"""DiT, the diffusion transformer of Peebles and Xie 2023 (arXiv 2212.09748), with adaLN-Zero.

Options, all off by default, are those of LightningDiT (Yao et al. 2025, arXiv 2501.01423): SwiGLU,
RMSNorm, rotary positions, normalised queries and keys. Each is what its authors' code computes.

Positions are functions of a patch's row and column, not weights. At another size than that of the
training, coordinates are scaled so that the grid spans what it spanned in training: patch i of n
lies at i·g/n, where g is the number of patches of a training latent along that side.
"""

from typing import Annotated, Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion.network import Network, NetworkSizes, sinusoids, zeroed
from ldm.config import Depth, Resolution, Width, height_width

FEATURES = 256
"""Sinusoids of the noise level, for every width."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines (N, d/2) of the angles by which N tokens turn the pairs of a head of d."""


class DiTConfig(NetworkSizes):
    """The defaults are DiT-B/2: 130 M parameters with the 1000 classes of ImageNet."""

    type: Literal["dit"] = "dit"
    """Type of the network."""
    width: Width = 768
    """Channels of a token: 384 S, 768 B, 1024 L, 1152 XL."""
    depth: Depth = 12
    """Blocks: 12 S, 12 B, 24 L, 28 XL."""
    heads: Width = 12
    """Heads of every attention: 6 S, 12 B, 16 L, 16 XL; they divide the width."""
    patch: Annotated[int, Field(ge=1, le=64)] = 2
    """Side of the squares of latents that are a token each; divides both sides of the latents."""
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    """Hidden width of a block's MLP, in multiples of `width`; of a SwiGLU two thirds of that."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """MLP of a block: two layers with a GELU between, or with a gate (Shazeer 2020)."""
    norm: Literal["layer", "rms"] = "layer"
    """Normalisation before attention, MLP and last layer: LayerNorm without weights, or RMSNorm."""
    positions: Literal["sincos", "rotary", "both"] = "sincos"
    """Sinusoids added to the tokens, rotations of queries and keys (Su et al. 2021), or both;
    rotations need heads of a multiple of four channels."""
    qk_norm: bool = False
    """Normalise the queries and keys of every head, with weights."""
    frequency_shift: Annotated[int, Field(ge=0, le=1)] = 0
    """The noise level's frequencies are 10000^(−i/(128 − shift)): 1 for networks of diffusers."""
    grid: Resolution | None = None
    """Patches of a training latent, N for N×N or [rows, columns], the scale of positions at other
    sizes; taken from the recipe. null: positions are not scaled."""

    @model_validator(mode="after")
    def _divides(self) -> "DiTConfig":
        head_width, rest = divmod(self.width, self.heads)
        if rest:
            raise ValueError(
                f"heads: {self.heads} do not divide the {self.width} channels of width"
            )
        if self.width % 4:  # sine and cosine, of row and column
            raise ValueError(f"width: {self.width} is no multiple of 4")
        if self.positions != "sincos" and head_width % 4:
            raise ValueError(f"heads: rotations need a multiple of 4 channels, not {head_width}")
        if self.hidden_width < 1:
            raise ValueError("mlp_ratio: the MLP would have no channels")
        return self

    @property
    def factor(self) -> int:
        """Both sides of a latent must be multiples of it."""
        return self.patch

    @property
    def hidden_width(self) -> int:
        """Channels between the two layers of a block's MLP."""
        hidden = int(self.width * self.mlp_ratio)
        return int(2 / 3 * hidden) if self.mlp == "swiglu" else hidden

    def grid_of(self, resolution: Resolution, downsampling: int) -> Resolution:
        """Patches of a training latent: of an image's size, divided by stage one and `patch`."""
        rows, columns = (side // (downsampling * self.patch) for side in height_width(resolution))
        return rows if rows == columns else (rows, columns)


# -------------------------------------------------------------------------------- positions
def angles(coordinates: Tensor, count: int) -> Tensor:
    """Coordinates (n,) times falling frequencies → (n, count), in the coordinates' dtype."""
    # Vaswani et al. 2017, Section 3.5: frequencies 10000^(−i/count)
    ramp = torch.arange(count, dtype=coordinates.dtype, device=coordinates.device)
    return coordinates[:, None] * 10_000 ** (-ramp / count)


def coordinates(side: int, trained: int, device: torch.device) -> Tensor:
    """Coordinates of the patches along a side, scaled to a trained side's span: float64 (side,)."""
    return torch.arange(side, dtype=torch.float64, device=device) * (trained / side)


def of_patches(rows: Tensor, columns: Tensor) -> list[Tensor]:
    """Values of rows (H, n) and columns (W, n) for every patch: two of (H, W, n)."""
    shape = len(rows), len(columns), -1
    return [rows[:, None].expand(shape), columns.expand(shape)]


def sincos(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Sinusoids of the coordinates (H,), (W,) of patches → (H·W, width).

    The first half is the column's, each half first sines and then cosines, as in the code of He et
    al. 2022 (arXiv 2111.06377), whose table DiT has.
    """
    turns = (angles(side, width // 4) for side in (rows, columns))
    of_row, of_column = of_patches(*(torch.cat([a.sin(), a.cos()], dim=1) for a in turns))
    return torch.cat([of_column, of_row], dim=2).flatten(0, 1)


def rotation(rows: Tensor, columns: Tensor, head_width: int) -> Rotation:
    """The rotations of a head: its first half by the row's angles, the second by the column's."""
    turns = of_patches(*(angles(side, head_width // 4) for side in (rows, columns)))
    together = torch.cat(turns, dim=2).flatten(0, 1)  # (H·W, d/2)
    return together.cos(), together.sin()


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn each pair of neighbouring channels of x (B, heads, N, d) by its token's angles."""
    (cos, sin), (even, odd) = by, x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, heads, N, d/2)
    # Su et al. 2021 (arXiv 2104.09864), Equation 34
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


# ---------------------------------------------------------------------------------- layers
class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019) in its weight's type, as autocast runs a LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def make_norm(config: DiTConfig) -> nn.Module:
    """The normalisation of tokens (…, width) before their modulation."""
    if config.norm == "rms":
        return RMSNorm(config.width, eps=1e-6)
    return nn.LayerNorm(config.width, eps=1e-6, elementwise_affine=False)


class DiTEmbedding(nn.Module):
    """Noise level, class and augmentation as the vector (B, width) that every block reads.

    The table's last row is that of no class. An augmentation is embedded without a bias, so that
    zeros add nothing.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config, width, parameters = config, config.width, config.augment_parameters
        self.linear_in = nn.Linear(FEATURES, width)
        self.linear_out = nn.Linear(width, width)
        self.classes = nn.Embedding(config.classes + 1, width) if config.classes else None
        self.augment = nn.Linear(parameters, width, bias=False) if parameters else None

    def forward(self, c_noise: Tensor, labels: Tensor, augment: Tensor) -> Tensor:
        """c_noise (B,), labels (B,), augment (B, A) → (B, width)."""
        waves = sinusoids(c_noise, FEATURES, self.config.frequency_shift)
        embedding = self.linear_out(F.silu(self.linear_in(waves.to(self.linear_in.weight.dtype))))
        if self.classes is not None:
            # −1, none, is the last row
            embedding = embedding + self.classes(labels.remainder(self.config.classes + 1))
        if self.augment is not None:
            embedding = embedding + self.augment(augment.to(self.augment.weight.dtype))
        return F.silu(embedding)


class DiTAttention(nn.Module):
    """Multi-head attention between all tokens: (B, N, width) → (B, N, width)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, head_width = config.heads, config.width // config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        norms: list[nn.Module] = [nn.Identity(), nn.Identity()]
        if config.qk_norm and config.norm == "rms":
            norms = [RMSNorm(head_width, eps=1e-6) for _ in norms]
        elif config.qk_norm:
            norms = [nn.LayerNorm(head_width) for _ in norms]
        self.query_norm, self.key_norm = norms

    def forward(self, x: Tensor, by: Rotation | None = None) -> Tensor:
        query, key, value = rearrange(
            self.qkv(x), "b n (qkv heads d) -> qkv b heads n d", qkv=3, heads=self.heads
        )
        query, key = self.query_norm(query), self.key_norm(key)
        if by is not None:
            query, key = rotate(query, by), rotate(key, by)
        # norms and rotations may have computed in a finer type; Vaswani et al. 2017, Equation 1
        mixed = F.scaled_dot_product_attention(query.type_as(value), key.type_as(value), value)
        return self.proj(rearrange(mixed, "b heads n d -> b n (heads d)"))


class DiTMLP(nn.Module):
    """Two layers, with a GELU or a gate between: (B, N, width) → (B, N, width)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.is_gated = config.mlp == "swiglu"
        self.linear_in = nn.Linear(config.width, (1 + self.is_gated) * config.hidden_width)
        self.linear_out = nn.Linear(config.hidden_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear_in(x)
        if not self.is_gated:
            return self.linear_out(F.gelu(h, approximate="tanh"))
        gate, h = h.chunk(2, dim=-1)
        # Shazeer 2020 (arXiv 2002.05202), Equation 6
        return self.linear_out(F.silu(gate) * h)


class DiTBlock(nn.Module):
    """Attention, then an MLP, both with adaLN-Zero: (B, N, width) → (B, N, width).

    Untrained it is the identity: the gates are 0.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.attention, self.mlp = DiTAttention(config), DiTMLP(config)
        self.modulation = nn.Linear(config.width, 6 * config.width)

    def forward(self, x: Tensor, embedding: Tensor, by: Rotation | None = None) -> Tensor:
        # Peebles and Xie 2023, Figure 3, "DiT Block with adaLN-Zero": x + α f((1 + γ) norm(x) + β)
        parts = self.modulation(embedding)[:, None].chunk(6, dim=-1)  # (B, 1, width) each
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, by)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiTLast(nn.Module):
    """The last layer: tokens (B, N, width) → the values of their patches (B, N, patch² · n_z)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.linear = nn.Linear(config.width, config.patch**2 * config.latent_channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


class DiT(Network):
    """The diffusion transformer; untrained, it answers 0.

    Every patch of the latents is a token. It differs from the published networks in predicting no
    variance, and in having no table of positions: both sides of a latent may be any multiple of
    `config.patch`.
    """

    config: DiTConfig
    embed: DiTEmbedding

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config, DiTEmbedding(config))
        n_z, patch = config.latent_channels, config.patch
        self.patches = nn.Conv2d(n_z, config.width, patch, stride=patch)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.last = DiTLast(config)
        self._initialise()

    def _initialise(self) -> None:
        """Draw the weights as the authors' code does; the paper's Section 4 names the zeros."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for layer in (self.embed.linear_in, self.embed.linear_out):
            nn.init.normal_(layer.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, DiTBlock | DiTLast):
                zeroed(module.modulation)
        zeroed(self.last.linear)

    def transform(self, x: Tensor, embedding: Tensor) -> Tensor:
        config, patch = self.config, self.config.patch
        height, width = (side // patch for side in x.shape[2:])
        trained = height_width(config.grid or (height, width))
        rows = coordinates(height, trained[0], x.device)
        columns = coordinates(width, trained[1], x.device)
        # tokens stay in the type of x, also under autocast: (B, N, width)
        tokens = rearrange(self.patches(x), "b c h w -> b (h w) c").to(x.dtype)
        if config.positions != "rotary":
            tokens = tokens + sincos(rows, columns, config.width).to(x.dtype)
        by = None
        if config.positions != "sincos":
            wide = torch.promote_types(x.dtype, torch.float32)
            cos, sin = rotation(rows, columns, config.width // config.heads)
            by = cos.to(wide), sin.to(wide)
        for block in self.blocks:
            tokens = self.run(block, tokens, embedding, by)
        values = self.last(tokens, embedding)
        return rearrange(values, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=patch, q=patch)
