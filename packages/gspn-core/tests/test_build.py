"""The build backend: what it says without a compiler, and what it fetches where there is a driver but no nvcc."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="drivers are looked for on Linux alone")
NVCC = "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.*"

# cuInit and the others answer as a driver does, with what is compiled in.
DRIVER = """
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int* version) { *version = CUDA; return 0; }
int cuDeviceGetCount(int* count) { *count = sizeof((int[]){GPUS}) / sizeof(int); return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  int gpus[] = {GPUS};
  if (attribute != 75 && attribute != 76) return 1;
  *value = attribute == 75 ? gpus[device] / 10 : gpus[device] % 10;
  return 0;
}
"""

SMI = """#!/bin/sh
case "$*" in
  *compute_cap*) printf '{}\\n' ;;
  *) echo '| NVIDIA-SMI 580.10    Driver Version: 580.10    CUDA Version: {}  |' ;;
esac
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a C++ compiler, without nvcc and without a driver, in the environment of processes."""
    for name in [name for name in os.environ if name.startswith(("GSPN_CUDA", "CMAKE_", "SKBUILD_", "CUDA"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("LIBRARY_PATH", raising=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    make_program(programs / "c++")
    (programs / "sh").symlink_to(shutil.which("sh"))
    monkeypatch.setenv("PATH", str(programs))
    if sys.platform == "linux":
        make_driver(tmp_path, monkeypatch, init=100)  # CUDA_ERROR_NO_DEVICE
    return programs


def make_program(path, text="#!/bin/sh\nexit 1\n"):
    path.write_text(text)
    path.chmod(0o755)


def make_driver(folder, monkeypatch, cuda=13000, gpus=(90,), init=0):
    compiler = shutil.which("cc", path=os.defpath) or shutil.which("gcc", path=os.defpath)
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = folder / "driver.c"
    source.write_text(DRIVER)
    options = (f"-DINIT={init}", f"-DCUDA={cuda}", f"-DGPUS={','.join(map(str, gpus))}")
    library = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *options, "-o", str(library), str(source)]
    subprocess.run(command, check=True, env={"PATH": os.defpath})
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))


def run(code, *paths):
    """Run Python with the backend as gspn_build, in the environment of the test."""
    paths = (*paths, PACKAGE / "backend", *filter(None, [os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", f"import gspn_build\n{code}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
    )


def requirements(settings=None):
    """Return what the build requires of CUDA, and what the backend says."""
    result = run(f"print(gspn_build.get_requires_for_build_wheel({settings!r}))")
    assert result.returncode == 0, result.stderr
    *said, required = result.stdout.splitlines()
    return [name for name in eval(required) if "cuda" in name], said


# ---- the compiler


def test_without_a_compiler_one_sentence_says_what_to_install(machine):
    (machine / "c++").unlink()
    result = run("gspn_build.get_requires_for_build_wheel()")
    assert result.returncode == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("gspn-core: no C++ compiler was found") and "CXX" in line
    assert "install it with `" in line


@pytest.mark.parametrize(
    "release, command",
    [
        ("ID=ubuntu\nID_LIKE=debian\n", "apt install g++"),
        ("ID=debian\n", "apt install g++"),
        ('ID=rocky\nID_LIKE="rhel centos fedora"\n', "dnf install gcc-c++"),
        ("ID=arch\n", "pacman -S gcc"),
        ("ID=alpine\n", "apk add g++"),
        ('ID=opensuse-leap\nID_LIKE="suse opensuse"\n', "zypper install gcc-c++"),
        ("ID=other\n", "apt install g++ (Debian, Ubuntu) or dnf install gcc-c++ (Fedora, RHEL)"),
    ],
)
def test_what_to_install_depends_on_the_platform(tmp_path, release, command):
    file = tmp_path / "os-release"
    file.write_text(release)
    code = f"import platform; platform.system = lambda: 'Linux'; platform._os_release_candidates = ({str(file)!r},)"
    result = run(f"{code}\nprint(gspn_build._how_to_install_a_compiler())")
    assert result.stdout.strip() == command, result.stderr


def test_on_macos_the_command_line_tools_are_named():
    result = run("import platform; platform.system = lambda: 'Darwin'\nprint(gspn_build._how_to_install_a_compiler())")
    assert result.stdout.strip() == "xcode-select --install"


def test_cxx_that_is_not_there_is_named(machine, monkeypatch):
    monkeypatch.setenv("CXX", "g++-99 -m64")
    result = run("gspn_build.get_requires_for_build_wheel()")
    assert (
        result.stderr == "gspn-core: the environment variable CXX names the C++ compiler g++-99, which is not there.\n"
    )


@pytest.mark.parametrize(
    "settings", [{"cmake.define.CMAKE_CXX_COMPILER": "/x/g++"}, {"cmake.args": "-DCMAKE_TOOLCHAIN_FILE=/x.cmake"}]
)
def test_a_compiler_that_cmake_is_told_of_is_not_looked_for(machine, settings):
    (machine / "c++").unlink()
    assert requirements(settings) == ([], [])


def test_pip_shows_the_sentence_and_nothing_of_cmake(machine, tmp_path):
    (machine / "c++").unlink()
    # No isolation, so that the test needs no index.
    command = ("-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(tmp_path))
    result = subprocess.run([sys.executable, *command, str(PACKAGE)], capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 1 and "no C++ compiler was found" in output, output
    assert "CMake" not in output and "Traceback" not in output


# ---- nvcc


@LINUX
def test_without_a_driver_nothing_is_fetched(machine):
    required, said = requirements()
    assert required == []
    assert said == [] or "names no GPU" in said[0]  # the latter on a machine that has a driver


@LINUX
@pytest.mark.parametrize(
    "gpus, architectures",
    [((90,), "90"), ((90, 90, 86), "86, 90"), ((75, 89), "89"), ((121,), "121"), ((107,), "103")],
)
def test_nvcc_is_fetched_for_the_gpus_of_the_machine(machine, tmp_path, monkeypatch, gpus, architectures):
    make_driver(tmp_path, monkeypatch, gpus=gpus)
    required, (line,) = requirements()
    assert required == [NVCC]
    assert line == (
        f"gspn-core: CUDA kernels for compute capability {architectures}, by nvcc from its Python packages "
        "(GSPN_CUDA=off: none)"
    )


@LINUX
def test_nvidia_smi_serves_where_the_library_does_not(machine):
    make_program(machine / "nvidia-smi", SMI.format(r"9.0\n8.6", "13.1"))
    required, (line,) = requirements()
    assert required == [NVCC] and "compute capability 86, 90" in line


@LINUX
@pytest.mark.parametrize("how", ["environment", "setting"])
def test_off_means_off(machine, tmp_path, monkeypatch, how):
    make_driver(tmp_path, monkeypatch)
    if how == "environment":
        monkeypatch.setenv("GSPN_CUDA", "off")
    assert requirements({"cmake.define.GSPN_CUDA": "off"} if how == "setting" else None) == ([], [])


@LINUX
@pytest.mark.parametrize("where", ["PATH", "CUDACXX"])
def test_nvcc_of_the_machine_comes_first(machine, tmp_path, monkeypatch, where):
    make_driver(tmp_path, monkeypatch)
    if where == "PATH":
        make_program(machine / "nvcc")
    else:
        monkeypatch.setenv("CUDACXX", "/x/nvcc")
    assert requirements() == ([], [])


@LINUX
@pytest.mark.parametrize(
    "driver, reason", [({"cuda": 12080}, "serves CUDA 12.8"), ({"gpus": (75,)}, "capability 8.0 or later")]
)
def test_a_driver_or_gpu_that_is_too_old_is_named(machine, tmp_path, monkeypatch, driver, reason):
    make_driver(tmp_path, monkeypatch, **driver)
    required, (line,) = requirements()
    assert required == [] and reason in line and line.endswith("only CPU kernels are built")


@LINUX
def test_on_ends_the_build_where_the_driver_is_too_old(machine, tmp_path, monkeypatch):
    make_driver(tmp_path, monkeypatch, cuda=12080)
    result = run("gspn_build.get_requires_for_build_wheel({'cmake.define.GSPN_CUDA': 'on'})")
    assert result.returncode == 1
    assert "serves CUDA 12.8" in result.stderr and len(result.stderr.splitlines()) == 1


@LINUX
def test_on_fetches_nvcc_without_a_driver_and_for_all_gpus(machine, monkeypatch):
    monkeypatch.setenv("GSPN_CUDA", "on")
    required, (line,) = requirements()
    assert required == [NVCC] and "GSPN_CUDA=on asks for it" in line


@LINUX
def test_architectures_that_are_asked_for_count_more_than_the_machine(machine, tmp_path, monkeypatch):
    make_driver(tmp_path, monkeypatch)
    monkeypatch.setenv("GSPN_CUDA_ARCHITECTURES", "80;100")
    _, (line,) = requirements()
    assert "compute capability 80, 100" in line


USE = """
import os
gspn_build._use_nvcc({})
print([os.environ.get(name) for name in ("CUDACXX", "LIBRARY_PATH", "GSPN_CUDA_ARCHITECTURES")])
"""


@LINUX
def test_cmake_is_told_of_nvcc_and_the_gpu(machine, tmp_path, monkeypatch):
    make_driver(tmp_path, monkeypatch)
    site = tmp_path / "site"
    record = site / "nvidia_cuda_nvcc-13.0.88.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-nvcc\nVersion: 13.0.88\n")
    (record / "RECORD").write_text("nvidia/cu13/bin/nvcc,,\n")
    nvcc = site / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    make_program(nvcc)
    result = run(USE, site)
    assert eval(result.stdout.splitlines()[-1]) == [str(nvcc), str(site / "nvidia" / "cu13" / "lib"), "90"]


@LINUX
@pytest.mark.parametrize("wanted, status", [("auto", 0), ("on", 1)])
def test_without_isolation_the_missing_package_is_named(machine, tmp_path, monkeypatch, wanted, status):
    make_driver(tmp_path, monkeypatch)
    monkeypatch.setenv("GSPN_CUDA", wanted)
    result = run(USE)
    assert result.returncode == status and f"pip install '{NVCC}'" in result.stdout + result.stderr
