"""Check what the compiled CUDA kernels cost, by their machine code: no GPU is needed.

    python tools/cuda_budget.py BUILD_FOLDER --nvdisasm NVDISASM

reads the objects and the log of a build with `-Xptxas -v` and `--no-compress`, finds each kernel's loop over tiles, and
counts what a warp executes for a full tile, per 32 elements of an image and direction. It prints a table, writes it to
BUILD_FOLDER/budget.json, and fails where a kernel is above its limit.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import check_spills
from cuda_sass import Graph, Kernel, Loop, code_bytes, cost_of_turn, disassemble, graph_of, loops_of


@dataclass(frozen=True)
class Case:
    """A kernel as a shape uses it, and what it may cost at most.

    Args:
        case: name.
        kernel: function, storage type, template arguments P, K, CW, SEG, and the last one: of a strip kernel whether it
            scans horizontally, of a column kernel whether it normalises logits.
        lanes: share of the lanes that have a position of the line.
        instructions, local, loop_bytes: limits, per 32 elements or in all.
    """

    case: str
    kernel: tuple[str, str, tuple[int, int, int, int], bool | None]
    instructions: float
    local: int
    loop_bytes: int
    lanes: float = 1.0


# The limits are what the kernels take with nvcc 13.0 for sm_90, and a twentieth more.
CASES = (
    Case("A down", ("column_forward", "float", (4, 4, 1, 1), False), 23, 0, 28_300),
    Case("A right", ("strip_forward", "float", (4, 4, 1, 1), True), 288, 4, 71_300),
    Case("A from logits", ("column_forward", "float", (4, 4, 1, 1), True), 93, 8, 52_400),
    Case("propagate bf16 strip", ("column_forward", "bf16", (4, 4, 1, 1), True), 89, 22, 51_800),
    Case("propagate bf16 strip right", ("strip_forward", "bf16", (4, 4, 1, 1), True), 277, 0, 68_200),
    Case("B", ("resident_forward", "bf16", (4, 4, 4, 1), None), 218, 0, 32_300, lanes=74 / 128),
    Case("C", ("resident_forward", "bf16", (1, 8, 1, 2), None), 277, 150, 34_100),
    Case("A backward", ("strip_backward", "float", (4, 4, 1, 1), False), 648, 0, 168_000),
    Case("A backward right", ("strip_backward", "float", (4, 4, 1, 1), True), 658, 0, 172_000),
)
TYPES = {"float": ("float32", "f"), "bf16": ("bfloat16", "NS0_8BFloat16E")}


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


def pattern_of(case: Case) -> str:
    """Return a regular expression for the mangled name of a case's kernel."""
    function, kind, cover, horizontal = case.kernel
    numbers = "".join(f"Li{number}E" for number in cover)
    flag = "" if horizontal is None else f"Lb{int(horizontal)}E"
    return rf"\d{function}INS0_6ConfigI{TYPES[kind][1]}{numbers}EE{flag}E"


def tile_loops(graph: Graph, loops: list[Loop]) -> list[Loop]:
    """Return the innermost loops that both read global memory and shuffle: those over tiles."""

    def has(loop: Loop, names: tuple[str, ...]) -> bool:
        return any(instruction.name in names for block in loop.blocks for instruction in graph.code(block))

    found = [loop for loop in loops if has(loop, ("SHFL",)) and has(loop, ("LDG", "LD", "LDGSTS"))]
    return [loop for loop in found if not any(other.blocks < loop.blocks for other in found)]


def measure(case: Case, kernel: Kernel, usage: check_spills.Usage) -> Row:
    """Count what a case's kernel executes per 32 elements and direction.

    A backward kernel takes a tile through two loops, which add up; the loops of a forward kernel are of one axis each.
    """
    graph = graph_of(kernel)
    loops = loops_of(graph)
    tiles = tile_loops(graph, loops)
    if not tiles:
        raise ValueError(f"{kernel.name} has no loop that reads global memory and shuffles")
    positions, lines = case.kernel[2][:2]
    turns = [cost_of_turn(graph, loop, loops, lines) for loop in tiles]
    total = sum(turns, Counter())
    share = positions * lines * case.lanes * (1 if "backward" in case.kernel[0] else len(turns))
    return Row(
        case.case,
        kernel.name,
        round(total["instructions"] / share, 1),
        round(total["alu"] / share, 1),
        max(turn["local"] for turn in turns),
        round(total["loaded"] / max(1, total["loads"]), 1),
        usage.registers,
        usage.stores,
        max(code_bytes(graph, loop) for loop in tiles),
    )


def judge(case: Case, row: Row) -> list[str]:
    """Say in which respects a kernel is above its limits."""
    figures = {
        "instructions per 32 elements": (row.instructions_per_32, case.instructions),
        "accesses to local memory in a tile": (row.local_accesses, case.local),
        "bytes of code in a loop": (row.loop_bytes, case.loop_bytes),
    }
    return [
        f"{case.case}: {value} {name}, allowed are {limit}" for name, (value, limit) in figures.items() if value > limit
    ]


def show(rows: list[Row]) -> str:
    """Lay rows out as a table."""
    columns = ("case", "instructions", "ALU", "local", "bytes a load", "registers", "spills", "loop bytes")
    lines = [columns] + [tuple(str(value) for name, value in asdict(row).items() if name != "kernel") for row in rows]
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
        rows.append(measure(case, kernels[name], reports[name]))
        faults += judge(case, rows[-1])
    (options.build / "budget.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(show(rows))
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
