"""Runs cases, and records their rows with device, versions and date."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .._command import UserError, first_line
from .._info import info
from .harness import Case, DisagreementError, Figures, Lab, Target, UnavailableError
from .report import table

Row = dict[str, Any]
STATUSES = ("measured", "skipped", "not run", "failed", "wrong")
# Attributes of cases that their rows repeat, the last four of attention.
FACTS: tuple[str, ...] = ("op", "dtype", "shape", "directions", "weight_groups", "lam_channels", "u_channels")
FACTS += ("batch", "tokens", "channels", "heads")


def select(cases: Sequence[Case], args: argparse.Namespace) -> list[Case]:
    """Return the cases that --filter names, and show them if --list asks for it; else make the folders of --out."""
    wanted = args.filter or [""]
    selected = [case for case in cases if any(text in f"{case.group}: {case.name}" for text in wanted)]
    if not selected:
        raise UserError(f"no case contains {' or '.join(map(repr, wanted))}; --list shows them")
    if args.list:
        print("\n".join(f"{case.group}: {case.name}" for case in selected))
        return selected
    for out in args.out or ():
        out.parent.mkdir(parents=True, exist_ok=True)
    return selected


def execute(cases: Sequence[Case], lab: Lab, args: argparse.Namespace, *, sources: Path | None = None) -> int:
    """Run the cases, print and write the results; return 1 if a case failed. Records the git revision of `sources`."""
    record = make_record(cases, lab, sources)
    files = [new_file(out, record) for out in args.out or ()]
    run(cases, lab, record, files=files, progress=args.progress)
    return conclude(record, files, args)


def conclude(record: dict[str, Any], files: Sequence[Path], args: argparse.Namespace) -> int:
    """Print the results, and what failed; return 1 if a case did."""
    print(json.dumps(record) if args.json else table(record))
    statuses = [row["status"] for row in record["rows"]]
    for row in record["rows"]:
        if row["status"] in ("failed", "wrong"):
            print(f"{row['case']}, {row['pass']}: {row['status']}, no figures: {row['reason']}", file=sys.stderr)
    if files:
        counts = [f"{statuses.count(status)} {status}" for status in STATUSES if status in statuses]
        print(f"{', '.join(counts)} of {len(statuses)} rows", *files, sep="\n", file=sys.stderr)
    return 1 if "failed" in statuses or "wrong" in statuses else 0


def make_record(cases: Sequence[Case], lab: Lab, sources: Path | None = None) -> dict[str, Any]:
    """Return what `run` fills: device, versions and date, and a row for each pass, of which none is measured yet."""
    git = ("git", "-C", str(sources), "--no-optional-locks")
    revision = _output(*git, "rev-parse", "HEAD") if sources is not None else None
    changes = _output(*git, "status", "--porcelain") if revision is not None else None
    return {
        "device": torch.cuda.get_device_name() if lab.cuda else _cpu_model(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())) if lab.cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if lab.cuda else None,
        "cuda": torch.version.cuda if lab.cuda else None,
        "info": info(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_revision": revision,
        "git_changes": None if changes is None else bool(changes),
        "quick": lab.quick,
        "repeats": lab.repeats,
        "copy": None,
        "rows": [_new_row(case, name) for case in cases for name in case.passes],
    }


def _new_row(case: Case, name: str) -> Row:
    facts = {key: getattr(case, key) for key in FACTS if hasattr(case, key)}
    facts["dtype"] = str(facts.get("dtype")).removeprefix("torch.")
    targets = [vars(target) | {"met": None} for target in case.targets.get(name, ())]
    about = {"bytes": case.bytes(name), "published": case.published, "targets": targets}
    state = {"status": "not run", "reason": "the program ended before its turn"}
    return {"group": case.group, "case": case.name, "pass": name, **facts, **about, **state}


def run(
    cases: Sequence[Case], lab: Lab, record: dict[str, Any], *, files: Sequence[Path] = (), progress: bool = False
) -> None:
    """Fill the rows of the record, and write it after every case. The others are measured even if a case is wrong."""
    measured: dict[tuple[str, str], Figures] = {}
    write(record, files)
    if any(case.bytes(name) is not None and name not in case.roof for case in cases for name in case.passes):
        record["copy"] = lab.copy()
    with tqdm(cases, unit="case", disable=not progress, mininterval=0.1 if sys.stderr.isatty() else 5.0) as bar:
        for case in bar:
            bar.set_postfix_str(case.name, refresh=False)
            key = (case.group, case.name)
            rows = {row["pass"]: row for row in record["rows"] if (row["group"], row["case"]) == key}
            gc.collect()
            torch.cuda.empty_cache()
            if lab.left() > 0:
                figures: dict[str, Figures] = {}
                settle(rows, figures, *attempt(case, lab, figures.__setitem__))
                measured.update({(case.name, name): timing for name, timing in figures.items()})
                derive(cases, record, measured)
            else:
                for row in rows.values():
                    row["reason"] = f"the budget of {lab.budget:g} s was used up"
            write(record, files)


def attempt(case: Case, lab: Lab, found: Callable[[str, Figures], None]) -> tuple[str, str]:
    """Measure a case, and report the figures of each function as they come; return the state of passes without any."""
    try:
        for name, timing in case.measure(lab):
            moved = case.bytes(name)
            found(name, timing | ({} if moved is None else {"bytes_per_s": moved / timing["time_us"] * 1e6}))
    except DisagreementError as error:
        return "wrong", str(error)
    except UnavailableError as error:
        return "not run", str(error)
    except torch.OutOfMemoryError as error:  # of a GPU
        return "skipped", first_line(error)
    except Exception as error:  # a case that fails keeps no other from its turn
        return "failed", first_line(error)
    return "failed", "not measured"


def settle(rows: Mapping[str, Row], figures: dict[str, Figures], status: str, reason: str) -> None:
    """Fill the rows of a case. Passes that were measured keep their figures, unless a result is wrong."""
    if status == "wrong":
        figures.clear()
    for name, row in rows.items():
        state = {"status": "measured", "reason": None} if name in figures else {"status": status, "reason": reason}
        row |= state | figures.get(name, {})


def derive(cases: Sequence[Case], record: dict[str, Any], measured: dict[tuple[str, str], Figures]) -> None:
    """Add to measured rows what follows from others: floor, ratios, and whether targets are met."""
    by_name = {(case.group, case.name): case for case in cases}
    for row in record["rows"]:
        case, name = by_name.get((row["group"], row["case"])), row["pass"]
        if case is None or row["status"] != "measured":
            continue
        rival = case.versus.get(name, ("", ""))
        roof = measured[case.name, case.roof[name]] if name in case.roof else record["copy"]
        if roof is not None and "bytes_per_s" in row:
            row["floor_us"] = row["bytes"] / roof["bytes_per_s"] * 1e6
            row["ratio"] = row["time_us"] / row["floor_us"]
            row["copy_fraction"] = row["bytes_per_s"] / roof["bytes_per_s"]
        if rival in measured:
            kept = {key: value for key, value in measured[rival].items() if key in ("time_us", "compile_s")}
            row["versus"] = {"case": rival[0], "pass": rival[1], **kept}
            row["speedup"] = row["versus"]["time_us"] / row["time_us"]
            row["slowdown"] = 1 / row["speedup"]
        for target in row["targets"]:
            target["met"] = Target(target["quantity"], target["comparison"], target["value"]).met_by(row)


def write(record: dict[str, Any], files: Sequence[Path]) -> None:
    """Write JSON so that a reader finds the old file or the new one, never a part."""
    for file in files:
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(file)


def new_file(out: Path, record: dict[str, Any]) -> Path:
    """Return `out`, or in a folder `<device>-torch<version>-<date>.json`, numbered from the day's second run on."""
    if not out.is_dir():
        return out
    device = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    stem = f"{device}-torch{record['info']['torch'].partition('+')[0]}-{record['date'][:10]}"
    names = (f"{stem}{'' if count == 1 else f'-{count}'}.json" for count in itertools.count(1))
    return next(file for name in names if not (file := out / name).exists())


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return model[1] if model else platform.processor() or platform.machine()
