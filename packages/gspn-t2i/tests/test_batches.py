"""What a distillation trains on: random draws, cuts, aspect-ratio buckets, and the captions of validation."""

import numpy as np
import pytest
import torch
from PIL import Image
from t2i_cases import distill_config as config

from gspn_core.runs.logs import read_table
from gspn_core.runs.options import ImageSize
from gspn_t2i.batches import draw
from gspn_t2i.buckets import BucketOrder, choose_sizes
from gspn_t2i.captions import crop, open_captioned
from gspn_t2i.conditions import Pixels, mirror_sizes
from gspn_t2i.distill import Distiller, distill

WIDE, SQUARE, HIGH = ImageSize(32, 64), ImageSize(48, 48), ImageSize(64, 32)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of images of several shapes, the last turned by its EXIF orientation, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("shapes")
    sizes = [(60, 30), (40, 38), (20, 70), (64, 64), (100, 45), (30, 64), (80, 40), (40, 80)]
    turned = Image.Exif()
    turned[0x0112] = 6
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png", exif=turned if number == 7 else Image.Exif())
    (folder / "8.png").write_bytes(b"no image")
    rows = [f'{{"file_name": "{number}.png", "text": "{number}"}}\n' for number in range(9)]
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


def test_draws_depend_on_the_place_in_the_update_alone():
    """Neither on the processes nor on the forward passes, and no process draws for another."""
    options = {"hflip": 0.5, "dropout": 0.3, "seeds": (1, 2)}
    whole = draw(range(12), (4, 3, 5), 1000, **options)
    parts = [draw(range(first, first + 3), (4, 3, 5), 1000, **options) for first in (0, 3, 6, 9)]
    for together, apart in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(together, torch.cat(apart))
    assert 0 < whole.mirrored.sum() < 12 and len(whole.times.unique()) > 6
    assert not torch.equal(whole.noise, whole.posterior)
    assert not torch.equal(whole.noise, draw(range(12), (4, 3, 5), 1000, **options | {"seeds": (1, 3)}).noise)


def test_updates_of_one_size(shapes):
    """Every image goes to the bucket of its shape, once an epoch, whatever the processes and forward passes."""
    captioned = open_captioned(str(shapes))
    sizes = choose_sizes(captioned, [WIDE, SQUARE, HIGH], progress=False)
    assert sizes == [WIDE, SQUARE, HIGH, SQUARE, WIDE, HIGH, WIDE, WIDE, WIDE]
    assert captioned.shape(7) == captioned[7][0].size[::-1] == (40, 80)
    one = list(BucketOrder(sizes, 4, 1, 12, seed=3))
    assert len(one) == 12 and all(len({sizes[index] for _, index in images}) == 1 for images in one)
    seen = [key for images in one for key in images]
    assert len(set(seen)) == len(seen) and {index for epoch, index in seen if epoch == 0} == set(range(9))
    parts = [list(BucketOrder(sizes, 1, 2, 12, seed=3, rank=rank, world_size=2)) for rank in (0, 1)]
    for update, images in enumerate(one):
        assert images == [key for micro in (0, 1) for part in parts for key in part[2 * update + micro]]
    later = BucketOrder(sizes, 4, 1, 12, seed=3)
    later.start = 5
    assert list(later) == one[5:]


def test_a_random_cut_is_a_function_of_epoch_and_image(shapes):
    captioned = open_captioned(str(shapes))
    pixels = Pixels(captioned, SQUARE, crop_seed=1)
    centre = Pixels(captioned, SQUARE)
    places = {tuple(pixels[epoch, 2].size[2:4].int().tolist()) for epoch in range(20)}
    assert len(places) > 5 and all(0 <= top <= 120 and left == 0 for top, left in places)
    assert torch.equal(pixels[4, 2].image, pixels[4, 2].image)
    assert not torch.equal(pixels[4, 2].image, pixels[5, 2].image)
    assert torch.equal(centre[4, 2].image, centre[2].image)


def test_size_conditions_of_a_mirrored_cut():
    """Are those of the cut of the mirrored image."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 100, 3), dtype=np.uint8))
    cut, sizes = crop(image, WIDE, (0.0, 0.25))
    flipped, expected = crop(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), WIDE, (0.0, 0.75))
    assert np.abs(np.asarray(cut)[:, ::-1].astype(int) - np.asarray(flipped)).max() <= 1
    both = torch.tensor([sizes, sizes], dtype=torch.float32)
    moved = mirror_sizes(both, torch.tensor([False, True]))
    assert moved[0].tolist() == list(sizes) and moved[1].tolist() == list(expected) and sizes[3] != expected[3]


def test_buckets_and_validation_in_a_run(sdxl, shapes, digits, tmp_path):
    """A run that was interrupted and extended is the one left alone; validation changes nothing and is the same."""
    changes = {"buckets": ["32x64", "48x48", "64x32"], "random_crop": True, "unreadable": "skip", "checkpoint_every": 4}
    changes |= {"batch_size": 2, "lr_schedule": "constant", "log_every": 4}
    whole = distill(config(sdxl, shapes, tmp_path / "whole", **changes))
    options = config(sdxl, shapes, tmp_path / "run", **changes, steps=4, val_data=str(digits), validate_every=2)
    distill(options)
    distill(config(sdxl, shapes, tmp_path / "run", **changes, val_data=str(digits), validate_every=3))
    tables = [read_table(tmp_path / name / "train.csv") for name in ("whole", "run")]
    assert [row["loss"] for row in tables[0]][:1] == [row["loss"] for row in tables[1]][:1]
    assert tables[1][-1]["loss"] == tables[0][-1]["loss"] == str(whole["loss"])
    rows = read_table(tmp_path / "run" / "validation.csv")
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert all(0 < float(row["loss"]) < 10 for row in rows) and len({row["loss"] for row in rows}) == 3
    again = Distiller(config(sdxl, shapes, tmp_path / "run", **changes, val_data=str(digits), validate_every=3))
    drawn = [list(again.batches.validation(again.validation)) for _ in range(2)]
    assert len(drawn[0]) == 20
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])
