"""The emulated CUDA kernels under AddressSanitizer and ThreadSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulation import build

pytestmark = pytest.mark.skipif(build.missing() != "", reason=build.missing())

# These tests access no other memory than the rest.
DESELECTED = "not only_wanted and not constant and not nan"


def needs(sanitizer):
    if not build.links(sanitizer):
        pytest.skip(f"g++ does not link a program with -fsanitize={sanitizer} here")


def test_the_emulated_kernels_under_address_sanitizer():
    """torch's memory too comes from AddressSanitizer, preloaded: one element beyond a tensor ends the run."""
    needs("address")
    environment = os.environ | build.address_sanitizer() | {"OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    environment["GSPN_EMULATED_MODULE"] = str(build.build_module(build.BUILD / "emulation-address-module", "address"))
    command = [sys.executable, "-m", "pytest", "--capture=sys", "-q", "-x", "-p", "no:cacheprovider"]
    command += [str(Path(__file__).with_name("test_cuda_emulated.py")), "--numprocesses", str(os.cpu_count())]
    command += ["-k", DESELECTED]
    environment["GSPN_EVERY"] = "2"  # it is slow; the mutants run the kernels under AddressSanitizer, too
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert " passed" in done.stdout and " failed" not in done.stdout


def test_no_races():
    """ThreadSanitizer takes barriers alone as ordering: a missing one is a race even where no value changes.

    The kernels without Python, at exactly sized tensors; the mutants run the same program under AddressSanitizer too.
    """
    needs("thread")
    program = build.build_races("thread")
    for schedule in ("0", "3"):
        environment = os.environ | {"GSPN_EMULATOR_SCHEDULE": schedule, "TSAN_OPTIONS": "halt_on_error=1"}
        done = subprocess.run([program], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-6000:]
        assert "all done" in done.stdout
