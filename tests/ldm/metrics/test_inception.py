"""Finding, loading and running Inception, on a tiny TorchScript network of its interface."""

import hashlib
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from torch import nn

from ldm.errors import LdmError
from ldm.metrics import inception
from ldm.metrics.inception import FeatureExtractor, load_inception, weight_folders
from tests.ldm.metrics.fake_inception import Layers, save_fake_inception, save_script


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A machine without weights and without a network: every known folder is empty."""
    folders = [tmp_path / "cache", tmp_path / "tmp", tmp_path / "hub"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setattr(inception, "weight_folders", lambda: folders)
    monkeypatch.setattr("cleanfid.downloads_helper.inception_url", "file:///nowhere/inception.pt")
    return folders


def photographs(size: int) -> torch.Tensor:
    crops = [p[50 : 50 + size, 60 : 60 + size] for p in (data.astronaut(), data.chelsea())]
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

    found = load_inception(path, "cpu")(images)
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
    found = load_inception(save_fake_inception(tmp_path), "cpu")(images[:1])
    torch.testing.assert_close(found, expected)


def test_provenance(tmp_path):
    path = save_fake_inception(tmp_path)
    extractor = load_inception(path, torch.device("cpu"))
    assert extractor.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert extractor.name == "inception-2015-12-05.pt, clean-fid resizing"
    assert not extractor.is_published


def test_loading_is_silent(tmp_path):
    path = save_fake_inception(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_inception(path, "cpu")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_found_where_people_keep_it(alone, place, monkeypatch):
    path = save_fake_inception(alone[place])
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert load_inception(None, "cpu").is_published


def test_another_file_that_was_found_is_not_run(alone, monkeypatch):
    """Anybody may put one into /tmp."""
    path = save_fake_inception(alone[1])
    monkeypatch.setattr(inception, "_load_network", None)  # calling it would be an error
    with pytest.raises(LdmError, match=r"is not on this machine .* give it with --weights PATH"):
        load_inception(None, "cpu")
    with pytest.raises(LdmError, match=r"not the published file .* give it with --weights PATH"):
        FeatureExtractor(path, "cpu", trusted=False)


def test_another_file_hides_no_published_one(alone, monkeypatch):
    save_fake_inception(alone[1], dim=512)
    path = save_fake_inception(alone[2])
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert inception.published_weights() == path and load_inception(None, "cpu").is_published


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
        load_inception(None, "cpu")
    assert not list(alone[0].iterdir())

    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert load_inception(None, "cpu").is_published
    assert (alone[0] / "inception-2015-12-05.pt").read_bytes() == path.read_bytes()


# ---------------------------------------------------------------------------------- errors
def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_it_cannot_be_had(alone):
    with pytest.raises(LdmError) as error:
        load_inception(None, "cpu")
    text = one_line(error)
    assert "could not be fetched from file:///nowhere/inception.pt" in text
    assert f"put the file at {alone[0] / 'inception-2015-12-05.pt'}" in text
    assert text.endswith("or give it with --weights PATH")


def test_nothing_at_the_path_given(tmp_path):
    with pytest.raises(LdmError) as error:
        load_inception(tmp_path / "x.pt", "cpu")
    assert one_line(error).startswith(f"no Inception weights at {tmp_path / 'x.pt'}: give")


def test_a_broken_download(tmp_path):
    path = save_fake_inception(tmp_path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(LdmError) as error:
        load_inception(path, "cpu")
    text = one_line(error)
    assert f"{path} is damaged or no TorchScript file: give the published inception-" in text
    assert "or leave --weights out" in text and "delete" not in text, "it is a person's own file"


def test_a_file_of_plain_weights(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "inception.pt")
    with pytest.raises(LdmError) as error:
        load_inception(tmp_path / "inception.pt", "cpu")
    assert "no TorchScript file" in one_line(error)


def test_a_script_of_another_network(tmp_path):
    path = save_script(nn.Linear(2, 2), tmp_path / "linear.pt")
    with pytest.raises(LdmError) as error:
        load_inception(path, "cpu")
    assert "is TorchScript but no Inception network" in one_line(error)


def test_a_network_with_other_features(tmp_path):
    extractor = load_inception(save_fake_inception(tmp_path, dim=512), "cpu")
    with pytest.raises(LdmError) as error:
        extractor(photographs(32))
    assert "gives 512 features, not 2048" in one_line(error)


def test_floats_are_refused(tmp_path):
    extractor = load_inception(save_fake_inception(tmp_path), "cpu")
    with pytest.raises(TypeError, match="must be uint8"):
        extractor(torch.zeros(1, 3, 32, 32))
