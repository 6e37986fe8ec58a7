"""Check and measure gspn_core on a GPU: time, and how far that is from the time a copy of the same bytes would take.

    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --budget 240 --out results.json
    python benchmarks/gpu.py --resume results.json                       measures what is left of it
    python benchmarks/gpu.py --device cpu --quick --out trial.json       tries the program, measures nothing of use

Stages, each with a time limit: what only hardware shows (smoke), the targets, accuracy (pytest in several processes),
the rest, and a profile of five kernels by ncu. A worker process runs the cases, one after another; a case that takes it
along, or too long, costs its own rows. The record is written after every case; `python -m gspn_core.bench.report` makes
a table and a plot of it.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from gpu_cases import make_cases
from smoke import make_checks
from stages import STAGES, Run
from workers import Worker, serve

import gspn_core
from gspn_core._command import Parser, UserError, add_bench_options, guarded, positive_integer
from gspn_core.bench import runner
from gspn_core.bench.harness import Case, Lab

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
COSTS = FOLDER.parents[2] / ".nox" / "cuda-build" / "budget.json"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = Parser(description=__doc__.partition("\n")[0], prog="gpu.py")
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the program, with --quick")
    add(
        "--budget", type=float, default=3600.0, metavar="SECONDS", help="end after this, whatever happens (%(default)s)"
    )
    add("--stages", nargs="+", choices=STAGES, metavar="STAGE", help=f"some of {', '.join(STAGES)}")
    add("--case-seconds", type=float, default=60.0, metavar="SECONDS", help="limit of one case (default %(default)s)")
    add("--processes", type=positive_integer, default=8, metavar="N", help="of the tests (default %(default)s)")
    add("--tests", type=Path, default=FOLDER.parent / "tests" / "test_cuda.py", metavar="FILE", help="of the accuracy")
    add("--costs", type=Path, default=COSTS, metavar="FILE", help="budget.json of nox -s cuda, for predictions")
    add("--resume", type=Path, metavar="FILE", help="a record of the same device and revision to go on with")
    add("--serve", action="store_true", help=argparse.SUPPRESS)  # be the worker
    add("--profile", help=argparse.SUPPRESS)  # make this call, 'pass of case', for ncu
    add_bench_options(parser)
    return parser.parse_args(argv)


def answers(args: argparse.Namespace, cases: Sequence[Case]) -> int:
    """Be the worker: make a record, time a copy, run cases."""
    lab = Lab(args.device, quick=args.quick, repeats=args.repeats)
    by_name = {f"{case.group}: {case.name}": case for case in cases}

    def answer(request: dict[str, Any], send: Any) -> dict[str, Any]:
        if request["do"] == "record":
            return {"record": runner.make_record(cases, lab, FOLDER)}
        if request["do"] == "copy":
            return {"copy": lab.copy()}
        state = runner.attempt(by_name[request["case"]], lab, lambda name, f: send({"pass": name, "figures": f}))
        broken = is_broken(lab)
        gc.collect()
        if lab.cuda and not broken:
            torch.cuda.empty_cache()  # other processes need the memory, too
        return {"state": state, "broken": broken}

    with torch.cuda.stream(lab.stream) if lab.stream is not None else nullcontext():
        return serve(answer)


def is_broken(lab: Lab) -> bool:
    """Tell whether every later CUDA call of this process would fail."""
    try:
        if lab.cuda:
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def profile(args: argparse.Namespace, cases: Sequence[Case]) -> int:
    """Make a call once more while ncu looks."""
    which, _, name = args.profile.partition(" of ")
    lab = Lab(args.device, quick=args.quick)
    case: Any = next(case for case in cases if case.name == name)
    f, inputs, _ = case.problem(lab)
    leaves = [None if t is None else t.requires_grad_(which == "backward") for t in inputs]

    def prepare() -> Any:
        if which == "forward":
            return lambda: f(*leaves)
        y = f(*leaves)
        return lambda: torch.autograd.grad(y, [t for t in leaves if t is not None], torch.ones_like(y))

    prepare()()
    call = prepare()
    if lab.cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    call()
    if lab.cuda:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit statuses as those of `gspn-core`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)

    def run() -> int:
        if args.device == "cpu" and not args.quick:
            raise UserError("--device cpu only tries the program: it needs --quick")
        cases = [*make_checks(quick=args.quick), *make_cases(quick=args.quick)]
        if args.serve:
            return answers(args, cases)
        if args.profile:
            return profile(args, cases)
        if args.resume is not None:
            if args.out or not args.resume.is_file():
                raise UserError(
                    f"--resume must name a record, which it goes on writing to, without --out; got {args.resume}"
                )
            args.out = [args.resume]
        selected = runner.select(cases, args)
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
        # The program itself never touches the GPU, so that no error of it can end the run.
        options = ["--device", args.device, *(["--quick"] if args.quick else [])]
        options += ["--repeats", str(args.repeats)] if args.repeats else []
        command = [sys.executable, str(Path(__file__).resolve()), *options]
        stages = Run(args, selected, Worker([*command, "--serve"]), command)
        return stages.run()

    return guarded("gpu.py", run)


if __name__ == "__main__":
    sys.exit(main())
