"""Check what the compiled CUDA kernels cost, by their machine code: no GPU is needed.

    python tools/cuda_budget.py BUILD_FOLDER --nvdisasm NVDISASM

reads the objects and the log of a build with `-Xptxas -v` and `--no-compress`, finds each kernel's loop over tiles, and
counts what a warp executes for a full tile, per 32 elements of an image and direction. BUILD_FOLDER/traffic.json, which
packages/gspn-core/tests/emulation/traffic.cpp prints, adds how kernels use sectors and banks. It prints a table, and
fails where a kernel is above its limit. BUILD_FOLDER/budget.json has the rows of the table, and of the other kernels of
scans, which packages/gspn-core/benchmarks/model.py needs.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import check_spills
from cuda_sass import Graph, Kernel, Loop, Work, code_bytes, cost_of_turn, disassemble, graph_of, loops_of


@dataclass(frozen=True)
class Case:
    """A kernel as a shape uses it, and what it may cost at most.

    Args:
        case: name.
        kernel: function, storage type, template arguments P, K, CW, SEG, and further ones: of a strip kernel whether it
            scans horizontally; of a column or row kernel whether it normalises logits, of a row kernel also whether it
            scans from right to left.
        lanes: share of the lanes that have a position of the line.
        instructions, local, loop_bytes: limits, per 32 elements or in all.
        sectors, wavefronts: limits of the ratios in traffic.json; None where the accesses are not recorded.
    """

    case: str
    kernel: tuple[str, str, tuple[int, int, int, int], tuple[bool, ...]]
    instructions: float
    local: int
    loop_bytes: int
    lanes: float = 1.0
    sectors: float | None = None
    wavefronts: float | None = None


LONG, NARROW, LANES = (4, 4, 1, 1), (2, 4, 1, 1), (8, 1, 1, 1)
# The limits are what the kernels take with nvcc 13.0 for sm_90, and a twentieth more.
CASES = (
    Case("A down", ("column_forward", "float", LONG, (False,)), 26, 0, 28_300, sectors=1.1),
    Case("A right", ("row_forward", "float", LONG, (False, False)), 36, 0, 43_600, sectors=1.1, wavefronts=1),
    Case("A left", ("row_forward", "float", LONG, (False, True)), 36, 0, 43_600, sectors=1.1, wavefronts=1),
    Case("A right, any strides", ("strip_forward", "float", LONG, (True,)), 276, 0, 64_800),
    Case("A down, narrow", ("column_forward", "float", NARROW, (False,)), 44, 0, 18_200, sectors=1.2),
    Case("N1 C2 bf16 down", ("column_forward", "bf16", NARROW, (True,)), 92, 0, 27_000),
    Case("A from logits", ("column_forward", "float", LONG, (True,)), 91, 0, 52_400, sectors=1.1),
    Case(
        "A right from logits", ("row_forward", "float", LONG, (True, False)), 101, 0, 70_300, sectors=1.1, wavefronts=1
    ),
    # Strips of a block read each other's edges, which the first-level cache has.
    Case("propagate bf16 strip", ("column_forward", "bf16", LONG, (True,)), 69, 0, 45_000, sectors=1.2),
    Case(
        "propagate bf16 strip right",
        ("row_forward", "bf16", LONG, (True, False)),
        80,
        0,
        81_000,
        sectors=1.1,
        wavefronts=1,
    ),
    # Sectors without what the first-level cache saves: the three warps of a direction read the same weights.
    Case("B", ("shared_forward", "bf16", (5, 1, 1, 2), ()), 24, 0, 30_000, 74 / 80, sectors=3.3, wavefronts=1.35),
    Case("B, gates of every channel", ("resident_forward", "bf16", (4, 4, 4, 1), ()), 245, 0, 28_600, 74 / 128),
    # x is read for every direction.
    Case("C", ("fused_forward", "bf16", (4, 4, 1, 8), ()), 46, 0, 68_000, sectors=1.15, wavefronts=1),
    Case("C, weights of two channels", ("resident_forward", "bf16", (1, 8, 1, 2), ()), 267, 0, 28_900),
    Case("channels last", ("lane_forward", "bf16", LANES, (True, False, False)), 135, 0, 19_900),
    Case("channels last right", ("lane_forward", "bf16", LANES, (True, True, False)), 135, 0, 19_900),
    Case("channels last, shared weights", ("lane_forward", "bf16", LANES, (True, False, True)), 101, 0, 15_500),
    Case("channels last backward", ("lane_backward", "bf16", LANES, (True, False, False)), 260, 0, 29_900),
    Case(
        "channels last backward, shared weights", ("lane_backward", "bf16", LANES, (True, False, True)), 355, 0, 43_000
    ),
    Case("A backward", ("column_backward", "float", LONG, (False,)), 92, 0, 18_000, sectors=1.1, wavefronts=1),
    Case("A backward right", ("row_backward", "float", LONG, (False, False)), 90, 0, 60_000, sectors=1.1, wavefronts=1),
    Case(
        "A backward, narrow",
        ("column_backward", "float", NARROW, (False,)),
        139,
        0,
        13_500,
        sectors=1.25,
        wavefronts=1.05,
    ),
    Case("A backward from logits, narrow", ("column_backward", "float", NARROW, (True,)), 254, 0, 31_800),
    Case("A backward from logits", ("column_backward", "float", LONG, (True,)), 200, 0, 53_000),
    Case("A backward right from logits", ("row_backward", "float", LONG, (True, False)), 181, 0, 104_900),
    # And strips begin within a sector.
    Case("bf16 backward", ("column_backward", "bf16", LONG, (True,)), 150, 0, 36_000, sectors=1.35, wavefronts=1),
    # Half units are read and written.
    Case(
        "bf16 backward right",
        ("row_backward", "bf16", LONG, (True, False)),
        135,
        0,
        78_000,
        sectors=1.1,
        wavefronts=1.6,
    ),
    Case("A backward, any strides", ("strip_backward", "float", LONG, (False,)), 610, 0, 151_000),
    Case("A backward right, any strides", ("strip_backward", "float", LONG, (True,)), 623, 0, 154_100),
)
TYPES = {"float": ("float32", "f"), "bf16": ("bfloat16", "NS0_8BFloat16E")}


SCAN = re.compile(r"\d([a-z]+_(?:for|back)ward)INS0_6ConfigI(f|NS0_8BFloat16E)((?:Li\d+E){4})E+((?:Lb[01]E)*)")


@dataclass(frozen=True)
class Row:
    """What a case costs."""

    case: str
    kernel: str
    instructions_per_32: float
    alu_per_32: float
    local_accesses: int
    load_bytes: float
    registers: int
    spills: int
    loop_bytes: int
    l2_ratio: float | None
    wavefront_ratio: float | None
    lanes: float  # the case's, by which a model converts the figures to other shapes


def pattern_of(case: Case) -> str:
    """Return a regular expression for the mangled name of a case's kernel."""
    function, kind, cover, flags = case.kernel
    numbers = "".join(f"Li{number}E" for number in cover)
    return rf"\d{function}INS0_6ConfigI{TYPES[kind][1]}{numbers}EE{''.join(f'Lb{int(flag)}E' for flag in flags)}E"


def others(kernels: Iterable[str], known: Iterable[str]) -> dict[str, Case]:
    """Return, by name, cases without limits for the kernels of scans that no case is about."""
    found = {}
    for name in sorted(set(kernels) - set(known)):
        if match := SCAN.search(name):
            kind = next(kind for kind, (_, mangled) in TYPES.items() if mangled == match[2])
            p, k, cw, segments = (int(number) for number in re.findall(r"Li(\d+)E", match[3]))
            kernel = (
                match[1],
                kind,
                (p, k, cw, segments),
                tuple(flag == "1" for flag in re.findall(r"Lb(.)E", match[4])),
            )
            found[name] = Case(f"other: {match[0][1:]}", kernel, math.inf, sys.maxsize, sys.maxsize)
    return found


def tile_loops(graph: Graph, loops: list[Loop]) -> list[Loop]:
    """Return the innermost loops that read global memory and exchange states, by shuffles or barriers: over tiles."""

    def has(loop: Loop, names: tuple[str, ...]) -> bool:
        return any(instruction.name in names for block in loop.blocks for instruction in graph.code(block))

    found = [loop for loop in loops if has(loop, ("SHFL", "BAR")) and has(loop, ("LDG", "LD", "LDGSTS"))]
    return [loop for loop in found if not any(other.blocks < loop.blocks for other in found)]


def costs(case: Case, graph: Graph) -> tuple[list[Counter[str]], float]:
    """Return what a turn of each loop over tiles executes, and the instructions per 32 elements and direction.

    A kernel of several directions has a loop for each axis or direction, of which the most expensive one counts. It
    knows two ways through a tile, and takes the cheap one while all states are finite. A backward kernel takes a tile
    through two loops, which add up; the loops of other kernels are of one axis each.
    """
    function, kind, (positions, lines, *_), _ = case.kernel
    loops = loops_of(graph)
    tiles = tile_loops(graph, loops)
    if not tiles:
        raise ValueError(f"{graph.kernel.name} has no loop that reads global memory and exchanges states")
    if function == "shared_forward":  # each element takes a load of its own; a second loop takes the last few lines
        turns = [
            cost_of_turn(graph, loop, loops, Work(trips=1, widest=0, shuffles=0, exponentials=0)) for loop in tiles
        ]
        most = max(turn["loads"] for turn in turns)
        turns = [turn for turn in turns if turn["loads"] == most]
        return turns, max(turn["instructions"] / turn["loads"] for turn in turns) / case.lanes
    if function == "fused_forward":
        work = Work(trips=2, widest=0, shuffles=0, exponentials=0)  # of a stage: two units of 16 bytes of each row
        turns = [cost_of_turn(graph, loop, loops, work) for loop in tiles]
        return turns, max(turn["instructions"] / (turn["exponentials"] / 3) for turn in turns) / case.lanes
    inner = lines  # turns of the loops inside
    if function == "row_forward":  # a stage of 32 bytes of each row, in groups of four lines
        lines = {"float": 8, "bf16": 16}[kind]
        inner = lines // 4
    if function == "row_backward":  # sixteen columns, in groups of four
        lines, inner = 16, 4
    turns = [cost_of_turn(graph, loop, loops, Work(trips=inner)) for loop in tiles]
    share = positions * lines * case.lanes * (1 if "backward" in function else len(turns))
    return turns, sum(turn["instructions"] for turn in turns) / share


def measure(case: Case, kernel: Kernel, usage: check_spills.Usage, traffic: Mapping[str, float]) -> Row:
    """Count what a case's kernel executes per 32 elements and direction; add its ratios in traffic.json."""
    graph = graph_of(kernel)
    turns, instructions = costs(case, graph)
    total = sum(turns, Counter())
    return Row(
        case.case,
        kernel.name,
        round(instructions, 1),
        round(instructions * total["alu"] / total["instructions"], 1),
        max(turn["local"] for turn in turns),
        round(total["loaded"] / max(1, total["loads"]), 1),
        usage.registers,
        usage.stores,
        max(code_bytes(graph, loop) for loop in tile_loops(graph, loops_of(graph))),
        traffic.get("l2_ratio"),
        traffic.get("wavefront_ratio"),
        case.lanes,
    )


def judge(case: Case, row: Row) -> list[str]:
    """Say in which respects a kernel is above its limits."""
    figures = {
        "instructions per 32 elements": (row.instructions_per_32, case.instructions),
        "accesses to local memory in a tile": (row.local_accesses, case.local),
        "bytes of code in a loop": (row.loop_bytes, case.loop_bytes),
        "sectors per distinct sector": (row.l2_ratio, case.sectors),
        "wavefronts per wavefront needed": (row.wavefront_ratio, case.wavefronts),
    }
    return [
        f"{case.case}: {value} {name}, allowed are {limit}"
        for name, (value, limit) in figures.items()
        if limit is not None and (value is None or value > limit)
    ]


def show(rows: list[Row]) -> str:
    """Lay rows out as a table."""
    columns: tuple[str, ...] = (
        "case",
        "instructions",
        "ALU",
        "local",
        "bytes a load",
        "registers",
        "spills",
        "loop bytes",
    )
    columns += ("sectors", "wavefronts")
    lines: list[tuple[str, ...]] = [columns]
    for row in rows:
        lines.append(
            tuple("-" if v is None else str(v) for name, v in asdict(row).items() if name not in ("kernel", "lanes"))
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            f"{word:<{width}}" if n == 0 else f"{word:>{width}}"
            for n, (word, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def main(argv: list[str] | None = None) -> int:
    """Write and print the budget; return 1 where a kernel is above its limit or missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="folder of the build")
    parser.add_argument("--nvdisasm", default="nvdisasm", help="the disassembler")
    options = parser.parse_args(argv)
    log = next(options.build.glob("build.log"), None)
    file = options.build / "traffic.json"
    traffic = {entry["case"]: entry for entry in json.loads(file.read_text())} if file.exists() else {}
    reports = {usage.kernel: usage for usage in check_spills.read(log.read_text())} if log else {}
    kernels: dict[str, Kernel] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for file in sorted({TYPES[case.kernel[1]][0] for case in CASES}):
            for path in sorted(options.build.rglob(f"kernels_{file}.*")):
                kernels |= disassemble(options.nvdisasm, path, Path(scratch))
    rows, faults = [], []
    for case in CASES:
        name = next((name for name in kernels if re.search(pattern_of(case), name)), None)
        if name is None or name not in reports:
            faults.append(f"{case.case}: no kernel {case.kernel} in {options.build}")
            continue
        rows.append(measure(case, kernels[name], reports[name], traffic.get(case.case, {})))
        faults += judge(case, rows[-1])
    further = others(reports.keys() & kernels.keys(), (row.kernel for row in rows))
    written = [*rows, *(measure(case, kernels[name], reports[name], {}) for name, case in further.items())]
    (options.build / "budget.json").write_text(json.dumps([asdict(row) for row in written], indent=1) + "\n")
    print(show(rows))
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
