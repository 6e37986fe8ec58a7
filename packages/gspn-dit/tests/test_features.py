import json
import os
import pickle
import shutil

import pytest
import torch
from feature_cases import LATENT, options, save_vae, tiny_vae, write_photographs
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from gspn_dit.extract import extract
from gspn_dit.features import Features
from gspn_dit.vae import DECODER, ENCODER, decode, factor, fingerprint, load_vae, sample_moments


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished extraction of 12 images in shards of 5, 5 and 2. Not to be changed."""
    root = tmp_path_factory.mktemp("features")
    vae = save_vae(root / "vae")
    extract(options(write_photographs(root / "images"), vae, root / "features"))
    return root / "features"


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(made, tmp_path / "features")


def test_rows(made):
    features = Features(made, vae_fingerprint=fingerprint(tiny_vae()))
    assert len(features) == 12
    assert features.class_names == ["china", "flower"]
    assert features.latent_shape == (4, LATENT, LATENT)
    assert (features.scaling_factor, features.shift_factor) == (0.18215, None)
    shards = [load_file(made / f"shard-{number:05d}.safetensors") for number in range(3)]
    moments, labels = (torch.cat([shard[name] for shard in shards]) for name in ("moments", "labels"))
    for index in (0, 4, 5, 11, -1, 7):
        row, label = features[index]
        assert torch.equal(row, moments[index])
        assert label == labels[index]
        assert row.untyped_storage().nbytes() == row.nbytes
    with pytest.raises(IndexError):
        features[12]


def test_loader_with_processes(made):
    features = Features(made)
    features[3]
    loader = DataLoader(features, batch_size=5, shuffle=True, num_workers=2)
    batches = list(loader)
    assert [moments.shape for moments, _ in batches] == [(n, 2, 8, LATENT, LATENT) for n in (5, 5, 2)]
    assert torch.cat([labels for _, labels in batches]).sort().values.tolist() == [0] * 6 + [1] * 6
    total = torch.stack([features[index][0] for index in range(12)]).sum(0)
    torch.testing.assert_close(sum(moments.sum(0) for moments, _ in batches), total)


def test_pickles_without_its_open_files(made):
    features = Features(made)
    row = features[6][0]
    copy = pickle.loads(pickle.dumps(features))
    assert copy._shards == {}
    assert torch.equal(copy[6][0], row)


def test_no_features(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=r"no features in '.*': it has no extraction.json"):
            Features(path)


def test_an_extraction_that_has_not_ended(folder):
    (folder / "index.json").unlink()
    (folder / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has not ended: 2 of 3 shards are there; run `gspn-dit extract` again"):
        Features(folder)


def test_a_missing_shard(folder):
    (folder / "shard-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001.safetensors is missing; run `gspn-dit extract` again"):
        Features(folder)


def test_a_truncated_shard(folder):
    shard = folder / "shard-00002.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 40)
    with pytest.raises(ValueError, match=rf"00002.safetensors is damaged: it must have {size} bytes, got {size - 40};"):
        Features(folder)


def test_a_shard_of_the_right_size_but_not_readable(folder):
    shard = folder / "shard-00000.safetensors"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is damaged: .*header.*; run `gspn-dit extract`"):
        Features(folder)


def test_a_shard_whose_content_changed(folder):
    shard = folder / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-60] ^= 1  # one bit of the moments
    shard.write_bytes(content)
    features = Features(folder)
    features[0]
    message = r"00001.safetensors is damaged: its checksum is not that of the index; run `gspn-dit extract` again"
    with pytest.raises(ValueError, match=message):
        features[5]


def test_a_shard_of_something_else(folder):
    shutil.copy(folder / "shard-00000.safetensors", folder / "shard-00001.safetensors")
    with pytest.raises(ValueError, match=r"00001.* must hold images 5 to 9 as moments \[5, 2, 8, 4, 4\], got 5 images"):
        Features(folder)


def test_a_class_out_of_range(folder):
    shard = folder / "shard-00001.safetensors"
    tensors = load_file(shard)
    tensors["labels"][2] = 2
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=r"labels must be from 0 to 1, got 0 to 2 in .*shard-00001.safetensors"):
        Features(folder)


def test_features_of_another_vae(made):
    other = fingerprint(tiny_vae(seed=1))
    with pytest.raises(
        ValueError, match=rf"vae must be the one that the features in .* with, \w{{12}}, got {other[:12]}"
    ):
        Features(made, vae_fingerprint=other)


def test_damaged_records(folder):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "shards": index["shards"][:2]}))
    with pytest.raises(ValueError, match=r"index.json must name 3 shards, got 2"):
        Features(folder)
    settings = json.loads((folder / "extraction.json").read_text())
    (folder / "extraction.json").write_text(json.dumps({**settings, "format": "other 2"}))
    with pytest.raises(ValueError, match=r"extraction.json must be of format 'gspn-dit features 2', got 'other 2'"):
        Features(folder)
    (folder / "extraction.json").write_text("{")
    with pytest.raises(ValueError, match=r"extraction.json is damaged: "):
        Features(folder)


def test_sampled_latents():
    mean, log_variance = torch.tensor([3.0, -1.0]), torch.tensor([-2.0, 1.0])
    moments = torch.cat((mean, log_variance)).view(1, 4, 1, 1).expand(20_000, 4, 2, 2)
    noise = torch.randn(20_000, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    z = sample_moments(moments, noise)
    torch.testing.assert_close(z.mean((0, 2, 3)), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), (log_variance / 2).exp(), atol=0.02, rtol=0)
    torch.testing.assert_close(sample_moments(moments, noise, 0.5, 0.25), (z - 0.25) * 0.5)
    torch.testing.assert_close(sample_moments(moments, noise, 0.5), z * 0.5)
    extreme = torch.tensor([0.0, 100.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(sample_moments(extreme, torch.ones(1, 1, 1, 1)).item(), torch.tensor(10.0).exp().item())
    # As diffusers draws from the same moments with the same noise.
    vae = tiny_vae()
    posterior = vae.encode(torch.rand(2, 3, 16, 16) * 2 - 1).latent_dist
    noise = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(
        sample_moments(posterior.parameters, noise), posterior.sample(torch.Generator().manual_seed(7))
    )


@pytest.mark.parametrize("shift", [None, 0.1159])
def test_decode_undoes_the_scaling(shift):
    vae = tiny_vae(scaling_factor=0.3611, shift_factor=shift)
    z = torch.randn(2, 4, 2, 3)
    images = decode(vae, (z - (shift or 0)) * 0.3611)
    assert images.shape == (2, 3, 16, 24)
    assert images.abs().max() <= 1
    assert not images.requires_grad
    torch.testing.assert_close(images, vae.decode(z).sample.detach().clamp(-1, 1), atol=1e-5, rtol=1e-4)


def test_factor():
    assert factor(tiny_vae()) == 8
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    assert factor(tiny_vae(block_out_channels=(8, 8), **blocks)) == 2


def test_fingerprint_is_of_weights_and_configuration(tmp_path):
    vae = tiny_vae()
    known = fingerprint(vae)
    assert fingerprint(load_vae(save_vae(tmp_path / "vae"))) == known
    assert fingerprint(load_vae(save_vae(tmp_path / "again", sample_size=128))) == known
    assert fingerprint(tiny_vae(scaling_factor=0.2)) != known
    assert fingerprint(tiny_vae(seed=1)) != known
    everything = fingerprint(vae, ENCODER + DECODER)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-6
    # Latents do not depend on the decoder: sd-vae-ft-ema and sd-vae-ft-mse share them.
    assert fingerprint(vae) == known
    assert fingerprint(vae, ENCODER + DECODER) != everything
    for parameter in (vae.encoder.conv_in.bias, vae.quant_conv.bias):
        with torch.no_grad():
            parameter[0] += 1e-6
        assert fingerprint(vae) != known
        known = fingerprint(vae)
    half = tiny_vae().half()
    half.save_pretrained(tmp_path / "half")
    assert fingerprint(load_vae(str(tmp_path / "half"))) == fingerprint(half)


def test_vae_of_a_pipeline(tmp_path):
    save_vae(tmp_path / "pipeline" / "vae")
    vae = load_vae(str(tmp_path / "pipeline"))
    assert (vae.training, vae.dtype) == (False, torch.float32)
    assert fingerprint(vae) == fingerprint(tiny_vae())


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated")
def test_no_vae(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"no VAE in .*: neither it nor its folder vae has a config.json"):
        load_vae(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no folder '.*absent'; vae must be a diffusers folder or the name of"):
        load_vae(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"no folder 'nobody/vae', and the Hub has no such VAE or cannot be"):
        load_vae("nobody/vae")


def test_bad_vaes(tmp_path):
    vae = tmp_path / "vae"
    save_vae(vae)
    config, weights = vae / "config.json", vae / "diffusion_pytorch_model.safetensors"
    text, tensors = config.read_text(), load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if name != "encoder.conv_in.weight"}, weights)
    with pytest.raises(ValueError, match=r"is incomplete: it lacks encoder.conv_in.weight"):
        load_vae(str(vae))
    os.truncate(weights, 1000)
    with pytest.raises(ValueError, match=r"the VAE in .* is damaged or incomplete: Unable to load weights"):
        load_vae(str(vae))
    weights.unlink()
    with pytest.raises(ValueError, match=r"the VAE in .* is damaged or incomplete: .*no file named"):
        load_vae(str(vae))
    config.write_text(text.replace('"AutoencoderKL"', '"AutoencoderOobleck"'))
    with pytest.raises(ValueError, match=r"vae must be one of AutoencoderKL, .*, got AutoencoderOobleck in"):
        load_vae(str(vae))
    config.write_text("{")
    with pytest.raises(ValueError, match=r"the VAE in .* is damaged: .*not a valid JSON file"):
        load_vae(str(vae))
