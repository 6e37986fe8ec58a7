"""The build backend of gspn-core: scikit-build-core, which it tells where a C++ compiler and nvcc are.

Before CMake starts, it
- ends the build with one sentence where no C++ compiler is found;
- adds nvcc's Python packages to what the build requires, where there is an NVIDIA driver but no nvcc, and builds for
  this machine's GPUs alone. `GSPN_CUDA=off` prevents that; `GSPN_CUDA=on` also adds them where no driver is, and then
  builds for all GPUs, or ends the build where they do not suffice.

https://peps.python.org/pep-0517/ describes the functions at the end.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from scikit_build_core import build as scikit_build
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = Mapping[str, Any]

# The first release of CUDA 13: a driver of any 13.x runs what it makes, PTX too. The packages of nvcc 12 lack nvcc
# itself. nvvm is named because nvcc's package takes any release of it.
NVCC = "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.*"
NVCC_ARCHITECTURES = (80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)  # of those that nvcc 13.0 knows, from 8.0 on
DRIVER_NEEDED = 13000  # as cuDriverGetVersion counts

COMPILERS = ("c++", "g++", "clang++", "icpx", "aCC", "xlC")  # among those that CMake looks for


# ---- settings, from pip's -C or from the environment


def _define(settings: Settings, name: str) -> str | None:
    """Return the value of -C cmake.define.NAME=..., if there is one."""
    value = settings.get(f"cmake.define.{name}")
    return str(value[-1] if isinstance(value, list) else value) if value else None


def _setting(settings: Settings, name: str) -> str:
    return _define(settings, name) or os.environ.get(name, "")


def _cmake_names(settings: Settings, name: str) -> bool:
    """Tell whether a variable of CMake is set by one of the ways that scikit-build-core has."""
    arguments = settings.get("cmake.args", "")
    given = [os.environ.get(key, "") for key in ("CMAKE_ARGS", "SKBUILD_CMAKE_ARGS", "SKBUILD_CMAKE_DEFINE")]
    return bool(_define(settings, name)) or any(name in text for text in (str(arguments), *given))


def _say(message: str) -> None:
    print(f"gspn-core: {message}", flush=True)


def _stop(message: str) -> None:
    """End the build with this message alone: installers print a traceback for any other exception."""
    sys.stdout.flush()
    sys.exit(f"gspn-core: {message}")


# ---- the C++ compiler


def _how_to_install_a_compiler() -> str:
    if platform.system() == "Darwin":
        return "xcode-select --install"
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    families = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    for family, command in (
        ("debian", "apt install g++"),
        ("fedora", "dnf install gcc-c++"),
        ("rhel", "dnf install gcc-c++"),
        ("suse", "zypper install gcc-c++"),
        ("arch", "pacman -S gcc"),
        ("alpine", "apk add g++"),
    ):
        if family in families:
            return command
    return "apt install g++ (Debian, Ubuntu) or dnf install gcc-c++ (Fedora, RHEL)"


def require_compiler(settings: Settings) -> None:
    """End the build with one sentence where CMake would not find a C++ compiler."""
    if platform.system() == "Windows" or any(
        _cmake_names(settings, name) for name in ("CMAKE_CXX_COMPILER", "CMAKE_TOOLCHAIN_FILE")
    ):
        return  # CMake looks in other places
    if os.environ.get("CMAKE_TOOLCHAIN_FILE"):
        return
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            _stop(f"the environment variable CXX names the C++ compiler {named[0]}, which is not there.")
        return
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found and not (found.startswith("/usr/bin/") and platform.system() == "Darwin"):
        return
    if found and subprocess.run(["xcode-select", "-p"], capture_output=True).returncode == 0:
        return  # macOS has a /usr/bin/c++ also without the command line tools
    _stop(
        "no C++ compiler was found, and installing from source needs one for C++17: "
        f"install it with `{_how_to_install_a_compiler()}`, or name yours in the environment variable CXX."
    )


# ---- the GPU


@dataclass(frozen=True)
class Driver:
    """An NVIDIA driver: the newest CUDA it serves, 0 if unknown, and the compute capabilities of its GPUs."""

    cuda: int  # 13010 is 13.1
    capabilities: tuple[int, ...]  # 90 is 9.0


def _ask_library() -> Driver | None:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number, count, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    try:
        if cuda.cuInit(0) != 0 or cuda.cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
        if cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return None
        capabilities = set()
        for ordinal in range(count.value):
            if cuda.cuDeviceGet(ctypes.byref(device), ordinal) != 0:
                return None
            parts = []
            for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
                value = ctypes.c_int()
                if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
                    return None
                parts.append(value.value)
            capabilities.add(10 * parts[0] + parts[1])
    except AttributeError:
        return None  # not the driver's library
    return Driver(number.value, tuple(sorted(capabilities)))


def _ask_command() -> Driver | None:
    def run(*arguments: str) -> str:
        command = ["nvidia-smi", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    try:
        capabilities = re.findall(r"^\s*(\d+)\.(\d)\s*$", run("--query-gpu=compute_cap", "--format=csv,noheader"), re.M)
        version = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", run())
    except (OSError, subprocess.SubprocessError):
        return None
    cuda = 1000 * int(version[1]) + 10 * int(version[2]) if version else 0
    return Driver(cuda, tuple(sorted({10 * int(major) + int(minor) for major, minor in capabilities})))


def find_driver() -> Driver | None:
    """Ask the driver's library, or nvidia-smi, what there is. None without a driver, or if it does not answer."""
    return _ask_library() or _ask_command()


@dataclass(frozen=True)
class Plan:
    """What the build does about CUDA where there is no nvcc: fetch it or not, for which GPUs, and why."""

    fetch: bool
    architectures: str = ""  # empty: all that the kernels support
    message: str = ""


def plan_cuda(settings: Settings) -> Plan:
    """Decide whether nvcc is fetched."""
    wanted = _setting(settings, "GSPN_CUDA").lower() or "auto"
    if wanted not in ("auto", "on"):
        return Plan(False)  # off, or what CMake rejects
    if os.environ.get("CUDACXX") or shutil.which("nvcc") or _cmake_names(settings, "CMAKE_CUDA_COMPILER"):
        return Plan(False)
    machine = f"{platform.system()} {platform.machine()}"
    driver = find_driver() if machine in ("Linux x86_64", "Linux aarch64") else None
    chosen = _setting(settings, "GSPN_CUDA_ARCHITECTURES")
    if driver is None:
        if machine not in ("Linux x86_64", "Linux aarch64"):
            return Plan(False)  # there are no packages for it
        if wanted == "on":
            return Plan(True, chosen, f"nvcc comes from its Python packages ({NVCC}); GSPN_CUDA=on asks for it")
        if Path("/proc/driver/nvidia").exists():
            return Plan(False, message="there is an NVIDIA driver, but it names no GPU: CUDA kernels need GSPN_CUDA=on")
        return Plan(False)
    if 0 < driver.cuda < DRIVER_NEEDED:
        served = f"{driver.cuda // 1000}.{driver.cuda % 1000 // 10}"
        message = (
            f"this machine's driver serves CUDA {served}, and nvcc's Python packages begin with 13.0: for CUDA kernels "
            "update the driver, or put nvcc of CUDA 12.4 or later on PATH"
        )
        if wanted == "on":
            _stop(f"{message} (GSPN_CUDA=on)")
        return Plan(False, message=f"{message}; only CPU kernels are built")
    supported = sorted({_architecture(capability) for capability in driver.capabilities if capability >= 80})
    if not supported and wanted == "auto":
        names = ", ".join(f"{c // 10}.{c % 10}" for c in driver.capabilities) or "none"
        message = f"the CUDA kernels need a GPU of compute capability 8.0 or later, this machine's: {names}"
        return Plan(False, message=f"{message}; only CPU kernels are built")
    architectures = chosen or ";".join(map(str, supported))
    what = f"compute capability {architectures.replace(';', ', ')}" if architectures else "all supported GPUs"
    return Plan(True, architectures, f"CUDA kernels for {what}, by nvcc from its Python packages (GSPN_CUDA=off: none)")


def _architecture(capability: int) -> int:
    """Return what to compile for: the capability itself, or the newest that nvcc knows, whose PTX later GPUs take."""
    return max(known for known in NVCC_ARCHITECTURES if known <= capability)


def _nvcc_of_packages() -> Path | None:
    """Return nvcc of the package nvidia-cuda-nvcc in the build's environment."""
    try:
        files = metadata.distribution("nvidia-cuda-nvcc").files or []
    except metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.name == "nvcc"]
    return next((path for path in paths if path.is_file()), None)


def _requirements(settings: Settings) -> list[str]:
    plan = plan_cuda(settings)
    if plan.message:
        _say(plan.message)
    return [NVCC] if plan.fetch else []


def _use_nvcc(settings: Settings) -> None:
    """Tell CMake where nvcc is, if it was fetched, and what to build for."""
    plan = plan_cuda(settings)
    if not plan.fetch:
        return
    nvcc = _nvcc_of_packages()
    if nvcc is None:
        # Only a build without isolation comes here.
        message = f"nvcc is needed for CUDA kernels: pip install '{NVCC}', or GSPN_CUDA=off"
        if _setting(settings, "GSPN_CUDA").lower() == "on":
            _stop(message)
        _say(message)
        return
    _say(plan.message)
    os.environ["CUDACXX"] = str(nvcc)
    libraries = (str(nvcc.parent.parent / "lib"), os.environ.get("LIBRARY_PATH", ""))
    os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    if plan.architectures:
        os.environ["GSPN_CUDA_ARCHITECTURES"] = plan.architectures


# ---- what installers call


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return what scikit-build-core requires, and nvcc where it is to be fetched."""
    require_compiler(config_settings or {})
    return [*scikit_build.get_requires_for_build_wheel(config_settings), *_requirements(config_settings or {})]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """Return the same for an editable installation."""
    require_compiler(config_settings or {})
    return [*scikit_build.get_requires_for_build_editable(config_settings), *_requirements(config_settings or {})]


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Build a wheel."""
    require_compiler(config_settings or {})
    _use_nvcc(config_settings or {})
    return scikit_build.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Build an editable wheel."""
    require_compiler(config_settings or {})
    _use_nvcc(config_settings or {})
    return scikit_build.build_editable(wheel_directory, config_settings, metadata_directory)
