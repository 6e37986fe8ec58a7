#!/usr/bin/env bash
# Builds gspn_core on a machine with a GPU, checks and measures it in one call of nine minutes; see --help.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: gpu.sh [--dry-run] [--budget SECONDS] [--wheel FILE] [--resume FILE] [--help] [-- OPTION ...]

Builds gspn-core from this checkout, then runs benchmarks/gpu.py: what only hardware shows, the timings of the targets,
the tests on the GPU (tests/test_cuda.py, in several processes), the other timings, and a profile of five kernels if ncu
is on PATH. Writes benchmarks/results/<gpu>-torch<version>-<date>.json after every case, with a table, a plot and the
log of the tests beside it, and the same to $OUT if that is set. Ends with one line for each step, and with a status
other than 0 if any failed. What the time does not allow is listed as not run; --resume goes on with it.

  --dry-run          what can be tried without a GPU: compile line_launch.cu if nvcc is there, run gpu.py on the CPU with
                     tiny shapes, make its table and plot; nothing is installed or written to results
  --budget SECONDS   for everything together (default 540)
  --wheel FILE       install this wheel of gspn-core, which must be of this checkout, instead of building one: it may have
                     been built on a machine without a GPU, for the Python of this one
  --resume FILE      a JSON that an earlier call on the same machine has written; measures what it lacks
  -- OPTION ...      what follows goes to gpu.py, such as --stages smoke targets, or --filter NAME

Environment: PYTHON (default python3); OUT, a folder for copies; PIP_USER, PIP_PREFIX or PIP_TARGET for where pip
installs; GSPN_CUDA_ARCHITECTURES (default: that of the GPU) and whatever else the build reads.
HELP
}

refuse() {
  echo "gpu.sh: $1" >&2
  exit 2
}

dry_run=false
budget=540
wheel=
resume=
options=()
while (($#)); do
  case $1 in
    --dry-run) dry_run=true ;;
    --budget)
      budget=${2:-}
      [[ $budget =~ ^[1-9][0-9]*$ ]] || refuse "--budget takes a whole number of seconds, got '$budget'"
      shift
      ;;
    --resume)
      resume=${2:-}
      [[ -f $resume ]] || refuse "--resume takes a file that an earlier call has written, got '$resume'"
      resume=$(realpath "$resume")
      shift
      ;;
    --wheel)
      wheel=${2:-}
      [[ $wheel == *.whl && -f $wheel ]] || refuse "--wheel takes a wheel of gspn-core, got '$wheel'"
      wheel=$(realpath "$wheel")
      shift
      ;;
    --)
      shift
      options=("$@")
      break
      ;;
    -h | --help) usage; exit 0 ;;
    *) refuse "unknown option '$1', see --help" ;;
  esac
  shift
done

benchmarks=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
package=$(dirname "$benchmarks")
python=${PYTHON:-python3}
results=$benchmarks/results
[[ -d /usr/local/cuda/bin ]] && PATH=$PATH:/usr/local/cuda/bin
export PYTHONUNBUFFERED=1

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
summary=()

left() { echo $((budget - SECONDS)); }

# step NAME LIMIT COMMAND...: runs a command for LIMIT seconds at most, or what is left; 1 if it failed or had no time.
step() {
  local name=$1 limit=$2 rc=0 began=$SECONDS
  shift 2
  (($(left) < limit)) && limit=$(left)
  if ((limit < 5)); then
    summary+=("$name: not run, the budget of $budget s is used up")
    status=1
    return 1
  fi
  echo "== $name (at most $limit s)"
  # INT first: the program then ends what it has started.
  timeout --signal=INT --kill-after=10 "$limit" "$@" || rc=$?
  case $rc in
    0) summary+=("$name: passed in $((SECONDS - began)) s") && return 0 ;;
    124 | 137) summary+=("$name: stopped after $limit s, the rest of it was not run") ;;
    *) summary+=("$name: FAILED with status $rc") ;;
  esac
  status=1
  return 1
}

# finish: the summary; after abandon REASON, with the step that was left.
abandon() {
  summary+=("benchmark: not run, $1")
  status=1
  finish
}

finish() {
  printf '\n== summary, %s s of %s\n' "$SECONDS" "$budget"
  printf '%s\n' "${summary[@]}"
  exit "$status"
}

report() { # JSON: makes a table and a plot beside it
  local report=("$python" -m gspn_core.bench.report "$1")
  step "table" 30 "${report[@]}" --table "${1%.json}.md" || return 0
  "$python" -c 'import matplotlib' 2>/dev/null || { summary+=("plot: not run, matplotlib is not installed"); return 0; }
  step "plot" 60 "${report[@]}" --plot "${1%.json}.png" || return 0
}

if $dry_run; then
  for architecture in sm_80 sm_90; do
    command -v nvcc >/dev/null || { summary+=("line_launch.cu: not run, nvcc is not on PATH"); break; }
    step "line_launch.cu for $architecture" 120 nvcc -O3 -std=c++17 -Werror all-warnings "-arch=$architecture" -shared \
      -Xcompiler -fPIC -o "$work/line_launch.so" "$benchmarks/line_launch.cu" || true
  done
  # The tests would only say that there is no GPU.
  gpu_py=("$python" "$benchmarks/gpu.py" --device cpu --quick --progress --stages smoke targets rest profile)
  gpu_py+=(--budget 230 --out "$work/trial.json" ${options[@]+"${options[@]}"})
  if step "gpu.py on the CPU" 240 "${gpu_py[@]}"; then
    report "$work/trial.json"
    if [[ -n ${OUT:-} ]]; then cp "$work"/trial.* "$OUT/"; fi
  fi
  finish
fi

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")') ||
  refuse "$python cannot import torch; name another Python in PYTHON"
[[ -n $gpu ]] || refuse "torch finds no GPU; --dry-run tries what needs none"
echo "== $gpu"

missing=()
modules=(pip pytest xdist hypothesis)
tools=()
[[ -n $wheel ]] || modules+=(scikit_build_core pybind11) tools+=(nvcc cmake)
for module in "${modules[@]}"; do
  "$python" -c "import $module" 2>/dev/null || missing+=("$module")
done
for tool in ${tools[@]+"${tools[@]}"}; do
  command -v "$tool" >/dev/null || { [[ $tool == cmake ]] && "$python" -c 'import cmake' 2>/dev/null; } || missing+=("$tool")
done
((${#missing[@]} == 0)) ||
  refuse "missing: ${missing[*]}. No package index is asked; install them for $python first."

export GSPN_CUDA=${GSPN_CUDA:-on}
if [[ -z ${GSPN_CUDA_ARCHITECTURES:-} ]]; then
  # Only what this machine runs: the other architectures would take most of the time.
  GSPN_CUDA_ARCHITECTURES=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  export GSPN_CUDA_ARCHITECTURES
fi
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
if [[ -n $wheel ]]; then
  step "installation" 60 "$python" -m pip install --no-index --no-deps --force-reinstall "$wheel" ||
    abandon "the wheel does not install"
else
  step "build" 300 "$python" -m pip install --no-build-isolation --no-deps "$package" || abandon "there is no build"
fi
# pip does not make Python look where PIP_TARGET and PIP_PREFIX have it install.
if [[ -n ${PIP_TARGET:-} ]]; then
  export PYTHONPATH=$PIP_TARGET${PYTHONPATH:+:$PYTHONPATH}
elif [[ -n ${PIP_PREFIX:-} ]]; then
  site=$("$python" -c 'import sys, sysconfig
print(sysconfig.get_path("platlib", vars={"base": sys.argv[1], "platbase": sys.argv[1]}))' "$PIP_PREFIX")
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

# Without kernels every test would be skipped, and that is no success.
cd "$work"
step "CUDA kernels" 60 "$python" -c 'import gspn_core
cuda = gspn_core.info()["cuda"]
print(gspn_core.__file__, cuda)
raise SystemExit(0 if cuda["compiled"] else 1)' || abandon "gspn_core has no CUDA kernels"

cd "$package"
mkdir -p "$results"
outs=(--out ${OUT:+"$OUT"} "$results") # the tests' log and the profiles go beside the first
[[ -n $resume ]] && outs=(--resume "$resume")
touch "$work/before"
reports=15 # for the table and the plot
gpu_py=("$python" "$benchmarks/gpu.py" --progress --processes 8 --budget $(($(left) - reports)))
gpu_py+=("${outs[@]}" ${options[@]+"${options[@]}"})
step "checks and benchmark" $(($(left) - reports + 5)) "${gpu_py[@]}" || true
[[ -n $resume && -n ${OUT:-} ]] && cp -p "$resume" "$OUT/"
written=("$results" ${OUT:+"$OUT"} ${resume:+"$resume"})
find "${written[@]}" -maxdepth 1 -name '*.json' -newer "$work/before" | sort -u >"$work/written"
while IFS= read -r file; do report "$file"; done <"$work/written"
# What the status of the benchmark does not tell.
while IFS= read -r line; do summary+=("$line"); done < <("$python" - "$(head -n 1 "$work/written")" <<'PYTHON'
import json, sys
record = json.load(open(sys.argv[1])) if sys.argv[1] else {"stages": [], "accuracy": {}}
for stage in record["stages"]:
    print(f"  {stage['name']}: {stage['state']}, {stage['seconds']:.0f} of {stage['limit']:.0f} s")
for name, tests in record["accuracy"].items():
    counts = ", ".join(f"{tests[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    print(f"  tests {name}: {counts}; {tests['state']}")
PYTHON
)
finish
