"""The batches of a distillation: data in the order of the run, and what each update draws at random."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gspn_core.runs.order import STEP, Order, derive_seed
from gspn_core.runs.training import loader_workers

from .captions import open_captioned
from .conditions import INDEX, SETTINGS, Batch, Embeddings, Encoded, Frozen, Pixels, collate, encode
from .config import DistillConfig


def open_data(config: DistillConfig, frozen: Frozen) -> Pixels | Encoded:
    """Open images and captions, or a cache of them, which is made first if wanted.

    Raises:
        FileNotFoundError: there are no such data.
        ValueError: an option, the data or a cache does not fit.
    """
    if all((Path(config.data) / name).is_file() for name in (SETTINGS, INDEX)):
        if config.cache is not None:
            raise ValueError(f"cache must be unset where data is one, got {config.cache!r}")
        cached = Encoded(config.data)
        needed = {"image_size": str(config.image_size), "encoders": frozen.fingerprint()}
        for key, value in (needed | ({"mirrored": True} if config.hflip else {})).items():
            if cached.settings[key] != value:
                raise ValueError(f"{config.data} is a cache with {key} {cached.settings[key]!r}, must be {value!r}")
        return cached
    columns = {"image_column": config.image_column, "text_column": config.text_column}
    captioned = open_captioned(config.data, config.split, **columns)
    pixels = Pixels(captioned, config.image_size, skip_unreadable=config.unreadable == "skip")
    if config.cache is None:
        return pixels
    options = {"mirrored": config.hflip > 0, "batch_size": config.batch_size, "progress": config.progress}
    return encode(pixels, frozen, config.cache, **options)


class Batches:
    """The batches of one process.

    Args:
        config: of the run.
        source: of images.
        frozen: encodes them.
        shape: (C, h, w) of the latents of an image.
        training_times: number of times that the noise is defined for.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        config: DistillConfig,
        source: Pixels | Encoded,
        frozen: Frozen,
        shape: tuple[int, int, int],
        training_times: int,
        *,
        rank: int,
        world_size: int,
    ) -> None:
        self.config, self.source, self.frozen = config, source, frozen
        self.shape, self.training_times = shape, training_times
        self.rank, self.world_size = rank, world_size
        self.empty = frozen.unconditional()

    def load(self, start: int) -> Iterator[Any]:
        """Yield what `draw` takes, from an update on."""
        config = self.config
        order = Order(
            len(self.source),
            config.batch_size,
            config.accumulate,
            config.steps,
            seed=config.seed,
            rank=self.rank,
            world_size=self.world_size,
        )
        order.start = start
        return iter(
            DataLoader(
                self.source,
                batch_sampler=order,
                collate_fn=collate,
                num_workers=loader_workers(config.workers),
                persistent_workers=config.workers > 0,
            )
        )

    def draw(self, loaded: Any, step: int, micro: int) -> tuple[Batch, Tensor, Tensor]:
        """Mirror some images and drop some captions; return the batch, noise of its latents' shape, and times (N,).

        Every process draws for all, on the CPU, so that the numbers depend neither on the processes nor on the device.
        """
        config, device = self.config, self.frozen.device
        count = config.batch_size * self.world_size
        own = slice(self.rank * config.batch_size, (self.rank + 1) * config.batch_size)
        generator = torch.Generator().manual_seed(derive_seed(STEP, config.seed, step, micro))
        mirrored = (torch.rand(count, generator=generator) < config.hflip)[own]
        dropped = (torch.rand(count, generator=generator) < config.caption_dropout)[own].to(device)
        times = torch.randint(self.training_times, (count,), generator=generator)[own]
        posterior, noise = (torch.randn(count, *self.shape, generator=generator)[own].to(device) for _ in range(2))
        batch = self.source.encode(loaded, self.frozen, mirrored, posterior)
        states, pooled = batch.embeddings
        states = torch.where(dropped.view(-1, 1, 1), self.empty.states, states)
        if pooled is not None and self.empty.pooled is not None:
            pooled = torch.where(dropped.view(-1, 1), self.empty.pooled, pooled)
        return Batch(batch.latents, Embeddings(states, pooled), batch.sizes), noise, times.to(device)
