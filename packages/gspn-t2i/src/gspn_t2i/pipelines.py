"""Diffusers pipelines as the commands use them: loading, mounting an adapter, devices, and saving images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from diffusers import AutoPipelineForText2Image
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from gspn_core.runs.files import replacing
from gspn_core.runs.options import ImageSize
from gspn_core.runs.training import use_cpu

from .adapter import GSPNAdapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TILED_ABOVE = 1024 * 1024  # pixels, SDXL's own size: larger images are decoded in tiles unless asked otherwise
CPU = torch.device("cpu")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hide the bars of loading weights, a line of each part; those of downloads stay."""
    libraries = [transformers.utils.logging, diffusers_logging]
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def load_adapter(name: str) -> GSPNAdapter:
    """Load an adapter.

    Raises:
        FileNotFoundError: there is none of this name, or it cannot be downloaded.
        ValueError: it is not an adapter, lacks a weight, or has one that is not finite.
    """
    try:
        adapter: GSPNAdapter = GSPNAdapter.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(f"no adapter {name!r}: {_first_line(error)}") from None
    return adapter


def load_pipeline(name: str, adapter: str | None, dtype: torch.dtype) -> Any:
    """Load a pipeline and mount an adapter on its UNet.

    Raises:
        FileNotFoundError: there is none of this name, or it cannot be downloaded.
        ValueError: the pipeline has no UNet, or one that takes more than noisy latents, or the adapter does not fit.
    """
    try:
        with _no_bars():
            pipeline = AutoPipelineForText2Image.from_pretrained(name, dtype=dtype)
    except OSError as error:
        raise FileNotFoundError(f"no pipeline {name!r}: {_first_line(error)}") from None
    if getattr(pipeline, "unet", None) is None:
        raise ValueError(f"pipeline must have a UNet to mount mixers on, {type(pipeline).__name__} has none")
    takes, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if takes != latents:
        raise ValueError(
            f"pipeline must draw from noise alone, in {latents} channels, the UNet of {name!r} takes {takes} "
            "(as for inpainting)"
        )
    if adapter is not None:
        # Commands have no use for the attention any more.
        load_adapter(adapter).mount(pipeline.unet, discard=True)
    return pipeline


def own_size(pipeline: Any) -> ImageSize:
    """Return the image size that a pipeline was trained for."""
    size, factor = pipeline.unet.config.sample_size, pipeline.vae_scale_factor
    height, width = (size, size) if isinstance(size, int) else size
    return ImageSize(height * factor, width * factor)


def is_tiled(choice: str, size: ImageSize) -> bool:
    """Tell whether an option `vae_tiling` means tiles for an image of this size."""
    return choice == "always" or (choice == "auto" and size.height * size.width > TILED_ABOVE)


def one_device(device: str) -> torch.device:
    """Return the device of a command that runs in one process, by its option `device`."""
    accelerator = None if use_cpu(device) else torch.accelerator.current_accelerator(check_available=True)
    return accelerator or CPU


def open_processes(device: str) -> tuple[PartialState, torch.device]:
    """Join the other processes, if there are any; return accelerate's view of them and the device of this one."""
    on_cpu = use_cpu(device)
    state = PartialState(cpu=on_cpu)
    return state, CPU if on_cpu else state.device


def check_offload(offload: str, device: str) -> None:
    """Refuse to offload where there is nothing to offload from.

    Raises:
        ValueError: with the option `offload`.
    """
    if offload != "none" and use_cpu(device):
        raise ValueError(f"offload needs an accelerator to be useful, got {offload!r} on the CPU")


def place(pipeline: Any, device: torch.device, offload: str) -> None:
    """Put a pipeline where it computes, or let its parts come there in turn: by "model", "sequential" or "group"."""
    if offload == "none":
        pipeline.to(device)
    elif offload == "group":
        pipeline.enable_group_offload(onload_device=device, offload_type="leaf_level")
    else:
        getattr(pipeline, f"enable_{offload}_cpu_offload")(device=device)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        WriteError: the disk is full or not writable.
    """
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
