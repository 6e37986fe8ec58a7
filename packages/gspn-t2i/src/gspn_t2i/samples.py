"""The grid of samples that a distillation draws now and then."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor, nn

from .config import DistillConfig


@contextmanager
def exchanged(pipeline: Any, unet: nn.Module, adapter: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a pipeline draw with another UNet, whose adapter has other weights, for a while."""
    own, before = pipeline.unet, {name: value.clone() for name, value in adapter.state_dict().items()}
    adapter.load_state_dict(weights)
    pipeline.unet = unet
    try:
        yield
    finally:
        pipeline.unet = own
        adapter.load_state_dict(before)


@torch.no_grad()
def draw_grid(pipeline: Any, config: DistillConfig) -> Image.Image:
    """Draw the sample prompts, each from noise of its own that stays the same, and lay them out in a square."""
    images: list[Image.Image] = []
    for number, prompt in enumerate(config.sample_prompts):
        images += pipeline(
            prompt,
            height=config.image_size.height,
            width=config.image_size.width,
            num_inference_steps=config.sampler_steps,
            guidance_scale=config.guidance,
            generator=torch.Generator().manual_seed(config.seed + number),
        ).images
    columns = math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    blank = Image.new("RGB", images[0].size, "white")
    grid: Image.Image = make_image_grid(images + [blank] * (rows * columns - len(images)), rows, columns)
    return grid
