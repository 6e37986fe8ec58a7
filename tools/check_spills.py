"""Check ptxas's report of the CUDA kernels: which spill registers to memory, or keep arrays there.

    python tools/check_spills.py BUILD_LOG

reads what a build printed with `-Xptxas -v`, prints a line per kernel, and fails where one spills more than allowed, or
has an array in local memory.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

# Bytes of spill stores of one kernel. Most have none; a few general kernels spill addresses. With nvcc 13.0 the most is
# 24 bytes on sm_90, in resident_forward<float, 1, 8, 1, 4>, and 304 in float64, whose elements take two registers each.
ALLOWED_BYTES, ALLOWED_OF_DOUBLE = 32, 320

REPORT = re.compile(
    r"Function properties for (?P<kernel>\S+)\s*\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s*\n"
    r"(?:.*\n)?.*Used (?P<registers>\d+) registers"
)


@dataclass(frozen=True)
class Usage:
    """One kernel on one architecture: registers, and bytes of local memory, of spill stores and of spill loads."""

    kernel: str
    registers: int
    stack: int
    stores: int
    loads: int

    @property
    def arrays(self) -> int:
        """Return the bytes of local memory that are no spills: an array with an index that only the device knows.

        Local memory comes in units of 8 bytes.
        """
        return max(0, self.stack - -(-self.stores // 8) * 8)


def demangle(names: list[str]) -> list[str]:
    """Make C++ names readable where c++filt is there."""
    try:
        done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return names
    readable = (re.sub(r"\(.*|^void |gspn::cuda::", "", name) for name in done.stdout.splitlines())
    return [re.sub(r"Config<(.*)>", r"\1", name) for name in readable]


def read(log: str) -> list[Usage]:
    """Read all reports in a build's output; kernels by their mangled names."""
    return [
        Usage(match["kernel"], *(int(match[name]) for name in ("registers", "stack", "stores", "loads")))
        for match in REPORT.finditer(log)
    ]


def parse(log: str) -> list[Usage]:
    """Read all reports in a build's output; kernels by readable names."""
    found = read(log)
    names = demangle([usage.kernel for usage in found])
    return [replace(usage, kernel=name) for usage, name in zip(found, names, strict=True)]


def main(argv: list[str] | None = None) -> int:
    """Print the report; return 1 where a kernel spills too much or there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path, help="what the build printed")
    usages = sorted(parse(parser.parse_args(argv).log.read_text()), key=lambda u: -u.stores)
    if not usages:
        print("no ptxas report found", file=sys.stderr)
        return 1
    for usage in usages:
        print(f"{usage.registers:4d} registers {usage.stores:5d} bytes spilled {usage.loads:5d} loaded  {usage.kernel}")
    status = 0
    for usage in usages:
        allowed = ALLOWED_OF_DOUBLE if "double" in usage.kernel else ALLOWED_BYTES
        if usage.stores > allowed:
            print(f"spills {usage.stores} bytes, allowed are {allowed}: {usage.kernel}", file=sys.stderr)
            status = 1
        if usage.arrays > 0:
            print(f"has arrays of {usage.arrays} bytes in local memory: {usage.kernel}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
