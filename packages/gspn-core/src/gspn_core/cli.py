"""Command line: `gspn-core info` says what is installed, `gspn-core bench` measures it.

Exit statuses: 0; 1 when the work failed; 2 for a call that is wrong; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ._command import Parser, UserError, add_bench_options, guarded, positive_integer
from ._version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    args = _parser().parse_args(argv)
    return guarded(f"gspn-core {args.command}", lambda: int(args.run(args)))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gspn-core", description="The line-scan operator of GSPN for PyTorch.")
    parser.add_argument("--version", action="version", version=f"gspn-core {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    about = commands.add_parser("info", help="show versions, kernels, instruction sets and threads")
    about.add_argument("--json", action="store_true", help="print JSON instead of a table")
    about.set_defaults(run=_info)

    bench = commands.add_parser("bench", help="measure the CPU kernels against the reference")
    bench.add_argument("--threads", type=positive_integer, metavar="N", help="threads of torch and of the kernels")
    add_bench_options(bench)
    bench.set_defaults(run=_bench)
    return parser


def _info(args: argparse.Namespace) -> int:
    from . import info

    installed = info()
    if args.json:
        print(json.dumps(installed))
        return 0
    lines = list(_flatten(installed))
    width = max(len(key) for key, _ in lines)
    for key, value in lines:
        print(f"{key:<{width}}  {value}")
    return 0


def _flatten(values: dict[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines.extend(_flatten(value, f"{prefix}{key}."))
        elif isinstance(value, list):
            lines.append((prefix + key, ", ".join(map(str, value)) or "none"))
        elif isinstance(value, bool):
            lines.append((prefix + key, "yes" if value else "no"))
        else:
            lines.append((prefix + key, "none" if value is None else str(value)))
    return lines


def _bench(args: argparse.Namespace) -> int:
    import torch

    from . import _backend
    from .bench import cpu_cases, rival_cases, runner
    from .bench.harness import Lab

    cases = runner.select([c for m in (cpu_cases, rival_cases) for c in m.make_cases(quick=args.quick)], args)
    if args.list:
        return 0
    extension = _backend.extension()
    if isinstance(extension, ImportError):
        raise UserError(f"there are no compiled kernels to measure: {extension}")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads or threads)
        return runner.execute(cases, Lab("cpu", quick=args.quick, repeats=args.repeats), args)
    finally:
        torch.set_num_threads(threads)
