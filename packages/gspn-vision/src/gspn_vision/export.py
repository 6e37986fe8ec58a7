"""Export of a model to ONNX, or to a program of torch.export, checked against the model itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}

# Of the largest output: what the roundings of some fifty layers come to in float32, with room.
TOLERANCE = 1e-4


class ExportMismatchError(ArithmeticError):
    """What was written computes something else than the model."""


@dataclasses.dataclass(kw_only=True, frozen=True)
class Exported:
    """A file that was written, and how far its outputs are from the model's.

    `difference` is the largest difference of two outputs on random images, `largest` the largest output itself;
    `difference` is None if there was nothing to run the file with.
    """

    path: Path
    bytes: int
    inputs: str
    outputs: str
    difference: float | None
    largest: float


def export(
    model: nn.Module,
    path: str | Path,
    *,
    size: tuple[int, int],
    format: str = "onnx",
    in_chans: int = 3,
    batch: int | None = None,
    dynamic_size: bool = False,
) -> Exported:
    """Write a model to a file, which appears only when it is whole and gives the outputs of the model.

    An ONNX file has the input `images` and the output `logits` and holds standard operators only, the line scans as
    `Scan`. A program of torch.export calls the operators of gspn_core, which must be imported where it is loaded.

    Args:
        model: an image model on the CPU, in evaluation mode; (N, in_chans, H, W) to (N, ...).
        path: of the file, ending in .onnx or .pt2 as the format has it; an older file is replaced.
        size: height and width of the images.
        format: "onnx", or "torch" for torch.export.
        in_chans: channels of the images.
        batch: images at a time; None leaves it open.
        dynamic_size: leave height and width open, too; `size` is then what the model is traced with.

    Raises:
        ValueError: an argument does not fit, or the model does not take such images.
        FileNotFoundError: there is no such folder.
        ImportError: packages are missing; the message says which to install.
        ExportMismatchError: the outputs differ.
    """
    path = Path(path)
    _check(path, format, size, batch)
    torch.manual_seed(0)
    # Not of one image, which the exporter would take for a constant.
    images = torch.randn(batch or 2, in_chans, *size)
    with torch.no_grad():
        try:
            outputs = model(images)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ValueError(f"the model does not take images of {size[0]} x {size[1]}: {error}") from error
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        write = {"onnx": _write_onnx, "torch": _write_torch}[format]
        write(model, images, temporary, _dynamic_shapes(batch, dynamic_size))
        read = {"onnx": _read_onnx, "torch": _read_torch}[format]
        difference, largest = _compare(model, read(temporary), _test_images(images, batch, dynamic_size))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    axes = ["N" if batch is None else str(batch), *([] if not dynamic_size else [])]
    ...
