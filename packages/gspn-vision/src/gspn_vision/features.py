"""`gspn-vision features`: what a model makes of images, stored once, in files that `gspn-vision probe` reads.

OUT/features.json             settings and class names, written first
OUT/00000.safetensors, ...    features (n, C), or maps (n, C, H, W); labels (n,); index (n,), numbers in the data set
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from gspn_core.runs.errors import reason
from gspn_core.runs.files import check_record, damaged, locked, make_folder, read_json, write_json, write_tensors
from gspn_core.runs.training import make_accelerator, use_cpu

from .checkpoint import CONFIG, hash_weights
from .config import FeaturesConfig
from .data import Samples, Unreadable, batch_loader
from .foundation.vision import open_model
from .sources import Source, Unlabelled, open_source

FORMAT = "gspn-vision features 1"
SETTINGS = "features.json"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def shard_path(folder: Path, number: int) -> Path:
    """Return the name of a shard's file."""
    return folder / f"{number:05d}.safetensors"


def _shard_count(settings: dict[str, Any]) -> int:
    return -(-int(settings["images"]) // int(settings["shard_size"]))


def pooled(model: nn.Module, pool: str) -> Callable[[Tensor], Tensor]:
    """Return what makes features, (N, C) or for "map" (N, C, H, W), of images.

    Raises:
        ValueError: the model has no such features.
    """
    any_model: Any = model
    name = type(model).__name__
    if pool == "head":
        return lambda x: any_model.forward_head(any_model.forward_features(x), pre_logits=True)
    if pool == "class":
        if getattr(any_model, "cls_token", None) is None:
            raise ValueError(f"pool must be head, mean or map: a {name} has no class token, got 'class'")
        return lambda x: any_model.forward_features(x)[:, 0]
    if not callable(getattr(any_model, "forward_intermediates", None)):
        raise ValueError(f"pool must be head: a {name} does not tell its map, got {pool!r}")

    def maps(x: Tensor) -> Tensor:
        found: Tensor = any_model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[-1]
        return found

    return maps if pool == "map" else lambda x: maps(x).mean((2, 3))


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return {"features", "labels", "index"} <= set(file.keys())
    except (FileNotFoundError, SafetensorError):
        return False


def _open(config: FeaturesConfig) -> Source:
    """Open the images; without a split these are all of a folder that has none."""
    folder = Path(config.data)
    if config.split is not None:
        return open_source(config.data, config.split, root=config.data_root)
    if not folder.is_dir() or any((folder / name).is_dir() for name in ("train", "val", "validation")):
        raise ValueError(f"split must be given, such as train or validation, of {config.data}")
    return Unlabelled(folder)


class Extraction:
    """Writes the shards that are missing.

    Raises:
        ValueError, FileNotFoundError: an option, the model or the data does not fit, or the folder holds features of
            other settings; nothing has been written then.
    """

    def __init__(self, config: FeaturesConfig) -> None:
        self.config, self.folder = config, Path(config.out)
        # Processes may wait long for the slowest.
        self.state = PartialState(cpu=use_cpu(config.device), timeout=timedelta(hours=6))
        self.accelerator = make_accelerator(config.device, config.precision)
        self.source = _open(config)
        vision = open_model(config).resized(config.image_size, config.crop_pct)
        self.model = vision.model.eval().to(self.accelerator.device)
        self.features = pooled(self.model, config.pool)
        preprocessing = vision.preprocessing
        self.samples = Samples(self.source, preprocessing.transform(), preprocessing.mode)
        self.settings: dict[str, Any] = {
            "format": FORMAT,
            "model": vision.name,
            "weights": hash_weights(self.model),
            "data": config.data,
            "split": config.split,
            "source_fingerprint": self.source.fingerprint,
            "images": len(self.source),
            "class_names": list(self.source.class_names),
            "labelled": not isinstance(self.source, Unlabelled),
            "pool": config.pool,
            "preprocessing": json.loads(json.dumps(preprocessing.to_timm())),  # as the record has it
            "precision": config.precision,
            "store_precision": config.store_precision,
            "shard_size": config.shard_size,
            "unreadable": config.unreadable,
        }
        if (self.folder / CONFIG).is_file():
            raise ValueError(f"out must be a folder of its own, {config.out!r} holds a model")
        check_record(self.folder / SETTINGS, self.settings, free=("data", "split"))

    def run(self) -> dict[str, Any]:
        """Write what is missing.

        Returns:
            The `folder`, `images`, `shards`, how many were `written` and `skipped`, and `seconds`.

        Raises:
            UnreadableImageError: an image cannot be read and `unreadable` is "stop".
            WriteError: the disk is full; whole shards stay.
            ArithmeticError: features are not finite in the precision asked for.
        """
        began, count = time.perf_counter(), _shard_count(self.settings)
        with locked(self.folder):
            if self.state.is_main_process:
                make_folder(self.folder)
                for leftover in self.folder.glob(".*.tmp"):
                    leftover.unlink()
                if not (self.folder / SETTINGS).is_file():
                    write_json(self.folder / SETTINGS, self.settings)
            missing = [number for number in range(count) if not _is_whole(shard_path(self.folder, number))]
            self.state.wait_for_everyone()  # all have listed what is missing before any writes
            own = missing[self.state.process_index :: self.state.num_processes]
            self._write(own)
            written = sum(gather_object([len(own)]))
        return {
            "folder": str(self.folder),
            "images": len(self.source),
            "shards": count,
            "written": written,
            "skipped": count - written,
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _write(self, numbers: list[int]) -> None:
        config, size = self.config, self.config.shard_size
        policy = Unreadable(config.unreadable)
        shards = {n: range(n * size, min((n + 1) * size, len(self.source))) for n in numbers}
        # A batch never spans two shards, so that batches are the same whichever process makes a shard.
        split = {
            n: [items[i : i + config.batch_size] for i in range(0, len(items), config.batch_size)]
            for n, items in shards.items()
        }
        loaded = iter(
            batch_loader(self.samples, [list(b) for batches in split.values() for b in batches], config.workers)
        )
        total, show = sum(map(len, shards.values())), config.progress and self.state.is_main_process
        with torch.inference_mode(), tqdm(total=total, unit="image", desc="features", disable=not show) as bar:
            for number, batches in split.items():
                parts: list[tuple[Tensor, Tensor, Tensor]] = []
                for items in batches:
                    batch = next(loaded)
                    policy.note(batch.unreadable)
                    bar.update(len(items))
                    if len(batch.targets):
                        parts.append((self._features(batch.images), batch.targets, batch.items))
                if not parts:  # not one of its images can be read
                    parts.append((torch.empty(0), torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)))
                features, labels, index = (torch.cat(column) for column in zip(*parts, strict=True))
                tensors = {"features": features, "labels": labels, "index": index}
                write_tensors(shard_path(self.folder, number), tensors)
        policy.report()

    def _features(self, images: Tensor) -> Tensor:
        with self.accelerator.autocast():
            made = self.features(images.to(self.accelerator.device))
        stored = made.to(_DTYPES[self.config.store_precision]).cpu()
        if not stored.isfinite().all():
            precision, kept = self.config.precision, self.config.store_precision
            raise ArithmeticError(f"features are not finite with precision {precision} and store_precision {kept}")
        return stored


def run(config: FeaturesConfig) -> dict[str, Any]:
    """Store features as configured; see `Extraction.run`."""
    return Extraction(config).run()


def read_features(folder: str | Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Read what `gspn-vision features` wrote.

    Returns:
        Features (M, C) or (M, C, H, W), labels (M,), and the settings.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is of another format, or some shards are missing or damaged.
    """
    path = Path(folder)
    if not (path / SETTINGS).is_file():
        raise FileNotFoundError(f"no features in {str(folder)!r}: it has no {SETTINGS}")
    settings = read_json(path / SETTINGS)
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        found = settings.get("format") if isinstance(settings, dict) else settings
        raise ValueError(f"{path / SETTINGS} must be of format {FORMAT!r}, got {found!r}")
    if not {"images", "shard_size", "labelled", "class_names"} <= settings.keys():
        raise damaged(path / SETTINGS, "settings are missing")
    count = _shard_count(settings)
    missing = [n for n in range(count) if not shard_path(path, n).is_file()]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of {count} shards; run gspn-vision features again")
    parts = []
    for number in range(count):
        file = shard_path(path, number)
        try:
            with safe_open(file, framework="pt") as shard:
                parts.append((shard.get_tensor("features"), shard.get_tensor("labels")))
        except SafetensorError as error:
            raise damaged(file, reason(error)) from None
    present = [part for part in parts if len(part[1])]
    if not present:
        raise ValueError(f"{path} holds no features: not one image could be read")
    return torch.cat([f for f, _ in present]), torch.cat([labels for _, labels in present]), settings
