"""Builds the CUDA kernels for the host: as a Python module, and as a program for sanitizers."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
BUILD = HERE.parent.parent / "build"


def missing() -> str:
    """Return what this machine lacks for the emulation; empty if nothing."""
    if sys.platform != "linux":
        return "the emulation of CUDA needs Linux"
    lacking = [name for name in ("cmake", "ninja", "g++") if shutil.which(name) is None]
    return f"the emulation of CUDA needs {', '.join(lacking)}" if lacking else ""


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time build in a folder."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(folder: Path, target: str, *options: str) -> None:
    with _locked(folder):
        _build_target(folder, target, *options)


def _build_target(folder: Path, target: str, *options: str) -> None:
    _run("cmake", "-S", HERE, "-B", folder, "-G", "Ninja", "-DCMAKE_CXX_COMPILER=g++", *options)
    _run("cmake", "--build", folder, "--target", target)


def build_module(folder: Path = BUILD / "emulation", sanitizer: str = "", *options: str) -> Path:
    """Build `_emulated`, a module like gspn_core._C whose CUDA functions run on the CPU.

    Under a sanitizer it loads only into a process that starts with `address_sanitizer()` in its environment.
    """
    import pybind11

    _build(
        folder,
        "_emulated",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DGSPN_SANITIZER={sanitizer}",
        *options,
    )
    (path,) = folder.glob("_emulated*.so")
    return path


def build_races(sanitizer: str, folder: Path | None = None, *options: str) -> Path:
    """Build the program that runs every kernel under a sanitizer, `address` or `thread`."""
    folder = folder or BUILD / f"emulation-{sanitizer}"
    _build(folder, "races", f"-DGSPN_SANITIZER={sanitizer}", "-DGSPN_EMULATED_MODULE=OFF", *options)
    return folder / "races"


def address_sanitizer() -> dict[str, str]:
    """Return the environment variables that preload AddressSanitizer into a Python built without it."""

    def library(name: str) -> str:
        command = ["g++", f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # libstdc++ comes first too, or AddressSanitizer does not find the function that throws exceptions.
    return {
        "LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
    }


def load_module(path: str | Path) -> ModuleType:
    """Import an `_emulated` from where it was built."""
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def links(sanitizer: str) -> bool:
    """Tell whether g++ links and runs programs with a sanitizer."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "empty"
        command = ["g++", f"-fsanitize={sanitizer}", "-x", "c++", "-", "-o", str(program)]
        linked = subprocess.run(command, input="int main() {}", text=True, capture_output=True)
        return linked.returncode == 0 and subprocess.run([program], capture_output=True).returncode == 0
