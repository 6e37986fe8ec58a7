"""Make a Markdown table and a plot of what gpu.py wrote.

python benchmarks/report.py RESULTS.json                                       the table, to standard output
python benchmarks/report.py RESULTS.json --table TABLE.md --plot PLOT.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HEADER = ("case", "pass", "MB", "floor", "time", "time / floor", "GB/s", "in a row", "graph", "versus", "target, met")


def table(result: dict[str, Any]) -> str:
    """Lay out the rows, a heading for each group; times in microseconds."""
    lines = [f"# {_title(result)}", "", _provenance(result), ""]
    if not result["gate"]:
        lines += ["The program ended before the gate was through: nothing was measured.", ""]
    elif not result["gate"]["passed"]:
        return "\n".join([*lines, f"Nothing was measured: {result['gate']['error']}.", ""])
    if result["copy"]:
        lines += [f"A large copy moves {_number(result['copy']['bytes_per_s'], 1e-9)} GB/s, read and written.", ""]
    lines += [
        "Times in us: `time` is a single call with the cache flushed, `in a row` and `graph` a call among several "
        "without a flush. The floor is the time in which a copy would move the same bytes.",
        "",
    ]
    for group in dict.fromkeys(row["group"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["group"] == group]
        lines += [f"## {group}", "", _cells(HEADER), _cells(["---"] * 2 + ["---:"] * 7 + ["---"] * 2)]
        lines += [_cells(_row(row)) for row in rows if row["status"] == "measured"]
        lines += ["", *_sources(rows)]
        left = [f"- {row['case']}, {row['pass']}: {row['status']}, {row['reason']}" for row in _unmeasured(rows)]
        lines += [*left, ""] if left else []
    return "\n".join(lines)


def plot(result: dict[str, Any], file: Path) -> None:
    """Draw achieved bytes per second over bytes moved, under the roof of a copy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in result["rows"] if row.get("bytes_per_s") is not None]
    figure, axes = plt.subplots(figsize=(11, 6.5), layout="constrained")
    roof = result["copy"]["bytes_per_s"] if result["copy"] else None
    if roof:
        axes.axhline(roof * 1e-9, color="black", linewidth=1.2)
        axes.annotate(
            f"copy: {_number(roof, 1e-9)} GB/s",
            (0.995, roof * 1e-9),
            (0, 4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
        )
    colors = {"float32": "#1f77b4", "bfloat16": "#d95f02"}
    markers = {"forward": "o", "forward, checkpoints saved": "^", "backward": "v"}
    for dtype, color in colors.items():
        for which, marker in markers.items():
            for op, filled in (("gspn_core", True), ("one launch per line", False)):
                chosen = [
                    row
                    for row in rows
                    if row["dtype"] == dtype and row["pass"] == which and (row["op"] != "line_launch") == filled
                ]
                if chosen:
                    axes.scatter(
                        [row["bytes"] * 1e-6 for row in chosen],
                        [row["bytes_per_s"] * 1e-9 for row in chosen],
                        facecolors=color if filled else "none",
                        edgecolors=color,
                        marker=marker,
                        s=34,
                        alpha=0.8,
                        label=f"{op}, {dtype}, {which}",
                    )
    labelled: list[int] = []  # cases that move as many bytes stand above each other, and so would their names
    for row in rows:
        if row["group"] == "targets" and row["pass"] == "forward":
            at = (row["bytes"] * 1e-6, row["bytes_per_s"] * 1e-9)
            below = 9 * (1 + labelled.count(row["bytes"]))
            axes.annotate(row["case"], at, xytext=(5, -below), textcoords="offset points", fontsize=7)
            labelled.append(row["bytes"])
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bytes a pass has to move, in MB (inputs read once, outputs written once)",
        ylabel="achieved bandwidth in GB/s (those bytes over the measured time)",
        title=f"{_title(result)}\n{_provenance(result)}",
    )
    axes.title.set_fontsize(10)
    axes.grid(visible=True, which="both", alpha=0.2)
    if rows:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _title(result: dict[str, Any]) -> str:
    trial = ", trial run on tiny shapes" if result["quick"] else ""
    return f"gspn_core {result['gspn_core']} on {result['device']}{trial}"


def _provenance(result: dict[str, Any]) -> str:
    parts = [f"torch {result['torch']}"]
    for name, key in (("CUDA", "cuda"), ("driver", "driver"), ("compute capability", "compute_capability")):
        if result[key] and result["device"] != "cpu":
            parts.append(f"{name} {result[key]}")
    if result["git_revision"]:
        parts.append(f"revision {result['git_revision'][:10]}{' with changes' if result['git_changes'] else ''}")
    return ", ".join([*parts, result["date"]])


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, scale: float = 1.0) -> str:
    if value is None:
        return ""
    value *= scale
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _row(row: dict[str, Any]) -> list[str]:
    versus = row.get("versus")
    against = f"{row['speedup']:.3g}x as fast as {versus['case']} ({_number(versus['time_us'])})" if versus else ""
    targets = []
    for target in row["targets"]:
        met = {True: "yes", False: "no", None: "unknown"}[target["met"]]
        targets.append(f"{target['quantity']} {target['comparison']} {target['value']:g}: {met}")
    if row.get("op") and row["group"] == "comparison" and row["bytes"] is None:
        against = f"{row['op']}; heads: {row['heads']}"
    return [
        row["case"],
        row["pass"],
        _number(row["bytes"], 1e-6),
        _number(row.get("floor_us")),
        _number(row["time_us"]),
        _number(row.get("ratio")),
        _number(row.get("bytes_per_s"), 1e-9),
        _number(row.get("row_us")),
        _number(row.get("graph_us")),
        against,
        "; ".join(targets),
    ]


def _sources(rows: Sequence[dict[str, Any]]) -> list[str]:
    published = [row for row in rows if row["published"] and row["pass"] == "forward"]
    if not published:
        return []
    source = published[0]["published"]
    lines = [f"Published by {source['source']} ({source['device']}, GSPN-1 then GSPN-2, GB/s):", ""]
    for row in published:
        first, second = (row["published"][name] * 1e-9 for name in ("GSPN-1", "GSPN-2"))
        lines.append(f"- {row['case']}: {first:.0f}, {second:.0f}")
    return [*lines, ""]


def _unmeasured(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["status"] != "measured"]


def main(argv: Sequence[str] | None = None) -> int:
    """Write what was asked for; return 2 where there is nothing to read."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="report.py")
    parser.add_argument("results", type=Path, metavar="RESULTS", help="JSON that gpu.py wrote")
    parser.add_argument("--table", type=Path, metavar="FILE", help="where to write Markdown instead of printing it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw a PNG (needs matplotlib)")
    args = parser.parse_args(argv)
    try:
        result = json.loads(args.results.read_text())
    except (OSError, json.JSONDecodeError) as error:
        print(f"report.py: error: cannot read {args.results}: {error}", file=sys.stderr)
        return 2
    text = table(result)
    if args.table is not None:
        args.table.write_text(text + "\n")
    elif args.plot is None:
        print(text)
    if args.plot is not None:
        try:
            plot(result, args.plot)
        except ImportError as error:
            print(f"report.py: error: no plot: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
