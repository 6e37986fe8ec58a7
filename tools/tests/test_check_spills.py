"""What ptxas prints, read and judged."""

import importlib.util
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("check_spills", Path(__file__).parents[1] / "check_spills.py")
assert _spec is not None
assert _spec.loader is not None
check_spills = sys.modules["check_spills"] = importlib.util.module_from_spec(_spec)  # dataclasses look themselves up
_spec.loader.exec_module(check_spills)

REPORT = """[1/9] Building CUDA object kernels_float32.cu.o
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '{name}' for 'sm_90'
ptxas info    : Function properties for {name}
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, {stack} bytes cumulative stack size
ptxas info    : Compile time = 1.0 ms
"""


def report(*kernels, arrays=0):
    return "".join(
        REPORT.format(name=name, stack=stores + arrays, stores=stores, loads=2 * stores) for name, stores in kernels
    )


def test_a_report_is_read():
    (usage,) = check_spills.parse(report(("plain", 24)))
    assert usage == check_spills.Usage("plain", 168, 24, 24, 48)


@pytest.mark.parametrize(
    "stores,status", [(0, 0), (check_spills.ALLOWED_BYTES, 0), (check_spills.ALLOWED_BYTES + 4, 1)]
)
def test_too_many_spills_fail(tmp_path, capsys, stores, status):
    log = tmp_path / "build.log"
    log.write_text(report(("first", 0), ("second", stores)))
    assert check_spills.main([str(log)]) == status
    out, err = capsys.readouterr()
    assert "first" in out and ("second" in err) == bool(status)


def test_an_array_in_local_memory_fails(tmp_path, capsys):
    log = tmp_path / "build.log"
    log.write_text(report(("first", 8)) + report(("second", 0), arrays=48))
    assert check_spills.main([str(log)]) == 1
    assert capsys.readouterr().err == "has arrays of 48 bytes in local memory: second\n"


def test_a_log_without_reports_fails(tmp_path):
    log = tmp_path / "build.log"
    log.write_text("nothing was compiled")
    assert check_spills.main([str(log)]) == 1
