"""Extractors: Inception in either mode, and functions that a person writes."""

import hashlib
import itertools
import sys

import numpy as np
import pytest
import torch
from skimage import data

from ldm.errors import LdmError, UsageError
from ldm.metrics.inception import load_extractor
from tests.ldm.metrics.fake_inception import save_fake_inception

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


def photographs() -> torch.Tensor:
    crops = [p[50:114, 60:140] for p in (data.astronaut(), data.chelsea())]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


MEANS = "lambda images: images.float().mean((2, 3))"


# ---------------------------------------------------------------------------------- Inception
def test_legacy_features_are_those_of_clean_fids_own_wrapper(tmp_path):
    """Its mode legacy_tensorflow: floats 0..255 as they are; the file resizes by itself."""
    from cleanfid.inception_torchscript import InceptionV3W

    path = save_fake_inception(tmp_path)
    images = photographs()
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


# ------------------------------------------------------------------------------ one's own
def test_a_function_that_makes_a_function(write, tmp_path):
    name = write(f"def make():\n    return {MEANS}\n")
    extractor = own(f"{name}:make")
    images = photographs()
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
    first, second = extractor(photographs()), extractor(photographs())
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


def test_specs_that_name_nothing(write):
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


def test_a_function_of_images_is_told_what_it_should_be(write):
    name = write("def features(images):\n    return images.float().mean((2, 3))\n")
    assert error_of(f"{name}:features").endswith(
        "has no attribute 'float'; it must be function(device) → callable(uint8 images "
        "(B, 3, H, W)) → (B, dim)"
    )


def test_answers_that_are_no_features(write):
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
    with pytest.raises(LdmError, match="gave 80 features an image, and 256 at first"):
        sized(photographs())


def test_inceptions_options_are_refused(write, tmp_path):
    name = write(f"def make():\n    return {MEANS}\n")
    for mode, weights in (("legacy-tensorflow", None), ("clean", tmp_path / "x.pt")):
        with pytest.raises(UsageError, match="leave out the weights and the mode"):
            load_extractor(f"{name}:make", mode, weights, "cpu")


def test_floats_are_refused(write):
    name = write(f"def make():\n    return {MEANS}\n")
    with pytest.raises(TypeError, match="must be uint8"):
        own(f"{name}:make")(torch.zeros(1, 3, 32, 32))
