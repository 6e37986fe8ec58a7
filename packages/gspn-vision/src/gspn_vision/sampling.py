"""Randomness as a function of counters, so that a run continues exactly without saving any generator's state.

The order of the data depends on (seed, epoch), an image's augmentation on (seed, epoch, index) and what the model and
mixup draw on (seed, update, micro-batch, rank). None of it depends on the number of loader processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

# The first counter of a stream, so that no two purposes share one.
ORDER, AUGMENT, STEP, INIT = range(4)


def derive_seed(*counters: int) -> int:
    """Return a 64-bit seed that depends on every counter and their order."""
    # SeedSequence does not tell trailing zeros from nothing: their number comes first.
    low, high = np.random.SeedSequence((len(counters), *counters)).generate_state(2, np.uint32)
    return int(high) << 32 | int(low)


def seed_all(*counters: int) -> None:
    """Seed the generators of torch, NumPy and Python."""
    seed = derive_seed(*counters)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """The batches of one process in one epoch, from any update on, as lists of (epoch, index).

    The images of an update are the same whatever the number of processes, as long as the images per update are: a
    permutation of the data is cut into pieces of world_size * batch_size images, and each process takes its slice.
    What does not fill the last update is left out of the epoch.

    Args:
        length: images in the data set.
        batch_size: images per process and batch.
        accumulate: batches per update.
        seed: of the order.
        rank, world_size: of this process.

    Raises:
        ValueError: the data set is smaller than one update.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0
        self.updates_per_epoch = length // (batch_size * accumulate * world_size)
        if self.updates_per_epoch == 0:
            raise ValueError(
                f"the training data must fill one update of {batch_size * accumulate * world_size} images "
                f"(batch_size * accumulate * processes), got {length}"
            )

    def set_position(self, epoch: int, update: int) -> None:
        """Begin the next iteration at an update of an epoch."""
        self.epoch = epoch
        self.start = update

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(derive_seed(ORDER, self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        piece = self.batch_size * self.world_size
        epoch = self.epoch
        for number in range(self.start * self.accumulate, self.updates_per_epoch * self.accumulate):
            first = number * piece + self.rank * self.batch_size
            yield [(epoch, index) for index in order[first : first + self.batch_size]]

    def __len__(self) -> int:
        return (self.updates_per_epoch - self.start) * self.accumulate
