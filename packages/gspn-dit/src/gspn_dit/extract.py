"""`gspn-dit extract`: encode a data set of images and their mirror images once, and store the posteriors' moments."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from gspn_core.runs.errors import WriteError
from gspn_core.runs.files import check_record, locked, make_folder, read_json, write_json, write_tensors
from gspn_core.runs.options import ImageSize
from gspn_core.runs.training import leave_signals, loader_workers, use_cpu

from .config import ExtractConfig
from .features import (
    FORMAT,
    INDEX,
    SETTINGS,
    checksum,
    count_shards,
    open_shard,
    read_settings,
    shard_items,
    shard_name,
)
from .images import Images, adm_crop, open_images
from .vae import VAE, factor, fingerprint, load_vae, posterior

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Crops(Dataset[tuple[Tensor, int] | str]):
    """Cropped images, uint8 (3, H, W), with their classes; for an unreadable image, the error message instead."""

    def __init__(self, images: Images, size: ImageSize) -> None:
        self.images, self.size = images, size

    def __getitem__(self, index: int) -> tuple[Tensor, int] | str:
        try:
            image, label = self.images[index]
        except ValueError as error:
            # Returned, not raised: a DataLoader wraps exceptions in a traceback and then shuts down slowly.
            return str(error)
        return torch.from_numpy(np.array(adm_crop(image, *self.size))).permute(2, 0, 1).contiguous(), label


def _collate(samples: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    for sample in samples:
        if isinstance(sample, str):
            return sample
    pixels, labels = default_collate(samples)
    return pixels, labels


def _settings(config: ExtractConfig, images: Images, vae: VAE) -> dict[str, Any]:
    """Return all settings that the features depend on.

    Raises:
        ValueError: the images do not suit the VAE.
    """
    height, width = config.image_size
    reduction = factor(vae)
    if height % reduction or width % reduction:
        raise ValueError(f"image_size must be divisible by the VAE's factor {reduction}, got {height} x {width}")
    if vae.config.in_channels != 3:
        raise ValueError(f"vae must take images of 3 channels, got one of {vae.config.in_channels}")
    return {
        "format": FORMAT,
        "source": config.data,
        "split": config.split,
        "source_fingerprint": images.fingerprint,
        "images": len(images),
        "shard_size": config.shard_size,
        "image_size": [height, width],
        "mirrored": True,
        "vae_fingerprint": fingerprint(vae),
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.get("shift_factor"),
        "latent_shape": [vae.config.latent_channels, height // reduction, width // reduction],
        "store_precision": config.store_precision,
        "precision": config.precision,
        "class_names": images.class_names,
    }


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except WriteError as error:
        raise WriteError(
            f"{error}; the shards that are there are whole, run it again to continue after them"
        ) from error


def _open_folder(folder: Path, settings: dict[str, Any], state: PartialState) -> None:
    """Make the folder, or check that what is in it is of the same settings.

    Raises:
        ValueError: it is not; the message names the first setting that differs.
    """
    before = read_settings(folder) if (folder / SETTINGS).is_file() else settings
    # The same images may have been moved, or their split left out.
    moved = before.get("source_fingerprint") == settings["source_fingerprint"]
    check_record(folder / SETTINGS, settings, free=("source", "split") if moved else ())
    state.wait_for_everyone()
    if state.is_main_process:
        with _writing():
            make_folder(folder)
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
            if not (folder / SETTINGS).is_file():
                write_json(folder / SETTINGS, settings)
    state.wait_for_everyone()


def _missing(folder: Path, settings: dict[str, Any]) -> list[int]:
    """Return the shards that are absent or damaged."""
    numbers = []
    index = folder / INDEX
    known = [entry["crc32"] for entry in read_json(index)["shards"]] if index.is_file() else []
    for number in range(count_shards(settings)):
        try:
            open_shard(folder, settings, number)
            if number < len(known) and checksum(folder / shard_name(number)) != known[number]:
                raise ValueError("its content has changed")
        except (FileNotFoundError, ValueError):
            numbers.append(number)
    return numbers


def _write_index(folder: Path, settings: dict[str, Any]) -> None:
    shards = []
    for number in range(count_shards(settings)):
        name = shard_name(number)
        path = folder / name
        about = {"bytes": path.stat().st_size, "crc32": checksum(path)}
        shards.append({"file": name, "images": len(shard_items(settings, number)), **about})
    with _writing():
        write_json(folder / INDEX, {"images": settings["images"], "shards": shards})


@torch.inference_mode()
def encode(vae: VAE, pixels: Tensor, precision: str = "fp32") -> Tensor:
    """Encode images and their mirror images.

    Args:
        vae: on the device of `pixels`.
        pixels: uint8 (N, 3, H, W).
        precision: "fp32", "bf16" or "fp16".

    Returns:
        Moments (N, 2, 2C, H/f, W/f), float32.
    """
    x = pixels.float() / 127.5 - 1
    with torch.autocast(pixels.device.type, _DTYPES[precision], enabled=precision != "fp32"):
        both = [posterior(vae, view).float() for view in (x, x.flip(-1))]
    return torch.stack(both, dim=1)


def _write_shards(
    numbers: list[int],
    config: ExtractConfig,
    settings: dict[str, Any],
    images: Images,
    vae: VAE,
    bar: Any,
) -> None:
    """Encode images and write these shards, one after the other."""
    # A batch never spans two shards, so that batches are the same whichever process makes a shard.
    batches: dict[int, list[range]] = {}
    for number in numbers:
        items = shard_items(settings, number)
        batches[number] = [
            items[first : first + config.batch_size] for first in range(0, len(items), config.batch_size)
        ]
    loaded = iter(
        DataLoader(
            _Crops(images, config.image_size),
            batch_sampler=[list(batch) for shard in batches.values() for batch in shard],
            num_workers=loader_workers(config.workers) if numbers else 0,
            worker_init_fn=leave_signals,
            collate_fn=_collate,
            pin_memory=vae.device.type == "cuda",
        )
    )
    for number, shard in batches.items():
        moments, labels = [], []
        for batch in shard:
            content = next(loaded)
            if isinstance(content, str):
                raise ValueError(content)
            pixels, classes = content
            encoded = encode(vae, pixels.to(vae.device), config.precision).to(_DTYPES[config.store_precision]).cpu()
            if not encoded.isfinite().all():
                raise ArithmeticError(
                    f"the moments of images {batch[0]} to {batch[-1]} are not finite with "
                    f"precision {config.precision} and store_precision {config.store_precision}"
                )
            moments.append(encoded)
            labels.append(classes)
            bar.update(len(batch))
        path = Path(config.out) / shard_name(number)
        index = torch.tensor(shard_items(settings, number))
        with _writing():
            write_tensors(path, {"moments": torch.cat(moments), "labels": torch.cat(labels), "index": index})


def extract(config: ExtractConfig) -> dict[str, Any]:
    """Encode what is missing; return the folder, images, shards, shards written and skipped, and seconds.

    Raises:
        FileNotFoundError: the data or the VAE cannot be had.
        ValueError: an option or an image is wrong, or the folder holds features of other settings.
        WriteError: the disk is full; whole shards stay.
        ArithmeticError: moments are not finite in the precision asked for.
    """
    began = time.perf_counter()
    # Processes may wait long for the slowest to read its images.
    state = PartialState(cpu=use_cpu(config.device), timeout=timedelta(hours=6))
    device = state.device if config.device == "auto" else torch.device("cpu")
    images = open_images(
        config.data,
        config.split,
        image_column=config.image_column,
        label_column=config.label_column,
        unreadable=config.unreadable,
    )
    vae = load_vae(config.vae)
    settings = _settings(config, images, vae)
    folder = Path(config.out)
    with locked(folder):
        _open_folder(folder, settings, state)
        missing = _missing(folder, settings)
        # Barrier: all list missing shards before any writes.
        state.wait_for_everyone()
        # Only missing shards are distributed, so that processes finish together after an interruption too.
        own = missing[state.process_index :: state.num_processes]
        total = sum(len(shard_items(settings, number)) for number in own)
        title = "images" if state.num_processes == 1 else f"images of process 1 of {state.num_processes}"
        show = config.progress and state.is_main_process
        with tqdm(total=total, unit="image", desc=title, disable=not show) as bar:
            _write_shards(own, config, settings, images, vae.to(device), bar)
        written = sum(gather_object([len(own)]))
        if state.is_main_process:
            _write_index(folder, settings)
        state.wait_for_everyone()
    shards = count_shards(settings)
    return {
        "folder": str(folder),
        "images": len(images),
        "shards": shards,
        "written": written,
        "skipped": shards - written,
        "seconds": round(time.perf_counter() - began, 1),
    }
