"""Which items a process trains on, as a function of counters alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

# The first counter of a stream, so that no two purposes share one.
ORDER, STEP, INIT, SAMPLE = range(4)


def derive_seed(*counters: int) -> int:
    """Return a 64-bit seed that depends on every counter and their order."""
    # SeedSequence does not tell trailing zeros from nothing: their number comes first.
    low, high = np.random.SeedSequence((len(counters), *counters)).generate_state(2, np.uint32)
    return int(high) << 32 | int(low)


class Order(Sampler[list[int]]):
    """The batches of one process from any update on: permutation after permutation of the data, without a border.

    Update s takes places s B to (s + 1) B of that endless row, B = batch_size * world_size * accumulate, so that its
    items are the same whatever the number of processes.
    """

    def __init__(
        self, length: int, batch_size: int, accumulate: int, updates: int, *, seed: int, rank: int, world_size: int
    ) -> None:
        self.length, self.batch_size, self.accumulate, self.updates = length, batch_size, accumulate, updates
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.start = 0

    def _permutation(self, epoch: int) -> np.ndarray[Any, Any]:
        return np.random.default_rng(derive_seed(ORDER, self.seed, epoch)).permutation(self.length)

    def __iter__(self) -> Iterator[list[int]]:
        piece = self.batch_size * self.world_size
        epoch, order = -1, np.empty(0, int)
        for number in range(self.start * self.accumulate, self.updates * self.accumulate):
            batch = []
            first = number * piece + self.rank * self.batch_size
            for place in range(first, first + self.batch_size):
                if place // self.length != epoch:
                    epoch = place // self.length
                    order = self._permutation(epoch)
                batch.append(int(order[place % self.length]))
            yield batch

    def __len__(self) -> int:
        return (self.updates - self.start) * self.accumulate
