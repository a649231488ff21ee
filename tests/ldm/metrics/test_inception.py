"""Extractors: a tiny TorchScript Inception, and users' functions."""

import hashlib
import itertools
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import nn

from ldm.errors import LdmError, UsageError
from ldm.metrics import inception
from ldm.metrics.inception import FeatureExtractor, load_extractor, weight_folders
from tests.ldm.metrics.fake_inception import (
    Layers,
    WholeInception,
    save_fake_inception,
    save_script,
    save_whole_inception,
)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A machine without weights and without a network: every known folder is empty."""
    folders = [tmp_path / "cache", tmp_path / "tmp", tmp_path / "hub"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(inception, "weight_folders", lambda: folders)
    monkeypatch.setattr("cleanfid.downloads_helper.inception_url", "file:///nowhere/inception.pt")
    return folders


def photographs(height: int, width: int | None = None) -> torch.Tensor:
    rows, columns = slice(50, 50 + height), slice(60, 60 + (width or height))
    crops = [photo[rows, columns] for photo in (data.astronaut(), data.chelsea())]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def test_features_are_those_of_clean_fids_own_wrapper(tmp_path):
    """The same file through clean-fid's resizer and its InceptionV3W."""
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    path = save_fake_inception(tmp_path)
    images = photographs(64)
    resize = build_resizer("clean")
    resized = np.stack([resize(image.permute(1, 2, 0).numpy()) for image in images])
    with torch.no_grad():
        wrapper = InceptionV3W(str(tmp_path), download=False)
        expected = wrapper(torch.from_numpy(resized).permute(0, 3, 1, 2))

    found = FeatureExtractor(path, "cpu")(images)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, expected)


def test_resizing_is_antialiased_bicubic_in_float(tmp_path):
    """Against Pillow itself, one float channel at a time; and 0..255 becomes −1..1."""
    images = photographs(200)
    channels = [
        Image.fromarray(channel.numpy().astype(np.float32)).resize((299, 299), Image.BICUBIC)
        for channel in images[0]
    ]
    resized = torch.from_numpy(np.stack(channels)).clamp(0, 255)
    expected = Layers(2048)((resized[None] - 128) / 128)
    found = FeatureExtractor(save_fake_inception(tmp_path), "cpu")(images[:1])
    torch.testing.assert_close(found, expected)


def test_provenance(tmp_path):
    path = save_fake_inception(tmp_path)
    extractor = FeatureExtractor(path, torch.device("cpu"))
    assert extractor.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert extractor.name == "inception-2015-12-05.pt, clean-fid resizing"
    assert not extractor.is_published


def test_loading_is_silent(tmp_path):
    path = save_fake_inception(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeatureExtractor(path, "cpu")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_found_where_people_keep_it(alone, place, monkeypatch):
    path = save_fake_inception(alone[place])
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert FeatureExtractor(None, "cpu").is_published


def test_another_file_that_was_found_is_not_run(alone, monkeypatch):
    """Anybody may put one into /tmp."""
    path = save_fake_inception(alone[1])
    monkeypatch.setattr(inception, "_load_network", None)  # calling it would be an error
    with pytest.raises(LdmError, match=r"is not on this machine .* give it with --weights PATH"):
        FeatureExtractor(None, "cpu")
    monkeypatch.setattr(inception, "published_weights", lambda: path)  # changed since it was found
    with pytest.raises(LdmError, match=r"not the published file .* give it with --weights PATH"):
        FeatureExtractor(None, "cpu")


def test_another_file_hides_no_published_one(alone, monkeypatch):
    save_fake_inception(alone[1], dim=512)
    path = save_fake_inception(alone[2])
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert inception.published_weights() == path and FeatureExtractor(None, "cpu").is_published


def test_the_folders_looked_in(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    ours, clean_fid, torch_hub = weight_folders()
    assert ours == tmp_path / "ours"
    assert clean_fid.name == "tmp"
    assert torch_hub == tmp_path / "torch" / "hub" / "checkpoints"


def test_fetched_only_when_it_is_the_published_file(alone, tmp_path, monkeypatch):
    elsewhere = tmp_path / "server"
    elsewhere.mkdir()
    path = save_fake_inception(elsewhere)
    monkeypatch.setattr("cleanfid.downloads_helper.inception_url", path.as_uri())
    with pytest.raises(LdmError, match="could not be fetched"):
        FeatureExtractor(None, "cpu")
    assert not list(alone[0].iterdir())

    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert FeatureExtractor(None, "cpu").is_published
    assert (alone[0] / "inception-2015-12-05.pt").read_bytes() == path.read_bytes()


# ---------------------------------------------------------------------------------- errors
def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_it_cannot_be_had(alone):
    with pytest.raises(LdmError) as error:
        FeatureExtractor(None, "cpu")
    text = one_line(error)
    assert "could not be fetched from file:///nowhere/inception.pt" in text
    assert f"put the file at {alone[0] / 'inception-2015-12-05.pt'}" in text
    assert text.endswith("or give it with --weights PATH")


def test_nothing_at_the_path_given(tmp_path):
    with pytest.raises(LdmError) as error:
        FeatureExtractor(tmp_path / "x.pt", "cpu")
    assert one_line(error).startswith(f"no Inception weights at {tmp_path / 'x.pt'}: give")


def test_a_broken_download(tmp_path):
    path = save_fake_inception(tmp_path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(LdmError) as error:
        FeatureExtractor(path, "cpu")
    text = one_line(error)
    assert f"{path} is damaged or no TorchScript file: give the published inception-" in text
    assert "or leave --weights out" in text and "delete" not in text, "it is a person's own file"


def test_a_file_of_plain_weights(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "inception.pt")
    with pytest.raises(LdmError) as error:
        FeatureExtractor(tmp_path / "inception.pt", "cpu")
    assert "no TorchScript file" in one_line(error)


def test_a_script_of_another_network(tmp_path):
    path = save_script(nn.Linear(2, 2), tmp_path / "linear.pt")
    with pytest.raises(LdmError) as error:
        FeatureExtractor(path, "cpu")
    assert "is TorchScript but no Inception network" in one_line(error)


def test_a_network_with_other_features(tmp_path):
    extractor = FeatureExtractor(save_fake_inception(tmp_path, dim=512), "cpu")
    with pytest.raises(LdmError) as error:
        extractor(photographs(32))
    assert "gives 512 features, not 2048" in one_line(error)


def test_floats_are_refused(tmp_path):
    extractor = FeatureExtractor(save_fake_inception(tmp_path), "cpu")
    with pytest.raises(TypeError, match="must be uint8"):
        extractor(torch.zeros(1, 3, 32, 32))


# -------------------------------------------------------------------------------------- extractors
numbers = itertools.count()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module into the current folder; its name. Nothing of it stays after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    before = set(sys.modules)

    def write(text: str) -> str:
        name = f"own_features_{next(numbers)}"
        (tmp_path / f"{name}.py").write_text(f"import torch\n{text}")
        return name

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("own_features_"):
            del sys.modules[name]


def own(spec: str, **kwargs):
    return load_extractor(spec, "clean", None, "cpu", **kwargs)


MEANS = "lambda images: images.float().mean((2, 3))"


# ---------------------------------------------------------------------------------- Inception
def test_legacy_features_are_those_of_clean_fids_own_wrapper(tmp_path):
    """Its mode legacy_tensorflow: floats 0..255 as they are; the file resizes by itself."""
    from cleanfid.inception_torchscript import InceptionV3W

    path = save_fake_inception(tmp_path)
    images = photographs(64, 80)
    with torch.no_grad():
        wrapper = InceptionV3W(str(tmp_path), download=False, resize_inside=True)
        expected = wrapper(images.float())
    legacy = load_extractor(None, "legacy-tensorflow", path, "cpu")
    found = legacy(images)
    torch.testing.assert_close(found, expected)
    assert found.shape == (2, legacy.dim)
    # resizing with and without antialiasing differs
    assert not torch.allclose(found, load_extractor(None, "clean", path, "cpu")(images), atol=1e-3)


def test_modes_say_which_they_are(tmp_path):
    path = save_fake_inception(tmp_path)
    clean, legacy = (
        load_extractor(None, mode, path, "cpu") for mode in ("clean", "legacy-tensorflow")
    )
    assert clean.name == "inception-2015-12-05.pt, clean-fid resizing"
    assert legacy.name == "inception-2015-12-05.pt, TensorFlow's legacy resizing"
    assert clean.sha256 == legacy.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not legacy.is_published


def test_an_unknown_mode():
    with pytest.raises(UsageError, match="'dirty' does not exist: use clean or legacy-tensorflow"):
        load_extractor(None, "dirty", None, "cpu")


# ------------------------------------------------------------- other outputs of the same pass
def test_tensorflows_resizing_puts_row_i_at_i_times_the_ratio():
    images = photographs(20, 33)[:, :1].double()
    resized = inception.resize_as_tensorflow(images.float(), 29)
    image, expected = images[0, 0].numpy(), np.zeros((29, 29))
    for i in range(29):
        for j in range(29):
            y, x = i * 20 / 29, j * 33 / 29
            top, left = int(y), int(x)
            below, right = min(top + 1, 19), min(left + 1, 32)
            rows = image[[top, below]] * np.array([[1 - y + top], [y - top]])
            expected[i, j] = rows.sum(0)[[left, right]] @ [1 - x + left, x - left]
    np.testing.assert_allclose(resized[0, 0].numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (240, 300)])
def test_all_outputs_are_those_of_the_network(tmp_path, monkeypatch, size):
    """The first 7 maps of mixed_6's branch conv, channels last; a softmax without the bias."""
    monkeypatch.setattr(FeatureExtractor, "dim", 24)
    path = save_whole_inception(tmp_path, 24)
    whole = FeatureExtractor(path, "cpu", "legacy-tensorflow")
    images = photographs(*size)
    plain = whole(images.clone())
    spatial, score = whole.output("sfid"), whole.output("is")
    network = WholeInception(24, 17, 1008)
    with torch.no_grad():
        features = network(images.float(), return_features=True)
        torch.testing.assert_close(plain, features, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(whole(images), features, atol=1e-3, rtol=1e-3)
        logits = features @ network.output.weight.T
        x = (inception.resize_as_tensorflow(images.float(), 299) - 128) / 128
        maps = network.layers.mixed_6.conv(network.layers[:3](x))[:, :7]
    torch.testing.assert_close(score(images), logits.softmax(1), atol=1e-3, rtol=1e-3)
    found = spatial(images)
    assert (found.shape, spatial.dim, score.dim) == ((2, 2023), 2023, 1008)
    for channel, row, column in ((0, 0, 0), (6, 16, 16), (3, 5, 11)):
        expected = maps[:, channel, row, column]
        torch.testing.assert_close(found[:, (row * 17 + column) * 7 + channel], expected)
    assert spatial.sha256 == whole.sha256 and spatial.mode == whole.mode


def test_outputs_of_one_batch_share_a_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(FeatureExtractor, "dim", 24)
    whole = FeatureExtractor(save_whole_inception(tmp_path, 24), "cpu")
    outputs = [whole, whole.output("sfid"), whole.output("is")]
    passes, run = [], whole._run
    monkeypatch.setattr(whole, "_run", lambda images: passes.append(1) or run(images))
    one, other = photographs(64), photographs(80)
    for images in (one, other):
        for output in outputs:
            output(images)
    assert len(passes) == 2


def test_a_network_without_these_outputs_is_refused(tmp_path):
    whole = FeatureExtractor(save_fake_inception(tmp_path), "cpu")
    for name, what in (("sfid", "spatial features"), ("is", "class probabilities")):
        with pytest.raises(LdmError) as error:
            whole.output(name)
        assert f"has no {what}: give the published inception-" in one_line(error)


# ------------------------------------------------------------------------------ one's own
def test_a_function_that_makes_a_function(write, tmp_path):
    name = write(f"def make():\n    return {MEANS}\n")
    extractor = own(f"{name}:make")
    images = photographs(64, 80)
    torch.testing.assert_close(extractor(images), images.float().mean((2, 3)))
    assert extractor.name == f"{name}:make"
    assert extractor.dim == 3
    assert not extractor.is_published
    source = (tmp_path / f"{name}.py").read_bytes()
    assert extractor.sha256 == hashlib.sha256(source).hexdigest()


@pytest.mark.parametrize("parameters", ["device", "where", "scale=1, device=None", "*, device"])
def test_it_is_given_the_device(write, parameters):
    where = "device" if "device" in parameters else "where"
    name = write(
        f"def make({parameters}):\n    assert {where} == torch.device('cpu')\n    return {MEANS}\n"
    )
    assert own(f"{name}:make").dim == 3


def test_defaults_of_its_own_are_left_alone(write):
    name = write(f"def make(scale=2):\n    assert scale == 2\n    return {MEANS}\n")
    assert own(f"{name}:make").dim == 3


def test_a_module_is_set_to_evaluation_and_learns_nothing(write):
    name = write(
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.line = torch.nn.Linear(3, 5)\n"
        "        self.drop = torch.nn.Dropout(0.5)\n"
        "    def forward(self, images):\n"
        "        return self.drop(self.line(images.float().mean((2, 3)))).half()\n"
    )
    extractor = own(f"{name}:Net")
    first, second = extractor(photographs(64, 80)), extractor(photographs(64, 80))
    assert torch.equal(first, second)
    assert first.dtype == torch.float32
    assert not first.requires_grad


def test_it_is_tried_at_the_images_size(write):
    name = write(
        "def make():\n"
        "    def features(images):\n"
        "        assert images.shape[-1] == 48 and images.dtype == torch.uint8\n"
        "        return images.float().mean((2, 3))\n"
        "    return features\n"
    )
    assert own(f"{name}:make", resolution=48).dim == 3
    with pytest.raises(LdmError, match=r"on uint8 images \(2, 3, 256, 256\): Assertion"):
        own(f"{name}:make")


# ---------------------------------------------------------------------------------- errors
def error_of(spec: str, kind: type = LdmError) -> str:
    with pytest.raises(kind) as error:
        own(spec)
    text = str(error.value)
    assert "\n" not in text
    assert spec in text
    return text


def test_invalid_specs(write):
    name = write("number = 3\ndef make():\n    return 5\n")
    assert "names no function: write module:function" in error_of("features", UsageError)
    assert "write module:function" in error_of(f"{name}:", UsageError)
    missing = "own_features_missing"
    assert f"no module '{missing}' is in" in error_of(f"{missing}:make", UsageError)
    assert f"'build' is not in {name}" in error_of(f"{name}:build", UsageError)
    assert "is int, which cannot be called" in error_of(f"{name}:number", UsageError)
    returned = error_of(f"{name}:make")
    assert "returned int, which cannot be called with images: it must be function(dev" in returned


def test_modules_that_cannot_be_imported(write):
    needy = write("import own_features_elsewhere\n")
    assert "No module named 'own_features_elsewhere'" in error_of(f"{needy}:make")
    broken = write("1 / 0\n")
    assert "cannot be imported: ZeroDivisionError" in error_of(f"{broken}:make")


def test_functions_that_fail(write):
    name = write(
        "def ask(a, b):\n    pass\n"
        "def fall():\n    raise RuntimeError('one\\ntwo')\n"
        "def make():\n    return lambda images: images.reshape(-1, 7)\n"
    )
    assert "failed to be made: TypeError" in error_of(f"{name}:ask")
    assert "failed to be made: RuntimeError: one two" in error_of(f"{name}:fall")
    assert "failed on uint8 images (2, 3, 256, 256): RuntimeError" in error_of(f"{name}:make")


def test_a_function_of_images_gets_the_expected_signature(write):
    name = write("def features(images):\n    return images.float().mean((2, 3))\n")
    assert error_of(f"{name}:features").endswith(
        "has no attribute 'float'; it must be function(device) → callable(uint8 images "
        "(B, 3, H, W)) → (B, dim)"
    )


def test_invalid_outputs_of_a_function(write):
    name = write(
        "def maps():\n    return lambda images: images.float()\n"
        "def one():\n    return lambda images: images.float().mean((0, 2, 3))[None]\n"
        "def pair():\n    return lambda images: (images, images)\n"
        "def sized():\n    return lambda images: images[:, 0, 0].float()\n"
    )
    assert "gave (2, 3, 256, 256) for images" in error_of(f"{name}:maps")
    assert "gave (1, 3) for images (2, 3, 256, 256): it must give a" in error_of(f"{name}:one")
    assert "gave tuple for images" in error_of(f"{name}:pair")
    sized = own(f"{name}:sized")
    with pytest.raises(LdmError, match=r"gave \(2, 80\) for .* it must give a tensor \(2, 256\)"):
        sized(photographs(64, 80))


def test_options_of_inception_are_refused_with_a_function(write, tmp_path):
    name = write(f"def make():\n    return {MEANS}\n")
    for mode, weights in (("legacy-tensorflow", None), ("clean", tmp_path / "x.pt")):
        with pytest.raises(UsageError, match="leave out the weights and the mode"):
            load_extractor(f"{name}:make", mode, weights, "cpu")


def test_floats_are_refused_by_a_function(write):
    name = write(f"def make():\n    return {MEANS}\n")
    with pytest.raises(TypeError, match="must be uint8"):
        own(f"{name}:make")(torch.zeros(1, 3, 32, 32))
