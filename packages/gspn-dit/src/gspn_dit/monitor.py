"""What a training run shows of itself: grids of samples, and the FID of samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .config import TrainConfig
from .extractors import build_extractor, extract
from .metrics import Moments, frechet_distance, moments
from .sample import columns_for, generate, grid, to_pixels
from .samplers import SAMPLERS
from .sources import open_reference
from .vae import decode


class Drawn:
    """Samples that are drawn when they are asked for: the i-th with seed + i, of classes in turn.

    Args:
        monitor: that draws them.
        model: in evaluation mode.
        count: how many.
    """

    def __init__(self, monitor: Monitor, model: Any, count: int) -> None:
        self.monitor, self.model, self.count = monitor, model, count

    def __len__(self) -> int:
        return self.count

    def chunks(self, start: int, stop: int, size: int) -> Iterator[Tensor]:
        """Yield samples start to stop, at most `size` at a time, as uint8 (n, 3, H, W)."""
        for first in range(start, stop, size):
            pixels = self.monitor.draw(self.model, range(first, min(first + size, stop)))
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2)


class Monitor:
    """Draws samples of a model in training.

    Args:
        config: of the run.
        accelerator: of the run.
        shape: of what the model makes, (C, H, W).
        classes: of the data.
        vae: that decodes it, or None for pixels.

    Raises:
        ValueError, FileNotFoundError: what FID needs is not there.
    """

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, shape: tuple[int, ...], classes: int, vae: Any | None
    ) -> None:
        self.config, self.accelerator, self.shape, self.classes, self.vae = config, accelerator, shape, classes, vae
        self.visible = vae is not None or shape[0] in (1, 3)
        if config.fid_every is None:
            return
        if config.reference is None or not self.visible:
            missing = "reference" if config.reference is None else "vae"
            raise ValueError(f"{missing} must be given to compute the FID of samples, got none")
        images, statistics = open_reference(config.reference, inception=config.extractor == "inception")
        self._target: Moments | None = statistics.get("fid")
        self._references = None if self._target else images
        if self._target is None and images is None:
            raise ValueError(f"reference must hold images or mu and sigma, got neither in {config.reference}")
        with accelerator.local_main_process_first():  # which alone downloads
            network = build_extractor(
                config.extractor, weights=config.extractor_weights, kwargs=config.extractor_kwargs
            )
            self.extractor = network.to(accelerator.device)

    def draw(self, model: Any, indices: range) -> Any:
        """Return samples as uint8 pixels, (n, H, W, 3)."""
        config = self.config
        x = generate(
            model,
            [index % self.classes for index in indices],
            indices,
            sampler=SAMPLERS[config.objective][0],
            steps=config.sampler_steps,
            seed=config.seed,
            guidance=config.guidance,
            time_shift=config.time_shift,
            size=self.shape[1:],  # type: ignore[arg-type]
            autocast=self.accelerator.autocast,
        )
        if self.vae is not None:
            self.vae.to(x.device)
            x = decode(self.vae, x)
        return to_pixels(x)

    def grid(self, model: Any) -> Any:
        """Return a page of samples, uint8 (H, W, 3)."""
        count = self.config.sample_count
        return grid(self.draw(model, range(count)), columns_for(count, self.classes))

    def fid(self, model: Any) -> float | None:
        """Return the FID of samples, drawn by all processes together; on others than the main one, None."""
        if self._target is None:
            assert self._references is not None
            self._target = self._moments(self._references, len(self._references))
        samples = self._moments(Drawn(self, model, self.config.fid_count), self.config.fid_count)
        if samples is None or self._target is None:
            return None
        return frechet_distance(samples, self._target)

    def _moments(self, images: Any, count: int) -> Moments | None:
        state, device, size = self.accelerator.state, self.accelerator.device, self.config.batch_size
        features = extract(self.extractor, images, count, ("pool",), size, state, device)
        return moments(features["pool"]) if features else None
