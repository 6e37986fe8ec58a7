"""Aspect-ratio buckets: training images of several sizes, each update's of one size."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler
from tqdm import tqdm

from gspn_core.runs.options import ImageSize
from gspn_core.runs.order import Order

from .captions import Captioned


def choose_sizes(captioned: Captioned, buckets: Sequence[ImageSize], *, progress: bool) -> list[ImageSize]:
    """Return for each image the bucket of the next aspect ratio; the first for images that cannot be read."""
    chosen = []
    for index in tqdm(range(len(captioned)), "sizes", unit="image", disable=not progress, leave=False):
        height, width = captioned.shape(index) or buckets[0]
        chosen.append(min(buckets, key=lambda size: abs(math.log(size.height / size.width * width / height))))
    return chosen


class BucketOrder(Sampler[list[tuple[int, int]]]):
    """The batches of one process from any update on, as of `Order`, where the images of an update have one size.

    The images of the endless sequence of `Order` go each to its bucket, and an update takes those of a bucket as soon
    as they are enough. So its items are the same whatever the number of processes and of forward passes.

    Args:
        size_of: the size of each image.
        batch_size, accumulate, updates, seed, rank, world_size: as of `Order`.

    Attributes:
        start: update to begin the next iteration at.
    """

    def __init__(
        self,
        size_of: Sequence[ImageSize],
        batch_size: int,
        accumulate: int,
        updates: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size_of, self.batch_size, self.accumulate, self.updates = size_of, batch_size, accumulate, updates
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.start = 0

    def _images_of_updates(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[ImageSize, list[tuple[int, int]]] = {size: [] for size in self.size_of}
        for [(epoch, index)] in Order(len(self.size_of), 1, 1, sys.maxsize, seed=self.seed, with_epoch=True):
            queue = waiting[self.size_of[index]]
            queue.append((epoch, index))
            if len(queue) == self.batch_size * self.accumulate * self.world_size:
                yield list(queue)
                queue.clear()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for images in itertools.islice(self._images_of_updates(), self.start, self.updates):
            for micro in range(self.accumulate):
                first = (micro * self.world_size + self.rank) * self.batch_size
                yield images[first : first + self.batch_size]

    def __len__(self) -> int:
        return (self.updates - self.start) * self.accumulate
