"""The emulator of CUDA kernels detects what it claims to: emulation/selftest.cpp, with and without sanitizers."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator maps its stacks and is tested on Linux only"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

SOURCE = Path(__file__).parent / "emulation" / "selftest.cpp"
COMPILE = ["g++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
BUILDS = {
    "plain": [],
    "ucontext": ["-DGSPN_EMULATOR_UCONTEXT"],
    "address": ["-fsanitize=address", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread"],
}
RIGHT = ["reduction", "shuffles", "partial", "cluster", "copies", "launches_in_order", "operating_system_threads"]
DEADLOCK = "deadlock: every thread that has not returned waits"


def sanitizer_works(flags, folder):
    trivial = folder / "trivial.cpp"
    trivial.write_text("int main() {}\n")
    program = folder / "trivial"
    compiled = subprocess.run([*COMPILE, *flags, trivial, "-o", program], capture_output=True)
    return compiled.returncode == 0 and subprocess.run([program], capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def selftest(tmp_path_factory):
    """Return a function that runs a case in a build, made on first use, and returns exit status, output and errors."""
    folder = tmp_path_factory.mktemp("emulator")
    programs = {}

    def program(build):
        flags = BUILDS[build]
        if any("sanitize" in flag for flag in flags) and not sanitizer_works(flags, folder):
            return None
        path = folder / build
        subprocess.run([*COMPILE, *flags, SOURCE, "-o", path], check=True)
        return path

    def run(build, case, **environment):
        if build not in programs:
            programs[build] = program(build)
        if programs[build] is None:
            pytest.skip(f"g++ {' '.join(BUILDS[build])} makes no program that runs here")
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.endswith("SAN_OPTIONS") and not name.startswith("GSPN_EMULATOR_") and name != "LD_PRELOAD"
        }
        result = subprocess.run(
            [programs[build], case], env=inherited | environment, capture_output=True, text=True, timeout=60
        )
        return result.returncode, result.stdout, result.stderr

    return run


def line(marker):
    """Return the number of the one line of the self test that ends in this comment."""
    (number,) = [i for i, text in enumerate(SOURCE.read_text().splitlines(), 1) if text.endswith(f"// {marker}")]
    return number


def at(marker):
    return f"{SOURCE}:{line(marker)}"


@pytest.mark.parametrize("case", RIGHT)
@pytest.mark.parametrize("build", BUILDS)
def test_correct_kernels_are_right_and_clean(selftest, build, case):
    assert selftest(build, case) == (0, "right\n", "")


@pytest.mark.parametrize("schedule", range(4))
def test_a_missing_barrier_is_a_wrong_value(selftest, schedule):
    environment = {"GSPN_EMULATOR_SCHEDULE": str(schedule), "GSPN_EMULATOR_SEED": "5"}
    assert selftest("plain", "missing_syncthreads", **environment) == (0, "wrong\n", "")


@pytest.mark.parametrize("build", ["plain", "address"])
@pytest.mark.parametrize("case", ["missing_syncwarp", "race_between_blocks"])
def test_only_the_race_detector_sees(selftest, build, case):
    assert selftest(build, case) == (0, "right\n", "")


@pytest.mark.parametrize("case", ["missing_syncthreads", "missing_syncwarp", "race_between_blocks", "left_cluster"])
def test_the_race_detector_sees(selftest, case):
    status, _, errors = selftest("thread", case)
    assert status == 66
    assert "WARNING: ThreadSanitizer: data race" in errors
    assert f"SUMMARY: ThreadSanitizer: data race {SOURCE}" in errors


def test_shared_memory_ends_where_the_launch_says(selftest):
    status, output, errors = selftest("address", "shared_out_of_bounds")
    assert (status, output) == (1, "")
    assert "ERROR: AddressSanitizer: heap-buffer-overflow" in errors
    assert re.search(r"0 bytes (to the right of|after) 128-byte region", errors)
    assert at("one beyond") in errors


@pytest.mark.parametrize("build", BUILDS)
def test_uninitialised_shared_memory_is_nan(selftest, build):
    assert selftest(build, "shared_uninitialised") == (0, "nan\n", "")


def test_shared_memory_of_a_block_that_has_returned_is_gone(selftest):
    assert selftest("plain", "left_cluster") == (0, "wrong\n", "")
    status, output, errors = selftest("address", "left_cluster")
    assert (status, output) == (1, "")
    assert "ERROR: AddressSanitizer: use-after-poison" in errors
    assert at("of a block that may be gone") in errors


@pytest.mark.parametrize("build", BUILDS)
def test_divergence(selftest, build):
    assert selftest(build, "divergent_shuffle") == (
        0,
        "divergence: lanes of one mask meet at different calls; "
        f"found by block (1, 2, 0) thread 16 at {at('second half')}\n"
        f"  block (1, 2, 0) threads 0 to 15 wait at __shfl_*sync, {at('first half')}\n"
        f"  block (1, 2, 0) threads 16 to 16 wait at __shfl_*sync, {at('second half')}\n",
        "",
    )


@pytest.mark.parametrize("build", BUILDS)
def test_barriers(selftest, build):
    assert selftest(build, "barrier_in_branch") == (
        0,
        f"threads meet at different barriers; found by block (0, 0, 0) thread 8 at {at('behind the branch')}\n"
        f"  block (0, 0, 0) threads 0 to 7 wait at __syncthreads, {at('in the branch')}\n"
        f"  block (0, 0, 0) threads 8 to 8 wait at __syncthreads, {at('behind the branch')}\n",
        "",
    )
    assert selftest(build, "deadlock") == (
        0,
        f"{DEADLOCK}\n"
        f"  block (0, 0, 0) threads 0 to 7 wait at __syncthreads, {at('some')}\n"
        f"  block (0, 0, 0) threads 8 to 31 wait at __syncwarp, {at('others')}\n",
        "",
    )
    assert selftest(build, "deadlock_at_return") == (
        0,
        f"{DEADLOCK}\n"
        f"  block (0, 0, 0) threads 0 to 7 wait at cluster_sync, {at('cluster')}\n"
        f"  block (0, 0, 0) threads 8 to 30 wait at __syncthreads, {at('block')}\n",
        "",
    )


def messages(output):
    return re.findall(r"^(\S.*?)(?:; found by .*)?$", output, re.MULTILINE)


def test_a_store_to_a_block_that_has_not_started(selftest):
    status, output, _ = selftest("plain", "early_store")
    assert status == 0
    assert set(messages(output)) == {"cluster_map to a block that has not started"}
    assert output.count(at("of the next block")) == 10  # in every schedule


def test_masks_and_maps(selftest):
    status, output, _ = selftest("plain", "masks")
    assert status == 0
    assert messages(output) == ["a lane is not in its own mask"] * 2 + ["warp masks overlap"]
    status, output, _ = selftest("plain", "maps")
    assert status == 0
    assert messages(output) == [
        "no error",
        "cluster_map of an address outside shared memory",
        "cluster_map to a rank outside the cluster",
    ]


def test_asynchronous_copies(selftest):
    assert selftest("plain", "copies_without_wait") == (0, "nan\n", "")
    status, _, errors = selftest("thread", "copies_without_barrier")
    assert status == 66
    assert "SUMMARY: ThreadSanitizer: data race" in errors
    assert re.search("emulator::(copy_async|wait_for_copies)", errors)
    status, output, _ = selftest("plain", "bad_copies")
    assert status == 0
    assert messages(output) == [
        "a thread returned while its copies were under way",
        "copy_async beyond shared memory",
        "copy_async of an address that is not aligned",
        "copy_async of an address that is not aligned",
    ]


def test_every_mutant_is_of_the_kernels(monkeypatch):
    """Each changes one place; whether the tests notice it takes minutes, in `nox -s mutants`."""
    monkeypatch.syspath_prepend(str(SOURCE.parent))
    mutants = importlib.import_module("mutants")
    texts = {path.name: path.read_text() for path in mutants.CUDA.glob("*.cuh")}
    assert [mutant.name for mutant in mutants.MUTANTS if texts[mutant.file].count(mutant.before) != 1] == []


def test_bad_launches(selftest):
    status, output, _ = selftest("plain", "bad_launch")
    assert status == 0
    assert output.splitlines() == [
        "bad launch: a block has 1 to 1024 threads, at most 64 along z, got (1024, 2, 1)",
        "bad launch: a block has 1 to 1024 threads, at most 64 along z, got (1, 0, 1)",
        "bad launch: a grid has 1 to 65535 blocks along y and z, got (1, 0, 1)",
        "bad launch: a grid has 1 to 65535 blocks along y and z, got (1, 65536, 1)",
        "bad launch: a block has at most 227 KiB of shared memory, got 232449 bytes",
        "bad launch: a cluster has 1 to 8 blocks and divides the grid along x, got 16 for 16",
        "bad launch: a cluster has 1 to 8 blocks and divides the grid along x, got 4 for 6",
        "no error",
    ]


@pytest.mark.parametrize("build", BUILDS)
def test_the_next_launch_after_an_error_is_right(selftest, build):
    status, output, errors = selftest(build, "reuse")
    assert (status, errors) == (0, "")
    assert output.count("; found by ") == 3 * 5
    assert output.count(DEADLOCK) == 3 * 2
    assert output.splitlines().count("right") == 3 * 2 + 1
    assert "wrong" not in output
