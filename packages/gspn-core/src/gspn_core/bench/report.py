"""A Markdown table and a plot of what a benchmark recorded.

python -m gspn_core.bench.report RESULTS.json                                  the table, to standard output
python -m gspn_core.bench.report RESULTS.json --table TABLE.md --plot PLOT.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._command import Parser, UserError, first_line, guarded

Row = dict[str, Any]
NOTES = """\
Times in us: `time` is a single call (on a GPU with the cache flushed), `in a row` and `graph` a call among several
without a flush. `floor` is the time in which a copy would move the same bytes, read and written."""
MODEL_NOTE = (
    "`model` is what benchmarks/model.py predicts from the machine code, with rates that are assumed, and what binds."
)

# Of numbers: the quantity of a row.
COLUMNS = {"MB": "bytes", "bytes": "saved_bytes", "of": "allowed_bytes", "floor": "floor_us", "time": "time_us"}
COLUMNS |= {"time / floor": "ratio", "GB/s": "bytes_per_s", "in a row": "row_us", "graph": "graph_us"}
COLUMNS |= {"seconds": "seconds", "model": "predicted_us"}
SCALES = {"MB": 1e-6, "GB/s": 1e-9}


def table(record: dict[str, Any]) -> str:
    """Lay out the rows, a heading for each group, without columns that would be empty."""
    lines = [f"# {_title(record)}", "", _provenance(record), ""]
    if record["copy"]:
        lines += [f"A large copy moves {_number(record['copy']['bytes_per_s'] * 1e-9)} GB/s, read and written.", ""]
    lines += [NOTES, *([MODEL_NOTE] if any("predicted_us" in row for row in record["rows"]) else []), ""]
    for group in dict.fromkeys(row["group"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["group"] == group]
        lines += [f"## {group}", ""]
        cells = [_cells(row) for row in rows if row["status"] == "measured"]
        if cells:
            lines += [*_aligned(cells), ""]
        lines += [*_published(rows)]
        left = [row for row in rows if row["status"] != "measured"]
        for why in dict.fromkeys((row["status"], row["reason"]) for row in left):
            names = [f"{row['case']}, {row['pass']}" for row in left if (row["status"], row["reason"]) == why]
            rest = f" and {len(names) - 1} more rows" if len(names) > 1 else ""
            lines.append(f"- {names[0]}{rest}: {', '.join(why)}")
        lines += [""] if left else []
    lines += _stages(record)
    return "\n".join(lines).rstrip()


def _cells(row: Row) -> dict[str, str]:
    versus = row.get("versus")
    compared = f"{row['op']}; {row['heads']} heads" if "heads" in row else ""
    if versus is not None:
        rival = versus["pass"] if versus["case"] == row["case"] else versus["case"]
        compiled = f", compiled in {versus['compile_s']:.3g} s" if "compile_s" in versus else ""
        compared = f"{row['speedup']:.3g}x as fast as {rival} ({_number(versus['time_us'])}{compiled})"
    met = {True: "yes", False: "no", None: "unknown"}
    targets = [f"{t['quantity']} {t['comparison']} {t['value']:g}: {met[t['met']]}" for t in row["targets"]]
    numbers = {column: _number(row.get(key), SCALES.get(column, 1.0)) for column, key in COLUMNS.items()}
    about = {"bound by": row.get("bound_by") or "", "versus": compared, "target, met": "; ".join(targets)}
    return {"case": row["case"], "pass": row["pass"], **numbers, **about}


def _stages(record: dict[str, Any]) -> list[str]:
    """Return what benchmarks/gpu.py adds to a record: its stages, tests, and the profiler's figures."""
    lines: list[str] = []
    if "stages" in record:
        lines += ["## stages", ""]
        lines += [
            f"- {s['name']}: {s['state']}, {s['seconds']:.0f} of {s['limit']:.0f} s" for s in record["stages"]
        ] + [""]
    for name, tests in record.get("accuracy", {}).items():
        counts = ", ".join(f"{tests[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        lines += [f"## accuracy, {name}", "", f"{counts}; {tests['state']}.", ""]
        about = [f"- {test['test']}: {test['reason']}" for test in tests["failures"]]
        about += [f"- {count} skipped: {reason}" for reason, count in tests["skips"].items()]
        lines += [*about, ""] if about else []
    for name, result in record.get("profile", {}).items():
        figures = [f"- {metric}: {value}" for metric, value in result.items()]
        lines += [f"## profile of {name}", "", *figures, ""]
    return lines


def _aligned(rows: Sequence[dict[str, str]]) -> list[str]:
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    text = [name not in COLUMNS for name in names]
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]

    def line(cells: Sequence[str]) -> str:
        parts = zip(cells, widths, text, strict=True)
        return "| " + " | ".join(f"{c:<{width}}" if left else f"{c:>{width}}" for c, width, left in parts) + " |"

    rule = ["-" * width if left else "-" * (width - 1) + ":" for width, left in zip(widths, text, strict=True)]
    return [line(names), line(rule), *(line([row[name] for name in names]) for row in rows)]


def _published(rows: Sequence[Row]) -> list[str]:
    published = [row for row in rows if row["published"] and row["pass"] == "forward"]
    if not published:
        return []
    source = published[0]["published"]
    lines = [f"Published by {source['source']} ({source['device']}, GSPN-1 then GSPN-2, GB/s):", ""]
    for row in published:
        first, second = (row["published"][name] * 1e-9 for name in ("GSPN-1", "GSPN-2"))
        lines.append(f"- {row['case']}: {first:.0f}, {second:.0f}")
    return [*lines, ""]


def _title(record: dict[str, Any]) -> str:
    trial = ", trial run on tiny shapes" if record["quick"] else ""
    return f"gspn_core {record['info']['gspn_core']} on {record['device']}{trial}"


def _provenance(record: dict[str, Any]) -> str:
    parts = [f"torch {record['info']['torch']}"]
    for name, key in (("CUDA", "cuda"), ("driver", "driver"), ("compute capability", "compute_capability")):
        parts += [f"{name} {record[key]}"] if record[key] else []
    if not record["compute_capability"]:
        parts += [f"{record['info']['threads']} threads", str(record["info"]["cpu"].get("isa"))]
    if record["git_revision"]:
        parts.append(f"revision {record['git_revision'][:10]}{' with changes' if record['git_changes'] else ''}")
    return ", ".join([*parts, record["date"]])


def _number(value: float | None, scale: float = 1.0) -> str:
    if value is None:
        return ""
    value *= scale
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plot(record: dict[str, Any], file: Path) -> None:
    """Draw the achieved bytes per second over the bytes moved, under the roof of a copy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 6.5), layout="constrained")
    if record["copy"]:
        roof = record["copy"]["bytes_per_s"] * 1e-9
        axes.axhline(roof, color="black", linewidth=1.2, label=f"copy: {_number(roof)} GB/s")
    series: dict[tuple[str, str, bool], list[tuple[float, float]]] = {}
    labels: dict[float, int] = {}  # of cases that move the same bytes, stacked
    for row in record["rows"]:
        if row.get("bytes_per_s") is None:
            continue
        point = (row["bytes"] * 1e-6, row["bytes_per_s"] * 1e-9)
        series.setdefault((row["dtype"], row["pass"], row["op"] != "line_launch"), []).append(point)
        if row["group"] == "targets" and row["pass"] == "forward":
            labels[point[0]] = labels.get(point[0], 0) + 1
            below = (5, -9 * labels[point[0]])
            axes.annotate(row["case"], point, xytext=below, textcoords="offset points", fontsize=7)
    colors = {"float32": "#1f77b4", "bfloat16": "#d95f02"}
    markers = {"forward": "o", "forward, checkpoints saved": "^", "backward": "v"}
    for (dtype, name, ours), points in series.items():
        color, what = colors.get(dtype, "gray"), "gspn_core" if ours else "one launch per line"
        style: dict[str, Any] = {"marker": markers.get(name, "s"), "facecolors": color if ours else "none", "s": 34}
        megabytes, rates = zip(*points, strict=True)
        axes.scatter(megabytes, rates, **style, edgecolors=color, label=f"{what}, {dtype}, {name}")
    axes.set(xscale="log", yscale="log", xlabel="MB a pass has to move (inputs read once, outputs written once)")
    axes.set_ylabel("achieved bandwidth in GB/s (those bytes over the measured time)")
    axes.set_title(f"{_title(record)}\n{_provenance(record)}", fontsize=10)
    axes.grid(visible=True, which="both", alpha=0.2)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Write what is asked for; exit statuses as those of `gspn-core`."""
    parser = Parser(description=__doc__.partition("\n")[0], prog="report")
    parser.add_argument("results", type=Path, metavar="RESULTS", help="JSON that a benchmark wrote with --out")
    parser.add_argument("--table", type=Path, metavar="FILE", help="where to write Markdown instead of printing it")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw a PNG (needs matplotlib)")
    args = parser.parse_args(argv)

    def report() -> int:
        try:
            record = json.loads(args.results.read_text())
            if args.plot is not None:
                plot(record, args.plot)
        except (OSError, ImportError, json.JSONDecodeError) as error:
            raise UserError(f"no report of {args.results}: {first_line(error)}") from error
        if args.table is not None:
            args.table.write_text(table(record) + "\n")
        elif args.plot is None:
            print(table(record))
        return 0

    return guarded("report", report)


if __name__ == "__main__":
    sys.exit(main())
