"""Where a pixel's information goes: heat maps of a layer's propagation on a photograph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from gspn_core import DIRECTIONS, SpatialPropagation, line_scan, row_stochastic
from gspn_core.runs.files import replacing

from .checkpoint import load_model
from .config import VisualizeConfig
from .data import Preprocessing
from .models import takes_any_size
from .predict import open_image
from .validate import prepare_file

_TITLES = {
    "left_to_right": "left to right →",
    "right_to_left": "← right to left",
    "top_to_bottom": "top to bottom ↓",
    "bottom_to_top": "bottom to top ↑",
}

_DECADES = 3  # of the colour scale
LONGEST = 1024  # side of a photograph that is not asked for in another size


@dataclasses.dataclass(kw_only=True, frozen=True)
class HeatMaps:
    """One layer's propagation from one pixel.

    maps: (D, h, w), what reaches each position of the layer's map of what starts as 1 at the chosen one, for each of
    the four directions. photograph: as the model saw it, of size (H, W). pixel: row and column in it. position: the
    same in the layer's map.
    """

    maps: Tensor
    photograph: Image.Image
    pixel: tuple[int, int]
    position: tuple[int, int]
    layer: str
    chunk_size: int | None


def layers(model: nn.Module) -> dict[str, SpatialPropagation]:
    """Return the propagation layers of a model by name, in the order of the forward pass."""
    return {k: m for k, m in model.named_modules() if isinstance(m, SpatialPropagation)}


def choose_layer(model: nn.Module, name: str | None) -> str:
    """Return the name of a layer: the given one, or the first that scans the whole map.

    Raises:
        ValueError: the model has no such layer, or no propagation layer.
    """
    found = layers(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no propagation layer to visualize")
    if name is None:
        whole = [key for key, layer in found.items() if layer.chunk_size is None]
        return whole[0] if whole else next(iter(found))
    if name not in found:
        raise ValueError(f"layer must be one of {', '.join(found)}; got {name!r}")
    return name


@torch.inference_mode()
def heat_maps(
    model: nn.Module,
    preprocessing: Preprocessing,
    photograph: Image.Image,
    *,
    pixel: tuple[int, int] | None = None,
    layer: str | None = None,
    size: tuple[int, int] | None = None,
) -> HeatMaps:
    """Propagate a unit impulse with the row-stochastic weights that a layer makes from a photograph.

    Args:
        model: with `SpatialPropagation` layers, in evaluation mode.
        preprocessing: of its input; its size counts for a model of images of one size alone.
        photograph: any image.
        pixel: row and column in the photograph; its centre by default.
        layer: a name out of `layers(model)`; the first that scans the whole map by default.
        size: height and width that the photograph is resized to; its own by default, but with a longer side of at most
            `LONGEST`: the cost of the forward pass and of its maps grows with the pixels. A model of images of one size
            gets this one by default.

    Raises:
        ValueError: the pixel lies outside, or there is no such layer.
    """
    name = choose_layer(model, layer)
    width, height = photograph.size
    row, column = pixel or (height // 2, width // 2)
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(f"pixel must lie inside {height} rows and {width} columns, got {(row, column)}")
    if not takes_any_size(model):
        size = size or preprocessing.size
    shrink = min(1.0, LONGEST / max(height, width))
    rows, columns = size or (max(1, round(height * shrink)), max(1, round(width * shrink)))
    photograph = photograph.convert("RGB").resize((columns, rows), Image.Resampling.BICUBIC)
    row, column = row * rows // height, column * columns // width

    full = dataclasses.replace(preprocessing, size=(rows, columns), crop_pct=1.0)
    x = full.transform()(photograph.convert(preprocessing.mode))[None]
    module = layers(model)[name]
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        model(x.to(next(model.parameters()).device))
    finally:
        handle.remove()
    _, logits, _, _ = module.project(seen[0])
    used = [DIRECTIONS[d] for d in module.directions]
    weights = row_stochastic(logits.float(), directions=used)  # (1, D, G, 3, h, w)
    h, w = weights.shape[-2:]
    position = (row * h // rows, column * w // columns)
    impulse = weights.new_zeros(1, weights.shape[2], h, w)  # (1, G, h, w)
    impulse[..., position[0], position[1]] = 1
    maps = [
        line_scan(impulse, weights[:, i], direction=direction, chunk_size=module.chunk_size)[0].mean(0)
        for i, direction in enumerate(used)
    ]
    order = [maps[used.index(d)] if d in used else torch.zeros(h, w) for d in DIRECTIONS]
    return HeatMaps(
        maps=torch.stack(order).cpu(),
        photograph=photograph,
        pixel=(row, column),
        position=position,
        layer=name,
        chunk_size=module.chunk_size,
    )


def _overlay(axis: Any, result: HeatMaps, values: Tensor) -> Any:
    """Put one map over the greyed photograph, logarithmically; return what a colour bar needs."""
    photo = result.photograph
    extent = (0, photo.width, photo.height, 0)
    axis.imshow(photo.convert("L").convert("RGB"), extent=extent)
    strength = 1 + values.clamp(10.0**-_DECADES, 1).log10().numpy() / _DECADES
    return axis.imshow(
        strength,
        extent=extent,
        cmap="inferno",
        vmin=0,
        vmax=1,
        alpha=0.9 * strength**0.7,
        interpolation="bilinear",
    )


def center_of(result: HeatMaps) -> tuple[float, float]:
    """Return the row and column, in the photograph, of the centre of the map's position that the impulse started at.

    On a coarse map it is up to half a position off the chosen pixel.
    """
    sides = zip(result.position, result.maps.shape[-2:], reversed(result.photograph.size), strict=True)
    row, column = ((place + 0.5) * pixels / count for place, count, pixels in sides)
    return row, column


def _mark(axis: Any, result: HeatMaps) -> None:
    row, column = center_of(result)
    for color, line in (("white", 2.4), ("deepskyblue", 1.2)):
        axis.plot(column, row, "o", ms=9, mfc="none", mec=color, mew=line)
    axis.set_axis_off()


def _color_bar(figure: Figure, mappable: Any, axes: Any) -> None:
    ticks = [i / _DECADES for i in range(_DECADES + 1)]
    bar = figure.colorbar(mappable, ax=list(axes), shrink=0.7, pad=0.015, ticks=ticks)
    bar.ax.set_yticklabels([f"{10.0 ** (i - _DECADES):g}" for i in range(_DECADES + 1)])
    bar.set_label("share of the marked pixel's value that arrives")


def _reach(result: HeatMaps) -> str:
    h, w = result.maps.shape[-2:]
    return f"{h}×{w} positions, " + (
        "whole map" if result.chunk_size is None else f"chunks of {result.chunk_size} lines"
    )


def _save(figure: Figure, path: str | Path) -> None:
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def draw(result: HeatMaps, path: str | Path, *, title: str = "") -> None:
    """Draw the photograph, the mean of the four directions and each of them into one PNG.

    What arrives falls off by orders of magnitude as it spreads over the lines: the colours are logarithmic, from a
    thousandth of the chosen pixel's value up to all of it.
    """
    photo = result.photograph
    shape = photo.height / photo.width
    width, height = (4.2, 4.2 * shape) if shape < 1.4 else (4.2 / shape, 4.2)
    figure = Figure(figsize=(3 * width + 1.3, 2 * (height + 0.3) + 0.75), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    axes[0].imshow(photo, extent=(0, photo.width, photo.height, 0))
    axes[0].set_title("photograph")
    panels = [("mean of the four directions", result.maps.mean(0))]
    panels += [(_TITLES[d], m) for d, m in zip(DIRECTIONS, result.maps, strict=True)]
    mappable: Any = None
    for axis, (name, values) in zip(axes[1:], panels, strict=True):
        mappable = _overlay(axis, result, values)
        axis.set_title(name)
    for axis in axes:
        _mark(axis, result)
    _color_bar(figure, mappable, axes)
    heading = f"Where the marked pixel's value goes: layer {result.layer}, {_reach(result)}"
    figure.suptitle(f"{title}\n{heading}" if title else heading)
    _save(figure, path)


def draw_page(results: Sequence[HeatMaps], path: str | Path, *, title: str = "") -> None:
    """Draw the photograph and, for each of several layers, the mean of its four directions, into one PNG."""
    photo = results[0].photograph
    shape = photo.height / photo.width
    columns = min(4, len(results) + 1)
    rows = -(-(len(results) + 1) // columns)
    width, height = (3.2, 3.2 * shape) if shape < 1.4 else (3.2 / shape, 3.2)
    figure = Figure(figsize=(columns * width + 1.3, rows * (height + 0.45) + 0.75), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    axes[0].imshow(photo, extent=(0, photo.width, photo.height, 0))
    axes[0].set_title("photograph", fontsize=9)
    _mark(axes[0], results[0])
    mappable: Any = None
    for axis, result in zip(axes[1:], results, strict=False):
        mappable = _overlay(axis, result, result.maps.mean(0))
        axis.set_title(
            f"{result.layer.removesuffix('.propagation').removesuffix('.mixer')}\n{_reach(result)}", fontsize=9
        )
        _mark(axis, result)
    for axis in axes[len(results) + 1 :]:
        axis.remove()
    _color_bar(figure, mappable, axes[: len(results) + 1])
    heading = "Where the marked pixel's value goes in each layer, mean of the four directions"
    figure.suptitle(f"{title}\n{heading}" if title else heading)
    _save(figure, path)


def run(config: VisualizeConfig) -> dict[str, Any]:
    """Draw as configured: one layer, or a page of all."""
    loaded = load_model(config.checkpoint, which=config.which, weights=config.weights)
    names = list(layers(loaded.model))
    if config.list_layers:
        return {"layers": names}
    if config.all_layers and config.layer is not None:
        raise ValueError(f"layer must not be given with --all-layers, got {config.layer!r}")
    if config.image is None:
        raise ValueError("image must be given, or --list-layers")
    photograph = open_image(config.image)[0]
    prepare_file(config.out)
    loaded = loaded.resized(config.image_size)
    size = None if config.image_size is None else loaded.preprocessing.size
    results = [
        heat_maps(loaded.model, loaded.preprocessing, photograph, pixel=config.pixel, layer=layer, size=size)
        for layer in (names if config.all_layers else [config.layer])
    ]
    title = f"{loaded.name} on {Path(config.image).name}"
    if config.all_layers:
        draw_page(results, config.out, title=title)
    else:
        draw(results[0], config.out, title=title)
    return {"out": config.out}


def as_text(result: dict[str, Any]) -> str:
    """Return the names of the layers, or that of the file."""
    return "\n".join(result["layers"]) if "layers" in result else str(result["out"])
