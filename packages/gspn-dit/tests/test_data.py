"""What is trained on, and what is drawn for an update."""

import pytest
import torch

from gspn_dit.data import Pixels, draw
from gspn_dit.losses import NoiseLoss


def test_draws_of_a_part_are_those_of_the_whole():
    def drawn(images):
        return draw(NoiseLoss(), (2, 3, 5), images, hflip=0.5, dropout=0.5, seeds=(3,))

    whole, second = drawn(range(8)), drawn(range(4, 8))
    for name in ("mirrored", "posterior", "noise", "dropped", "times"):
        assert torch.equal(getattr(whole, name)[4:], getattr(second, name))
    many = draw(NoiseLoss(), (4, 16, 16), range(1000), hflip=0.25, dropout=0.1, seeds=(0,))
    assert many.mirrored.float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert many.dropped.float().mean().item() == pytest.approx(0.1, abs=0.04)
    assert many.times.float().mean().item() == pytest.approx(500, abs=40)
    for noise in (many.noise, many.posterior):
        assert noise.std().item() == pytest.approx(1, abs=0.01) and abs(noise.mean().item()) < 0.01
    assert not draw(NoiseLoss(), (1, 2, 2), range(50), hflip=0.0, dropout=0.0, seeds=(0,)).mirrored.any()


def test_pixels_of_digits():
    source = Pixels("digits")
    assert (len(source), source.shape, source.class_names) == (1797, (1, 8, 8), [str(digit) for digit in range(10)])
    item, label = source[0]
    assert label == 0
    x = source.clean(torch.stack([item, item]), torch.tensor([False, True]), torch.empty(0))
    assert torch.equal(x[1], x[0].flip(-1))
    assert x.min() == -1
    assert x.max().item() == pytest.approx(item.max().item() / 127.5 - 1)
