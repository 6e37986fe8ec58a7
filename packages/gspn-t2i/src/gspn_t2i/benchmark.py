"""`benchmark`: a UNet with softmax attention, GSPN-1 and GSPN-2: one step and a whole image, counted and measured.

Weights are random and the architectures the true ones, so that nothing is downloaded. Counts (floating-point
operations, and the memory of weights and activations) come from a run on the meta device at every size; times and peaks
from the device, up to `measure_up_to` pixels. A whole image takes `sampler_steps` steps with and without the prompt,
and a pass of the autoencoder's decoder, in tiles where `generate` uses them.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gspn_core import info
from gspn_core.runs.errors import is_out_of_memory
from gspn_core.runs.files import make_folder, replacing, write_json
from gspn_core.runs.options import ImageSize, to_dict

from . import architectures
from .adapter import GSPNAdapter
from .config import BenchmarkConfig
from .counting import Counts, count
from .pipelines import DTYPES, is_tiled, one_device


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
    unet = architectures.make_unet(config.family, device=device, dtype=DTYPES[config.precision])
    if mixer != "softmax":
        with torch.device(device):
            # The cost depends on shapes only, not on the initial weights.
            adapter = GSPNAdapter.for_unet(unet, mixer=mixer, chunk_size=config.chunk_size, init="random")
        adapter.requires_grad_(False)
        adapter.mount(unet, discard=True)
    return unet


def _count_step(config: BenchmarkConfig, mixer: str, size: ImageSize) -> Counts:
    unet: Any = _with_mixer(config, mixer, "meta")
    inputs = architectures.make_inputs(unet, size.height, size.width, config.batch_size)
    return count(unet, lambda: unet(**inputs))


def _count_decoding(config: BenchmarkConfig, size: ImageSize) -> Counts:
    """Count the autoencoder's decoding, of tiles one after the other for a large image."""
    vae: Any = architectures.make_vae(config.family, device="meta", dtype=DTYPES[config.precision])
    height, width = size.height // 8, size.width // 8
    if not is_tiled("auto", size):
        latents = torch.empty(config.batch_size, 4, height, width, device="meta", dtype=vae.dtype)
        return count(vae, lambda: vae.decode(latents))
    side = vae.tile_latent_min_size
    stride = int(side * (1 - vae.tile_overlap_factor))
    tiles = -(-height // stride) * -(-width // stride)
    latents = torch.empty(config.batch_size, 4, side, side, device="meta", dtype=vae.dtype)
    tile = count(vae, lambda: vae.decode(latents))
    # Tiles are kept until they are put together.
    image = 2 * config.batch_size * 3 * size.height * size.width * vae.dtype.itemsize
    return Counts(tiles * tile.flops, tile.weight_bytes, tile.activation_bytes + image)


def _generate(config: BenchmarkConfig, unet: Any, size: ImageSize, device: torch.device) -> None:
    """Draw an image with random weights, as a pipeline does."""
    vae = architectures.make_vae(config.family, device=device, dtype=DTYPES[config.precision])
    pipeline = architectures.make_pipeline(unet, vae)
    pipeline.set_progress_bar_config(disable=True)
    if is_tiled("auto", size):
        vae.enable_tiling()
    inputs = architectures.make_inputs(unet, size.height, size.width, config.batch_size)
    embeddings = {"prompt_embeds": inputs["encoder_hidden_states"]}
    if "added_cond_kwargs" in inputs:
        embeddings["pooled_prompt_embeds"] = inputs["added_cond_kwargs"]["text_embeds"]
    pipeline(
        **embeddings,
        **{f"negative_{name}": value for name, value in embeddings.items()},
        height=size.height,
        width=size.width,
        num_inference_steps=config.sampler_steps,
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
    device = one_device(config.device)
    rows = []
    hidden = not (config.progress and sys.stderr.isatty())
    with tqdm(total=len(config.image_sizes) * len(config.mixers), unit="case", disable=hidden) as bar:
        for mixer in config.mixers:
            runs = any(size.height * size.width <= config.measure_up_to for size in config.image_sizes)
            unet = _with_mixer(config, mixer, device) if runs else None
            for size in config.image_sizes:
                bar.set_postfix_str(f"{mixer} {size}")
                rows.append(_row(config, mixer, size, unet, device))
                bar.update()
            del unet
            gc.collect()
    return rows


def _row(config: BenchmarkConfig, mixer: str, size: ImageSize, unet: Any, device: torch.device) -> Row:
    step, decoding = _count_step(config, mixer, size), _count_decoding(config, size)
    seconds, peak, generation, error = None, None, None, None
    if size.height * size.width <= config.measure_up_to:
        inputs = architectures.make_inputs(unet, size.height, size.width, config.batch_size)
        try:
            seconds, peak = _timed(lambda: unet(**inputs).sample, device, config.repeats)
            if config.generation:
                started = time.perf_counter()
                _generate(config, unet, size, device)
                generation = time.perf_counter() - started
        except (RuntimeError, MemoryError) as reason:
            if not is_out_of_memory(reason):
                raise
            error = f"out of memory: {str(reason).partition(chr(10))[0]}"
    weights = step.weight_bytes + decoding.weight_bytes
    return Row(
        mixer,
        size.height,
        size.width,
        **dataclasses.asdict(step),
        # Guidance predicts with and without the prompt: twice the batch, to which all but the weights is proportional.
        generation_flops=2 * config.sampler_steps * step.flops + decoding.flops,
        generation_bytes=weights + max(2 * step.activation_bytes, decoding.activation_bytes),
        seconds=seconds,
        peak_bytes=peak,
        generation_seconds=generation,
        error=error,
    )


def step_table(rows: Sequence[Row]) -> str:
    """Lay out a step as text; ratios are softmax attention's operations and time to those of the row."""
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


def image_table(rows: Sequence[Row]) -> str:
    """Lay out a whole image as text."""
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


def as_text(result: Mapping[str, Any]) -> str:
    """Lay the result of `benchmark` out as two tables."""
    config, rows = result["config"], [Row(**row) for row in result["rows"]]
    step = f"one step of {config['family']}'s UNet, {config['precision']}, batch {config['batch_size']}"
    image = f"a whole image in {config['sampler_steps']} steps with guidance, decoded"
    return "\n".join([step, step_table(rows), image, image_table(rows)])


def report(config: BenchmarkConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the results with the options, the device, versions and date."""
    device = one_device(config.device)
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "gspn-core": info()["gspn_core"]},
        "config": to_dict(config),
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
            own = [row for row in rows if row.mixer == mixer and value(row)]
            points = [(row.height * row.width / 1e6, value(row)) for row in own]
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


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Count and measure as configured, write the files asked for, and return the results; see `report`."""
    rows = measure(config)
    results = report(config, rows)
    if config.out:
        write_json(Path(config.out), results)
    if config.plot:
        make_folder(Path(config.plot).parent)
        plot(rows, Path(config.plot))
    return results
