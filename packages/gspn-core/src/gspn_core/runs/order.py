"""Randomness as a function of counters, so that a run continues exactly without saving any generator's state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

# The first counter of a stream of random numbers, so that no two purposes share one.
ORDER, STEP, INIT, SAMPLE, AUGMENT = range(5)


def derive_seed(*counters: int) -> int:
    """Return a 64-bit seed that depends on every counter and on their order."""
    # SeedSequence ignores trailing zeros, so the count is prepended.
    low, high = np.random.SeedSequence((len(counters), *counters)).generate_state(2, np.uint32)
    return int(high) << 32 | int(low)


def seed_all(*counters: int, accelerators: bool = True) -> None:
    """Seed the generators of torch, NumPy and Python by `derive_seed`.

    Args:
        counters: of the random numbers.
        accelerators: torch's for all devices, not for the CPU alone. Before CUDA is in use, torch notes the stack of
            every such call, which takes as long as decoding a small image.
    """
    seed = derive_seed(*counters)
    if accelerators:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class Order(Sampler[list[Any]]):
    """The batches of one process from any update on: one permutation of the data after another, without a gap.

    Update s takes the items s B to (s + 1) B of that endless sequence, B = batch_size * accumulate * world_size, so its
    items are the same whatever the number of processes.

    Args:
        length: items of the data set.
        batch_size: items per process and forward pass.
        accumulate: forward passes per update.
        updates: at which the sequence ends.
        seed: of the permutations.
        rank, world_size: of this process.
        with_epoch: yield (epoch, index) instead of an index.

    Attributes:
        start: update to begin the next iteration at.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        accumulate: int,
        updates: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        with_epoch: bool = False,
    ) -> None:
        self.length, self.batch_size, self.accumulate, self.updates = length, batch_size, accumulate, updates
        self.seed, self.rank, self.world_size, self.with_epoch = seed, rank, world_size, with_epoch
        self.start = 0

    def _permutation(self, epoch: int) -> np.ndarray[Any, Any]:
        return np.random.default_rng(derive_seed(ORDER, self.seed, epoch)).permutation(self.length)

    def __iter__(self) -> Iterator[list[Any]]:
        piece = self.batch_size * self.world_size
        current, permutation = -1, np.empty(0, int)
        for number in range(self.start * self.accumulate, self.updates * self.accumulate):
            batch: list[Any] = []
            first = number * piece + self.rank * self.batch_size
            for place in range(first, first + self.batch_size):
                epoch, position = divmod(place, self.length)
                if epoch != current:
                    current, permutation = epoch, self._permutation(epoch)
                index = int(permutation[position])
                batch.append((epoch, index) if self.with_epoch else index)
            yield batch

    def __len__(self) -> int:
        return (self.updates - self.start) * self.accumulate
