import pickle
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from vision_cases import write_images

from gspn_core.runs.options import make
from gspn_core.runs.order import Order
from gspn_vision import data
from gspn_vision.config import TrainConfig
from gspn_vision.data import Preprocessing, Samples, Unreadable
from gspn_vision.sources import TimmSource, UnreadableImageError, open_source

GREY = Preprocessing(in_chans=1, size=(32, 32), mean=(0.5,), std=(0.5,), interpolation="bilinear", crop_pct=1.0)


def test_digits_are_split_once_for_all():
    train, validation = open_source("digits", "train"), open_source("digits", "validation")
    assert (len(train), len(validation)) == (1437, 360)
    assert not {train.name(i) for i in range(1437)} & {validation.name(i) for i in range(360)}
    counts = np.bincount([validation[i][1] for i in range(360)])
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert validation.name(0) == "digits:21"
    assert validation[0][1] == load_digits().target[21]
    with pytest.raises(ValueError, match="digits has the splits 'train' and 'validation', got 'test'"):
        open_source("digits", "test")


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_epoch_and_image_alone(workers):
    options = make(
        TrainConfig,
        {"in_chans": 1, "image_size": 32, "auto_augment": "rand-m9-mstd0.5", "random_erasing": 0.5, "hflip": 0.5},
    )
    samples = Samples(open_source("digits", "train"), GREY.training_transform(options), "L", seed=5)
    order = Order(len(samples), 16, 1, 275, seed=5, with_epoch=True)
    order.start = 270  # after three epochs of 1437 / 16 updates
    loader = data.batch_loader(samples, order, workers, False)
    torch.manual_seed(workers)
    for batch, keys in zip(loader, order, strict=True):
        for image, key in zip(batch.images, keys, strict=True):
            assert key[0] == 3 and torch.equal(image, samples[key].image)
    # samples[4, ...] of the same image differ
    assert not torch.equal(samples[3, 0].image, samples[4, 0].image)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m1-mstd0.5", "original", "v0r", "augmix-m5-w4-d2"])
def test_posterisation_keeps_a_bit(policy):
    """At timm's strongest level it keeps none, which Pillow 13 refuses: in the midst of a run."""
    config = make(TrainConfig, {"in_chans": 1, "image_size": 32, "auto_augment": policy})
    steps = GREY.training_transform(config).transforms
    groups = [group for step in steps for group in (*getattr(step, "policy", ()), getattr(step, "ops", ()))]
    ops = [op for group in groups for op in group if op.name.startswith("Posterize")]
    assert ops
    for op in pickle.loads(pickle.dumps(ops)):
        op.prob, op.magnitude_std = 1.0, 0
        for op.magnitude in (0, 1, 9, 10):
            assert len(np.unique(np.asarray(op(Image.linear_gradient("L"))))) >= 2


def test_an_unknown_policy_of_augmentation():
    options = make(TrainConfig, {"in_chans": 1, "auto_augment": "foo"})
    with pytest.raises(ValueError, match="auto_augment must be a policy of timm, got 'foo'"):
        GREY.training_transform(options)


def test_folder(image_folder):
    train = open_source(str(image_folder), "train")
    assert train.class_names == ["blue", "green", "red"]
    assert len(train) == 18
    assert train[0][1] == 0
    assert train.name(0).endswith("train/blue/0.png")
    # A class without validation images keeps the others' numbers.
    shutil.rmtree(image_folder / "val" / "blue")
    (image_folder / "val").rename(image_folder / "validation")
    validation = open_source(str(image_folder), "validation", class_names=train.class_names)
    assert [validation[i][1] for i in (0, 6)] == [1, 2]


def test_only_images_of_classes_count_and_each_once(image_folder, tmp_path):
    """Hidden folders are not classes, and links to what holds them do not repeat images; links to nothing are named."""
    train = image_folder / "train"
    (train / ".ipynb_checkpoints").mkdir()
    shutil.copy(train / "red" / "0.png", train / ".ipynb_checkpoints")
    (train / "all").symlink_to(train)
    (train / "red" / "up").symlink_to(image_folder)
    (train / "red" / "notes.pdf").write_bytes(b"%PDF")
    (train / "red" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = open_source(str(image_folder), "train")
    assert (source.class_names, len(source)) == (["blue", "green", "red"], 19)
    with pytest.raises(UnreadableImageError, match=r"cannot read image '.*/red/gone\.png': there is no such file"):
        source[18]


@pytest.mark.parametrize("kind", ["bomb", "avif", "vanished", "colours"])
def test_every_kind_of_unreadable_image_is_skipped_with_its_name(kind, image_folder, monkeypatch):
    source = open_source(str(image_folder), "validation")
    file = image_folder / "val" / "blue" / "1.png"
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        Image.new("RGB", (8, 8)).save(image_folder / "small.png")
        for other in image_folder.rglob("*/*.png"):
            if other != file:
                shutil.copy(image_folder / "small.png", other)
    elif kind == "avif":
        file.write_bytes(b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B")
    elif kind == "vanished":
        file.unlink()
    else:
        Image.new("LAB", (8, 8)).save(file, "TIFF")
    samples = Samples(source, GREY.transform(), "L")
    skipped = [message for i in range(18) for message in samples[i].unreadable]
    assert len(skipped) == 1 and str(file) in skipped[0], skipped


def test_bad_folders(image_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder '.*absent'; data must be"):
        open_source(str(tmp_path / "absent"), "train")
    with pytest.raises(FileNotFoundError, match="no folder 'test' in"):
        open_source(str(image_folder), "test")
    with pytest.raises(ValueError, match="has 3 classes, more than the 2 of the head"):
        open_source(str(image_folder), "validation", class_names=["green", "red"])
    with pytest.raises(ValueError, match="classes that the training data or the checkpoint has not: blue"):
        open_source(str(image_folder), "validation", class_names=["green", "red", "white"])
    (image_folder / "train" / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no images for the classes empty in"):
        open_source(str(image_folder), "train")


def test_timm_data_sets(image_folder, tmp_path):
    source = open_source("torch/image_folder", "train", root=str(image_folder))
    assert source.class_names == ["blue", "green", "red"]
    image, label = source[17]
    assert (image.size, label) == ((36, 40), 2)
    assert source.name(17).endswith("train/red/5.png")
    with pytest.raises(ValueError, match="cannot open the data set 'torch/nonsense'"):
        open_source("torch/nonsense", "train", root=str(tmp_path))
    with pytest.raises(ValueError, match="10 classes, more than the 2 of the head"):
        open_source("digits", "validation", class_names=["0", "1"])


def test_a_reader_of_timm_does_not_hide_unreadable_images(image_folder):
    from timm.data import create_dataset

    (image_folder / "train" / "red" / "0.png").write_bytes(b"broken")
    source = TimmSource(create_dataset("", root=str(image_folder), split="train"), "folder")
    assert source.class_names == ["blue", "green", "red"]
    broken = next(i for i in range(18) if source.name(i).endswith("red/0.png"))
    with pytest.raises(UnreadableImageError, match=r"cannot read image 'red/0.png': not an image"):
        source[broken]


def test_streams_are_refused():
    class Stream:
        def __iter__(self):
            return iter([])

    with pytest.raises(ValueError, match=r"must have random access, .*; 'hfids/x' is a stream"):
        TimmSource(Stream(), "hfids/x")


def test_unreadable_images(image_folder, capsys):
    truncated = image_folder / "val" / "green" / "2.png"
    truncated.write_bytes(truncated.read_bytes()[:100])
    (image_folder / "val" / "blue" / "1.png").write_text("not an image")
    prep = Preprocessing(
        in_chans=3, size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0
    )
    samples = Samples(open_source(str(image_folder), "validation"), prep.transform(), prep.mode)
    policy = Unreadable("skip")
    seen = []
    for batch in data.validation_loader(samples, 4, 0):
        policy.note(batch.unreadable)
        seen += batch.items.tolist()
    assert seen == [i for i in range(18) if i not in (1, 8)]
    policy.report()
    text = capsys.readouterr().err
    assert "blue/1.png': not an image" in text
    assert "green/2.png'" in text
    assert text.endswith("skipped 2 unreadable image(s)\n")
    # Training takes the next readable image instead.
    sample = samples[0, 1]
    assert sample.item == 2
    assert "blue/1.png" in sample.unreadable[0]
    with pytest.raises(UnreadableImageError, match=r"blue/1.png': not an image"):
        Unreadable("stop").note(sample.unreadable)


def test_nothing_readable(tmp_path):
    folder = write_images(tmp_path / "images", {"red": 2})
    for file in (folder / "train").rglob("*.png"):
        file.write_bytes(b"")
    samples = Samples(open_source(str(folder), "train"), GREY.transform(), "L")
    with pytest.raises(UnreadableImageError, match="none of the 2 images can be read"):
        samples[0, 0]


def test_every_process_validates_its_own_share():
    samples = Samples(open_source("digits", "validation"), GREY.transform(), "L")
    shares = [
        [i for batch in data.validation_loader(samples, 64, 0, rank=rank, world_size=3) for i in batch.items.tolist()]
        for rank in range(3)
    ]
    assert sorted(chain(*shares)) == list(range(360))


def test_preprocessing():
    image = Image.new("L", (8, 8), 255)
    x = GREY.transform()(image)
    assert x.shape == (1, 32, 32)
    torch.testing.assert_close(x, torch.ones(1, 32, 32))
    assert Preprocessing.from_timm(GREY.to_timm()) == GREY
