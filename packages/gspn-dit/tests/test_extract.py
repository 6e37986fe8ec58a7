import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderTiny
from feature_cases import CLASSES, SIZE, files, options, save_vae, tiny_vae, write_photographs
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from gspn_core.runs.errors import WriteError
from gspn_core.runs.options import ImageSize, to_dict
from gspn_dit import extract as module
from gspn_dit.data import Latents
from gspn_dit.extract import extract
from gspn_dit.features import Features
from gspn_dit.images import _no_bars, _Table, adm_crop, open_images
from gspn_dit.vae import decode, fingerprint, load_vae

SCRIPT = """
import json, pathlib, sys
import torch
from accelerate import PartialState
from gspn_core.runs.options import make
from gspn_dit.config import ExtractConfig
from gspn_dit.extract import extract
torch.set_num_threads(1)
summary = extract(make(ExtractConfig, json.loads(sys.argv[1])))
state = PartialState()
# A file each: two processes that print at the same time would mix their lines.
written = json.dumps({"world": state.num_processes, **summary})
pathlib.Path(sys.argv[2], f"summary-{state.process_index}.json").write_text(written)
state.destroy_process_group()
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that these tests start, whose bytes are compared with this one's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """12 images of 2 classes, three shards. Not to be changed."""
    return write_photographs(tmp_path_factory.mktemp("images") / "photographs")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, vae, photographs):
    """What an extraction without interruption writes. Not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "features"
    summary = extract(options(photographs, vae, folder))
    assert {key: summary[key] for key in ("folder", "images", "shards", "written", "skipped")} == {
        "folder": str(folder),
        "images": 12,
        "shards": 3,
        "written": 3,
        "skipped": 0,
    }
    return files(folder)


def test_moments_are_the_encoders(tmp_path, vae, photographs, whole):
    assert sorted(whole) == [
        "extraction.json",
        "index.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
        "shard-00002.safetensors",
    ]
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    features = Features(tmp_path)
    model = tiny_vae()
    for index in (0, 5, 6, 11):
        with Image.open(photographs / CLASSES[index // 6] / f"{index % 6}.png") as image:
            crop = adm_crop(image, SIZE, SIZE)
        x = torch.tensor(np.asarray(crop), dtype=torch.float32).permute(2, 0, 1)[None] / 255 * 2 - 1
        with torch.no_grad():
            expected = [model.encode(view).latent_dist.parameters[0] for view in (x, torch.flip(x, [3]))]
        moments, label = features[index]
        torch.testing.assert_close(moments, torch.stack(expected), atol=1e-5, rtol=1e-4)
        assert label == index // 6
        # Encoding a mirror image is not mirroring the latent.
        assert (moments[1] - moments[0].flip(-1)).abs().max() > 1e-2
    settings = json.loads(whole["extraction.json"])
    assert settings["class_names"] == ["china", "flower"]
    assert (settings["image_size"], settings["latent_shape"], settings["mirrored"]) == ([32, 32], [4, 4, 4], True)
    index = json.loads(whole["index.json"])
    assert index["images"] == 12
    assert [shard["images"] for shard in index["shards"]] == [5, 5, 2]
    assert [shard["bytes"] for shard in index["shards"]] == [len(whole[shard["file"]]) for shard in index["shards"]]


def test_digits_in_half_precision(tmp_path, vae, monkeypatch):
    monkeypatch.setattr(module, "open_images", lambda *_, **__: Few(open_images("digits"), 7))
    extract(options("digits", vae, tmp_path / "full", image_size=ImageSize(16, 24)))
    extract(
        options(
            "digits", vae, tmp_path / "half", image_size=ImageSize(16, 24), store_precision="fp16", precision="bf16"
        )
    )
    full, half = Features(tmp_path / "full"), Features(tmp_path / "half")
    assert full.latent_shape == (4, 2, 3)
    assert [full[index][1] for index in range(7)] == load_digits().target[:7].tolist()
    assert half[6][0].dtype == torch.float16
    torch.testing.assert_close(half[6][0].float(), full[6][0], atol=0.1, rtol=0.05)


class Few:
    """The first images of a source."""

    def __init__(self, images, count):
        self.images, self.count = images, count
        self.class_names, self.fingerprint = images.class_names, images.fingerprint

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.images[index]


def test_moments_that_overflow(tmp_path, photographs):
    loud = tiny_vae()
    with torch.no_grad():
        loud.quant_conv.bias.fill_(1e6)
    loud.save_pretrained(tmp_path / "vae")
    with pytest.raises(
        ArithmeticError, match=r"moments of images 0 to 1 are not finite with precision fp32 and store_precision fp16"
    ):
        extract(options(photographs, str(tmp_path / "vae"), tmp_path / "out", store_precision="fp16"))


def test_a_full_disk_loses_nothing(tmp_path, vae, photographs, whole, monkeypatch):
    config = options(photographs, vae, tmp_path / "features")
    write = module.write_tensors

    def fail_at_the_second(path, tensors):
        if path.name == "shard-00001.safetensors":
            raise WriteError(f"cannot write {path}: no space")
        write(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_tensors", fail_at_the_second)
        with pytest.raises(WriteError, match=r"cannot write .*shard-00001.safetensors: no space; the shards that are"):
            extract(config)
    found = files(tmp_path / "features")
    assert sorted(found) == ["extraction.json", "shard-00000.safetensors"]
    with pytest.raises(ValueError, match=r"has not ended: 1 of 3 shards are there"):
        Features(tmp_path / "features")
    before = (tmp_path / "features" / "shard-00000.safetensors").stat().st_mtime_ns
    summary = extract(config)
    assert (summary["written"], summary["skipped"]) == (2, 1)
    assert files(tmp_path / "features") == whole
    assert (tmp_path / "features" / "shard-00000.safetensors").stat().st_mtime_ns == before


def test_a_disk_that_is_really_full(tmp_path, vae, photographs, whole):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=28k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        config = options(photographs, vae, disk / "features")
        with pytest.raises(WriteError, match=r"cannot write .*features.*No space left on device"):
            extract(config)
        found = files(disk / "features")
        assert not [name for name in found if name.startswith(".")]
        assert 0 < len(found) < len(whole)
        assert found.items() <= whole.items()
        subprocess.run(["mount", "-o", "remount,size=200k", disk], check=True)
        extract(config)
        assert files(disk / "features") == whole
    finally:
        subprocess.run(["umount", disk], check=True)


def stop_after_one(config, written):
    """Write a shard and half of another, and wait to be killed."""
    write = module.write_tensors

    def write_and_wait(path, tensors):
        if path.name == "shard-00001.safetensors":
            path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
            written.set()
            time.sleep(60)
        write(path, tensors)

    module.write_tensors = write_and_wait
    extract(config)


def test_killed_and_continued_by_two_processes(tmp_path, vae, photographs, whole):
    config = options(photographs, vae, tmp_path / "features")
    context = multiprocessing.get_context("fork")
    process = context.Process(target=stop_after_one, args=(config, written := context.Event()))
    process.start()
    assert written.wait(60)
    process.kill()
    process.join()
    names = [".shard-00001.safetensors.1.tmp", "extraction.json", "shard-00000.safetensors"]
    assert sorted(files(tmp_path / "features")) == names
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "script.py"), json.dumps(to_dict(config)), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("summary-*.json")]
    assert [(summary["world"], summary["written"], summary["skipped"]) for summary in summaries] == [(2, 2, 1)] * 2
    assert files(tmp_path / "features") == whole


def test_loader_processes_and_progress(tmp_path, vae, photographs, whole, capsys):
    extract(options(photographs, vae, tmp_path / "features", workers=2, progress=True))
    assert files(tmp_path / "features") == whole
    assert "12/12" in capsys.readouterr().err


def test_damaged_shards_are_made_again(tmp_path, vae, photographs, whole):
    config = options(photographs, vae, tmp_path)
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    os.truncate(tmp_path / "shard-00000.safetensors", 200)
    shutil.copy(tmp_path / "shard-00002.safetensors", tmp_path / "shard-00001.safetensors")
    summary = extract(config)
    assert (summary["written"], summary["skipped"]) == (2, 1)
    assert files(tmp_path) == whole
    assert extract(config)["written"] == 0


def test_other_settings(tmp_path, vae, photographs, whole):
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    match = "holds results of other settings: shard_size was 5, is 6; give another folder as `out`"
    with pytest.raises(ValueError, match=match):
        extract(options(photographs, vae, tmp_path, shard_size=6))
    with pytest.raises(ValueError, match=r"holds results of other settings: image_size was \[32, 32\], is \[32, 64\]"):
        extract(options(photographs, vae, tmp_path, image_size=ImageSize(32, 64)))
    with pytest.raises(ValueError, match=r"holds results of other settings: source was '.*photographs', is 'digits'"):
        extract(options("digits", vae, tmp_path))
    other = save_vae(tmp_path.parent / "other_vae", seed=1)
    with pytest.raises(ValueError, match=r"holds results of other settings: vae_fingerprint was '\w+', is '\w+'"):
        extract(options(photographs, other, tmp_path))
    assert files(tmp_path) == whole
    moved = shutil.copytree(photographs, tmp_path.parent / "moved")
    assert extract(options(moved, vae, tmp_path, split="train"))["written"] == 0
    assert files(tmp_path) == whole


def test_autoencoders_without_a_posterior(tmp_path, photographs):
    """A deep-compression and a tiny autoencoder: latents are what they encode, and decode to what they make of them."""
    blocks = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    deep = {"encoder_qkv_multiscales": ((),) * 3, "decoder_qkv_multiscales": ((),) * 3, "latent_channels": 8}
    deep |= {"encoder_layers_per_block": (1, 1, 1), "decoder_layers_per_block": (1, 1, 1), "scaling_factor": 0.4}
    tiny = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    torch.manual_seed(0)
    for made in (AutoencoderDC(**blocks, **deep), AutoencoderTiny(**blocks, **tiny)):
        made.save_pretrained(tmp_path / "vae")
        vae, out = load_vae(str(tmp_path / "vae")), tmp_path / type(made).__name__
        extract(options(photographs, str(tmp_path / "vae"), out))
        latents = Latents(str(out), fingerprint(vae))
        assert latents.shape == (vae.config.latent_channels, SIZE // 4, SIZE // 4)
        pixels = torch.from_numpy(np.array(adm_crop(open_images(str(photographs))[3][0], SIZE, SIZE))).permute(2, 0, 1)
        with torch.no_grad():
            encoded = vae.encode(pixels[None] / 127.5 - 1, return_dict=False)[0]
            decoded = vae.decode(encoded, return_dict=False)[0].clamp(-1, 1)
        noise = torch.randn(1, *latents.shape)
        clean = latents.clean(latents[3][0][None], torch.tensor([False]), noise)
        assert torch.allclose(clean, encoded * vae.config.scaling_factor, atol=1e-5)
        assert torch.allclose(decode(vae, clean), decoded, atol=1e-4)
        with torch.no_grad():  # what the decoder is does not matter to latents
            [parameter.add_(1) for name, parameter in vae.named_parameters() if name.startswith("decoder.")]
        assert Latents(str(out), fingerprint(vae)).shape == latents.shape


def test_sizes_that_do_not_suit(tmp_path, vae):
    for size, text in ((ImageSize(36, 36), "36 x 36"), (ImageSize(32, 20), "32 x 20")):
        with pytest.raises(ValueError, match=f"image_size must be divisible by the VAE's factor 8, got {text}"):
            extract(options("digits", vae, tmp_path / "out", image_size=size))
    grey = save_vae(tmp_path / "grey", in_channels=1)
    with pytest.raises(ValueError, match=r"vae must take images of 3 channels, got one of 1"):
        extract(options("digits", grey, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_next_image_takes_the_place_of_an_unreadable_one(tmp_path, vae, capsys):
    root = write_photographs(tmp_path / "images", per_class=2)
    (root / "flower" / "0.png").write_bytes(b"nonsense")
    assert extract(options(root, vae, tmp_path / "out", unreadable="skip"))["images"] == 4
    assert capsys.readouterr().err.count("skipped: cannot read image ") == 1
    features = Features(tmp_path / "out")
    assert torch.equal(features[2][0], features[3][0]) and features[2][1] == 1
    for file in root.rglob("*.png"):
        file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="none of the 4 images can be read, the last one: cannot read image"):
        extract(options(root, vae, tmp_path / "none", unreadable="skip"))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image(tmp_path, vae, workers):
    root = write_photographs(tmp_path / "images", per_class=2)
    (root / "flower" / "0.png").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"^cannot read image '.*flower/0.png': not an image"):
        extract(options(root, vae, tmp_path / "out", workers=workers))
    os.truncate(root / "flower" / "1.png", 2000)
    images = open_images(str(root))
    with pytest.raises(ValueError, match=r"cannot read image '.*flower/1.png': .*truncated"):
        images[3]
    (root / "flower" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"cannot read image '.*flower/1.png': there is no such file"):
        images[3]


def test_digits():
    images = open_images("digits")
    image, label = images[5]
    assert (len(images), image.mode, image.size, label) == (1797, "L", (8, 8), load_digits().target[5])
    assert images.class_names == [str(digit) for digit in range(10)]
    assert np.abs(np.asarray(image) - load_digits().images[5] * 255 / 16).max() <= 0.5
    with pytest.raises(ValueError, match=r"split must be one of train for 'digits', got 'test'"):
        open_images("digits", "test")


def test_folders_of_splits(tmp_path, photographs):
    root = tmp_path / "root"
    shutil.copytree(photographs, root / "train")
    shutil.copytree(photographs, root / "val")
    (root / "val" / "china" / "0.png").unlink()
    assert [len(open_images(str(root), split)) for split in (None, "train", "val", "validation")] == [12, 12, 11, 11]
    with pytest.raises(ValueError, match=r"split must be one of train, val for '.*root', got 'test'"):
        open_images(str(root), "test")
    with pytest.raises(ValueError, match=r"split must be one of train for '.*photographs', got 'val'"):
        open_images(str(photographs), "val")
    # The fingerprint is of the images, wherever they lie.
    prints = [open_images(path).fingerprint for path in (str(root), str(photographs))]
    assert prints[0] == prints[1] != open_images(str(root), "val").fingerprint


def test_folders_that_are_easily_mistaken(tmp_path, photographs):
    vehicles = shutil.copytree(photographs, tmp_path / "vehicles [new]")
    (vehicles / "flower").rename(vehicles / "train")
    assert open_images(str(vehicles)).class_names == ["china", "train"]
    unsorted = tmp_path / "unsorted"
    shutil.copytree(photographs, unsorted / "train")
    shutil.copytree(photographs / "china", unsorted / "val")
    images = open_images(str(unsorted))
    assert (len(images), images.class_names) == (12, ["china", "flower"])
    with pytest.raises(ValueError, match=r"split must be one of train for .*, got 'val'"):
        open_images(str(unsorted), "val")


def test_hidden_folders_and_loops_of_links(tmp_path, photographs):
    root = shutil.copytree(photographs, tmp_path / "root")
    for place in (root, root / "china"):
        shutil.copytree(photographs / "flower", place / ".ipynb_checkpoints")
    (root / "flower" / "again").symlink_to(root)
    images = open_images(str(root))
    assert (len(images), images.class_names) == (12, ["china", "flower"])


def test_bad_folders(tmp_path, photographs):
    with pytest.raises(FileNotFoundError, match=r"no folder '.*absent'"):
        open_images(str(tmp_path / "absent"))
    flat = shutil.copytree(photographs / "china", tmp_path / "flat")
    with pytest.raises(ValueError, match=r"the images of '.*flat' have no labels: there must be a folder per class"):
        open_images(str(flat))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no data set '.*empty' \(.*doesn't contain any data files"):
        open_images(str(tmp_path / "empty"))
    gap = shutil.copytree(photographs, tmp_path / "gap")
    (gap / "horse").mkdir()
    with pytest.raises(ValueError, match=r"every class folder in '.*gap' must have images, got none in horse"):
        open_images(str(gap))


def test_no_such_data_set_on_the_hub(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    match = "no data set 'nobody/nothing': it is no folder, and the Hub has none of this name or cannot be reached"
    with pytest.raises(FileNotFoundError, match=match):
        open_images("nobody/nothing")


def table(columns=("image", "label"), labels=(0, 2, 1), feature=None):
    pictures = [Image.fromarray(pixels[:40, :50]) for pixels in load_sample_images().images]
    features = {name: datasets.Image() for name in columns[:-1]} | {columns[-1]: feature or datasets.Value("int64")}
    values = {name: [pictures[0], pictures[1], pictures[0]] for name in columns[:-1]} | {columns[-1]: list(labels)}
    with _no_bars():
        return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def save(dataset, path):
    with _no_bars():
        dataset.save_to_disk(str(path))
    return str(path)


def test_data_set_on_disk(tmp_path, vae):
    path = save(table(feature=datasets.ClassLabel(names=["a", "b", "c"])), tmp_path / "disk")
    images = open_images(path)
    assert (len(images), images.class_names, [images[index][1] for index in range(3)]) == (
        3,
        ["a", "b", "c"],
        [0, 2, 1],
    )
    assert np.array_equal(np.asarray(images[1][0]), load_sample_images().images[1][:40, :50])
    assert extract(options(path, vae, tmp_path / "out"))["images"] == 3
    assert Features(tmp_path / "out").class_names == ["a", "b", "c"]
    numbers = open_images(save(table(), tmp_path / "numbers"))
    assert numbers.class_names == ["0", "1", "2"]
    assert numbers.fingerprint != images.fingerprint
    both = datasets.DatasetDict({"train": table(), "test": table(labels=(0, 0, 1))})
    assert open_images(save(both, tmp_path / "both"), "test").class_names == ["0", "1"]
    with pytest.raises(ValueError, match=r"split must be one of train, test for .*, got 'validation'"):
        open_images(str(tmp_path / "both"), "validation")
    (tmp_path / "disk" / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"the data set in '.*disk' is damaged: "):
        open_images(path)


def test_folder_of_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    with _no_bars():
        for split in ("train", "test"):
            table().to_parquet(str(tmp_path / "parquet" / "data" / f"{split}-00000-of-00001.parquet"))
    assert [len(open_images(str(tmp_path / "parquet"), split)) for split in (None, "test", "train[:2]")] == [3, 3, 2]
    with pytest.raises(ValueError, match=r"split must be one of train, test for .*parquet', got 'val'"):
        open_images(str(tmp_path / "parquet"), "val")
    with pytest.raises(ValueError, match=r"cannot open the data set '.*parquet': .*nonsense"):
        open_images(str(tmp_path / "parquet"), "nonsense[:1]")


def test_columns(tmp_path):
    two = save(table(("left", "right", "kind")), tmp_path / "two")
    with pytest.raises(ValueError, match=r"image_column must be one of left, right for .*, got None"):
        open_images(two, label_column="kind")
    with pytest.raises(ValueError, match=r"image_column must be one of left, right for .*, got 'kind'"):
        open_images(two, image_column="kind")
    with pytest.raises(ValueError, match=r"images of '.*two' have no labels; its columns are left, right, kind"):
        open_images(two, image_column="left")
    with pytest.raises(ValueError, match=r"label_column must be one of kind for .*, got 'left'"):
        open_images(two, image_column="left", label_column="left")
    assert open_images(two, image_column="right", label_column="kind")[1][1] == 2
    numbers = datasets.Dataset.from_dict({"label": [0, 1]})
    with pytest.raises(ValueError, match=r"'.*numbers' has no column of images; its columns are label"):
        open_images(save(numbers, tmp_path / "numbers"))
    with pytest.raises(ValueError, match=r"there are no images in 'none'"):
        _Table(table().select([]), "none", None, None)


@pytest.mark.parametrize("label", [-1, None])
def test_labels_out_of_range(tmp_path, label):
    path = save(table(labels=(1, 0, label)), tmp_path / "disk")
    with pytest.raises(ValueError, match=f"labels must be from 0 to 1, got {label} for image 2 of '.*disk'"):
        open_images(path)


def test_crop_halves_and_cuts_the_centre():
    pixels = np.random.default_rng(0).integers(0, 16, (64, 128, 3), np.uint8) * 16
    # 64 x 128 -> 32 x 64 -> 16 x 32, each an average of four, without rounding, and then the middle.
    halved = pixels
    for _ in range(2):
        n, m = halved.shape[0] // 2, halved.shape[1] // 2
        halved = halved.reshape(n, 2, m, 2, 3).mean((1, 3)).astype(np.uint8)
    assert np.array_equal(np.asarray(adm_crop(Image.fromarray(pixels), 16, 16)), halved[:, 8:24])
    assert np.array_equal(np.asarray(adm_crop(Image.fromarray(pixels), 16, 32)), halved)


def test_crop_of_odd_sizes():
    image = Image.fromarray(load_sample_images().images[0]).resize((500, 333))
    small = image.resize((250, 166), Image.Resampling.BOX).resize((125, 83), Image.Resampling.BOX)
    small = small.resize((96, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(adm_crop(image, 64, 64)), np.asarray(small)[:, 16:80])
    tall = adm_crop(image, 96, 64)
    expected = image.resize((250, 166), Image.Resampling.BOX).resize((145, 96), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(tall), np.asarray(expected)[:, 40:104])


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (8, 24), (30, 5)])
@pytest.mark.parametrize("shape", [(8, 8), (1, 5), (33, 17), (200, 9)])
def test_crop_is_of_the_size_asked_for(size, shape):
    height, width = size
    for mode in ("L", "P", "RGBA", "CMYK"):
        crop = adm_crop(Image.new(mode, shape), height, width)
        assert (crop.mode, crop.size) == ("RGB", (width, height))
