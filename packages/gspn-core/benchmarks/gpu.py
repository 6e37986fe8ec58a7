"""Measure gspn_core on a GPU: time, and how far that is from the time a copy of the same bytes would take.

    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --budget 240 --out results.json
    python benchmarks/gpu.py --device cpu --quick --out trial.json       tries the program, measures nothing of use

The record is written after every case; `python -m gspn_core.bench.report` makes a table and a plot of it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from gpu_cases import make_cases

import gspn_core
from gspn_core._command import Parser, UserError, add_bench_options, guarded
from gspn_core.bench import runner
from gspn_core.bench.harness import Lab

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit statuses as those of `gspn-core`."""
    parser = Parser(description=__doc__.partition("\n")[0], prog="gpu.py")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the program, with --quick")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start no case after this")
    add_bench_options(parser)
    args = parser.parse_args(argv)

    def run() -> int:
        if args.device == "cpu" and not args.quick:
            raise UserError("--device cpu only tries the program: it needs --quick")
        cases = runner.select(make_cases(quick=args.quick), args)
        if args.list:
            return 0
        args.out = args.out or ([] if args.quick else [RESULTS])
        if args.quick and any(RESULTS in (out.absolute(), *out.absolute().parents) for out in args.out):
            raise UserError(f"trial runs do not belong under {RESULTS}")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("torch finds no GPU")
        if args.device == "cuda" and not gspn_core.info()["cuda"]["compiled"]:
            raise UserError("this gspn_core has no CUDA kernels, see `gspn-core info`")
        if RESULTS in args.out:
            RESULTS.mkdir(exist_ok=True)
        lab = Lab(args.device, quick=args.quick, repeats=args.repeats, budget=args.budget)
        return runner.execute(cases, lab, args, sources=FOLDER)

    return guarded("gpu.py", run)


if __name__ == "__main__":
    sys.exit(main())
