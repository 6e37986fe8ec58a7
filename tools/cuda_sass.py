"""Machine code of CUDA kernels: instructions, control flow, loops, and the cost of one turn of a loop.

A loop's cost is that of its cheapest path among those which load the most bytes of global memory, then store the most
by the loop's widest stores, then take the most exponentials: the path of a full tile. One that leaves something out is
that of an edge, and one that moves as many bytes with more instructions is that of an awkward layout. Narrower stores
are those of checkpoints and of the edges that strips exchange, which are not part of every tile.
"""

from __future__ import annotations

import re
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

_LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\S*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+)\)")

# Opcodes of the integer and logic unit, which takes an instruction of a warp every other cycle.
ALU = {"LOP3", "SHF", "LEA", "IADD3", "ISETP", "SEL", "PRMT", "VIADD", "IABS", "PLOP3", "P2R", "R2P", "VIMNMX"}
ALU |= {"VIADDMNMX", "FMNMX", "FSETP", "FSEL", "FCHK", "MOV", "CS2R", "I2FP", "F2FP", "IADD", "LEPC"}
_GLOBAL_LOADS, _GLOBAL_STORES = ("LDG", "LD", "LDGSTS"), ("STG", "ST")


@dataclass(frozen=True)
class Instruction:
    """One instruction; `target` is the label that a branch goes to."""

    address: int
    guard: str
    opcode: str
    operands: str
    target: str | None

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def bytes_moved(self) -> int:
        """Bytes of a lane that it moves to or from global memory; copies into shared memory count like loads."""
        if self.name not in (*_GLOBAL_LOADS, *_GLOBAL_STORES):
            return 0
        parts = self.opcode.split(".")[1:]
        return next((size for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2)) if part in parts), 4)

    @property
    def is_conditional(self) -> bool:
        """Whether a branch may fall through."""
        return bool(self.guard) or re.match(r"!?U?P\d", self.operands) is not None


@dataclass
class Kernel:
    """A function's instructions, and the place that each label stands for."""

    name: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def find_cubins(path: Path) -> Iterator[bytes]:
    """Yield the cubins in a file: the file itself, or those within an object that nvcc wrote with --no-compress."""
    content = path.read_bytes()
    place = content.find(b"\x7fELF")
    while place >= 0:
        machine = struct.unpack_from("<H", content, place + 18)[0] if place + 64 <= len(content) else 0
        if machine == 190:  # EM_CUDA
            offset, size, count = (
                struct.unpack_from(kind, content, place + at)[0] for kind, at in (("<Q", 40), ("<H", 58), ("<H", 60))
            )
            segments, phentsize, phnum = (
                struct.unpack_from(kind, content, place + at)[0] for kind, at in (("<Q", 32), ("<H", 54), ("<H", 56))
            )
            end = max(offset + size * count, segments + phentsize * phnum)
            yield content[place : place + end]
        place = content.find(b"\x7fELF", place + 4)


def parse(text: str) -> dict[str, Kernel]:
    """Read what `nvdisasm -c` prints; kernels by their mangled names."""
    kernels: dict[str, Kernel] = {}
    kernel: Kernel | None = None
    for line in text.splitlines():
        if line.startswith("\t.section"):
            name = re.match(r"\t\.section\s+\.text\.(\w+)", line)
            kernel = kernels.setdefault(name[1], Kernel(name[1])) if name else None
        elif kernel is None:
            continue
        elif line.endswith(":") and not line.startswith((" ", "\t")):
            kernel.labels[line[:-1]] = len(kernel.code)
        elif found := _LINE.match(line):
            address, guard, opcode, operands = found.groups()
            target = _TARGET.search(operands)
            kernel.code.append(
                Instruction(int(address, 16), guard or "", opcode, operands, target[1] if target else None)
            )
    return kernels


def disassemble(nvdisasm: str, path: Path, scratch: Path) -> dict[str, Kernel]:
    """Disassemble all cubins in a file."""
    kernels: dict[str, Kernel] = {}
    for number, cubin in enumerate(find_cubins(path)):
        file = scratch / f"{path.stem}-{number}.cubin"
        file.write_bytes(cubin)
        done = subprocess.run([nvdisasm, "-c", str(file)], capture_output=True, text=True, check=True)
        kernels |= parse(done.stdout)
    return kernels


# ---- control flow


@dataclass
class Graph:
    """Basic blocks of a kernel as ranges of instructions, with the blocks that may follow each."""

    kernel: Kernel
    blocks: list[range]
    after: list[list[int]]

    def code(self, block: int) -> Sequence[Instruction]:
        """The instructions of a block."""
        place = self.blocks[block]
        return self.kernel.code[place.start : place.stop]


def graph_of(kernel: Kernel) -> Graph:
    """Cut a kernel into basic blocks. Calls return; subroutines behind the kernel's end are left out."""
    code, labels = kernel.code, kernel.labels
    targets = {labels[i.target] for i in code if i.name == "BRA" and i.target in labels}
    ends = {n + 1 for n, i in enumerate(code) if i.name in ("BRA", "EXIT", "RET", "BRX")}
    starts = sorted({0, *targets, *ends} - {len(code)})
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    of_start = {block.start: number for number, block in enumerate(blocks)}
    after: list[list[int]] = []
    for number, block in enumerate(blocks):
        last, following = code[block.stop - 1], [number + 1] if number + 1 < len(blocks) else []
        if last.name == "BRA" and last.target in labels:
            after.append([of_start[labels[last.target]], *(following if last.is_conditional else [])])
        elif last.name in ("EXIT", "RET", "BRX"):
            after.append(following if last.guard else [])
        else:
            after.append(following)
    return Graph(kernel, blocks, after)


@dataclass(frozen=True)
class Loop:
    """A natural loop: its first block and all its blocks."""

    head: int
    blocks: frozenset[int]


def _order(graph: Graph) -> list[int]:
    """Blocks that can be reached, each before those that follow it, but for the edges back."""
    seen, order, stack = {0}, [], [(0, iter(graph.after[0]))]
    while stack:
        block, rest = stack[-1]
        following = next((b for b in rest if b not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(graph.after[following])))
    return order[::-1]


def _dominators(graph: Graph, order: Sequence[int]) -> dict[int, int]:
    """The immediate dominator of each block (Cooper, Harvey and Kennedy's algorithm)."""
    place = {block: number for number, block in enumerate(order)}
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in graph.after[block]:
            before[following].append(block)
    found = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [b for b in before[block] if b in found]
            best = known[0]
            for other in known[1:]:
                while best != other:
                    while place[best] > place[other]:
                        best = found[best]
                    while place[other] > place[best]:
                        other = found[other]
            if found.get(block) != best:
                found[block], changed = best, True
    return found


def loops_of(graph: Graph) -> list[Loop]:
    """Natural loops, those with one first block joined."""
    order = _order(graph)
    dominators = _dominators(graph, order)
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in graph.after[block]:
            before[following].append(block)

    def dominates(a: int, b: int) -> bool:
        while b != a and b != order[0]:
            b = dominators[b]
        return a == b

    loops: dict[int, set[int]] = {}
    for block in order:
        for head in graph.after[block]:
            if dominates(head, block):
                body, todo = loops.setdefault(head, {head}), [block]
                while todo:
                    inner = todo.pop()
                    if inner not in body:
                        body.add(inner)
                        todo += before[inner]
    return [Loop(head, frozenset(body)) for head, body in loops.items()]


# ---- costs


def _count(code: Sequence[Instruction]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for instruction in code:
        counts["instructions"] += 1
        counts["alu"] += instruction.name in ALU
        counts["local"] += instruction.name in ("LDL", "STL")
        counts["shuffles"] += instruction.name == "SHFL"
        counts["shared"] += instruction.name in ("LDS", "STS", "LDGSTS")
        counts["exponentials"] += instruction.opcode.startswith("MUFU.EX2")
        if instruction.name in _GLOBAL_LOADS:
            counts["loads"] += 1
            counts["loaded"] += instruction.bytes_moved
        elif instruction.bytes_moved:
            counts[f"stored by {instruction.bytes_moved}"] += instruction.bytes_moved
    return counts


@dataclass(frozen=True)
class Work:
    """What a full tile takes, to tell its path from those of other cases.

    Args:
        trips: turns of inner loops with shuffles, the scans; other inner loops, such as those of divisions, take one.
        widest: bytes of the widest stores to global memory of the path; with 0, stores are not part of it; by default
            those of the loop.
        shuffles, exponentials: the most that a path is searched for; a path with more computes something twice.
    """

    trips: int
    widest: int | None = None
    shuffles: int = 1 << 30
    exponentials: int = 1 << 30

    @property
    def of_inner(self) -> Work:
        """Of one turn of an inner loop."""
        trips = max(1, self.trips)
        return replace(self, shuffles=self.shuffles // trips, exponentials=self.exponentials // trips)


def _key(counts: Mapping[str, int], widest: int, work: Work) -> tuple[int, ...]:
    """Orders paths: the most bytes, accesses to shared memory, shuffles, exponentials; then the fewest instructions."""
    return (
        -counts["loaded"],
        -counts[f"stored by {widest}"],
        -counts["shared"],
        -min(counts["shuffles"], work.shuffles),
        -min(counts["exponentials"], work.exponentials),
        counts["instructions"],
    )


def cost_of_turn(graph: Graph, loop: Loop, loops: Sequence[Loop], work: Work) -> Counter[str]:
    """Count what a turn of a loop executes on the path of a full tile.

    Args:
        graph: of the kernel.
        loop: in question.
        loops: all of the kernel.
        work: what the path does.
    """
    widest = work.widest
    if widest is None:
        every = _count([instruction for block in loop.blocks for instruction in graph.code(block)])
        widest = max((size for size in (2, 4, 8, 16) if every[f"stored by {size}"]), default=0)
        work = replace(work, widest=widest)
    inner = [other for other in loops if other.blocks < loop.blocks and other.head != loop.head]
    outermost = [a for a in inner if not any(a.blocks < b.blocks for b in inner)]
    owner = {block: other for other in outermost for block in other.blocks}
    costs: dict[int, Counter[str]] = {}
    for other in outermost:
        turn = cost_of_turn(graph, other, loops, work.of_inner)
        times = work.trips if turn["shuffles"] else 1
        costs[other.head] = Counter({key: value * times for key, value in turn.items()})
    best: dict[int, Counter[str]] = {loop.head: Counter()}
    result: Counter[str] | None = None
    for block in _order(graph):
        if block not in loop.blocks or (block in owner and owner[block].head != block):
            continue
        if block not in best:
            continue
        members = owner[block].blocks if block in owner else {block}
        so_far = best[block] + (costs[block] if block in owner else _count(graph.code(block)))
        for following in {after for member in members for after in graph.after[member]} - members:
            if following == loop.head:
                if result is None or _key(so_far, widest, work) < _key(result, widest, work):
                    result = so_far
            elif following in loop.blocks and (
                following not in best or _key(so_far, widest, work) < _key(best[following], widest, work)
            ):
                best[following] = so_far
        if block in members and loop.head in graph.after[block] and block == loop.head and result is None:
            result = so_far
    assert result is not None, f"no path through the loop at {loop.head} of {graph.kernel.name}"
    return result


def code_bytes(graph: Graph, loop: Loop) -> int:
    """Bytes of machine code in a loop."""
    return 16 * sum(len(graph.blocks[block]) for block in loop.blocks)
