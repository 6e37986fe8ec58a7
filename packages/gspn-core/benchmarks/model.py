"""Predict what the CUDA kernels take on an H100 or H200, and what binds them, from their machine code alone.

    python benchmarks/model.py --budget .nox/cuda-build/budget.json
    python benchmarks/model.py --device h200 --json predictions.json

`nox -s cuda` writes budget.json. A launch takes as long as the resource that it needs longest: resources are assumed to
be used side by side. A shape whose kernel is not in budget.json is shown as missing. A kernel whose accesses were not
recorded is taken to use whole sectors and no bank twice. Pure standard library.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch_plan import BACKWARD, BYTES, FORWARD, INTERVAL, SMS, Launch, Shape, launches, small_launches

# Measured by us on an H200, see results; the rest is assumed: data sheets, and what others have published for Hopper.
CLOCK = 1.88e9  # Hz, under load
# From one instruction of a warp to its next, in kernels whose lines follow from one another: 6.1 to 7.4. A model that
# took it for 1, with 55 clocks more for each line, predicted a fourth of the time of a few scans.
INSTRUCTION_CLOCKS = 6.5
ROW_SHARE = 0.28  # of a copy's bandwidth, where each row of an image is read 32 bytes at a time
SCHEDULERS = 4  # of a multiprocessor, of which each issues one instruction of a warp per clock
ISSUE_SHARE = 0.8  # of the issue slots that warps fill where enough of them are ready
ALU_CLOCKS = 2  # per integer or comparison instruction of a warp: 16 lanes
BARRIER_CLOCKS, CLUSTER_CLOCKS = 40, 250  # a barrier of a block, of a cluster
L2_RATE, L2_BYTES = 5.5e12, 50e6  # bytes/s; capacity in bytes
SHARED_BYTES_PER_CLOCK = 128  # of each multiprocessor: one wavefront
MEMORY_LATENCY, L2_LATENCY = 0.8e-6, 0.3e-6  # s, under load
LAUNCH = 1.5e-6  # s, from one kernel of a stream to the next, in a CUDA graph
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 233472, 64, 32  # of a multiprocessor
COPY_RATE = {"h100": 3.0e12, "h200": 4.3e12}  # bytes/s, read and written, of a large copy

MANGLED = {"f": "float32", "NS0_8BFloat16E": "bfloat16", "NS0_4HalfE": "float16"}
KERNEL = re.compile(r"\d([a-z_]+)INS0_6ConfigI(f|NS0_\d[A-Za-z0-9]*?E)((?:Li\d+E){4})E+((?:Lb[01]E)*)")


def read_budget(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[object, ...], Mapping[str, Any]]:
    """Return the rows of budget.json by kernel: function, dtype, cover and flags, which the mangled name holds."""
    found = {}
    for row in rows:
        if "lanes" not in row:
            raise ValueError("the budget must have been written by this version's tools/cuda_budget.py, got no 'lanes'")
        match = KERNEL.search(row["kernel"])
        if match and match[2] in MANGLED:
            cover = tuple(int(number) for number in re.findall(r"Li(\d+)E", match[3]))
            found[match[1], MANGLED[match[2]], cover, tuple(b == "1" for b in re.findall(r"Lb(.)E", match[4]))] = row
    return found


# ---- times


def traffic(shape: Shape, which: str, launch: Launch) -> tuple[float, float, float]:
    """Return the bytes of a launch: of DRAM, of L2, and of shared memory, per (n, c, pixel)."""
    bytes_, count, c = BYTES[shape.dtype], len(shape.directions), shape.size[3]
    backward, gates = which == BACKWARD, bool(shape.lam) + bool(shape.u)
    floor = shape.floor_bytes(which) / math.prod(shape.size)
    inputs = (3 + gates) * bytes_
    if launch.directions == count > 1:
        if launch.function == "shared_forward":  # points of 16 bytes for a block's channels; x and the sums in place
            return floor, 2 * bytes_ + 16 * count / (launch.warps // 2 * launch.cover[3]), count * (bytes_ + 8)
        if launch.function == "fused_forward":
            return floor, count * (inputs + bytes_) + bytes_, count * (2 * (inputs + bytes_) + 8)
        return floor, (2 + count * gates) * bytes_ + 3 * count * bytes_ / launch.cover[2], count * (2 * inputs + 8)
    images = 2 if backward else 1  # read again for every direction; sums of 4 bytes are written and read
    again = (count - 1) * (images * bytes_ + 8)
    partials = 8 * (3 * (shape.groups < c) + (0 < shape.lam < c) + (0 < shape.u < c)) if backward else 0
    kept = math.prod(shape.size) * (images * bytes_ + 4) < L2_BYTES / 2
    ours = floor / count + (0 if kept else again / count) + partials
    # Shared weights and gates are read for every channel, from L2; each output of a channel is written once.
    total = (2 if backward else 1) * inputs + (images + 1) * bytes_ + again / count + partials
    staged = launch.function.startswith("row") or launch.function == "column_backward"
    return ours, total, 2 * (inputs + images * bytes_) if staged else 0


def lines_ahead(launch: Launch, bytes_: int) -> int:
    """Return how many lines are loaded at once, while those before them are computed."""
    if "backward" in launch.function:
        return INTERVAL
    if launch.function == "shared_forward":
        return 3 if launch.cover[0] <= 5 else 2
    stages = {"row_forward": 32 // bytes_, "fused_forward": 32 // bytes_}
    return stages.get(launch.function, launch.cover[1])


def resources(shape: Shape, which: str, launch: Launch, row: Mapping[str, Any], copy_rate: float) -> dict[str, float]:
    """Return the seconds that a launch needs of each resource."""
    pixels, bytes_ = math.prod(shape.size), BYTES[shape.dtype]
    dram, l2, shared = (pixels * planes for planes in traffic(shape, which, launch))
    per_line = row["instructions_per_32"] * row["lanes"] * launch.cover[0]  # of a warp
    warp = per_line * launch.lines
    busiest = math.ceil(math.ceil(launch.blocks / SMS) * launch.warps / SCHEDULERS)  # warps of a scheduler, in all
    at_once = min(REGISTERS // (row["registers"] * 32 * launch.warps), SHARED // (launch.shared + 1024))
    at_once = max(1, min(at_once, WARPS // launch.warps, BLOCKS))  # blocks of a multiprocessor
    waves = math.ceil(launch.blocks / (SMS * at_once))
    barrier = 0 if launch.strips == 1 else CLUSTER_CLOCKS if launch.cluster > 1 else BARRIER_CLOCKS
    line = per_line * INSTRUCTION_CLOCKS + barrier / launch.cover[1]
    latency = L2_LATENCY if launch.function == "shared_forward" else MEMORY_LATENCY
    return {
        "DRAM": dram / (copy_rate * (ROW_SHARE if launch.function.startswith("row") else 1)),
        "L2": l2 * (1 if launch.function == "shared_forward" else row["l2_ratio"] or 1) / L2_RATE,
        "issue slots": busiest * warp / ISSUE_SHARE / CLOCK,
        "ALU": busiest * warp * row["alu_per_32"] / row["instructions_per_32"] * ALU_CLOCKS / CLOCK,
        "shared memory": shared * (row["wavefront_ratio"] or 1) / (SHARED_BYTES_PER_CLOCK * SMS * CLOCK),
        "latency of lines": waves * launch.lines * line / CLOCK,
        "latency of memory": waves * math.ceil(launch.lines / lines_ahead(launch, bytes_)) * latency,
    }


def predict(shape: Shape, which: str, copy_rate: float, budget: Mapping[tuple[object, ...], Any]) -> dict[str, Any]:
    """Return kernels, floor and predicted time in us, their ratio, and what binds; None where a kernel is missing."""
    kernels, bound, floor = launches(shape, which), dict[str, float](), shape.floor_bytes(which) / copy_rate
    names = ", ".join(dict.fromkeys(f"{k.function}{list(k.cover)}" for k in kernels))
    result: dict[str, Any] = {"kernel": names, "floor_us": floor * 1e6}
    missing = [k for k in kernels if k.key(shape.dtype) not in budget]
    if missing:
        return result | {"predicted_us": None, "ratio": None, "bound_by": "missing in budget.json"}
    for launch in kernels:
        needed = resources(shape, which, launch, budget[launch.key(shape.dtype)], copy_rate)
        name = max(needed, key=needed.__getitem__)
        bound[name] = bound.get(name, 0.0) + needed[name]
    bound["launches"] = LAUNCH * sum(1 + small_launches(shape, launch) for launch in kernels)
    seconds = sum(bound.values())
    by = max(bound, key=bound.__getitem__)
    return result | {"predicted_us": seconds * 1e6, "ratio": seconds / floor, "bound_by": by}


# ---- the table

SIZES = ((56, 56, 128, 2), (28, 28, 128, 16), (14, 14, 128, 64), (7, 7, 128, 64), (74, 74, 32, 64), (147, 147, 32, 64))
SIZES += ((16, 16, 32, 1200), (16, 16, 256, 1200), (1024, 512, 2, 160), (2048, 1024, 2, 160), (1024, 1024, 16, 8))


def shapes() -> list[Shape]:
    """Return the shapes of the targets, then those of the design study."""
    one = {"logits": False, "groups": 8, "lam": 8, "u": 0, "dtype": "float32"}
    ways, known = {"down": "top_to_bottom", "right": "left_to_right"}, {"74x74 N32 C64 bf16 G=C'=1": "B: "}
    known["16x16 N32 C1200 bf16 G=C'=C"] = "C: "
    found = [Shape(name=f"A {k}", size=(1024, 1024, 16, 8), directions=(d,), **one) for k, d in ways.items()]
    found.append(replace(found[0], name="A down, from logits", logits=True))
    few = {"size": (1024, 1024, 1, 2), "groups": 1, "lam": 1, "u": 1}
    for dtype, label in (("float32", "f32"), ("bfloat16", "bf16")):
        found += [Shape(name=f"N1 C2 {label} {k}", directions=(d,), dtype=dtype, **few) for k, d in ways.items()]
    for dtype, label in (("bfloat16", "bf16"), ("float32", "f32")):
        for size in SIZES:
            h, w, n, c = size
            kinds = {"G=C'=1": (1, 1), "G=C'=C": (c, c)} | (
                {"G=1 C'=C": (1, c)} if size in SIZES[4:6] + SIZES[10:] else {}
            )
            for kind, (groups, gates) in kinds.items():
                name = f"{h}x{w} N{n} C{c} {label} {kind}"
                about = {"groups": groups, "lam": gates, "u": gates, "dtype": dtype}
                found.append(Shape(name=known.get(name, "") + name, size=size, **about))
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay predictions out."""
    lines = [("device", "shape", "pass", "kernel", "floor", "predicted", "ratio", "bound by")]
    for row in rows:
        numbers = ("" if row[k] is None else f"{row[k]:.3g}" for k in ("floor_us", "predicted_us", "ratio"))
        lines.append((row["device"], row["shape"], row["pass"], row["kernel"], *numbers, row["bound_by"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{t:<{w}}" for t, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the predictions."""
    root = Path(__file__).resolve().parents[3]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, root / ".nox" / "cuda-build" / "budget.json"
    add(
        "--budget",
        type=Path,
        default=default,
        metavar="FILE",
        help="what nox -s cuda has written (default %(default)s)",
    )
    add("--device", choices=COPY_RATE, help="one of them (default both)")
    add("--json", type=Path, metavar="FILE", help="write the predictions there too")
    args = parser.parse_args(argv)
    try:
        budget = read_budget(json.loads(args.budget.read_text()))
    except (OSError, ValueError) as error:
        print(f"model.py: error: no budget in {args.budget}: {error}", file=sys.stderr)
        return 2
    rows = [
        {"device": device, "shape": shape.name, "pass": which, **predict(shape, which, COPY_RATE[device], budget)}
        for device in ([args.device] if args.device else COPY_RATE)
        for shape in shapes()
        for which in (FORWARD, BACKWARD)
    ]
    print("Times in us, where a copy moves 3.0 TB/s on an H100, 4.3 on an H200; model.py says what else is assumed.")
    print(table(rows))
    if args.json:
        assumed = {k: v for k, v in globals().items() if k.isupper() and isinstance(v, (int, float))}
        record = {"assumed": assumed | {"COPY_RATE": COPY_RATE}, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
