#!/usr/bin/env python3
"""Latency of attention and of C-GSPN's mixer, as a sub-layer and within a block, over the number of tokens.

    python benchmarks/latency.py --out results/latency-CPU.json --plot results/latency-CPU.png

The sub-layer is timm's `Attention` (projections and torch's scaled dot product, with heads of 64 channels) or
`CompressedPropagation` (latent of 1/18, weights shared by all channels), the block timm's `Block` with either. Batch 1,
inference. At every size all contestants take turns in one process, and medians count.

Memory is what a call of the sub-layer needs beside its input: on a GPU by torch's allocator; on a CPU the peak of the
resident set of a process of its own over that before the call, with glibc set to give back what is freed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import gspn_core
from gspn_core.runs.files import replacing, write_json
from gspn_vision.foundation import CompressedPropagation

SIDES, WIDTHS, HEAD = (16, 24, 32, 48, 64, 96, 128), (384, 1152), 64
KINDS = ("attention", "propagation")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}


class Layer(nn.Module):
    """A mixer that knows its grid, so that it is called as attention is."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.mixer, self.grid = CompressedPropagation(width, num_heads=width // HEAD), (side, side)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Mix tokens."""
        mixed: Tensor = self.mixer(x, grid=self.grid)
        return mixed


def layer(kind: str, width: int, side: int) -> nn.Module:
    """Return a sub-layer."""
    return Layer(width, side) if kind == "propagation" else Attention(width, num_heads=width // HEAD, qkv_bias=True)


def block(kind: str, width: int, side: int) -> nn.Module:
    """Return a block with a sub-layer."""
    made = Block(width, num_heads=width // HEAD, qkv_bias=True)
    made.attn = layer(kind, width, side)
    return made


def synchronize(device: torch.device) -> None:
    """Wait for the accelerator, if it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(contestants: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, float]:
    """Return the median milliseconds of each; they take turns until the time is over, and at least three times."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    began, rounds = time.perf_counter(), 0
    while rounds < 4 or (rounds < 60 and time.perf_counter() - began < seconds):
        for name, run in contestants.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if rounds:  # the first round is a warm-up
                times[name].append((time.perf_counter() - start) * 1e3)
        rounds += 1
    return {name: round(statistics.median(values), 4) for name, values in times.items()}


@torch.inference_mode()
def peak_bytes(kind: str, width: int, side: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return what a call needs beside its input; on a CPU of a process that has done nothing else."""
    layer(kind, width, 8).to(device, dtype).eval()(
        torch.zeros(1, 64, width, device=device, dtype=dtype)
    )  # libraries' own
    module = layer(kind, width, side).to(device, dtype).eval()
    x = torch.randn(1, side * side, width, device=device, dtype=dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        module(x)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    module(x)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Return bytes of this process's resident set (Linux): VmRSS, or VmHWM, its peak."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024  # type: ignore[index]


def memory(kind: str, width: int, side: int, device: torch.device, precision: str) -> int:
    """Measure `peak_bytes`, on a CPU in a process of its own."""
    if device.type == "cuda":
        return peak_bytes(kind, width, side, device, DTYPES[precision])
    words = [sys.executable, __file__, "--memory", kind, str(width), str(side), "--precision", precision]
    done = subprocess.run(words, env={**os.environ, **MALLOC}, capture_output=True, text=True, check=True)
    return int(done.stdout)


def measure(sides: Sequence[int], widths: Sequence[int], device: torch.device, precision: str, seconds: float) -> Any:
    """Yield a row for each number of tokens and width."""
    for width in widths:
        for side in sides:
            x = torch.randn(1, side * side, width, device=device, dtype=DTYPES[precision])
            contestants: dict[str, Callable[[], object]] = {}
            for part, build in (("layer", layer), ("block", block)):
                for kind in KINDS:
                    module = build(kind, width, side).to(device, x.dtype).eval()
                    contestants[f"{part} {kind}"] = lambda module=module, x=x: module(x)  # type: ignore[misc]
            with torch.inference_mode():
                times = medians(contestants, device, seconds)
            row: dict[str, Any] = {"width": width, "side": side, "tokens": side * side, "ms": times}
            row["ratio"] = {
                p: round(times[f"{p} attention"] / times[f"{p} propagation"], 3) for p in ("layer", "block")
            }
            row["bytes"] = {kind: memory(kind, width, side, device, precision) for kind in KINDS}
            print(row, file=sys.stderr)
            yield row


def crossing(rows: Sequence[dict[str, Any]], part: str) -> float | None:
    """Return the number of tokens from which propagation is faster, between sizes by powers; None if there is none."""
    for low, high in itertools.pairwise(rows):
        a, b = low["ratio"][part], high["ratio"][part]
        if a < 1 <= b:
            share = torch.tensor([1 / a]).log() / torch.tensor([b / a]).log()
            return round(low["tokens"] * (high["tokens"] / low["tokens"]) ** float(share))
    return None


def table(record: dict[str, Any]) -> str:
    """Lay the figures out as Markdown."""
    lines = [
        "| width | tokens | sub-layer: attention | ours | ratio | block: attention | ours | ratio | memory | ours |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for row in record["rows"]:
        cells = [f"{row['width']}", f"{row['side']}x{row['side']}"]
        for part in ("layer", "block"):
            cells += [f"{row['ms'][f'{part} {kind}']:.3g} ms" for kind in KINDS] + [f"{row['ratio'][part]:.3g}"]
        cells += [f"{row['bytes'][kind] / 1e6:.3g} MB" for kind in KINDS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw milliseconds over tokens, a panel for each width."""
    from matplotlib.figure import Figure

    widths = sorted({row["width"] for row in record["rows"]})
    figure = Figure(figsize=(5.2 * len(widths), 4.2), layout="constrained")
    for axis, width in zip(figure.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        rows = [row for row in record["rows"] if row["width"] == width]
        tokens = [row["tokens"] for row in rows]
        for kind, color in zip(KINDS, ("tab:red", "tab:blue"), strict=True):
            for part, style in (("layer", "-o"), ("block", "--s")):
                values = [row["ms"][f"{part} {kind}"] for row in rows]
                name = f"{kind}, {'sub-layer' if part == 'layer' else 'block'}"
                axis.plot(tokens, values, style, color=color, label=name, markersize=4)
        axis.set(xscale="log", yscale="log", title=f"{width} channels", xlabel="tokens", ylabel="milliseconds")
        axis.set_xticks(tokens, [f"{row['side']}²" for row in rows])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"One image, {record['precision']}, {record['device']}", fontsize=10)
    with replacing(path, ".png") as temporary:
        figure.savefig(temporary, dpi=130)


def device_name(device: torch.device, threads: int) -> str:
    """Name what was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", file.read_text()) if file.is_file() else None
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{found[1] if found else platform.machine()} ({capability}), {threads} threads"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="tokens of a side of the grid")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="channels, multiples of 64")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20, help="least time for each size (default: 20)")
    parser.add_argument("--memory", nargs=3, metavar=("KIND", "WIDTH", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.memory:
        kind, width, side = args.memory
        print(peak_bytes(kind, int(width), int(side), torch.device("cpu"), DTYPES[args.precision]))
        return
    rows = list(measure(sorted(args.sides), args.widths, device, args.precision, args.seconds))
    record = {
        "device": device_name(device, args.threads),
        "precision": args.precision,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "gspn_core": gspn_core.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "crossing_tokens": {
            str(width): {part: crossing([r for r in rows if r["width"] == width], part) for part in ("layer", "block")}
            for width in args.widths
        },
        "rows": rows,
    }
    if args.out:
        write_json(args.out, record)
    if args.plot:
        plot(record, args.plot)
    print(table(record))
    print(json.dumps(record["crossing_tokens"]))


if __name__ == "__main__":
    main()
