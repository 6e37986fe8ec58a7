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
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gspn_core
from gspn_core import SpatialPropagation, propagate

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
    start = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024


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
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    before = load_before(args.before)
    if args.memory:
        name, which = args.memory
        print(memory_of(name, before if which == "before" else None))
        return
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
