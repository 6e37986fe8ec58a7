"""Export of a model to ONNX, or to a program of torch.export, checked against the model itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gspn_core.runs.errors import reason
from gspn_core.runs.files import make_folder, replacing

from .checkpoint import load_model
from .config import ExportConfig
from .models import build_model, set_size, takes_any_size

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
_AXES = {0: "batch", 2: "height", 3: "width"}

# Allowed difference, relative to the largest output: twice the rounding errors of fifty float32 layers or more.
_TOLERANCE = 1e-4


class ExportMismatchError(ArithmeticError):
    """The exported file computes something else than the model."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A file that was written.

    `images` and `logits` are the shapes of its input and output; an open dimension is given by its name. `difference`
    is the largest between its outputs and the model's for random images, `largest` the largest output; both are None
    if onnxruntime is missing.
    """

    path: Path
    bytes: int
    images: tuple[int | str, ...]
    logits: tuple[int | str, ...]
    difference: float | None
    largest: float | None


def open_model(
    name: str | None, checkpoint: str | None, *, which: str = "best", weights: str = "auto"
) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return a timm model with fresh weights, or that of a checkpoint, in evaluation mode, and its input's (C, H, W).

    Raises:
        ValueError: neither is given, or both; timm knows no such model.
        FileNotFoundError: there is no such checkpoint.
    """
    if (name is None) == (checkpoint is None):
        raise ValueError(f"give either model or checkpoint, got {'neither' if name is None else 'both'}")
    if checkpoint is not None:
        loaded = load_model(checkpoint, which=which, weights=weights)
        return loaded.model, (loaded.preprocessing.in_chans, *loaded.preprocessing.size)
    assert name is not None
    model = build_model(name, {}).eval()
    own: Any = model.pretrained_cfg
    return model, tuple(own["input_size"])


def export(
    model: nn.Module,
    path: str | Path,
    *,
    input_size: tuple[int, int, int],
    format: str = "onnx",
    batch: int | None = None,
    dynamic_size: bool = False,
) -> Exported:
    """Write a model to a file, which appears only when it is whole and gives the model's outputs.

    An ONNX file has the input `images`, the output `logits`, and standard operators only. A program of torch.export
    calls the operators of gspn_core, which must be imported before `torch.export.load`; where sizes are open, those of
    the last stage's map must be 2 or more, that is, images larger than the model's stride. A model is traced with such
    images in any case, since the exporters treat a size of 1 as a constant.

    Args:
        model: (N, C, H, W) to (N, ...), on the CPU and in evaluation mode.
        path: of the file, ending in .onnx or .pt2 as the format has it. An older file is replaced.
        input_size: C, H and W of the images.
        format: "onnx", or "torch" for torch.export.
        batch: N; None leaves it open.
        dynamic_size: leave H and W open, too.

    Raises:
        ValueError: an argument does not fit, or the model does not take such images.
        ImportError: packages are missing; the message says which to install.
        ExportMismatchError: the outputs differ.
    """
    path = Path(path)
    _check_arguments(path, format, input_size, batch)
    open_axes = [axis for axis in _AXES if (batch is None if axis == 0 else dynamic_size)]
    # Two images if the batch size is dynamic: the exporter would treat 1 as a constant.
    images = _noise((batch or 2, input_size[0], *_traced_size(model, input_size[1:], dynamic_size)))
    # Under autograd the scans save states, and torch.export would limit the sizes to those that need as many.
    with torch.no_grad():
        try:
            logits = model(images)
        except (AssertionError, RuntimeError, ValueError) as error:
            size = f"{input_size[1]}x{input_size[2]}"
            raise ValueError(f"the model does not take images of {size}: {reason(error)}") from error
        make_folder(path.parent)
        with replacing(path, path.suffix) as temporary:
            run = (_onnx if format == "onnx" else _torch)(model, images, temporary, open_axes)
            asked = (images.shape[0], *input_size)
            sizes = [
                *_sizes(images, open_axes, getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))),
                *([asked] if format == "onnx" else []),
            ]
            difference, largest = _compare(run, model, sizes) if run is not None else (None, None)
        count = path.stat().st_size
    return Exported(
        path=path,
        bytes=count,
        images=tuple(_AXES[axis] if axis in open_axes else n for axis, n in enumerate(images.shape)),
        logits=("batch" if batch is None else batch, *logits.shape[1:]),
        difference=difference,
        largest=largest,
    )


def _traced_size(model: nn.Module, size: Sequence[int], is_open: bool) -> tuple[int, ...]:
    """Return the size itself if it is fixed, else one whose last map has two pixels or more each way."""
    info: Any = getattr(model, "feature_info", None)
    stride = max((entry["reduction"] for entry in info or ()), default=1)
    return tuple(max(side, 2 * stride) if is_open else side for side in size)


def _check_arguments(path: Path, format: str, input_size: tuple[int, int, int], batch: int | None) -> None:
    if format not in SUFFIXES:
        raise ValueError(f"format must be one of {', '.join(SUFFIXES)}, got {format!r}")
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f"the file of the format {format} must end in {SUFFIXES[format]}, got {str(path)!r}")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder")
    if min(input_size) < 1:
        raise ValueError(f"channels, height and width must be at least 1, got {tuple(input_size)}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")


_Run = Callable[[Tensor], Tensor]


def _torch(model: nn.Module, images: Tensor, path: Path, open_axes: list[int]) -> _Run:
    """Write a program of torch.export and return what runs it."""
    shapes = (dict.fromkeys(open_axes, torch.export.Dim.DYNAMIC),)
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=shapes), path)
    module: _Run = torch.export.load(path).module()
    return module


def _onnx(model: nn.Module, images: Tensor, path: Path, open_axes: list[int]) -> _Run | None:
    """Write ONNX and return what runs it, None without onnxruntime."""
    from gspn_core.export import onnx_translations

    program: Any = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({axis: _AXES[axis] for axis in open_axes},),
        custom_translation_table=onnx_translations(),
    )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the source lines it stems from, with paths of this machine
    program.save(path, external_data=False)
    try:
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def _noise(size: tuple[int, ...]) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def _sizes(images: Tensor, open_axes: list[int], patch: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the size of images, and others as far as its dimensions are open; of a ViT multiples of its patches."""
    n, c, h, w = images.shape
    yield n, c, h, w
    if 0 in open_axes:
        yield 1, c, h, w
    if 2 in open_axes:
        height, width = h + 8, 2 * w - 1
        yield n, c, -(-height // patch[0]) * patch[0], -(-width // patch[1]) * patch[1]


def _compare(run: _Run, model: nn.Module, sizes: Sequence[tuple[int, ...]]) -> tuple[float, float]:
    """Return the largest difference of the outputs for random images of some sizes, and the largest output.

    Raises:
        ExportMismatchError: they differ by more than rounding.
    """
    difference = largest = 0.0
    for size in sizes:
        x = _noise(size)
        expected = model(x)
        try:
            ours = run(x)
        except Exception as error:  # of onnxruntime: classes derived from Exception alone
            raise ExportMismatchError(f"the file does not run on images {tuple(x.shape)}: {reason(error)}") from error
        if ours.shape != expected.shape:
            raise ExportMismatchError(
                f"the file gives {tuple(ours.shape)} where the model gives {tuple(expected.shape)}"
            )
        apart, scale = (ours - expected).abs().max().item(), expected.abs().max().item()
        if not apart <= _TOLERANCE * scale:  # true of NaN as well
            raise ExportMismatchError(f"the file's outputs differ from the model's, up to {scale:.4g}, by {apart:.2g}")
        difference, largest = max(difference, apart), max(largest, scale)
    return difference, largest


def run(config: ExportConfig) -> dict[str, Any]:
    """Export as configured."""
    model, (channels, *own) = open_model(config.model, config.checkpoint, which=config.which, weights=config.weights)
    height, width = config.image_size or own
    if config.dynamic_size and not takes_any_size(model):
        raise ValueError(
            "dynamic_size must be off: the model takes images of its own size alone; a ViT made with model_kwargs "
            "{dynamic_img_size: true} takes others"
        )
    set_size(model, (height, width), (own[0], own[1]))
    exported = export(
        model,
        config.out or f"model{SUFFIXES[config.format]}",
        input_size=(channels, height, width),
        format=config.format,
        batch=config.batch_size,
        dynamic_size=config.dynamic_size,
    )
    return {**vars(exported), "path": str(exported.path)}


def as_text(result: dict[str, Any]) -> str:
    """Return the result as readable lines."""
    lines = [
        f"{result['path']}: {result['bytes'] / 1e6:.1f} MB",
        f"input   images ({', '.join(map(str, result['images']))}) float32",
        f"output  logits ({', '.join(map(str, result['logits']))}) float32",
    ]
    if str(result["path"]).endswith(SUFFIXES["torch"]) and "height" in result["images"]:
        lines.append("sizes   larger than the model's stride; ONNX takes smaller ones, too")
    if result["difference"] is None:
        lines.append("not checked: pip install onnxruntime to compare its outputs with the model's")
    else:
        difference, largest = result["difference"], result["largest"]
        lines.append(f"checked: outputs up to {largest:.4g} differ from the model's by {difference:.2g}")
    return "\n".join(lines)
