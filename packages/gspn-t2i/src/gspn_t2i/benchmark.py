"""`benchmark`: a UNet with softmax attention, GSPN-1 and GSPN-2, one step and a whole image, run where it fits.

Weights are random and the architectures the true ones, so that nothing is downloaded. Counts (floating-point
operations, and the memory that weights and activations need) come from a run on the meta device at every size; times
and peaks from the device, up to `measure_up_to` pixels. A whole image is `steps` steps for a prompt and without, and
what the autoencoder makes of the result, in tiles from the size on from which `generate` uses them.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from tqdm import tqdm

from gspn_core import info

from . import architectures
from .adapter import GSPNAdapter
from .counting import Counts, count
from .files import replacing, write_text
from .generate import DTYPES, TILED_FROM

MIXERS = ("softmax", "gspn", "gspn2")


@dataclasses.dataclass(kw_only=True, frozen=True)
class BenchmarkConfig:
    """Every option of `gspn-t2i benchmark`.

    Args:
        family: sd15 or sdxl, of the true size
        sizes: heights and widths in pixels, as 1024x1024
        mixers: of softmax, gspn and gspn2
        chunk_size: lines per independent chunk of the mixers; 0 scans the whole image
        batch: images; 2 is what guidance needs
        dtype: of weights and activations
        measure_up_to: pixels of the largest size that is run; larger ones are counted only
        steps: of the sampler for a whole image
        generation: run whole images too
        repeats: timed steps, of which the median is shown, after one that is not timed
        device: auto takes the accelerator if any
        json: file for the results
        plot: PNG for a plot of them
        progress: show a progress bar
    """

    family: Literal["sd15", "sdxl"] = "sdxl"
    sizes: tuple[str, ...] = ("512x512", "1024x1024", "2048x2048", "4096x4096", "8192x8192", "16384x8192")
    mixers: tuple[Literal["softmax", "gspn", "gspn2"], ...] = ("softmax", "gspn", "gspn2")
    chunk_size: NonNegativeInt = 4
    batch: PositiveInt = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    measure_up_to: NonNegativeInt = 1024 * 1024
    steps: PositiveInt = 30
    generation: bool = False
    repeats: PositiveInt = 5
    device: Literal["auto", "cpu"] = "auto"
    json: str | None = None
    plot: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for size in self.sizes:
            parse_size(size)
        if not self.sizes or not self.mixers:
            raise ValueError("sizes and mixers must not be empty")


def parse_size(text: str) -> tuple[int, int]:
    """Read "1024x576" as height and width.

    Raises:
        ValueError: it is of another form, or not in multiples of 8.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"sizes must be HEIGHTxWIDTH in pixels, such as 1024x576, got {text!r}")
    height, width = map(int, parts)
    if height % 8 or width % 8:
        raise ValueError(f"sizes must be multiples of 8, got {text!r}")
    return height, width


@dataclasses.dataclass(frozen=True)
class Row:
    """One mixer at one size; None where it was not run or ran out of memory."""

    mixer: str
    height: int
    width: int
    flops: int
    weight_bytes: int
    activation_bytes: int
    generation_flops: int
    generation_bytes: int  # weights and activations
    seconds: float | None
    peak_bytes: int | None
    generation_seconds: float | None
    error: str | None


def _with_mixer(config: BenchmarkConfig, mixer: str, device: torch.device | str) -> nn.Module:
    unet = architectures.make_unet(config.family, device=device, dtype=DTYPES[config.dtype])
    if mixer != "softmax":
        with torch.device(device):
            # Shapes are what counts; only the start of training differs with init.
            adapter = GSPNAdapter.for_unet(unet, mixer=mixer, chunk_size=config.chunk_size or None, init="random")
        adapter.requires_grad_(False)
        adapter.mount(unet)
    return unet


def _counted(config: BenchmarkConfig, mixer: str, size: tuple[int, int]) -> Counts:
    unet: Any = _with_mixer(config, mixer, "meta")
    inputs = architectures.make_inputs(unet, *size, batch=config.batch)
    return count(unet, lambda: unet(**inputs))


def _decoded(config: BenchmarkConfig, size: tuple[int, int]) -> Counts:
    """Count the autoencoder's decoding, of tiles one after the other for a large image."""
    vae: Any = architectures.make_vae(config.family, device="meta", dtype=DTYPES[config.dtype])
    height, width = size[0] // 8, size[1] // 8
    if size[0] * size[1] < TILED_FROM:
        latents = torch.empty(config.batch, 4, height, width, device="meta", dtype=DTYPES[config.dtype])
        return count(vae, lambda: vae.decode(latents))
    side = vae.tile_latent_min_size
    stride = int(side * (1 - vae.tile_overlap_factor))
    tiles = -(-height // stride) * -(-width // stride)
    tile = count(vae, lambda: vae.decode(torch.empty(config.batch, 4, side, side, device="meta", dtype=vae.dtype)))
    # Tiles are kept until they are put together.
    image = 2 * config.batch * 3 * size[0] * size[1] * vae.dtype.itemsize
    return Counts(tiles * tile.flops, tile.weight_bytes, tile.activation_bytes + image)


def _generate(config: BenchmarkConfig, unet: Any, size: tuple[int, int], device: torch.device) -> None:
    """Draw an image of random weights, as a pipeline does."""
    vae = architectures.make_vae(config.family, device=device, dtype=DTYPES[config.dtype])
    pipeline = architectures.make_pipeline(unet, vae)
    pipeline.set_progress_bar_config(disable=True)
    if size[0] * size[1] >= TILED_FROM:
        vae.enable_tiling()
    given = architectures.make_inputs(unet, *size, batch=config.batch)
    embeddings = {"prompt_embeds": given["encoder_hidden_states"]}
    if "added_cond_kwargs" in given:
        embeddings["pooled_prompt_embeds"] = given["added_cond_kwargs"]["text_embeds"]
    pipeline(
        **embeddings,
        **{f"negative_{name}": value for name, value in embeddings.items()},
        height=size[0],
        width=size[1],
        num_inference_steps=config.steps,
        output_type="pt",
    )


def _timed(call: Callable[[], Tensor], device: torch.device, repeats: int) -> tuple[float, int | None]:
    """Return the median of the seconds of a call, and the peak of the device's memory."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(repeats + 1):
        wait()
        start = time.perf_counter()
        out = call()
        wait()
        if number:
            seconds.append(time.perf_counter() - start)
    if not out.isfinite().all():
        raise ArithmeticError("the UNet's result is not finite")
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return statistics.median(seconds), peak


@torch.inference_mode()
def measure(config: BenchmarkConfig) -> list[Row]:
    """Count every mixer at every size, and run those that `measure_up_to` allows."""
    device = torch.device("cpu")
    if config.device == "auto" and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or device
    rows = []
    sizes = [parse_size(size) for size in config.sizes]
    show = config.progress and sys.stderr.isatty()
    with tqdm(total=len(sizes) * len(config.mixers), unit="case", disable=not show) as bar:
        for mixer in config.mixers:
            runs = any(height * width <= config.measure_up_to for height, width in sizes)
            unet = _with_mixer(config, mixer, device) if runs else None
            for size in sizes:
                bar.set_postfix_str(f"{mixer} {size[0]}x{size[1]}")
                rows.append(_row(config, mixer, size, unet, device))
                bar.update()
            del unet
            gc.collect()
    return rows


def _row(config: BenchmarkConfig, mixer: str, size: tuple[int, int], unet: Any, device: torch.device) -> Row:
    step, decoded = _counted(config, mixer, size), _decoded(config, size)
    seconds, peak, generation, error = None, None, None, None
    if size[0] * size[1] <= config.measure_up_to:
        inputs = architectures.make_inputs(unet, *size, batch=config.batch)
        try:
            seconds, peak = _timed(lambda: unet(**inputs).sample, device, config.repeats)
            if config.generation:
                started = time.perf_counter()
                _generate(config, unet, size, device)
                generation = time.perf_counter() - started
        except (torch.OutOfMemoryError, MemoryError) as reason:
            error = f"out of memory: {str(reason).splitlines()[0]}"
    weights = step.weight_bytes + decoded.weight_bytes
    return Row(
        mixer,
        *size,
        **dataclasses.asdict(step),
        # Guidance asks for the prompt and without it: twice the batch, to which all but the weights is proportional.
        generation_flops=2 * config.steps * step.flops + decoded.flops,
        generation_bytes=weights + max(2 * step.activation_bytes, decoded.activation_bytes),
        seconds=seconds,
        peak_bytes=peak,
        generation_seconds=generation,
        error=error,
    )


def table(rows: Sequence[Row]) -> str:
    """Lay results out as text; the ratio is of softmax attention's operations, and its time where both ran."""
    lines = [
        f"{'mixer':8} {'height x width':>15} {'TFLOP':>11} {'vs softmax':>10} {'weights':>9} {'activations':>12} "
        f"{'needed':>10} {'seconds':>9} {'vs softmax':>10}"
    ]
    softmax = {(row.height, row.width): row for row in rows if row.mixer == "softmax"}
    for row in rows:
        other = softmax.get((row.height, row.width))
        fewer = f"{other.flops / row.flops:.2f}x" if other else "-"
        faster = f"{other.seconds / row.seconds:.2f}x" if other and other.seconds and row.seconds else "-"
        seconds = f"{row.seconds:.3g}" if row.seconds else ("no memory" if row.error else "not run")
        weights, activations = row.weight_bytes / 2**30, row.activation_bytes / 2**30
        lines.append(
            f"{row.mixer:8} {row.height:>6} x {row.width:<6} {row.flops / 1e12:11.2f} {fewer:>10} {weights:5.2f} GiB "
            f"{activations:8.2f} GiB {weights + activations:6.2f} GiB {seconds:>9} {faster:>10}"
        )
    return "\n".join(lines)


def whole_table(rows: Sequence[Row]) -> str:
    """Lay out what a whole image takes as text."""
    lines = [f"{'mixer':8} {'height x width':>15} {'TFLOP':>12} {'vs softmax':>10} {'needed':>10} {'seconds':>9}"]
    softmax = {(row.height, row.width): row for row in rows if row.mixer == "softmax"}
    for row in rows:
        other = softmax.get((row.height, row.width))
        fewer = f"{other.generation_flops / row.generation_flops:.2f}x" if other else "-"
        seconds = f"{row.generation_seconds:.3g}" if row.generation_seconds else "not run"
        lines.append(
            f"{row.mixer:8} {row.height:>6} x {row.width:<6} {row.generation_flops / 1e12:12.2f} {fewer:>10} "
            f"{row.generation_bytes / 2**30:6.2f} GiB {seconds:>9}"
        )
    return "\n".join(lines)


def report(config: BenchmarkConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Return results with the options, the device, versions and date."""
    device = "cpu"
    if config.device == "auto" and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "gspn-core": info()["gspn_core"]},
        "config": dataclasses.asdict(config),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw operations and memory over pixels, both logarithmic, one line per mixer; times where there are some."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels: list[tuple[str, Callable[[Row], float | None]]] = [
        ("floating-point operations (T)", lambda row: row.flops / 1e12),
        ("memory of weights and activations (GiB)", lambda row: (row.weight_bytes + row.activation_bytes) / 2**30),
        ("seconds, measured", lambda row: row.seconds),
    ]
    panels = [panel for panel in panels if any(panel[1](row) for row in rows)]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (title, value) in zip(axes[0], panels, strict=True):
        for mixer in dict.fromkeys(row.mixer for row in rows):
            points = [(row.height * row.width / 1e6, value(row)) for row in rows if row.mixer == mixer and value(row)]
            if points:
                axis.loglog(*zip(*sorted(points), strict=True), marker="o", label=mixer)
        axis.set_xlabel("megapixels")
        axis.set_title(title)
        axis.grid(True, which="both", alpha=0.2)
    axes[0][0].legend()
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def benchmark(config: BenchmarkConfig) -> list[Row]:
    """Measure and count as configured, print the table, and write the files asked for."""
    rows = measure(config)
    print(f"one step of {config.family}'s UNet, {config.dtype}, batch {config.batch}")
    print(table(rows))
    print(f"a whole image in {config.steps} steps with guidance, decoded")
    print(whole_table(rows))
    if config.json:
        write_text(Path(config.json), json.dumps(report(config, rows), indent=1))
    if config.plot:
        plot(rows, Path(config.plot))
    return rows
