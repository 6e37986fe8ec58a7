"""Images per second of models beside each other, for inference and for training.

All contestants take turns within one run, so that a machine that is busy for a while slows all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import gspn_core
from gspn_core.runs.errors import reason
from gspn_core.runs.files import write_json
from gspn_core.runs.options import to_dict
from gspn_core.runs.training import device_of

from . import __version__
from .config import BenchmarkConfig
from .models.build import check_name
from .validate import prepare_file

# What the papers compare with, as timm names it.
PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny", "mambaout_tiny", "deit_small_patch16_224")

Mode = Literal["inference", "training"]


@dataclass
class Speed:
    """One model at one batch size: medians over the repeats, or why there are none."""

    model: str
    mode: Mode
    batch_size: int
    images_per_second: float | None = None
    milliseconds: float | None = None
    reason: str | None = None


def _step(model: nn.Module, mode: Mode, images: torch.Tensor, precision: str) -> Callable[[], None]:
    device = images.device.type

    def autocast() -> AbstractContextManager[Any]:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        return nullcontext() if dtype is None else torch.autocast(device, dtype)

    if mode == "inference":
        model.eval()

        def infer() -> None:
            with torch.inference_mode(), autocast():
                model(images)

        return infer
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    targets = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def train() -> None:
        with autocast():
            loss = F.cross_entropy(model(images).float(), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(config: BenchmarkConfig) -> list[Speed]:
    """Time every model at every batch size, on random images.

    Raises:
        ValueError: an unknown model.
    """
    names = [*config.models, *(peer for peer in PEERS if config.peers and peer not in config.models)]
    for name in names:
        check_name(name)
    rows: list[Speed] = []
    total = len(config.modes) * len(config.batch_sizes)
    with tqdm(total=total, unit="round", disable=not config.progress) as bar:
        for mode in config.modes:
            for batch_size in config.batch_sizes:
                bar.set_postfix_str(f"{mode}, batch {batch_size}")
                rows += _round(config, names, mode, batch_size)
                bar.update()
    return rows


def _round(config: BenchmarkConfig, names: Sequence[str], mode: Mode, batch_size: int) -> list[Speed]:
    device = device_of(config.device)
    rows = {name: Speed(name, mode, batch_size) for name in names}
    steps: dict[str, Callable[[], None]] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    images = torch.randn(batch_size, 3, *config.image_size, device=device)

    def attempt(name: str, run: Callable[[], object]) -> None:
        try:
            run()
        except (RuntimeError, AssertionError) as error:  # memory, or a model that takes no images of this size
            rows[name].reason = reason(error)
            steps.pop(name, None)

    def prepare(name: str) -> None:
        model = timm.create_model(name).to(device)
        if config.compile:
            model.compile()
        steps[name] = _step(model, mode, images, config.precision)
        for _ in range(2):
            steps[name]()

    for name in names:
        attempt(name, lambda name=name: prepare(name))  # type: ignore[misc]
    for _ in range(config.repeats):
        for name in [*steps]:
            attempt(name, lambda name=name: times[name].append(_seconds(steps[name], device)))  # type: ignore[misc]
    for name in steps:
        median = statistics.median(times[name])
        rows[name].milliseconds = 1e3 * median
        rows[name].images_per_second = batch_size / median
    return list(rows.values())


def report(config: BenchmarkConfig, rows: Sequence[Speed]) -> dict[str, Any]:
    """Return the rows as JSON holds them, with device, versions and date."""
    info = gspn_core.info()
    cuda = device_of(config.device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else info["platform"],
        "threads": info["threads"],
        "torch": info["torch"],
        "timm": timm.__version__,
        "gspn_vision": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": to_dict(config),
        "rows": [asdict(row) for row in rows],
    }


def table(rows: Sequence[Speed]) -> str:
    """Lay out images per second: a line per model and mode, a column per batch size."""
    batch_sizes = sorted({row.batch_size for row in rows})
    width = max(len(row.model) for row in rows)
    lines = [f"{'images/s':{width}s}  {'':9s}" + "".join(f"  {f'batch {b}':>10s}" for b in batch_sizes)]
    notes = []
    for mode in dict.fromkeys(row.mode for row in rows):
        for name in dict.fromkeys(row.model for row in rows):
            cells = {row.batch_size: row for row in rows if (row.model, row.mode) == (name, mode)}
            shown = ["-" if (v := cells[b].images_per_second) is None else f"{v:.1f}" for b in batch_sizes]
            lines.append(f"{name:{width}s}  {mode:9s}" + "".join(f"  {cell:>10s}" for cell in shown))
            notes += [f"{name}, {mode}, batch {b}: {cells[b].reason}" for b in batch_sizes if cells[b].reason]
    return "\n".join([*lines, *notes])


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure as configured, and write the file asked for."""
    prepare_file(config.out)
    result = report(config, measure(config))
    if config.out is not None:
        write_json(Path(config.out), result)
    return result


def as_text(result: dict[str, Any]) -> str:
    """Return the table."""
    return table([Speed(**row) for row in result["rows"]])
