"""The order of the data and what is drawn for a step."""

import pytest
import torch

from gspn_dit.data import Order, Pixels, draw
from gspn_dit.losses import NoiseLoss


def flat(order):
    return [index for batch in order for index in batch]


def test_every_image_comes_once_per_epoch():
    order = flat(Order(10, 4, 1, 5, seed=0, rank=0, world_size=1))
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert flat(Order(10, 4, 1, 5, seed=1, rank=0, world_size=1)) != order


def test_processes_share_the_images_of_one():
    one = list(Order(10, 6, 1, 4, seed=0, rank=0, world_size=1))
    two = [list(Order(10, 3, 1, 4, seed=0, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*two, strict=True)] == one
    accumulated = list(Order(10, 3, 2, 4, seed=0, rank=0, world_size=1))
    assert [a + b for a, b in zip(accumulated[::2], accumulated[1::2], strict=True)] == one


def test_it_continues_anywhere():
    order = Order(7, 3, 2, 9, seed=0, rank=0, world_size=1)
    whole = list(order)
    assert len(whole) == len(order) == 18
    order.start = 4
    assert list(order) == whole[8:]


def test_draws_of_a_part_are_those_of_the_whole():
    def drawn(part):
        return draw(NoiseLoss(), (2, 3, 5), 8, mirror=True, dropout=0.5, seed=3, part=part)

    whole, second = drawn(slice(0, 8)), drawn(slice(4, 8))
    for name in ("mirrored", "posterior", "noise", "dropped", "times"):
        assert torch.equal(getattr(whole, name)[4:], getattr(second, name))
    assert not draw(NoiseLoss(), (1, 2, 2), 50, mirror=False, dropout=0.0, seed=0, part=slice(None)).mirrored.any()


def test_pixels_of_digits():
    source = Pixels("digits", None, None)
    assert (len(source), source.shape, source.class_names) == (1797, (1, 8, 8), [str(digit) for digit in range(10)])
    item, label = source[0]
    assert label == 0
    x = source.clean(torch.stack([item, item]), torch.tensor([False, True]), torch.empty(0))
    assert torch.equal(x[1], x[0].flip(-1))
    assert x.min() == -1
    assert x.max().item() == pytest.approx(item.max().item() / 127.5 - 1)
