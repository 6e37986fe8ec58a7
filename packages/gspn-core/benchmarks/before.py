#!/usr/bin/env python3
"""Compare this checkout with an older one on the CPU: both in one process, in turns, medians.

    python benchmarks/before.py --before OLD/site-packages/gspn_core --out benchmarks/results/low-rank-CPU.json

OLD is an environment where the older commit was installed (not editable). Its package is copied under another name with
operators of another namespace, so that both are at hand; a model of before is the model of today whose
`SpatialPropagation` writes its gates' planes with a convolution and calls the old operator. Needs gspn-vision and
gspn-dit.

Memory is the peak of the resident set of a process of its own, over what it was before the first training step, with
glibc set to give back what is freed, which is not counted then.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gspn_core
from gspn_core import DIRECTIONS, SpatialPropagation, propagate
from gspn_core.bench.cpu_cases import scan_inputs

SHAPES = [(8, 576, 14, 14), (8, 1152, 7, 7), (1, 576, 14, 14), (1, 1152, 7, 7), (8, 288, 28, 28), (2, 144, 56, 56)]
PEERS = ["gspn2_tiny", "convnext_tiny", "swin_tiny_patch4_window7_224", "deit_small_patch16_224"]
OLD = "gspn_core_before"


def load_before(package: Path) -> Any:
    """Import an installed gspn_core under another name, its operators in another namespace."""
    folder = Path(tempfile.mkdtemp()) / OLD
    shutil.copytree(package, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    for file in sorted(package.glob("*.py")):
        text = file.read_text()
        text = re.sub(r"ops\.gspn\b", f"ops.{OLD}", text).replace('Library("gspn"', f'Library("{OLD}"')
        text = re.sub(r"\bgspn::", f"{OLD}::", text).replace('"gspn_core._C"', f'"{OLD}._C"')
        (folder / file.name).write_text(re.sub(r"\bfrom gspn_core\b", f"from {OLD}", text))
    sys.path.insert(0, str(folder.parent))
    return importlib.import_module(OLD)


def forward_before(before: Any) -> Callable[[SpatialPropagation, Tensor], Tensor]:
    """Return SpatialPropagation.forward as it was."""
    operator = importlib.import_module(f"{OLD}._library").propagate

    def forward(self: SpatialPropagation, x: Tensor) -> Tensor:
        v, logits, lam, u = self.project(x)
        out: Tensor = self.lift(operator(v, logits, lam, u, self.directions, self.chunk_size)[0])
        return out

    return forward


def turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median milliseconds of each, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if number:  # the first round is a warm-up
                times[name].append((time.perf_counter() - began) * 1e3)
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def step(model: torch.nn.Module, *inputs: Tensor) -> Callable[[], None]:
    """Return a training step without an optimizer: forward, loss, backward."""

    def run() -> None:
        model.zero_grad()
        out = model(*inputs)
        (out if isinstance(out, Tensor) else out[0]).square().mean().backward()

    return run


def of_before(old: Any, run: Callable[[], object]) -> Callable[[], object]:
    """Run with the old forward of the module."""
    new = SpatialPropagation.forward

    def wrapped() -> object:
        SpatialPropagation.forward = old  # type: ignore[method-assign]
        try:
            return run()
        finally:
            SpatialPropagation.forward = new  # type: ignore[method-assign]

    return wrapped


def tiny() -> torch.nn.Module:
    """Return gspn_tiny."""
    import timm

    importlib.import_module("gspn_vision")
    model: torch.nn.Module = timm.create_model("gspn_tiny")
    return model


def base() -> torch.nn.Module:
    """Return GSPN-B/2."""
    from gspn_dit import PRESETS, GSPNDiTTransformer2DModel

    return GSPNDiTTransformer2DModel(**PRESETS["GSPN-B/2"])


def propagation(before: Any, rounds: int) -> list[dict[str, Any]]:
    """Time `propagate` with weights and gates of every channel, and its training step."""
    rows = []
    for shape in SHAPES:
        n, c, h, w = shape
        inputs = [torch.randn(shape), *(torch.randn(n, 4, c, *k, h, w) for k in ((3,), (), ()))]
        with torch.no_grad():
            torch.testing.assert_close(propagate(*inputs), before.propagate(*inputs), rtol=1e-4, atol=1e-4)
            row = turns({"before": lambda: before.propagate(*inputs), "now": lambda: propagate(*inputs)}, rounds)  # noqa: B023
        leaves = [t.requires_grad_() for t in inputs]

        def train(f: Any, leaves: list[Tensor] = leaves) -> Callable[[], object]:
            return lambda: torch.autograd.grad(f(*leaves).sum(), leaves)

        steps = turns({"before": train(before.propagate), "now": train(propagate)}, max(3, rounds // 2))
        rows.append({"case": "propagate", "shape": shape, "forward": row, "forward_backward": steps})
        print(shape, row, steps, file=sys.stderr)
    return rows


def bench_shapes(before: Any, rounds: int) -> list[dict[str, Any]]:
    """Time what `gspn-core bench` times beside the reference: other shapes than those of `propagation`."""
    rows: list[dict[str, Any]] = []

    def add(
        case: str, shape: tuple[int, ...], old: Callable[[], object], new: Callable[[], object], count: int
    ) -> None:
        row = turns({"before": old, "now": new}, count)
        rows.append({"case": case, "shape": shape, "ms": row, "ratio": round(row["now"] / row["before"], 3)})
        print(rows[-1], file=sys.stderr)

    for shape, groups in (((8, 64, 56, 56), 1), ((8, 64, 64, 64), 64), ((16, 8, 1024, 1024), 8)):
        x, weights = scan_inputs(shape, groups)
        count = max(5, rounds // 3) if shape[-1] == 1024 else 4 * rounds
        for direction in DIRECTIONS:
            old, new = (partial(module.line_scan, x, weights, direction=direction) for module in (before, gspn_core))
            torch.testing.assert_close(old(), new(), rtol=1e-4, atol=1e-4)
            add(f"line_scan {direction}, {groups} weight groups", shape, old, new, count)
    shape = (8, 64, 56, 56)
    n, c, h, w = shape
    for gates in (1, c):
        inputs = [torch.randn(shape), torch.randn(n, 4, 1, 3, h, w), *(torch.randn(n, 4, gates, h, w) for _ in "lu")]
        old, new = (partial(module.propagate, *inputs) for module in (before, gspn_core))
        add(f"propagate, {gates} gates", shape, old, new, 2 * rounds)
        leaves = [tensor.requires_grad_() for tensor in inputs]
        old, new = (
            partial(lambda f, own: torch.autograd.grad(f(*own).sum(), own), module.propagate, leaves)
            for module in (before, gspn_core)
        )
        add(f"propagate forward+backward, {gates} gates", shape, old, new, rounds)
    pixel = (1, 1, 1, 1)
    inputs = [torch.randn(pixel), torch.randn(1, 4, 1, 3, 1, 1), torch.randn(1, 4, 1, 1, 1), torch.randn(1, 4, 1, 1, 1)]

    def calls(f: Any, *own: Tensor) -> None:
        with torch.no_grad():
            for _ in range(500):
                f(*own)

    add("500 calls of propagate", pixel, *(partial(calls, m.propagate, *inputs) for m in (before, gspn_core)), rounds)
    x, weights = scan_inputs(pixel, 1)
    add(
        "500 calls of line_scan",
        pixel,
        *(partial(calls, partial(m.line_scan, direction=DIRECTIONS[2]), x, weights) for m in (before, gspn_core)),
        rounds,
    )
    return rows


def models(before: Any, rounds: int) -> list[dict[str, Any]]:
    """Time inference of gspn_tiny beside its peers, and its training step."""
    import timm

    model, old = tiny(), forward_before(before)
    rows = []
    for batch in (1, 8):
        x = torch.randn(batch, 3, 224, 224)
        contestants: dict[str, Callable[[], object]] = {
            "gspn_tiny before": of_before(old, lambda: model(x)),  # noqa: B023
            "gspn_tiny": lambda: model(x),  # noqa: B023
        }
        for name in PEERS:
            peer = timm.create_model(name).eval()
            contestants[name] = lambda peer=peer: peer(x)  # type: ignore[misc]  # noqa: B023
        with torch.inference_mode():
            model.eval()
            torch.testing.assert_close(contestants["gspn_tiny before"](), model(x), rtol=1e-3, atol=1e-4)
            times = turns(contestants, rounds)
        speeds = {name: round(batch / ms * 1e3, 2) for name, ms in times.items()}
        rows.append({"case": "inference", "batch": batch, "ms": times, "images_per_second": speeds})
        print(rows[-1], file=sys.stderr)
    model.train()
    run = step(model, torch.randn(4, 3, 224, 224))
    rows.append(
        {
            "case": "training step",
            "batch": 4,
            "ms": turns({"before": of_before(old, run), "now": run}, max(3, rounds // 2)),
        }
    )
    print(rows[-1], file=sys.stderr)
    return rows


# glibc gives back what is freed, so that the peak is of what is in use.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
MEMORY = {"gspn_tiny": (8, tiny), "GSPN-B/2": (4, base)}


def memory_of(name: str, before: Any) -> int:
    """Return the peak bytes of a training step of this process."""
    batch, build = MEMORY[name]
    model = build().train()
    images = torch.randn(batch, 3, 224, 224)
    inputs: tuple[Tensor, ...] = (images,)
    if name == "GSPN-B/2":
        inputs = torch.randn(batch, 4, 32, 32), torch.rand(batch), torch.zeros(batch, dtype=torch.long)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run = step(model, *inputs)
    run = run if before is None else of_before(forward_before(before), run)  # type: ignore[assignment]
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far; that of getrusage has the parent's
    start = resident("VmRSS")
    run()
    return resident("VmHWM") - start


def resident(name: str) -> int:
    """Return bytes of this process's resident set (Linux): VmRSS, or VmHWM, its peak."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024  # type: ignore[index]


def memory(package: Path) -> list[dict[str, Any]]:
    """Measure the peaks, each in a process of its own."""
    rows = []
    for name in MEMORY:
        row: dict[str, Any] = {"case": "peak memory of a training step", "model": name, "batch": MEMORY[name][0]}
        for which in ("before", "now"):
            command = [sys.executable, __file__, "--before", str(package), "--memory", name, which]
            env = os.environ | MALLOC
            row[which] = int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)
        rows.append(row)
        print(row, file=sys.stderr)
    return rows


def main() -> None:
    """Compare as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the older gspn_core, as installed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="file of the results, as JSON")
    parser.add_argument("--only-memory", action="store_true", help="peak memory, and nothing else")
    parser.add_argument("--bench", action="store_true", help="the other shapes of gspn-core bench, and nothing else")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    before = load_before(args.before)
    if args.memory:
        name, which = args.memory
        print(memory_of(name, before if which == "before" else None))
        return
    if args.bench:
        rows = bench_shapes(before, args.rounds)
    elif args.only_memory:
        rows = memory(args.before)
    else:
        rows = [*propagation(before, args.rounds), *models(before, args.rounds), *memory(args.before)]
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": args.threads,
        "isa": gspn_core.info()["cpu"]["isa"],
        "cpu": re.search(r"model name\s+: (.*)", Path("/proc/cpuinfo").read_text())[1],  # type: ignore[index]
    }
    text = json.dumps({**about, "rows": rows}, indent=1)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
