"""The benchmarks: rows and targets, wrong results, the cases for a GPU, table and plot."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gspn_core import _backend, cli
from gspn_core._command import UserError
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
    out = ("--out", str(tmp_path / "new" / "result.json"), str(tmp_path))
    threads = torch.get_num_threads()
    record, _ = bench(capsys, "--filter", "saved memory", "small", "--repeats", "2", *out)
    assert torch.get_num_threads() == threads
    assert record["info"]["threads"] == 1
    assert [row["case"] for row in record["rows"]] == ["horizontal/vertical, small", "saved memory"]
    assert record["rows"][0]["repeats"] == 2
    files = sorted(tmp_path.rglob("*.json"))
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
    assert len({(case.group, case.name) for case in cases}) == len(cases) == 93
    names = {case.name for case in cases}
    assert all(rival in names for case in cases for rival, _ in case.versus.values())
    assert sum(len(targets) for case in cases for targets in case.targets.values()) == 13


def test_plot(trial, tmp_path):
    pytest.importorskip("matplotlib", reason="draws the plot")
    (tmp_path / "r.json").write_text(json.dumps(trial | {"copy": {"bytes_per_s": 1e9}}))
    assert report.main([str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]) == 0
    assert (tmp_path / "r.png").stat().st_size > 1000
    assert report.main([str(tmp_path / "missing.json")]) == 2


# ---- the model of what kernels take

# The design study's floors in us on an H200, bf16, four directions, by (H, W, N, C): forward and backward with
# G = C' = 1, then with G = C' = C.
FLOORS = {
    (56, 56, 128, 2): (4.5, 8.8, 8.2, 16),
    (28, 28, 128, 16): (2.4, 4.5, 16, 33),
    (14, 14, 128, 64): (1.7, 3.1, 16, 33),
    (7, 7, 128, 64): (0.4, 0.8, 4.1, 8.1),
    (74, 74, 32, 64): (12, 22, 115, 227),
    (147, 147, 32, 64): (48, 85, 453, 895),
    (16, 16, 32, 1200): (9, 16, 101, 199),
    (16, 16, 256, 1200): (74, 129, 805, 1591),
    (1024, 512, 2, 160): (166, 293, 1717, 3395),
    (2048, 1024, 2, 160): (663, 1171, 6867, 13578),
    (1024, 1024, 16, 8): (281, 531, 1373, 2716),
}
LONG, NARROW, A = (4, 4, 1, 1), (2, 4, 1, 1), (1024, 1024, 16, 8)


@pytest.fixture
def bench_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def model(bench_path):
    import model

    return model


def line(model, size=A, **options):
    about = {"groups": size[3], "lam": size[3], "u": 0, "dtype": "float32", "directions": ("top_to_bottom",)}
    return model.Shape(name="x", size=size, **about | {"logits": False} | options)


def costing(kernel=("column_forward", "float32", NARROW, (False,)), **figures):
    row = {"instructions_per_32": 21.0, "alu_per_32": 5.0, "registers": 142, "l2_ratio": 1.0, "wavefront_ratio": 1.0}
    return {k: row | {"lanes": 1.0} | figures for k in (kernel, (*kernel[:2], LONG, *kernel[3:]))}


def test_floors_of_the_model(model):
    def floor(shape, which):
        return shape.floor_bytes(which) / model.COPY_RATE["h200"] * 1e6

    def near(value):  # of figures with two digits
        return pytest.approx(value, rel=0.03, abs=0.05 if value < 10 else 0.5)

    rates = model.COPY_RATE
    for size, floors in FLOORS.items():
        for g, (forward, backward) in ((1, floors[:2]), (size[3], floors[2:])):
            shape = model.Shape(name="x", size=size, groups=g, lam=g, u=g)
            assert (floor(shape, "forward"), floor(shape, "backward")) == (near(forward), near(backward)), shape
            row = model.predict(shape, "forward", rates["h100"], {})
            assert row["floor_us"] == pytest.approx(floor(shape, "forward") * rates["h200"] / rates["h100"])
    assert (floor(line(model), "forward"), floor(line(model), "backward")) == (near(749), near(1381))
    gated = model.Shape(name="x", size=(74, 74, 32, 64), groups=1, lam=64, u=64)
    assert floor(gated, "forward") == near(53)


def test_floors_are_the_bytes_of_the_cases(model):
    import gpu_cases
    import stages

    for case in gpu_cases.make_cases(quick=False):
        if getattr(case, "op", None) in ("propagate", "line_scan"):
            row = runner._new_row(case, "forward")
            for which in case.passes:
                assert stages.shape_of(row).floor_bytes(which) == pytest.approx(case.bytes(which), rel=1e-9)


@pytest.mark.parametrize(
    "figures, options, bound",
    [
        ({}, {}, "DRAM"),
        ({"l2_ratio": 4.0}, {}, "L2"),
        # Of many warps, which wait for one another alone.
        ({"instructions_per_32": 150.0, "registers": 40}, {"size": (1024, 128, 64, 64)}, "issue slots"),
        ({"instructions_per_32": 150.0, "alu_per_32": 140.0, "registers": 40}, {"size": (1024, 128, 64, 64)}, "ALU"),
        ({}, {"size": (1024, 1024, 1, 2)}, "latency of memory"),
        ({"instructions_per_32": 80.0}, {"size": (1024, 1024, 1, 2)}, "latency of lines"),
        ({}, {"size": (4, 64, 1, 1)}, "launches"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_binds_a_kernel(model, figures, options, bound):
    shape, rate = line(model, **options), model.COPY_RATE["h200"]
    row = model.predict(shape, "forward", rate, costing(**figures))
    assert row["bound_by"] == bound and row["predicted_us"] >= row["floor_us"]
    worst = {k: 20 * v for k, v in (costing(**figures).popitem()[1]).items() if k.endswith(("per_32", "ratio"))}
    assert model.predict(shape, "forward", rate, costing(**figures | worst))["predicted_us"] > row["predicted_us"]


def test_a_kernel_that_is_twice_as_expensive_takes_longer(model):
    once, twice = (
        model.predict(line(model), "forward", 4.3e12, costing(instructions_per_32=k)) for k in (150.0, 300.0)
    )
    assert twice["predicted_us"] > 1.9 * once["predicted_us"]


def test_a_missing_kernel_is_shown_and_not_guessed(model, tmp_path, capsys):
    row = model.predict(line(model, directions=("left_to_right",)), "forward", 4.3e12, costing())
    assert row["predicted_us"] is None and row["bound_by"] == "missing in budget.json"
    name = "_ZN4gspn4cuda14column_forwardINS0_6ConfigIfLi2ELi4ELi1ELi1EEELb0EEEvNS_6ParamsENS0_11StripLaunchE"
    figures = costing().popitem()[1]
    (tmp_path / "budget.json").write_text(json.dumps([{"case": "A down", "kernel": name, **figures}]))
    options = ["--budget", str(tmp_path / "budget.json"), "--json", str(tmp_path / "out.json")]
    assert model.main(options) == 0
    assert "A down" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    down = [row for row in rows if row["shape"] == "A down" and row["pass"] == "forward"]
    assert [row["device"] for row in down] == ["h100", "h200"] and all(row["predicted_us"] for row in down)
    assert down[0]["predicted_us"] > down[1]["predicted_us"]
    assert {row["bound_by"] for row in rows if row["shape"] == "A right"} == {"missing in budget.json"}
    figures.pop("lanes")
    (tmp_path / "budget.json").write_text(json.dumps([{"case": "A down", "kernel": name, **figures}]))
    assert model.main(options) == 2 and "lanes" in capsys.readouterr().err


def test_which_kernels_serve_a_shape(bench_path):
    from launch_plan import Shape, launches

    def names(size, which="forward", **options):
        options = {"groups": 1, "lam": 1, "u": 1} | options
        return [(k.function, k.cover, k.flags) for k in launches(Shape(name="x", size=size, **options), which)]

    every = {"groups": 64, "lam": 64, "u": 64}
    assert names((74, 74, 32, 64)) == [("shared_forward", (5, 1, 1, 2), ())]
    assert names((74, 74, 32, 64), lam=64, u=64) == [("resident_forward", (4, 4, 4, 1), ())]
    assert names((74, 74, 32, 64), **every) == [("resident_forward", LONG, ())]
    assert names((16, 16, 32, 64), **every) == [("fused_forward", (4, 4, 1, 8), ())]
    assert names((14, 14, 32, 64), **every) == [("resident_forward", (1, 8, 1, 2), ())]
    rows = [("row_forward", LONG, (True, False)), ("row_forward", LONG, (True, True))]
    assert names((256, 256, 1, 64)) == [*rows, *2 * [("column_forward", NARROW, (True,))]]
    assert names((256, 256, 8, 64)) == [*rows, *2 * [("column_forward", LONG, (True,))]]
    assert names((147, 147, 1, 64)) == [
        *2 * [("strip_forward", LONG, (True,))],
        *2 * [("strip_forward", LONG, (False,))],
    ]
    assert {name for name, *_ in names((256, 256, 1, 64), "backward", **every)} == {"row_backward", "column_backward"}
    assert {name for name, *_ in names((256, 256, 1, 64), "backward")} == {"strip_backward"}


# ---- stages, each with a time limit, and a worker that may be lost

FAKE_WORKER = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from workers import serve

def answer(request, send):
    with open("requests", "a") as file:
        rows = json.load(open("out.json"))["rows"] if os.path.exists("out.json") else []
        done = [row["case"] for row in rows if row["status"] == "measured"]
        print(json.dumps([request, os.getpid(), done]), file=file)
    if request["do"] == "record":
        return {"record": json.load(open("record.json"))}
    if request["do"] == "copy":
        return {"copy": {"bytes_per_s": 4.3e12}}
    case = request["case"]
    print("what a library prints is no reply")
    send({"pass": "forward", "figures": {"time_us": 800.0, "bytes_per_s": 4.0e12}})
    if "dies" in case:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "stubborn" in case:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "slow" in case:
        time.sleep(100)
    if "sticky" in case:
        return {"state": ["failed", "CUDA error: an illegal memory access was encountered"], "broken": True}
    send({"pass": "backward", "figures": {"time_us": 2.0}})
    return {"state": ["failed", "not measured"]}

sys.exit(serve(answer))
"""


class Fake(Case):
    op, dtype, shape, directions = "line_scan", torch.float32, (16, 8, 1024, 1024), ("top_to_bottom",)
    weight_groups, lam_channels, u_channels = 8, 8, None

    def bytes(self, name):
        return 3221225472 if name == "forward" else None


@pytest.fixture
def staged(tmp_path, bench_path, monkeypatch):
    """Return a function that runs stages with a worker that fakes the cases named; files go to tmp_path."""
    import gpu
    import stages
    from workers import Worker

    (tmp_path / "worker.py").write_text(FAKE_WORKER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "END", 2.0)
    monkeypatch.setattr(stages, "START", 2.0)

    def run(names, *options, device="NVIDIA H200"):
        cases = [Fake(group=group, name=name, passes=("forward", "backward")) for group, name in names]
        record = runner.make_record(cases, Lab("cpu", quick=True)) | {"device": device}
        (tmp_path / "record.json").write_text(json.dumps(record))
        argv = ["--device", "cpu", "--quick", "--no-progress", *options]
        args = gpu.parse([*argv, *(() if "--resume" in options else ("--out", str(tmp_path / "out.json")))])
        args.out = args.out or [args.resume]
        worker = Worker([sys.executable, str(tmp_path / "worker.py"), str(BENCHMARKS)])
        status = stages.Run(args, cases, worker, [sys.executable, "-c", "pass"]).run()
        assert not worker.running
        return status, json.loads((tmp_path / "out.json").read_text())

    return run


def states(record):
    return {(row["case"], row["pass"]): (row["status"], row["reason"]) for row in record["rows"]}


NAMES = [("smoke", "dies"), ("targets", "first"), ("targets", "slow"), ("targets", "sticky"), ("shapes", "last")]


def test_a_lost_worker_costs_the_rows_that_it_had_not_measured(staged, tmp_path):
    only = ("--stages", "smoke", "targets", "rest", "--case-seconds", "1")
    status, record = staged(NAMES, *only)
    found = states(record)
    assert status == 1 and {found[name, "forward"] for _, name in NAMES} == {("measured", None)}
    assert found["dies", "backward"] == ("failed", "its process ended by signal 11 (SIGSEGV)")
    assert found["slow", "backward"][0] == "failed" and "took more than 1 s" in found["slow", "backward"][1]
    assert found["sticky", "backward"] == ("failed", "CUDA error: an illegal memory access was encountered")
    assert found["first", "backward"] == found["last", "backward"] == ("measured", None)
    assert [(stage["name"], stage["state"]) for stage in record["stages"]] == [(name, "finished") for name in only[1:4]]
    requests = [json.loads(line) for line in (tmp_path / "requests").read_text().splitlines()]
    assert len({pid for _, pid, _ in requests}) == 4  # at first, and after each loss
    for number, (request, _, done) in enumerate(requests[2:]):  # the record was written after every case
        assert request["case"].endswith(NAMES[number][1]) and set(done) == {name for _, name in NAMES[:number]}

    # Going on measures what was not, and nothing else.
    (tmp_path / "requests").unlink()
    _, again = staged(NAMES, *only, "--resume", str(tmp_path / "out.json"))
    asked = [json.loads(line)[0].get("case") for line in (tmp_path / "requests").read_text().splitlines()]
    assert asked == [None, "smoke: dies", "targets: slow", "targets: sticky"]
    assert states(again)["last", "backward"] == ("measured", None)


def test_a_record_of_another_device_is_not_gone_on_with(staged, tmp_path):
    staged(NAMES[1:2], "--stages", "targets")
    with pytest.raises(UserError, match="device differ"):
        staged(
            NAMES[1:2], "--stages", "targets", "--resume", str(tmp_path / "out.json"), device="NVIDIA H100 80GB HBM3"
        )


def test_the_whole_ends_within_its_budget(staged):
    began = time.monotonic()
    names = [("targets", "slow"), ("targets", "quick"), ("shapes", "last"), ("shapes", "slow and stubborn")]
    status, record = staged(names, "--budget", "4.5", "--stages", "targets", "rest")
    assert time.monotonic() - began < 4.5
    found = states(record)
    assert status == 1 and found["slow", "backward"][0] == "not run"
    assert found["quick", "backward"] == ("measured", None)  # in the time of the rest
    assert "took more than" in found["slow and stubborn", "backward"][1]
    assert found["last", "forward"] == ("measured", None)  # a stage leaves the next ones their time
    assert record["stages"][0]["state"] == "stopped, its time was used up"


def test_predictions_stand_beside_measurements(staged, tmp_path):
    kernel = "_ZN4gspn4cuda14column_forwardINS0_6ConfigIfLi2ELi4ELi1ELi1EEELb0EEEvNS_6ParamsENS0_11StripLaunchE"
    (tmp_path / "costs.json").write_text(json.dumps([{"kernel": kernel, **next(iter(costing().values()))}]))
    _, record = staged(NAMES[1:2], "--stages", "targets", "--costs", str(tmp_path / "costs.json"))
    forward, backward = record["rows"]
    assert forward["predicted_us"] == pytest.approx(751, abs=5) and forward["bound_by"] == "DRAM"
    assert forward["time_us"] == 800 and backward["predicted_us"] is None
    text = report.table(record)
    assert "| model |" in text and "| DRAM" in text and "- targets: finished" in text


TESTS = """
import os, time
import gpu_pytest, pytest

def test_good(): pass
def test_sticky():
    gpu_pytest.broken = lambda: True
    assert not "an illegal access"
@pytest.mark.parametrize("k", range(4))
def test_after(k): assert os.environ["GSPN_TEST_SECONDS"]
def test_bad(): assert not "wrong"
@pytest.mark.skip(reason="no place for it")
def test_elsewhere(): pass
def test_hangs(): time.sleep(100)
"""


def test_a_sticky_error_ends_a_process_and_no_other_test(bench_path, tmp_path, monkeypatch):
    import stages

    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # to start fast
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p xdist.plugin")
    (tmp_path / "tests").mkdir()
    file = tmp_path / "tests" / "test_it.py"
    file.write_text(TESTS)
    found = stages.run_tests(file, "not hangs", 60, 2, tmp_path / "log")
    assert found["state"] == "finished" and (found["passed"], found["failed"], found["skipped"]) == (5, 2, 1)
    failures = {failure["test"].partition("::")[2]: failure["reason"] for failure in found["failures"]}
    assert set(failures) == {"test_sticky", "test_bad"} and "its process was ended" in failures["test_sticky"]
    assert found["skips"] == {"no place for it": 1} and "crashed while running" in (tmp_path / "log").read_text()
    found = stages.run_tests(file, "hangs or good", 3, 1, None)
    assert found["state"] == "stopped after 3 s" and found["passed"] == 1


FAKE_NCU = """#!/bin/sh
echo "==PROF== Connected"
case "$*" in *"of B"*) echo "==ERROR== no counters" >&2; exit 9;; esac
cat <<'CSV'
"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread","other"
"","","us","register/thread","x"
"0","prepare","1.5","32","1"
"1","scan<4>","1,200.5","142","1"
CSV
"""


def test_profiles_are_of_the_longest_kernel(staged, tmp_path, monkeypatch):
    (tmp_path / "ncu").write_text(FAKE_NCU)
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _, record = staged(NAMES[1:2], "--stages", "profile")
    found = record["profile"]
    assert len(found) == 5 and found["forward of B"] == {"failed": "status 9: ==ERROR== no counters"}
    about = {"kernel": "scan<4>", "time": "1,200.5 us", "registers": "142 register/thread"}
    assert found["backward of A top_to_bottom"] == about and len(list(tmp_path.glob("out-ncu*.csv"))) == 5
    assert "- time: 1,200.5 us" in report.table(record)
