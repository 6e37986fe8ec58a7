"""What is trained on, and what is drawn for an update."""

import pytest
import torch

from gspn_dit.data import Pixels, draw
from gspn_dit.losses import NoiseLoss


def test_draws_of_a_part_are_those_of_the_whole():
    def drawn(part):
        return draw(NoiseLoss(), (2, 3, 5), 8, hflip=0.5, dropout=0.5, seed=3, part=part)

    whole, second = drawn(slice(0, 8)), drawn(slice(4, 8))
    for name in ("mirrored", "posterior", "noise", "dropped", "times"):
        assert torch.equal(getattr(whole, name)[4:], getattr(second, name))
    assert not draw(NoiseLoss(), (1, 2, 2), 50, hflip=0.0, dropout=0.0, seed=0, part=slice(None)).mirrored.any()


def test_pixels_of_digits():
    source = Pixels("digits")
    assert (len(source), source.shape, source.class_names) == (1797, (1, 8, 8), [str(digit) for digit in range(10)])
    item, label = source[0]
    assert label == 0
    x = source.clean(torch.stack([item, item]), torch.tensor([False, True]), torch.empty(0))
    assert torch.equal(x[1], x[0].flip(-1))
    assert x.min() == -1
    assert x.max().item() == pytest.approx(item.max().item() / 127.5 - 1)
