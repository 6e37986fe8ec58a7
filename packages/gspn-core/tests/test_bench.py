"""The benchmarks: rows and targets, wrong results, the cases for a GPU, table and plot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gspn_core import _backend, cli
from gspn_core.bench import cpu_cases, report, runner
from gspn_core.bench.harness import Case, DisagreementError, Lab, Target, UnavailableError, require_close

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RECORD = {"device", "compute_capability", "driver", "cuda", "info", "date", "git_revision", "git_changes"} | {
    *("quick", "repeats", "copy", "rows")
}
ROW = {"group", "case", "pass", "op", "dtype", "shape", "bytes", "published", "targets", "status", "reason"}


def bench(capsys, *options, status=0):
    assert cli.main(["bench", "--quick", "--threads", "1", "--json", *options]) == status
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


@pytest.fixture(scope="module")
def trial():
    cases, lab = cpu_cases.make_cases(quick=True), Lab("cpu", quick=True)
    record = runner.make_record(cases, lab)
    runner.run(cases, lab, record)
    return record


def test_a_record_has_rows_device_versions_and_date(trial):
    assert set(trial) == RECORD
    rows = [(row["case"], row["pass"]) for row in trial["rows"]]
    assert len(set(rows)) == len(rows) == 21
    for row in trial["rows"]:
        assert set(row) >= ROW
        assert (row["status"], row["reason"], row["targets"]) == ("measured", None, [])
        if row["case"] == "saved memory":
            assert row["fraction"] <= 1
            continue
        assert row["time_us"] > 0 and row["repeats"] == 3
        if "versus" in row:
            assert row["speedup"] == pytest.approx(row["versus"]["time_us"] / row["time_us"])
        if row["bytes"] is not None:
            assert row["ratio"] == pytest.approx(row["time_us"] / row["floor_us"])
    groups = {row["group"] for row in trial["rows"] if "versus" not in row and row["bytes"] is None}
    assert groups == {"memory"}  # the others are compared with something
    assert json.loads(json.dumps(trial)) == trial | {"rows": json.loads(json.dumps(trial["rows"]))}


def test_every_row_has_a_line_of_the_table(trial):
    text = report.table(trial)
    for row in trial["rows"]:
        assert any(line.startswith(f"| {row['case']}") and row["pass"] in line for line in text.splitlines())
    assert trial["device"] in text and trial["date"] in text


def test_bench_prints_json_or_a_table_and_writes_files(capsys, tmp_path):
    out = ("--out", str(tmp_path / "result.json"), str(tmp_path))
    threads = torch.get_num_threads()
    record, _ = bench(capsys, "--filter", "saved memory", "small", "--repeats", "2", *out)
    assert torch.get_num_threads() == threads
    assert record["info"]["threads"] == 1
    assert [row["case"] for row in record["rows"]] == ["horizontal/vertical, small", "saved memory"]
    assert record["rows"][0]["repeats"] == 2
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2 and f"-torch{torch.__version__.partition('+')[0]}-" in files[0].name + files[1].name
    assert all(json.loads(file.read_text()) == record for file in files)
    assert cli.main(["bench", "--quick", "--filter", "saved memory"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("| saved memory | gspn_core |")
    assert cli.main(["bench", "--list"]) == 0
    assert "memory: saved memory" in capsys.readouterr().out.splitlines()


def test_targets():
    assert Target("time_us", "<=", 25).met_by({"time_us": 25}) is True
    assert Target("speedup", ">=", 10).met_by({"speedup": 9}) is False
    assert Target("speedup", ">=", 10).met_by({}) is None
    with_targets = [case for case in cpu_cases.make_cases(quick=False) if case.targets]
    assert len(with_targets) == len(cpu_cases.make_cases(quick=False))
    assert not any(case.targets for case in cpu_cases.make_cases(quick=True))


# ---- wrong results


def scan_wrongly(monkeypatch, wrong_if=lambda x: True):
    forward = _backend.Kernels.forward

    def wrong(self, x, weights, lam, u, y, checkpoints):
        forward(self, x, weights, lam, u, y, checkpoints)
        if wrong_if(x):
            y.select(-1, -1).add_(1e-3 * y.abs().max() + 1e-3)

    monkeypatch.setattr(_backend.Kernels, "forward", wrong)


def test_a_wrong_forward_gets_no_figures_in_any_case(capsys, monkeypatch):
    scan_wrongly(monkeypatch)
    record, errors = bench(capsys, status=1)
    for row in record["rows"]:
        assert row["status"] == "wrong" and "of the largest value" in row["reason"]
        assert not {"time_us", "saved_bytes", "speedup"} & set(row)
        assert f"{row['case']}, {row['pass']}: wrong, no figures" in errors


def test_a_wrong_case_keeps_no_other_from_its_figures(capsys, monkeypatch):
    scan_wrongly(monkeypatch, lambda x: x.shape[2:] == (48, 48))
    record, _ = bench(capsys, "--filter", "large maps", "saved memory", status=1)
    assert [row["status"] for row in record["rows"]] == ["wrong"] * 5 + ["measured"]


def test_wrong_gradients_get_no_figures(capsys, monkeypatch):
    backward = _backend.Kernels.backward

    def wrong(self, *args):
        backward(self, *args)
        args[-1][1].mul_(1.001)

    monkeypatch.setattr(_backend.Kernels, "backward", wrong)
    record, _ = bench(capsys, "--filter", "forward+backward", status=1)
    assert {row["status"] for row in record["rows"]} == {"wrong"}


def test_a_result_that_is_not_a_number_is_a_disagreement():
    with pytest.raises(DisagreementError, match="case: off by nan"):
        require_close("case", torch.tensor([torch.nan]), torch.ones(1))


@pytest.mark.parametrize(
    "error, state",
    [
        (DisagreementError("far off"), ("wrong", "far off")),
        (UnavailableError("not installed"), ("not run", "not installed")),
        (torch.OutOfMemoryError("of 80 GiB"), ("skipped", "OutOfMemoryError: of 80 GiB")),
        (RuntimeError("two\nlines"), ("failed", "RuntimeError: two")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_states_of_rows(error, state):
    """Passes that were measured before an error keep their figures, unless a result is wrong."""

    class Failing(Case):
        def measure(self, lab):
            yield "first", {"time_us": 1.0}
            raise error

    case, lab = Failing(group="g", name="n", passes=("first", "second")), Lab("cpu", quick=True)
    record = runner.make_record([case], lab)
    runner.run([case], lab, record)
    first, second = record["rows"]
    assert (second["status"], second["reason"]) == state
    assert (first["status"] == "measured") is ("time_us" in first) is (state[0] != "wrong")
    late = Lab("cpu", quick=True, budget=0)
    record = runner.make_record([case], late)
    runner.run([case], late, record)
    assert record["rows"][0]["reason"] == "the budget of 0 s was used up"


# ---- the cases for a GPU, tried on the CPU


def test_gpu_cases_on_the_cpu(tmp_path):
    command = [sys.executable, "-W", "error", str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--quick", "--json"]
    command += ["--filter", "targets: A", "targets: B", "sub-layer 74x74", "flash attention 74x74", "line, A"]
    done = subprocess.run([*command, "--out", str(tmp_path / "t.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert json.loads((tmp_path / "t.json").read_text()) == record
    for row in record["rows"]:
        assert row["status"] == ("not run" if row["op"] == "line_launch" else "measured"), row
    assert {row["pass"] for row in record["rows"]} == {"forward", "forward, checkpoints saved", "backward"}
    assert "one launch per line" in report.table(record)


def test_gpu_cases_have_distinct_names(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_cases

    cases = gpu_cases.make_cases(quick=False)
    assert len({(case.group, case.name) for case in cases}) == len(cases) == 86
    names = {case.name for case in cases}
    assert all(rival in names for case in cases for rival, _ in case.versus.values())
    assert sum(len(targets) for case in cases for targets in case.targets.values()) == 16


def test_plot(trial, tmp_path):
    pytest.importorskip("matplotlib", reason="draws the plot")
    (tmp_path / "r.json").write_text(json.dumps(trial | {"copy": {"bytes_per_s": 1e9}}))
    assert report.main([str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]) == 0
    assert (tmp_path / "r.png").stat().st_size > 1000
    assert report.main([str(tmp_path / "missing.json")]) == 2
