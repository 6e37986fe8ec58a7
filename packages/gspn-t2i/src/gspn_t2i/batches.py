"""The batches of a distillation: data in the order of the run, and what each update draws at random."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gspn_core.runs.errors import explaining_memory
from gspn_core.runs.order import SAMPLE, STEP, Order, derive_seed
from gspn_core.runs.training import leave_signals, loader_workers

from .buckets import BucketOrder, choose_sizes
from .captions import open_captioned
from .conditions import INDEX, SETTINGS, Batch, Embeddings, Encoded, Frozen, Pixels, collate, encode
from .config import DistillConfig


def open_data(config: DistillConfig, frozen: Frozen, *, progress: bool) -> Pixels | Encoded:
    """Open images and captions, or a cache of them, which is made first if wanted.

    Raises:
        FileNotFoundError: there are no such data.
        ValueError: an option, the data or a cache does not fit.
        MemoryError, WriteError: the cache cannot be made.
    """
    if is_cache(config.data):
        return _open_cache(config, frozen)
    columns = {"image_column": config.image_column, "text_column": config.text_column}
    captioned = open_captioned(config.data, config.split, **columns)
    pixels = Pixels(
        captioned,
        config.image_size,
        skip_unreadable=config.unreadable == "skip",
        size_of=choose_sizes(captioned, config.buckets, progress=progress) if config.buckets else None,
        crop_seed=config.seed if config.random_crop else None,
    )
    if config.cache is None:
        return pixels
    with explaining_memory({"--batch-size 1": config.batch_size > 1, "--precision bf16": config.precision == "fp32"}):
        return encode(
            pixels,
            frozen,
            config.cache,
            mirrored=config.hflip > 0,
            batch_size=config.batch_size,
            progress=config.progress,
        )


def is_cache(folder: str) -> bool:
    """Tell whether a folder is a finished cache."""
    return all((Path(folder) / name).is_file() for name in (SETTINGS, INDEX))


def _open_cache(config: DistillConfig, frozen: Frozen) -> Encoded:
    for name in ("cache", "random_crop", "buckets"):
        if getattr(config, name):
            raise ValueError(f"{name} must be unset where data is a cache, got {getattr(config, name)!r}")
    cached = Encoded(config.data)
    needed = {"image_size": str(config.image_size), "encoders": frozen.fingerprint()}
    for key, value in (needed | ({"mirrored": True} if config.hflip else {})).items():
        if cached.settings[key] != value:
            raise ValueError(f"{config.data} is a cache with {key} {cached.settings[key]!r}, must be {value!r}")
    return cached


def open_validation(config: DistillConfig) -> Pixels:
    """Open the images and captions of the validation loss.

    Raises:
        FileNotFoundError, ValueError: as `open_captioned`.
    """
    columns = {"image_column": config.image_column, "text_column": config.text_column}
    captioned = open_captioned(config.val_data or config.data, config.val_split, **columns)
    return Pixels(captioned, config.image_size, skip_unreadable=config.unreadable == "skip")


class Draws(NamedTuple):
    """All that is random in one forward pass of one process, on the CPU."""

    mirrored: Tensor  # (N,) bool
    dropped: Tensor  # (N,) bool, captions
    times: Tensor  # (N,) int64
    posterior: Tensor  # (N, C, h, w), noise of the latents
    noise: Tensor  # (N, C, h, w)


def draw(
    images: range, shape: tuple[int, ...], training_times: int, *, hflip: float, dropout: float, seeds: tuple[int, ...]
) -> Draws:
    """Draw for images, each a function of `seeds` and its own number alone.

    In training the numbers count the images of an update over all processes and forward passes: so what is drawn for
    an image depends neither on these nor on the device.
    """
    chances, times = torch.empty(len(images), 2), torch.empty(len(images), dtype=torch.int64)
    posterior, noise = torch.empty(2, len(images), *shape)
    generator = torch.Generator()
    for place, number in enumerate(images):
        generator.manual_seed(derive_seed(*seeds, number))
        torch.rand(2, generator=generator, out=chances[place])
        torch.randint(training_times, (), generator=generator, out=times[place])
        for values in (posterior, noise):
            values[place].normal_(generator=generator)
    return Draws(chances[:, 0] < hflip, chances[:, 1] < dropout, times, posterior, noise)


class Batches:
    """The batches of one process.

    Args:
        config: of the run.
        source: of images.
        frozen: encodes them.
        training_times: number of times that the noise is defined for.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        config: DistillConfig,
        source: Pixels | Encoded,
        frozen: Frozen,
        training_times: int,
        *,
        rank: int,
        world_size: int,
    ) -> None:
        self.config, self.source, self.frozen = config, source, frozen
        self.training_times = training_times
        self.rank, self.world_size = rank, world_size
        self.empty = frozen.unconditional()

    def load(self, start: int) -> Iterator[Any]:
        """Yield what `draw` takes, from an update on."""
        config, place = self.config, {"rank": self.rank, "world_size": self.world_size}
        amounts = (config.batch_size, config.accumulate, config.steps)
        order: Order | BucketOrder
        if isinstance(self.source, Pixels) and self.source.size_of is not None:
            order = BucketOrder(self.source.size_of, *amounts, seed=config.seed, **place)
        else:
            order = Order(len(self.source), *amounts, seed=config.seed, with_epoch=config.random_crop, **place)
        order.start = start
        return iter(loader(self.source, order, config.workers))

    def draw(self, loaded: Any, step: int, micro: int) -> tuple[Batch, Tensor, Tensor]:
        """Mirror some images and drop some captions; return the batch, noise of its latents' shape, and times (N,)."""
        config = self.config
        first = (micro * self.world_size + self.rank) * config.batch_size
        numbers = range(first, first + config.batch_size)
        return self._drawn(
            self.source, loaded, numbers, config.hflip, config.caption_dropout, (STEP, config.seed, step)
        )

    def validation(self, source: Pixels) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Yield this process's batches of other images, each as they are and with noise and time of its own."""
        size = self.config.batch_size
        parts = [range(first, min(first + size, len(source))) for first in range(0, len(source), size)]
        own = parts[self.rank :: self.world_size]
        loaded = loader(source, [list(part) for part in own], self.config.workers, persistent=False)
        for numbers, items in zip(own, loaded, strict=True):
            yield self._drawn(source, items, numbers, 0.0, 0.0, (SAMPLE, self.config.seed))

    def _drawn(
        self,
        source: Pixels | Encoded,
        loaded: Any,
        numbers: range,
        hflip: float,
        dropout: float,
        seeds: tuple[int, ...],
    ) -> tuple[Batch, Tensor, Tensor]:
        vae, device = self.frozen.pipeline.vae, self.frozen.device
        size = source.latent_size(loaded, self.frozen.pipeline.vae_scale_factor)
        shape = (vae.config.latent_channels, *size)
        draws = draw(numbers, shape, self.training_times, hflip=hflip, dropout=dropout, seeds=seeds)
        batch = source.encode(loaded, self.frozen, draws.mirrored, draws.posterior)
        dropped = draws.dropped.to(device)
        states, pooled = batch.embeddings
        states = torch.where(dropped.view(-1, 1, 1), self.empty.states, states)
        if pooled is not None and self.empty.pooled is not None:
            pooled = torch.where(dropped.view(-1, 1), self.empty.pooled, pooled)
        embeddings = Embeddings(states, pooled)
        return Batch(batch.latents, embeddings, batch.sizes), draws.noise.to(device), draws.times.to(device)


def loader(source: Pixels | Encoded, batches: Any, workers: int, *, persistent: bool = True) -> DataLoader[Any]:
    """Load batches of items by their names, such as of an order."""
    return DataLoader(
        source,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=loader_workers(workers),
        worker_init_fn=leave_signals,
        persistent_workers=persistent and loader_workers(workers) > 0,
    )
