"""Measure gspn_core on a GPU: time, and how far that is from the time a copy of the same bytes would take.

Every case is first compared with the reference in float64; one disagreement and nothing is reported. Times are medians
between CUDA events, the second-level cache flushed before each call. Results are JSON, written after every case, with
a row for each case and pass whether it was measured or not; `report.py` makes a table and a plot of them.

    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --budget 240 --out results.json
    python benchmarks/gpu.py --device cpu --quick --out trial.json       tries the program, measures nothing of use
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from cases import (
    BACKWARD,
    FORWARD,
    SAVING,
    AttentionJob,
    DisagreementError,
    Job,
    LineLaunch,
    Target,
    attention,
    make_jobs,
)
from torch import Tensor
from tqdm import tqdm

import gspn_core

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"

_REFRESH = 0.1 if sys.stderr.isatty() else 5.0  # seconds between two states of a progress bar
ENDED_EARLY = "the program ended before its turn"
SHORT_US = 100.0  # calls below are also timed several at once, and replayed from a CUDA graph


# ---- the machine


class Lab:
    """Where a run happens: device, clock, scratch memory, and what is found out once."""

    def __init__(self, device: str, *, quick: bool, budget: float) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.quick = quick
        self.began = time.perf_counter()
        self.budget = budget
        self.stream = torch.cuda.Stream() if self.cuda else None
        self.refused: dict[object, str] = {}  # by gate_key: why another's function does not run here
        self.seconds = 0.01 if quick else 0.25  # of repeats per timing
        # Several times the cache, and long enough on the device for the next call to be enqueued behind it.
        self.flush = torch.empty(2**29, dtype=torch.uint8, device=self.device) if self.cuda else None

    def left(self) -> float:
        """Seconds of the budget that remain."""
        return self.budget - (time.perf_counter() - self.began)

    def free_bytes(self) -> int | None:
        """Memory that a case may take, None where nobody counts."""
        if not self.cuda:
            return None
        gc.collect()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def randn(self, *shape: int, dtype: torch.dtype, seed: int) -> Tensor:
        """Random numbers, the same in every run."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(generator=generator)

    @cached_property
    def line_launch(self) -> LineLaunch | str:
        """The kernels of line_launch.cu, or why there are none."""
        if not self.cuda:
            return "line_launch.cu needs a GPU"
        return LineLaunch.build("sm_{}{}".format(*torch.cuda.get_device_capability()))

    def attention_reason(self, backend: str) -> str | None:
        """Why a backend of scaled_dot_product_attention cannot run with heads of 72, None if it can."""
        q = torch.zeros(1, 1, 8, 72, dtype=torch.bfloat16, device=self.device)
        try:
            attention(backend)(q, q, q)
        except RuntimeError as error:
            return f"scaled_dot_product_attention refused the backend {backend}: {str(error).splitlines()[0]}"
        return None

    def time(self, run: Callable[[], object]) -> dict[str, Any]:
        """Return the median microseconds of a call, and for short ones of calls in a row and from a CUDA graph."""
        for _ in range(2):
            run()
        estimate = statistics.median(self._times(run, 3))
        wanted = int(self.seconds * 1e6 / max(estimate, 1.0))
        repeats = max(5, min(3 if self.quick else 200, wanted))
        times = self._times(run, repeats)
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        result: dict[str, Any] = {"time_us": median, "quartiles_us": [low, high], "repeats": repeats}
        if median < SHORT_US:
            calls = max(2, min(50, int(1000 / max(median, 1.0))))

            def several() -> None:
                for _ in range(calls):
                    run()

            rounds = max(5, repeats // 4)
            result |= {"calls_in_a_row": calls}
            result["row_us"] = statistics.median(self._times(several, rounds, flush=False)) / calls
            if self.cuda:
                result |= self._graph(several, calls, rounds)
        return result

    def _times(self, run: Callable[[], object], repeats: int, *, flush: bool = True) -> list[float]:
        if not self.cuda:
            times = []
            for _ in range(repeats):
                start = time.perf_counter_ns()
                run()
                times.append((time.perf_counter_ns() - start) * 1e-3)
            return times
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start_event, end_event in events:
            if flush and self.flush is not None:
                self.flush.zero_()
            start_event.record()
            run()
            end_event.record()
        torch.cuda.synchronize()
        return [start_event.elapsed_time(end_event) * 1e3 for start_event, end_event in events]

    def _graph(self, several: Callable[[], None], calls: int, rounds: int) -> dict[str, Any]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                several()
        except RuntimeError as error:
            return {"graph_us": None, "graph_reason": f"capture failed: {str(error).splitlines()[0]}"}
        graph.replay()
        return {"graph_us": statistics.median(self._times(graph.replay, rounds, flush=False)) / calls}

    def copy_bandwidth(self) -> dict[str, Any]:
        """Bytes per second of a large copy, those read and those written counted."""
        free = self.free_bytes()
        size = 2**20 if self.quick or free is None else min(2**32, free // 4)
        source = self.randn(size // 4, dtype=torch.float32, seed=0)
        target = torch.empty_like(source)
        timing = self.time(lambda: target.copy_(source))
        moved = 2 * source.numel() * source.element_size()
        return {"bytes_per_s": moved / timing["time_us"] * 1e6, "bytes": moved, **timing}


# ---- measuring


def gate(jobs: Sequence[Job], lab: Lab) -> int:
    """Check small versions of all cases, each kind once; return their number or raise DisagreementError."""
    kinds = {job.gate_key(): job for job in jobs}
    with tqdm(kinds.items(), desc="gate", unit="check", mininterval=_REFRESH) as bar:
        for key, job in bar:
            bar.set_postfix_str(job.name, refresh=False)
            if job.reason(lab) is not None:
                continue
            try:
                job.check(lab)
            except DisagreementError:
                raise
            except Exception as error:
                if not isinstance(job, AttentionJob):
                    raise DisagreementError(f"{job.name}: {_first_line(error)}") from error
                lab.refused[key] = _first_line(error)  # others' functions need not take every shape
    return len(kinds)


def measure(job: Job, rows: dict[str, dict[str, Any]], lab: Lab) -> None:
    """Fill the rows of a case, one for each of its passes."""
    reason = job.reason(lab) or lab.refused.get(job.gate_key())
    free = lab.free_bytes()
    passes = []
    for which in job.passes:
        if reason is not None:
            rows[which] |= {"status": "not run", "reason": reason}
        elif free is not None and job.memory(which) > free:
            needed = f"needs about {job.memory(which) / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            rows[which] |= {"status": "skipped", "reason": needed}
        else:
            passes.append(which)
    if FORWARD not in passes:
        return
    for which in passes:
        rows[which] |= {"status": "failed", "reason": "an earlier pass of the case failed"}
    which = FORWARD
    try:
        f, inputs, parameters = job.contestant(lab)
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
        wanted = [*(t for t in leaves if t is not None), *parameters]
        with torch.no_grad():
            y = f(*inputs)
        if BACKWARD in passes:
            dy = torch.empty_like(y).normal_(generator=torch.Generator(lab.device).manual_seed(5))
            which = BACKWARD
            saved = f(*leaves)
            gradients = torch.autograd.grad(saved, wanted, dy, retain_graph=True)
            job.verify(inputs, y, dy, gradients[0])
            del gradients
        else:
            job.verify(inputs, y, None, None)
        del y

        def forward() -> Tensor:
            with torch.no_grad():
                return f(*inputs)

        runs: dict[str, Callable[[], object]] = {FORWARD: forward, SAVING: lambda: f(*leaves)}
        if BACKWARD in passes:
            runs[BACKWARD] = lambda: torch.autograd.grad(saved, wanted, dy, retain_graph=True)
        for which in passes:
            timing = lab.time(runs[which])
            rows[which] |= {"status": "measured", "reason": None, **timing}
    except DisagreementError:
        raise
    except Exception as error:  # one case that fails, of memory perhaps, is reported and keeps no other from its turn
        rows[which] |= {"status": "failed", "reason": _first_line(error)}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def finish(rows: Sequence[dict[str, Any]], jobs: Sequence[Job], copy_rate: float | None) -> None:
    """Add to measured rows what follows from others: floor, ratio, speed-up, and whether targets are met."""
    by_name = {(row["case"], row["pass"]): row for row in rows}
    for job in jobs:
        for which in job.passes:
            row = by_name[job.name, which]
            if row["status"] != "measured":
                continue
            moved = row["bytes"]
            if moved is not None and copy_rate:
                row["floor_us"] = moved / copy_rate * 1e6
                row["ratio"] = row["time_us"] / row["floor_us"]
                row["bytes_per_s"] = moved / row["time_us"] * 1e6
                row["copy_fraction"] = row["bytes_per_s"] / copy_rate
            other = by_name.get(job.versus.get(which, ("", "")))
            if other is not None and other["status"] == "measured":
                row["versus"] = {"case": other["case"], "pass": other["pass"], "time_us": other["time_us"]}
                row["speedup"] = other["time_us"] / row["time_us"]
            for target in row["targets"]:
                target["met"] = Target(target["quantity"], target["comparison"], target["value"]).met_by(row)


def about(lab: Lab) -> dict[str, Any]:
    """Device, versions, date and revision."""
    info = gspn_core.info()
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if lab.cuda else "cpu",
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())) if lab.cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if lab.cuda else None,
        "torch": info["torch"],
        "cuda": torch.version.cuda,
        "gspn_core": info["gspn_core"],
        "gspn_core_cuda": info["cuda"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_revision": _output("git", "-C", str(FOLDER), "rev-parse", "HEAD"),
        "quick": lab.quick,
    }
    changed = _output("git", "-C", str(FOLDER), "--no-optional-locks", "status", "--porcelain")
    return about | {"git_changes": None if about["git_revision"] is None else bool(changed)}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write(result: dict[str, Any], files: Sequence[Path]) -> None:
    """Write JSON so that a reader finds the old file or the new one, never a part."""
    for file in files:
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        unfinished.replace(file)


def file_name(result: dict[str, Any]) -> str:
    """`<gpu>-torch<version>-<date>`."""
    gpu = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    return f"{gpu}-torch{result['torch'].partition('+')[0]}-{result['date'][:10]}"


def _files(outs: Sequence[Path], result: dict[str, Any]) -> list[Path]:
    files = []
    for out in outs:
        if out.is_dir():
            stem, count = file_name(result), 1
            while (out / f"{stem}{'' if count == 1 else f'-{count}'}.json").exists():
                count += 1  # an earlier run of the day keeps its file
            out = out / f"{stem}{'' if count == 1 else f'-{count}'}.json"
        files.append(out)
    return files


# ---- the command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="gpu.py")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the program, with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few repeats, no targets")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start no case after this")
    parser.add_argument(
        "--out",
        type=Path,
        action="append",
        metavar="FILE",
        help="where to write JSON, a folder for a file named by GPU, torch and date; may be given several times",
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="only the cases whose 'group: name' matches")
    parser.add_argument("--list", action="store_true", help="show the cases and end")
    return parser


def _run(jobs: Sequence[Job], lab: Lab, outs: Sequence[Path]) -> int:
    rows = [
        {
            "group": job.group,
            "case": job.name,
            "pass": which,
            **job.facts(),
            "bytes": job.bytes(which),
            "published": job.published,
            "targets": [vars(target) | {"met": None} for target in job.targets.get(which, ())],
            "status": "not run",
            "reason": ENDED_EARLY,
        }
        for job in jobs
        for which in job.passes
    ]
    result: dict[str, Any] = about(lab) | {"gate": None, "copy": None, "rows": rows}
    files = _files(outs, result)
    write(result, files)
    try:
        result["gate"] = {"passed": True, "checks": gate(jobs, lab)}
        result["copy"] = lab.copy_bandwidth()
        with tqdm(jobs, desc="measure", unit="case", mininterval=_REFRESH) as bar:
            for job in bar:
                bar.set_postfix_str(job.name, refresh=False)
                mine = {row["pass"]: row for row in rows if row["case"] == job.name}
                if lab.left() <= 0:
                    for row in mine.values():
                        row["reason"] = f"the budget of {lab.budget:g} s was used up"
                    continue
                measure(job, mine, lab)
                finish(rows, jobs, result["copy"]["bytes_per_s"])
                write(result, files)
    except DisagreementError as error:
        result |= {"gate": {"passed": False, "error": str(error)}, "rows": []}
        write(result, files)
        print(f"gpu.py: {error}; no figures are reported", file=sys.stderr)
        return 1
    write(result, files)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("measured", "skipped", "failed")}
    counts["not run"] = len(rows) - sum(counts.values())
    print(", ".join(f"{count} {status}" for status, count in counts.items()), "of", len(rows), "rows")
    print(*files, sep="\n")
    return 1 if counts["failed"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 on a disagreement or a failed case, 2 where nothing can be measured."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu only tries the program: it needs --quick")
    try:
        wanted = re.compile(args.only)
    except re.error as error:
        parser.error(f"--only must be a regular expression, got {args.only!r} ({error})")
    jobs = [job for job in make_jobs(quick=args.quick) if wanted.search(f"{job.group}: {job.name}")]
    if not jobs:
        parser.error(f"no case matches --only {args.only!r}; see --list")
    if args.list:
        print("\n".join(f"{job.group}: {job.name}" for job in jobs))
        return 0
    outs = args.out or ([RESULTS] if args.device == "cuda" else [])
    for out in outs:
        if (args.device == "cpu" or args.quick) and RESULTS in (out.absolute(), *out.absolute().parents):
            parser.error(f"trial runs do not belong under {RESULTS}, got --out {out}")
        if not out.absolute().parent.is_dir():
            parser.error(f"--out must be in an existing folder, got {out}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: error: torch finds no GPU", file=sys.stderr)
        return 2
    if args.device == "cuda" and not gspn_core.info()["cuda"]["compiled"]:
        print("gpu.py: error: this gspn_core has no CUDA kernels, see `gspn-core info`", file=sys.stderr)
        return 2
    if RESULTS in outs:
        RESULTS.mkdir(exist_ok=True)
    lab = Lab(args.device, quick=args.quick, budget=args.budget)
    # Not the default stream: a backward runs where its forward ran, and can be captured only on another stream.
    with torch.cuda.stream(lab.stream) if lab.stream is not None else nullcontext():
        return _run(jobs, lab, outs)


if __name__ == "__main__":
    sys.exit(main())
