"""What is trained on, pixels or stored latents, and what is random in an update, as a function of counters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gspn_core.runs.options import ImageSize
from gspn_core.runs.order import Order, derive_seed
from gspn_core.runs.training import leave_signals, loader_workers

from .features import Features
from .images import adm_crop, open_images
from .vae import sample_moments


class Pixels(Dataset[tuple[Tensor, int]]):
    """Images as uint8 (C, H, W), with their classes.

    Args:
        name, split, unreadable: as in `open_images`.
        size: height and width, cropped to as ADM does; None keeps the digits' 8 x 8.

    Raises:
        ValueError: size is missing where the images need one.
    """

    def __init__(
        self, name: str, split: str | None = None, size: ImageSize | None = None, unreadable: str = "stop"
    ) -> None:
        self.images = open_images(name, split=split, unreadable=unreadable)
        self.class_names, self.fingerprint = self.images.class_names, self.images.fingerprint
        if size is None and name != "digits":
            raise ValueError("image_size must be given to train on the pixels of these images, got none")
        self.size = size
        self.shape = tuple(self[0][0].shape)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        pixels = np.asarray(image if self.size is None else adm_crop(image, *self.size))
        return torch.from_numpy(pixels.copy()).view(*pixels.shape[:2], -1).permute(2, 0, 1), label

    def clean(self, items: Tensor, mirrored: Tensor, noise: Tensor) -> Tensor:
        """Return x_0 in [-1, 1], (N, C, H, W), of items as loaded; images where `mirrored` (N,) is set are flipped."""
        x = items.float() / 127.5 - 1
        return torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)


class Latents(Dataset[tuple[Tensor, int]]):
    """What `gspn-dit extract` stored: moments (2, 2C, H, W) of image and mirror image, with classes.

    Args:
        folder: of the features.
        vae_fingerprint: that they must be made with, if given.
    """

    def __init__(self, folder: str, vae_fingerprint: str | None = None) -> None:
        self.features = Features(folder, vae_fingerprint=vae_fingerprint)
        self.class_names, self.fingerprint = self.features.class_names, self.features.fingerprint
        self.shape = tuple(self.features.latent_shape)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.features[index]

    def clean(self, items: Tensor, mirrored: Tensor, noise: Tensor) -> Tensor:
        """Return scaled latents x_0, (N, C, H, W), drawn from the posterior by `noise` of that shape."""
        moments = items[torch.arange(len(items), device=items.device), mirrored.long()]
        features = self.features
        return sample_moments(moments.float(), noise, features.scaling_factor, features.shift_factor)


def open_data(
    name: str, *, split: str | None, image_size: ImageSize | None, unreadable: str, vae_fingerprint: str | None
) -> Pixels | Latents:
    """Open features if `name` is a folder of them, or else images."""
    if (Path(name) / "extraction.json").is_file():
        if image_size is not None:
            raise ValueError(f"image_size must be absent with features, whose size is fixed, got {image_size}")
        return Latents(name, vae_fingerprint)
    return Pixels(name, split, image_size, unreadable)


@dataclass(frozen=True)
class Draws:
    """All that is random in one forward pass of one process."""

    mirrored: Tensor  # (N,) bool
    posterior: Tensor  # (N, C, H, W), noise of the latents
    noise: Tensor  # (N, C, H, W)
    dropped: Tensor  # (N,) bool, labels to replace
    times: Tensor  # (N,)


def draw(
    objective: Any, shape: tuple[int, ...], images: range, *, hflip: float, dropout: float, seeds: tuple[int, ...]
) -> Draws:
    """Draw for images of an update, counted over all processes and forward passes.

    The numbers of an image are a function of `seeds` and its place in the update, drawn on the CPU: so they depend
    neither on the processes, nor on how the update is split into forward passes, nor on the device.
    """
    count = len(images)
    chances = torch.empty(2, count)
    posterior, noise = torch.empty(2, count, *shape)
    times = []
    generator = torch.Generator()
    for place, image in enumerate(images):
        generator.manual_seed(derive_seed(*seeds, image))
        chances[:, place] = torch.rand(2, generator=generator)
        times.append(objective.draw_times(1, generator))
        noise[place].normal_(generator=generator)
        posterior[place].normal_(generator=generator)
    return Draws(chances[0] < hflip, posterior, noise, chances[1] < dropout, torch.cat(times))


def loader(source: Pixels | Latents, order: Order, workers: int) -> DataLoader[Any]:
    """Load batches of (items, labels) in an order."""
    return DataLoader(
        source,
        batch_sampler=order,
        num_workers=loader_workers(workers),
        worker_init_fn=leave_signals,
        persistent_workers=workers > 0,
        pin_memory=False,
    )
