"""Which items an update sees, and seeds: functions of counters."""

import random

import numpy as np
import pytest
import torch

from gspn_core.runs.order import Order, derive_seed, seed_all


def flat(order):
    return [index for batch in order for index in batch]


def test_every_item_comes_once_per_epoch():
    order = flat(Order(10, 4, 1, 5, seed=0))
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert flat(Order(10, 4, 1, 5, seed=1)) != order
    keys = flat(Order(10, 4, 1, 5, seed=0, with_epoch=True))
    assert keys == [(place // 10, index) for place, index in enumerate(order)]


@pytest.mark.parametrize("world,accumulate", [(1, 2), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_the_items_of_an_update_depend_on_their_number_alone(world, accumulate):
    """Processes, accumulation and batch size may change; the items of an update must not."""
    batch = 8 // (world * accumulate)
    updates = [set() for _ in range(7)]
    for rank in range(world):
        order = Order(43, batch, accumulate, 7, seed=3, rank=rank, world_size=world, with_epoch=True)
        assert len(order) == 7 * accumulate
        for number, keys in enumerate(order):
            updates[number // accumulate] |= set(keys)
    assert updates == [set(keys) for keys in Order(43, 8, 1, 7, seed=3, with_epoch=True)]


def test_it_continues_anywhere():
    order = Order(7, 3, 2, 9, seed=0)
    whole = list(order)
    assert len(whole) == len(order) == 18
    for start in (0, 4, 8, 9):
        order.start = start
        assert list(order) == whole[2 * start :] and len(order) == 18 - 2 * start


def test_less_data_than_a_batch():
    order = flat(Order(3, 8, 1, 2, seed=0))
    assert sorted(order[:3]) == sorted(order[3:6]) == [0, 1, 2] and len(order) == 16


def test_seeds_depend_on_every_counter_and_their_order():
    counters = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0), (0,), (1, 2, 3), (3, 2, 1)]
    assert len({derive_seed(*c) for c in counters}) == len(counters)
    assert derive_seed(1, 2) == derive_seed(1, 2) < 2**64


def test_seed_all():
    def draw():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()

    seed_all(1, 2)
    first = draw()
    assert draw() != first
    seed_all(1, 2)
    assert draw() == first
