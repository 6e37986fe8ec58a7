"""Command line: `gspn-core info` says what is installed, `gspn-core bench` measures it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from ._info import __version__, info


class _UserError(Exception):
    """Something the user can mend; shown on one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 when kernels disagree with the reference, or 2 for a user's error."""
    from .bench import DisagreementError, UnavailableError

    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except DisagreementError as error:
        print(f"gspn-core {args.command}: {error}; no figures are reported", file=sys.stderr)
        return 1
    except (UnavailableError, _UserError) as error:
        print(f"gspn-core {args.command}: error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gspn-core", description="The line-scan operator of GSPN for PyTorch.")
    parser.add_argument("--version", action="version", version=f"gspn-core {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    about = commands.add_parser("info", help="show versions, kernels, instruction sets and threads")
    about.add_argument("--json", action="store_true", help="print JSON instead of a table")
    about.set_defaults(run=_info)

    bench = commands.add_parser("bench", help="measure the kernels against the reference")
    bench.add_argument("--json", metavar="FILE", help="write the result as JSON; - is standard output")
    bench.add_argument("--quick", action="store_true", help="a trial run: small shapes, few repeats, no targets")
    bench.add_argument("--threads", type=_positive, metavar="N", help="threads of torch and of the kernels")
    bench.add_argument("--repeats", type=_positive, metavar="N", help="rounds that medians are taken over")
    bench.add_argument("--filter", default="", metavar="SUBSTRING", help="only the cases whose name contains this")
    bench.set_defaults(run=_bench)
    return parser


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return number


def _info(args: argparse.Namespace) -> int:
    found = info()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    lines = list(_flatten(found))
    width = max(len(key) for key, _ in lines)
    for key, value in lines:
        print(f"{key:<{width}}  {value}")
    return 0


def _flatten(found: dict[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in found.items():
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
    from . import bench

    file = None if args.json in (None, "-") else Path(args.json)
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise _UserError(f"--json must name a file in an existing folder, or be -, got {args.json!r}")
    settings = bench.QUICK if args.quick else bench.Settings()
    if args.repeats is not None:
        settings = dataclasses.replace(settings, repeats=args.repeats)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(args.threads or threads)
        result = bench.run(settings, only=args.filter)
    finally:
        torch.set_num_threads(threads)
    text = json.dumps(result, indent=2)
    if args.json == "-":
        print(text)
        return 0
    print(bench.table(result))
    if file is not None:
        try:
            file.write_text(text + "\n")
        except OSError as error:
            raise _UserError(f"cannot write {args.json!r}: {error.strerror}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
