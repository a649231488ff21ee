"""DINOv2's features: made-up weights of the published names, against transformers' network."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import LdmError
from ldm.metrics import dinov2
from ldm.metrics.dinov2 import Dinov2, VisionTransformer, load_network
from tests.pipelines.measuring.fid_sides import pictures, to_nchw


def write_dinov2(path, width=64, depth=2, grid=16, seed=0):
    """A file of the published format, small; its tensors."""
    draw = torch.Generator().manual_seed(seed)
    network = VisionTransformer(width, depth, grid)
    weights = {
        name: torch.randn(tensor.shape, generator=draw) * (0.3 if tensor.ndim < 2 else 0.1)
        + ("norm" in name and "weight" in name)
        for name, tensor in network.state_dict().items()
    }
    weights["mask_token"] = torch.zeros(1, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)
    return weights


def as_transformers(weights, names) -> dict[str, torch.Tensor]:
    """The tensors under transformers' `names`, which version 5 changed."""
    is_new = any("q_proj" in name for name in names)
    pairs = [
        ("cls_token", "embeddings.cls_token"),
        ("mask_token", "embeddings.mask_token"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("blocks", "encoder.layer"),
        ("attn.proj", "attention.o_proj" if is_new else "attention.output.dense"),
        ("ls1.gamma", "layer_scale1.lambda1"),
        ("ls2.gamma", "layer_scale2.lambda1"),
    ]
    parts = ("q_proj", "k_proj", "v_proj") if is_new else ("query", "key", "value")
    inner = "attention" if is_new else "attention.attention"
    named = {}
    for name, tensor in weights.items():
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        if name.startswith("norm."):
            name = f"layernorm.{name.removeprefix('norm.')}"
        if "attn.qkv" in name:
            for part, chunk in zip(parts, tensor.chunk(3), strict=True):
                named[name.replace("attn.qkv", f"{inner}.{part}")] = chunk
        else:
            named[name] = tensor
    return named


def test_class_tokens_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    weights = write_dinov2(tmp_path / "w.pth", width=128, depth=3)
    config = transformers.Dinov2Config(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=224, patch_size=14
    )
    theirs = transformers.Dinov2Model(config).eval()
    theirs.load_state_dict(as_transformers(weights, theirs.state_dict()))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(images).last_hidden_state[:, 0]
        found = load_network(tmp_path / "w.pth")(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Keys's kernel."""
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def test_positions_are_interpolated_with_the_published_offset():
    """16 places at (i + ½) · 37 / 16.1 − ½ of the trained 37, by a loop over its definition."""
    network = VisionTransformer(64, 1, 37)
    torch.nn.init.normal_(network.pos_embed, generator=torch.Generator().manual_seed(0))
    matrix = np.zeros((16, 37))
    for i in range(16):
        place = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            matrix[i, min(max(j, 0), 36)] += cubic(np.array(place - j))
    maps = network.pos_embed[0, 1:].detach().double().numpy().reshape(37, 37, 64)
    expected = np.einsum("ij,kl,jlc->ikc", matrix, matrix, maps).reshape(256, 64)
    with torch.no_grad():
        found = network._positions(16, 16)
    assert torch.equal(found[:, 0], network.pos_embed[:, 0])
    np.testing.assert_allclose(found[0, 1:].numpy(), expected, atol=5e-5)


def test_images_are_resized_by_pillow_at_8_bits(tmp_path):
    write_dinov2(tmp_path / "w.pth")
    extractor = Dinov2("cpu", tmp_path / "w.pth")
    images = pictures(2, 0)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    resized = [np.asarray(Image.fromarray(image).resize((224, 224), 3)) for image in images]
    inputs = torch.from_numpy((np.stack(resized) / 255 - mean) / std).float()
    with torch.no_grad():
        expected = load_network(tmp_path / "w.pth")(inputs.permute(0, 3, 1, 2))
    found = extractor(to_nchw(images))
    assert found.shape == (2, extractor.dim) == (2, 64)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert extractor.sha256 == hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    assert extractor.mode is None and extractor.is_published is False
    assert "(not of ViT-L/14's size), Pillow's bicubic" in extractor.name


@pytest.mark.parametrize("place", ["cache", "hub/checkpoints"])
def test_weights_are_found_in_the_usual_caches(tmp_path, monkeypatch, place):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(dinov2, "URL", "file:///nowhere")
    with pytest.raises(LdmError, match=r"put the file at .*, or omit the metric fd-dinov2"):
        Dinov2("cpu")
    write_dinov2(tmp_path / place / dinov2.WEIGHTS)
    assert Dinov2("cpu").dim == 64


@pytest.mark.parametrize(
    "damage",
    [
        lambda w: [1, 2],
        lambda w: {k: v for k, v in w.items() if k != "cls_token"},
        lambda w: w | {"pos_embed": torch.zeros(1, 4, 64)},
        lambda w: {k: v for k, v in w.items() if not k.startswith("blocks")},
        lambda w: w | {"blocks.x.ls1.gamma": torch.zeros(64)},
        lambda w: w | {"cls_token": torch.zeros(1, 1, 65)},
        lambda w: w | {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)},
        lambda w: w | {"register_tokens": torch.zeros(1, 4, 64)},
        lambda w: w | {"norm.weight": torch.full((64,), torch.nan)},
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "w.pth"
    torch.save(damage(write_dinov2(path)), path)
    with pytest.raises(LdmError) as error:
        load_network(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
