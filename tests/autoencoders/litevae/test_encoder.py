import numpy as np
import pytest
import pywt
import torch
from einops import rearrange
from torch.nn import functional as F

from autoencoders import AutoencoderConfig, build_autoencoder
from autoencoders.litevae.encoder import LiteVAEEncoder, LiteVAEEncoderConfig, wavelet_latents
from ldm.config import merge, resolve, validate
from ldm.errors import LdmError, UsageError
from tests.autoencoders.parameters import count
from tests.golden import ENCODER_GMAC_256, LITEVAE_ENCODER_PARAMETERS

UNET = {"type": "unet", "channels": 8, "multipliers": [1, 2], "blocks": 1}
SMALL = {"extractor": UNET, "aggregator": UNET}
NAFNET = {"extractor": {"type": "nafnet", "channels": 8, "blocks": 2}}
VIT = {"aggregator": {"type": "vit", "width": 16, "depth": 2, "heads": 2, "grid": 4}}
VARIANTS = {
    "paper": {},
    "f4": {"depth": 2},
    "f16": {"depth": 4},
    "f2": {"depth": 1},
    "nafnet": NAFNET,
    "vit": VIT,
    "shared": {"shared": True},
    "last two": {"levels": [2, 3]},
    "outer two": {"levels": [1, 3]},
    "without the last": {"levels": [1, 2]},
    "db2": {"wavelet": "db2"},
    "sym4": {"wavelet": "sym4"},
    "bior2.2": {"wavelet": "bior2.2"},
    "shortcut": {"shortcut": "wavelet"},
    "space to depth": {"reduction": "space_to_depth"},
    "space to depth, without the last": {"reduction": "space_to_depth", "levels": [1, 2]},
    "groups": {"extractor": UNET | {"group_channels": 4}},
    "all": {"shared": True, "levels": [2, 4], "depth": 4, "wavelet": "db2", **NAFNET, **VIT},
}


def small(seed=0, **options):
    torch.manual_seed(seed)
    config = validate(LiteVAEEncoderConfig, merge(SMALL, options))
    return LiteVAEEncoder(config, latent_channels=4)


def pictures(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("preset", "expected"), LITEVAE_ENCODER_PARAMETERS.items())
def test_golden_parameters(preset, expected):
    with torch.device("meta"):
        assert count(build_autoencoder(preset).encoder) == expected


@pytest.mark.parametrize("preset", LITEVAE_ENCODER_PARAMETERS)
def test_golden_multiply_accumulates(preset):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_autoencoder(preset).encoder(torch.zeros(1, 3, 256, 256))
    assert counter.get_total_flops() / 2e9 == pytest.approx(ENCODER_GMAC_256[preset], abs=0.005)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_forward_is_the_papers_with_every_level_from_the_image(options):
    """Appendix G's forward pass, its wavelets by PyWavelets from the image, against our cascade."""
    encoder = small(**options)
    images = pictures(2, 3, 64, 96)
    depth, wavelet = options.get("depth", 3), options.get("wavelet", "haar")
    grid = (64 >> depth, 96 >> depth)
    features = []
    for i, level in enumerate(options.get("levels", range(1, depth + 1))):
        low, edges, *_ = pywt.wavedec2(images.numpy(), wavelet, "periodization", level)
        sub_bands = torch.from_numpy(np.concatenate([low, *edges], axis=1)) / 2**level
        extractor = encoder.extractors[0 if options.get("shared") else i]
        maps = extractor(sub_bands)
        if options.get("reduction"):
            patch = {"a": maps.shape[2] // grid[0], "b": maps.shape[3] // grid[1]}
            maps = rearrange(maps, "n c (h a) (w b) -> n (c a b) h w", **patch)
        features.append(F.adaptive_avg_pool2d(maps, grid))
    expected = encoder.aggregator(torch.cat(features, dim=1))
    if options.get("shortcut"):
        expected[:, :4] += wavelet_latents(sub_bands, 4)
    assert expected.shape == (2, 8, *grid)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_learns_after_one_step(options):
    encoder = small(**options)
    optimizer = torch.optim.Adam(encoder.parameters(), 1e-2)
    images = pictures(2, 3, 32, 32).requires_grad_()
    target = torch.randn(encoder(images).shape, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.zero_grad()
        (encoder(images) - target).square().mean().backward()
        optimizer.step()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert (images.grad.abs().amax(dim=(0, 1)) > 0).all()  # no pixel goes unread


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_bf16_autocast_reads_float32_sub_bands(options):
    encoder, seen = small(**options), []
    images = pictures(2, 3, 64, 64)
    for extractor in encoder.extractors:
        extractor.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    expected = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        moments = encoder(images)
    exact, lowered = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(exact, lowered, strict=True))
    assert (moments - expected).norm() < 0.1 * expected.norm()


def test_saved_and_loaded_it_answers_the_same():
    ours, other = (small(seed, shared=True, levels=[2, 3], **VIT) for seed in (0, 1))
    images = pictures(1, 3, 32, 32)
    assert not torch.equal(ours(images), other(images))
    other.load_state_dict(ours.state_dict())
    assert torch.equal(ours(images), other(images))
    assert not any(name.startswith("extractors.1.") for name in ours.state_dict())


def test_sub_bands_of_a_flat_image_stay_in_its_range():
    seen, encoder = [], small()
    for extractor in encoder.extractors:
        extractor.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    encoder(torch.full((1, 3, 16, 16), 0.5))
    for sub_bands in seen:
        torch.testing.assert_close(sub_bands[:, :3], torch.full_like(sub_bands[:, :3], 0.5))
        assert sub_bands[:, 3:].abs().max() == 0


# luminance and two colour differences of (R, G, B): orthonormal
COLOURS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


def by_a_matrix(sub_bands, n_z):
    """The shortcut as a matrix of n_z rows over LL, H, V, D of R, G, B."""
    order = [(0, c) for c in range(3)] + [(band, c) for c in range(3) for band in (1, 2, 3)]
    rows = np.zeros((12, 4, 3))
    for row, (band, colour) in zip(rows, order, strict=True):
        row[band] = COLOURS[colour]
    matrix = rows.reshape(12, 12) if n_z < 12 else np.eye(max(n_z, 12))[:, :12]
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(12), atol=1e-12)  # it keeps the energy
    return torch.einsum("oc,bchw->bohw", torch.from_numpy(matrix[:n_z]), sub_bands)


@pytest.mark.parametrize("n_z", [1, 2, 3, 4, 8, 11, 12, 16])
def test_the_shortcut_is_an_orthonormal_matrix(n_z):
    sub_bands = pictures(2, 12, 3, 5).double()
    found = wavelet_latents(sub_bands, n_z)
    assert found.shape == (2, n_z, 3, 5)
    torch.testing.assert_close(found, by_a_matrix(sub_bands, n_z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"levels": [1, 2]}, {"wavelet": "db2"}, VIT])
def test_the_shortcut_adds_the_deepest_sub_bands_to_the_mean_alone(options):
    plain, ours = (small(**options, shortcut=kind) for kind in ("none", "wavelet"))
    assert ours.state_dict().keys() == plain.state_dict().keys()
    images = pictures(2, 3, 32, 32)
    low, edges, *_ = pywt.wavedec2(
        images.numpy(), options.get("wavelet", "haar"), "periodization", level=3
    )
    sub_bands = torch.from_numpy(np.concatenate([low, *edges], axis=1)) / 8
    added = ours(images) - plain(images)
    torch.testing.assert_close(added[:, :4], wavelet_latents(sub_bands, 4), rtol=1e-4, atol=1e-5)
    assert not added[:, 4:].any()


def test_the_shortcut_is_exact_where_the_networks_are_not():
    encoder = small(shortcut="wavelet")
    torch.nn.init.zeros_(encoder.last_layer.weight)
    torch.nn.init.zeros_(encoder.last_layer.bias)
    images = pictures(1, 3, 32, 32)
    expected = encoder(images)
    assert expected[:, :4].any()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(images), expected)


def test_parameters_of_the_ablations():
    def parameters(**options):
        with torch.device("meta"):
            return count(LiteVAEEncoder(validate(LiteVAEEncoderConfig, options), latent_channels=4))

    extractor, aggregator = 1_686_220, 1_691_976  # LiteVAE-B's, with 6,750,636 for all
    assert parameters() == 3 * extractor + aggregator
    assert parameters(shared=True) == extractor + aggregator
    # a level less: 12 channels fewer into the aggregator's first 3×3 convolution, 32 wide
    assert parameters(levels=[2, 3]) == 2 * extractor + aggregator - 12 * 32 * 9
    assert parameters(depth=2) == parameters(levels=[2, 3])
    vit = parameters(aggregator={"type": "vit"}) - 3 * extractor
    assert vit == pytest.approx(0.84e6, rel=0.02)  # Table 20
    nafnet = (parameters(extractor={"type": "nafnet"}) - aggregator) / 3
    assert nafnet == pytest.approx(extractor, rel=0.005)


@pytest.mark.parametrize(
    ("depth", "multipliers"), [(2, [1, 2, 4]), (3, None), (4, [1, 1, 2, 4, 4])]
)
def test_the_downsampling_is_that_of_the_levels(depth, multipliers):
    decoder = {"channels": 32} | ({"multipliers": multipliers} if multipliers else {})
    with torch.device("meta"):
        ae = build_autoencoder("litevae-s", encoder={"depth": depth}, decoder=decoder)
        assert ae.downsampling == 2**depth
        assert ae.encode(torch.zeros(1, 3, 64, 96)).mean.shape == (1, 4, 64 >> depth, 96 >> depth)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("encoder.wavelet=bd2", "'encoder.wavelet': no wavelet 'bd2'; did you mean 'db2'?"),
        ("encoder.depth=6", "'encoder.depth': input should be less than or equal to 5"),
        ("encoder.levels=[3,2]", "'encoder.levels': must ascend, without repeats, from 1 to"),
        ("encoder.levels=[2,2]", "'encoder.levels': must ascend"),
        ("encoder.levels=[2,4]", "to at most depth, 3"),
        ("encoder.levels=[0,1]", "'encoder.levels.0': input should be greater than 0"),
        ("encoder.levels=[]", "'encoder.levels': tuple should have at least 1 item"),
        ("encoder.extractor.type=vit", "'encoder.extractor': input tag 'vit'"),
        ("encoder.aggregator.type=nafnet", "'encoder.aggregator': input tag 'nafnet'"),
        ("encoder.extractor.heads=2", "unknown key 'encoder.extractor.heads'"),
    ],
)
def test_bad_options_are_refused_in_one_line(override, said):
    with pytest.raises(UsageError) as error:
        resolve(AutoencoderConfig, {}, [override])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_images_too_small_for_the_levels_are_refused():
    with pytest.raises(LdmError, match=r"images of 32×32 pixels are too small .* depth 3 .* 'db8'"):
        small(wavelet="db8")(torch.zeros(1, 3, 32, 32))
    with pytest.raises(LdmError, match=r"images of 24×32 pixels: .* depth 4 .* multiples of 16"):
        small(depth=4)(torch.zeros(1, 3, 24, 32))
