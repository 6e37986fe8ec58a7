"""Check that no file of one package holds ten lines in a row that a file of another package holds too.

    python tools/check_duplicates.py                check, exit status 1 with a line per pair of places

What two packages need belongs to a library, to `gspn_core.runs`, or is small enough to stand twice. Looked at are the
Python and C++ sources and tests of `packages/`, without blank lines, comments and imports.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINES = 10
_SUFFIXES = (".py", ".cpp", ".hpp", ".cu", ".cuh")
_PASSED_OVER = re.compile(r"^(#|//|import |from \S+ import |\W*$)")


def code_lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that count, with their numbers from 1 and without the white space around them."""
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in lines if not _PASSED_OVER.match(line)]


def check(root: Path, length: int = LINES) -> list[str]:
    """Return a line for each run of equal lines, with where it begins in both files."""
    places: dict[tuple[str, ...], list[tuple[str, Path, int, int]]] = defaultdict(list)
    for file in sorted(root.glob("packages/*/**/*")):
        relative = file.relative_to(root)
        if file.suffix not in _SUFFIXES or not {"src", "csrc", "tests", "benchmarks"} & set(relative.parts):
            continue
        lines = code_lines(file.read_text(encoding="utf-8"))
        for first in range(len(lines) - length + 1):
            run = tuple(line for _, line in lines[first : first + length])
            places[run].append((relative.parts[1], relative, lines[first][0], first))
    faults, reported = [], set()
    for group in places.values():
        package, one, line, start = group[0]
        for other_package, two, other_line, other_start in group[1:]:
            # The windows of a longer run follow each other: one line for all of them.
            key = (one, two, start - other_start)
            if other_package != package and key not in reported:
                reported.add(key)
                faults.append(f"{one}:{line} and {two}:{other_line} share {length} lines or more")
    return faults


def main() -> int:
    """Print the faults; return 1 if there are any."""
    faults = check(ROOT)
    print("\n".join(faults) or f"no {LINES} lines in a row stand in two packages")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
