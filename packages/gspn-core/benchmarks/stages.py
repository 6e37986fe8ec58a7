"""The stages of gpu.py: what runs when, for how long at most, and what the record says of it."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import model
from launch_plan import BYTES, Shape
from workers import Worker, WorkerLostError, end

from gspn_core._command import UserError
from gspn_core.bench import runner
from gspn_core.bench.harness import Case, Figures

# Limits in seconds of a budget of 540, and in proportion of another. The rest has what the others leave.
LIMITS = {"smoke": 60.0, "targets": 150.0, "accuracy": 150.0, "rest": math.inf, "profile": 60.0}
STAGES = tuple(LIMITS)
END = 5.0  # seconds kept for the last writes and the processes that must end
SETTLED = ("measured", "wrong", "skipped")  # a resumed run leaves such rows as they are
LATE = "stopped, its time was used up"
NO_TIME = "there was no time left in stage"
START = 90.0  # seconds in which a worker must have begun
# Tests that measure memory of the whole device or need most of it are alone on it, after all others.
ALONE = "50_calls or sanitizer or 2_to_31 or waits_for_nothing"
PROFILED = ("forward of A top_to_bottom", "forward of A left_to_right", "forward of B", "forward of C")
PROFILED += ("backward of A top_to_bottom",)
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM % of peak",
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": "L2 % of peak",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue slots % of peak",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": "ALU % of peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps % of peak",
    "smsp__inst_executed.sum": "instructions of warps",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "launch__registers_per_thread": "registers",
}


class Run:
    """One run of the benchmark: `run` goes through the stages and returns the exit status."""

    def __init__(self, args: argparse.Namespace, cases: Sequence[Case], worker: Worker, command: Sequence[str]) -> None:
        self.args, self.cases, self.worker, self.command = args, cases, worker, command
        self.deadline = time.monotonic() + args.budget - END
        self.measured: dict[tuple[str, str], Figures] = {}
        self.record: dict[str, Any] = {}
        self.files: list[Path] = []
        chosen = args.stages or (("smoke", "targets", "rest") if args.filter else STAGES)
        self.stages = [name for name in STAGES if name in chosen]

    def run(self) -> int:
        """Run the stages; print and write what came of it."""
        for stop in (signal.SIGINT, signal.SIGTERM):  # also where a shell has started it in the background
            signal.signal(stop, signal.default_int_handler)
        others: dict[str, Callable[[float], str]] = {"accuracy": self.accuracy, "profile": self.profile}
        try:
            self.begin()
            for name in self.stages:
                began, limit = time.monotonic(), self.limit(name)
                if name in others:
                    state = others[name](began + limit) if limit > 0 else LATE
                else:
                    state = self.measure(name, began + limit)
                kept = [stage for stage in self.record["stages"] if stage["name"] != name]
                about = {"seconds": time.monotonic() - began, "limit": max(0.0, limit)}
                self.record["stages"] = [*kept, {"name": name, "state": state, **about}]
                self.write()
        finally:
            self.worker.close()
        failed = any(tests["failed"] for tests in self.record["accuracy"].values())
        stopped = not all(stage["state"].startswith("finished") for stage in self.record["stages"])
        return max(runner.conclude(self.record, self.files, self.args), int(failed or stopped))

    def limit(self, name: str) -> float:
        """Return the seconds that a stage has, the rest what the profile does not need."""
        share = self.args.budget / 540
        later = LIMITS["profile"] * share if "profile" in self.stages and shutil.which("ncu") else 0.0
        left = self.deadline - time.monotonic() - (later if name == "rest" else 0.0)
        return min(left, LIMITS[name] * share)

    def begin(self) -> None:
        """Have the worker make the record, or go on with one; have it time a copy."""
        record = self.ask({"do": "record"})["record"]
        wanted = {(case.group, case.name) for case in self.cases}
        record["rows"] = [row for row in record["rows"] if (row["group"], row["case"]) in wanted]
        if self.args.resume:
            record = self.resumed(record)
        for row in record["rows"]:
            if row["status"] == "not run" and stage_of(row["group"]) not in self.stages:
                row["reason"] = f"stage {stage_of(row['group'])!r} was not asked for"
        self.record = {"accuracy": {}, "profile": {}, "stages": []} | record
        self.files = [runner.new_file(out, record) for out in self.args.out or ()]
        self.write()
        if self.record["copy"] is None and any(row["bytes"] is not None for row in self.record["rows"]):
            self.record["copy"] = self.ask({"do": "copy"})["copy"]
        self.predict()
        self.write()

    def resumed(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return the old record with rows for cases that it lacks."""
        old = json.loads(self.args.resume.read_text())
        changed = [key for key in ("device", "git_revision", "quick") if old[key] != record[key]]
        changed += ["torch"] if old["info"]["torch"] != record["info"]["torch"] else []
        if changed:
            raise UserError(f"--resume must name a record of this device and revision; {', '.join(changed)} differ")
        known = {(row["group"], row["case"]) for row in old["rows"]}
        fresh = [row for row in record["rows"] if (row["group"], row["case"]) not in known]
        self.measured = {(r["case"], r["pass"]): dict(r) for r in old["rows"] if r["status"] == "measured"}
        return old | {"rows": [*old["rows"], *fresh]}

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Ask what the whole run depends on: a second time if the worker is lost."""
        for _ in range(2):
            try:
                return self.worker.ask(request, min(START, max(1.0, self.deadline - time.monotonic())))
            except WorkerLostError as error:
                lost = error
        raise ChildProcessError(f"the worker was lost in {request['do']!r}: {lost}")

    def write(self) -> None:
        """Write the record."""
        runner.write(self.record, self.files)

    def say(self, text: str) -> None:
        """Tell the progress."""
        if self.args.progress:
            print(f"[{self.deadline - time.monotonic():4.0f} s left] {text}", file=sys.stderr, flush=True)

    # ---- checks and timings

    def measure(self, stage: str, deadline: float) -> str:
        """Run the cases of a stage; those that earlier ones had no time for belong to the rest, too."""
        state = "finished"
        for case in self.cases:
            own = stage_of(case.group)
            rows = {r["pass"]: r for r in self.record["rows"] if (r["group"], r["case"]) == (case.group, case.name)}
            left_over = stage == "rest" and any((row["reason"] or "").startswith(NO_TIME) for row in rows.values())
            if (own != stage and not left_over) or all(row["status"] in SETTLED for row in rows.values()):
                continue
            left = deadline - time.monotonic()
            if left > 0.5:
                self.run_case(case, rows, left)
            else:
                state = LATE
                runner.settle(rows, {}, "not run", f"{NO_TIME} {stage!r}")
        self.write()
        return state

    def run_case(self, case: Case, rows: dict[str, runner.Row], left: float) -> None:
        """Have the worker run a case, and write what comes."""
        figures: dict[str, Figures] = {}
        seconds = self.args.case_seconds + (0.0 if self.worker.running else START)
        request = {"do": "case", "case": f"{case.group}: {case.name}"}
        try:
            reply = self.worker.ask(request, min(left, seconds), lambda r: figures.update({r["pass"]: r["figures"]}))
            status, reason = reply["state"]
        except WorkerLostError as error:
            status, reason = ("not run" if error.late and left < seconds else "failed"), str(error)
        runner.settle(rows, figures, status, reason)
        self.measured.update({(case.name, name): timing for name, timing in figures.items()})
        runner.derive(self.cases, self.record, self.measured)
        self.write()
        times = [f"{name} {f['time_us']:.4g} us" for name, f in figures.items() if "time_us" in f and name in rows]
        self.say(f"{case.group}: {case.name}: {', '.join(times) or rows[case.passes[0]]['status']}")

    def predict(self) -> None:
        """Add the model's predictions to the rows, with the bandwidth that was measured here."""
        device, copy = self.record["device"], self.record["copy"]
        if copy is None or not any(name in device for name in ("H100", "H200")):
            return
        try:
            budget = model.read_budget(json.loads(self.args.costs.read_text()))
        except (OSError, ValueError) as error:
            return self.say(f"no predictions: {error}")
        for row in self.record["rows"]:
            modelled = row["group"] != "channels last"  # whose kernels the model does not know
            if modelled and row.get("op") in ("propagate", "line_scan") and row["dtype"] in BYTES:
                found = model.predict(shape_of(row), row["pass"], copy["bytes_per_s"], budget)
                row |= {key: found[key] for key in ("predicted_us", "bound_by", "kernel")}

    # ---- tests

    def accuracy(self, deadline: float) -> str:
        """Run the tests, most of them in several processes, then those that need the device alone."""
        for name, only, share in (("side by side", f"not ({ALONE})", 0.7), ("alone", ALONE, 1.0)):
            if self.record["accuracy"].get(name, {}).get("state") == "finished":
                continue
            seconds = (deadline - time.monotonic()) * share - 4
            if seconds < 5:
                return LATE
            self.say(f"accuracy, {name}: at most {seconds:.0f} s")
            count = self.args.processes if name == "side by side" else 1
            self.record["accuracy"][name] = run_tests(self.args.tests, only, seconds, count, self.beside("tests.log"))
            self.write()
        states = {tests["state"] for tests in self.record["accuracy"].values()}
        return "finished" if states == {"finished"} else "; ".join(sorted(states - {"finished"}))

    def beside(self, suffix: str) -> Path | None:
        """Return the name of a file beside the record."""
        return self.files[0].with_name(f"{self.files[0].stem}-{suffix}") if self.files else None

    # ---- profile

    def profile(self, deadline: float) -> str:
        """Have ncu look at five kernels, each in a process of its own."""
        if shutil.which("ncu") is None:
            return "finished, without figures: ncu is not on PATH"
        options = ["--clock-control", "none", "--set", "full", "--profile-from-start", "off", "--csv", "--page", "raw"]
        for number, name in enumerate(PROFILED):
            seconds = min(40.0, deadline - time.monotonic() - 2)
            if seconds < 3:
                return LATE
            self.say(f"profile: {name}")
            call = f"{name}, shrunk" if self.args.quick else name
            status, text = captured(["ncu", *options, *self.command, "--profile", call], seconds)
            if file := self.beside(f"ncu{number}.csv"):
                file.write_text(text)
            last = next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
            self.record["profile"][name] = ncu_figures(text) or {"failed": f"status {status}: {last[:200]}"}
            self.write()
        return "finished"


def stage_of(group: str) -> str:
    """Return the stage that runs a group of cases."""
    return group if group in ("smoke", "targets") else "rest"


def shape_of(row: dict[str, Any]) -> Shape:
    """Return a row's call as the model knows it."""
    n, c, h, w = row["shape"]
    channels = {"groups": row["weight_groups"], "lam": row["lam_channels"] or 0, "u": row["u_channels"] or 0}
    about = {"directions": tuple(row["directions"]), "logits": row["op"] == "propagate", "dtype": row["dtype"]}
    return Shape(name=row["case"], size=(h, w, n, c), **channels, **about)


def run_tests(tests: Path, only: str, seconds: float, processes: int, log: Path | None) -> dict[str, Any]:
    """Run a file of tests for at most `seconds`; return counts, and what failed, of all that was reported by then."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        results.touch()
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = os.environ | {"GSPN_TEST_RESULTS": str(results), "GSPN_TEST_SECONDS": f"{seconds - 3:.0f}"}
        env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
        command = [sys.executable, "-m", "pytest", "-p", "gpu_pytest", "-p", "no:cacheprovider", "-k", only, str(tests)]
        command += ["-W", "default"]  # versions that are not ours to choose may warn of what is of no concern here
        if processes > 1:
            command += ["-n", str(processes), "--max-worker-restart", "100"]
        status, text = captured(command, seconds, env=env, first=signal.SIGINT)
        reports = [json.loads(line) for line in results.read_text().splitlines()]
    if log is not None:
        with log.open("a") as file:
            file.write(text)
    outcomes: dict[str, str] = {}
    failures: dict[str, str] = {}
    for report in reports:  # a test that took its process along has two
        if report["outcome"] == "failed":
            failures.setdefault(report["test"], report["reason"])
        outcomes[report["test"]] = "failed" if report["test"] in failures else report["outcome"]
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
    state = f"stopped after {seconds:.0f} s" if status is None else "finished" if status in (0, 1, 5) else last[:200]
    counts = Counter(outcomes.values())
    skips = Counter(report["reason"] for report in reports if report["outcome"] == "skipped")
    found = {"state": state, "failures": [{"test": test, "reason": reason} for test, reason in failures.items()]}
    return {name: counts[name] for name in ("passed", "failed", "skipped")} | found | {"skips": dict(skips)}


def captured(command: Sequence[str], seconds: float, *, first: signal.Signals = signal.SIGTERM, **options: Any) -> Any:
    """Return the exit status, None if the time did not suffice, and the output of a command, errors too."""
    with tempfile.TemporaryFile() as output:
        about: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, start_new_session=True, **about, **options)
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end(process, first=first, grace=2.0)
        output.seek(0)
        return status, output.read().decode(errors="replace")


def ncu_figures(text: str) -> dict[str, str]:
    """Return some figures of the kernel that took longest, of ncu's raw page as CSV; none if there is no such page."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    header, units, *kernels = list(csv.reader(lines[start:])) if start is not None else ([], [])
    kernels = [kernel for kernel in kernels if len(kernel) == len(header)]
    if not kernels:
        return {}
    found = [dict(zip(header, kernel, strict=True)) for kernel in kernels]
    of = dict(zip(header, units, strict=False))
    longest = max(found, key=lambda row: float(row.get("gpu__time_duration.sum", "0").replace(",", "") or 0))
    figures = {label: f"{longest[key]} {of[key]}".strip() for key, label in METRICS.items() if key in longest}
    return {"kernel": longest["Kernel Name"]} | figures
