"""Diffusers' other autoencoders through ours: the same numbers, and everything that takes one."""

import json
import shutil
import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from autoencoders import Autoencoder, build_autoencoder, load_autoencoder, to_diffusers
from autoencoders.diffusers_parts import KINDS
from ldm.checkpoint import ModelFile, fingerprint, save_model
from ldm.config import resolve, to_tree
from ldm.errors import LdmError, UsageError
from pipelines import LatentDiffusionPipeline
from pipelines.analysis.features import analyze_features
from pipelines.analysis.latents import analyze_latents
from pipelines.analysis.subjects import open_analysis
from pipelines.bench import bench_encoders
from pipelines.evaluate import evaluate_checkpoints
from pipelines.exchange import export_autoencoder, import_autoencoder
from pipelines.recipes import AutoencoderRecipe
from pipelines.train_diffusion import train_diffusion
from tests import small
from tests.autoencoders.other_models import DETERMINISTIC, OTHERS, make

every_class = pytest.mark.parametrize("name", OTHERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each class, as diffusers' save_pretrained writes it."""
    root = tmp_path_factory.mktemp("others")
    for name in OTHERS:
        make(name).save_pretrained(root / name)
    return root


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(6):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i}.png")
    return str(tmp_path / "data")


def images(count=2, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latents_of(model, x):
    found = model.encode(x)
    names = ("latent_dist", "latents", "latent")
    value = next(getattr(found, name) for name in names if hasattr(found, name))
    return value.mode() if hasattr(value, "mode") and not torch.is_tensor(value) else value


def test_every_class_of_the_table_is_tested():
    assert set(KINDS) == set(OTHERS)


@every_class
@torch.no_grad()
def test_numbers_are_those_of_diffusers_to_the_bit(folders, name):
    ae, theirs, x = load_autoencoder(folders / name), make(name), images()
    z = latents_of(theirs, x)
    posterior = ae.encode(x)
    assert torch.equal(posterior.mean, z)
    assert z.shape[1] == ae.config.latent_channels and 32 // z.shape[2] == ae.downsampling
    if name in DETERMINISTIC:
        generator = torch.Generator().manual_seed(0)
        torch.testing.assert_close(posterior.sample(generator), z, atol=1e-5, rtol=0)
    else:
        assert torch.equal(posterior.logvar, theirs.encode(x).latent_dist.logvar)
    noise = [torch.Generator().manual_seed(0) for _ in z]
    given = {"generator": noise} if name == "ConsistencyDecoderVAE" else {}
    recon = ae.decode(z)
    assert torch.equal(recon, theirs.decode(z, **given).sample)
    torch.testing.assert_close(ae.decode(z[1:]), recon[1:], atol=1e-4, rtol=0)  # no batch in it
    assert ae(images(1, 36)[..., :35]).recon.shape == (1, 3, 36, 35)  # padded and cropped


@every_class
def test_it_becomes_a_model_file_and_goes_back_to_the_bit(folders, tmp_path, name):
    out = tmp_path / "a.pt"
    import_autoencoder(str(folders / name), out)
    ae = load_autoencoder(out)
    assert fingerprint(ae.state_dict()) == fingerprint(
        load_autoencoder(folders / name).state_dict()
    )
    export_autoencoder(tmp_path / "back", "diffusers", out)
    again, first = (getattr(diffusers, name).from_pretrained(p) for p in
                    (tmp_path / "back", folders / name))  # fmt: skip
    assert dict(again.config) | {"_name_or_path": ""} == dict(first.config) | {"_name_or_path": ""}
    theirs = first.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in again.state_dict().items())
    export_autoencoder(tmp_path / "hub", "hub", out)
    assert Autoencoder.from_pretrained(tmp_path / "hub").config == ae.config
    with pytest.raises(LdmError, match=r"no compvis model can .*encoder\.type=diffusers"):
        export_autoencoder(tmp_path / "kl.ckpt", "compvis", out)


def test_exported_scaling_is_that_of_the_source_unless_given(folders, tmp_path):
    for given, expected in ((None, 0.4), (0.7, 0.7)):
        out = tmp_path / str(given)
        export_autoencoder(out, "diffusers", folders / "AutoencoderDC", given)
        described = json.loads((out / "config.json").read_text("utf-8"))
        assert described["scaling_factor"] == expected


def test_weights_in_shards_and_variants_load(folders, tmp_path):
    whole = load_autoencoder(folders / "VQModel").state_dict()
    make("VQModel").save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    make("VQModel").save_pretrained(tmp_path / "fp16", variant="fp16")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("shards", "fp16"):
        assert fingerprint(load_autoencoder(tmp_path / folder).state_dict()) == fingerprint(whole)


@pytest.mark.usefixtures("no_lpips")
def test_all_are_evaluated_side_by_side(folders, pictures, tmp_path):
    models = [folders / name for name in OTHERS]
    found = evaluate_checkpoints(
        models, pictures, "all", [32], 3, device="cpu", fid=False, out=tmp_path / "eval.json"
    )
    assert [each.model for each in found] == models
    for each in found:
        theirs = make(each.model.name)
        assert np.isfinite(each.numbers["psnr"]) and each.about["model"]["format"] == "diffusers"
        assert theirs is not None


def test_their_latents_are_analysed_but_not_their_levels(folders, pictures, tmp_path):
    models = [f"{name}={folders / name}" for name in ("AutoencoderTiny", "VQModel")]
    opened = open_analysis(models, pictures, "all", 32, "cpu", 4)
    found = analyze_latents(*opened, 4, 2, tmp_path)
    assert {row[0] for row in found.rows} == {"AutoencoderTiny", "VQModel"}
    with pytest.raises(LdmError, match="AutoencoderTiny: its decoder is one of diffusers"):
        analyze_features(*opened, 2, tmp_path)


@every_class
def test_bench_counts_the_encoder(folders, name):
    costs = bench_encoders([str(folders / name)], 32, 2, "cpu", 1, 1).costs
    theirs = make(name)
    parts = [getattr(theirs, part, None) for part in ("encoder", "quant_conv")]
    expected = sum(p.numel() for part in parts if part is not None for p in part.parameters())
    assert costs[0].parameters == expected and costs[0].gmac > 0 and costs[0].peak_mib > 0
    assert costs[0].name == str(folders / name)


def test_stage_two_trains_on_it_and_its_checkpoint_holds_it(folders, pictures, tmp_path):
    recipe = small.diffusion_recipe(
        folders / "AutoencoderTiny", "steps=2", f"data.source={pictures!r}", "data.workers=0",
        "run={validate_every_steps: 2, save_every_steps: 2, device: cpu}",
    )  # fmt: skip
    train_diffusion(recipe, folder=tmp_path / "run")
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "run", "cpu", "fp32")
    assert pipe(n=1, seed=0, steps=2).shape == (1, 3, 32, 32)
    # the scaling that the source had stays with it
    assert to_diffusers(pipe.codec.autoencoder).config.scaling_factor == 1.0


@torch.no_grad()
def test_a_litevae_encoder_goes_with_their_decoder(folders, tmp_path):
    theirs = load_autoencoder(folders / "AutoencoderTiny")
    tree = to_tree(theirs.config)
    ae = build_autoencoder("tiny", encoder={"depth": 2}, decoder=tree["decoder"])
    ae.decoder.load_state_dict(theirs.decoder.state_dict())
    file = ModelFile("autoencoder", to_tree(ae.config), ae.state_dict())
    save_model(tmp_path / "student.pt", file)
    student = load_autoencoder(tmp_path / "student.pt")
    z = theirs.encode(images()).mode()
    assert student.encode(images()).mean.shape == z.shape
    assert torch.equal(student.decode(z), theirs.decode(z))
    assert len(to_diffusers(student).config.block_out_channels) == 3
    with pytest.raises(LdmError, match=r"no diffusers model can .*encoder\.type=litevae"):
        export_autoencoder(tmp_path / "out", "diffusers", tmp_path / "student.pt")


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_training_one_is_refused_in_a_line(folders, part):
    section = to_tree(load_autoencoder(folders / "AutoencoderTiny").config)[part]
    other = {"decoder": {"multipliers": [1, 1, 2]}, "encoder": {"depth": 2}}
    tree = {part: section} | {key: other[key] for key in other if key != part}
    with pytest.raises(UsageError, match=f"{part}s of type diffusers are not trained") as caught:
        resolve(AutoencoderRecipe, tree)
    assert "\n" not in str(caught.value)


def test_without_diffusers_one_line_says_so(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(LdmError, match=r"AutoencoderTiny is a class of diffusers.*pip install"):
        load_autoencoder(folders / "AutoencoderTiny")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"encoder_block_out_channels": None}, "has no encoder_block_out_channels"),
        ({"encoder_block_out_channels": "x"}, "has no encoder_block_out_channels"),
        ({"latent_channels": "4"}, "has no latent_channels"),
        ({"in_channels": 1}, "in_channels is 1, only 3 is supported"),
        ({"num_encoder_blocks": [1]}, "diffusers cannot build this AutoencoderTiny: ValueError"),
        ({"act_fn": "nonsense"}, "diffusers cannot build this AutoencoderTiny"),
        ({"latent_channels": 5}, "does not fit its own config: tensor"),
        ({"latent_channels": 2**40}, "latent_channels is 1099511627776, at most 65536"),
        ({"num_encoder_blocks": [1, 10**7, 3, 3]}, "num_encoder_blocks is 10000000, at most 64"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_a_line(folders, tmp_path, changes, why):
    folder = tmp_path / "vae"
    shutil.copytree(folders / "AutoencoderTiny", folder)
    described = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(described | changes))
    with pytest.raises(LdmError, match=why) as caught:
        load_autoencoder(folder)
    assert "\n" not in str(caught.value)


def test_a_class_that_is_not_in_the_table_is_refused(folders, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderOobleck"}))
    with pytest.raises(LdmError, match="_class_name is 'AutoencoderOobleck'"):
        load_autoencoder(tmp_path)
