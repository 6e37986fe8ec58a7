"""Breaks the CUDA kernels on purpose, one fault at a time, and shows that the tests detect every one.

    python tests/emulation/mutants.py [--only NAME]

A mutant is a copy of the kernels with one line changed, compiled for the host for float32 alone. It must be detected
by the check for its kind of fault: values compared with the reference, AddressSanitizer, or ThreadSanitizer. Copies
without a change must pass, or a check that always fails would detect everything.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import build

CUDA = build.HERE.parent.parent / "csrc" / "cuda"
TESTS = build.HERE.parent / "test_cuda_emulated.py"

# The other types would take most of the time to compile, without detecting more.
STUB = """#include <stdexcept>
#include "device.cuh"
#include "typed.hpp"
namespace gspn::cuda {{
template <> size_t Typed<{0}>::forward_workspace(const Params&) {{ throw std::invalid_argument("not built"); }}
template <> size_t Typed<{0}>::backward_workspace(const Params&) {{ throw std::invalid_argument("not built"); }}
template <> void Typed<{0}>::forward(const Params&, void*, void*) {{}}
template <> void Typed<{0}>::backward(const Params&, void*, void*) {{}}
}}
"""
STUBS = {"float64": "double", "bfloat16": "BFloat16", "float16": "Float16"}


@dataclass(frozen=True)
class Mutant:
    """A change of one place in one file, and the check that has to detect it: values, address or thread."""

    name: str
    noticed_by: str
    file: str
    before: str
    after: str


UNCHANGED = "constexpr int kSaturation"
MUTANTS = (
    *(Mutant(f"nothing: passes {kind}", kind, "step.cuh", UNCHANGED, UNCHANGED) for kind in ("values", "thread")),
    Mutant(
        "left border weighs",
        "values",
        "tile.cuh",
        "widen(raw[2].v[e]), j > 0, j + 1",
        "widen(raw[2].v[e]), true, j + 1",
    ),
    Mutant("chunks run on", "values", "step.cuh", "kSelects && starts_chunk ? line.f[q] : next[q]", "next[q]"),
    Mutant("vectors: chunks run on", "values", "step.cuh", "        if (starts_chunk)\n", "        if (false)\n"),
    Mutant(
        "wrong difference", "values", "step.cuh", "line.c[q] * (right(q) - h[q]);", "line.c[q] * (right(q) - left(q));"
    ),
    Mutant("vectors: left border", "values", "columns.cuh", "q > 0 ? ~0u : from.left", "q > 1 ? ~0u : from.left"),
    Mutant(
        "vectors: half a tile too late",
        "values",
        "columns.cuh",
        "rows[1 - half].load(columns, first + kRows, job.end)",
        "rows[1 - half].load(columns, first, job.end)",
    ),
    Mutant(
        "vectors: sums of a neighbour",
        "values",
        "columns.cuh",
        "if (owns) output.store",
        "if (columns.in) output.store",
    ),
    Mutant("vectors: one buffer for all", "thread", "columns.cuh", "parity ^= 1, h", "parity, h"),
    Mutant("copies: no wait", "values", "rows.cuh", "wait_for_copies<0>();", ""),
    Mutant(
        "copies: one group too few",
        "values",
        "rows.cuh",
        "wait_for_copies<0>();",
        "wait_for_copies<1>();",
    ),
    Mutant(
        "copies: no barrier after the wait",
        "thread",
        "rows.cuh",
        "wait_for_copies<0>();\n    __syncwarp();",
        "wait_for_copies<0>();",
    ),
    Mutant(
        "copies: to a stage in use",
        "thread",
        "rows.cuh",
        "    __syncwarp();  // the stage is free for new copies\n",
        "",
    ),
    Mutant(
        "copies: not committed",
        "values",
        "rows.cuh",
        "next * Stage::kLines, p);\n    commit_copies();",
        "next * Stage::kLines, p);",
    ),
    Mutant(
        "rows: stored before they are there",
        "thread",
        "rows.cuh",
        "    __syncwarp();\n    strip.template store",
        "    strip.template store",
    ),
    Mutant("lanes: no wait", "values", "lanes.cuh", "wait_for_copies<kSlots - 2>();", ""),
    Mutant(
        "lanes: no barrier after the wait",
        "thread",
        "lanes.cuh",
        "wait_for_copies<kSlots - 2>();\n    __syncwarp();",
        "wait_for_copies<kSlots - 2>();",
    ),
    Mutant("lanes: copies beyond the line", "address", "lanes.cuh", "if (q < job.own && job.first", "if (job.first"),
    Mutant("lanes: edges in one buffer", "thread", "lanes.cuh", "parity ^= 1;\n    A* const at", "A* const at"),
    Mutant(
        "lanes: states of warps that are not there yet",
        "thread",
        "lanes_backward.cuh",
        "    __syncthreads();  // warps read the states of those beside\n",
        "",
    ),
    Mutant("lanes: nothing from the warp beside", "values", "lanes_backward.cuh", "next[0] += from_left, ", ""),
    Mutant("lanes: weights of one lane", "values", "lanes.cuh", "__shfl_sync(~0u, c, q)", "__shfl_sync(~0u, c, 0)"),
    Mutant("rows: read beyond the image", "address", "rows.cuh", "exists && j >= 0", "j >= 0"),
    Mutant(
        "fused: copies to a stage in use",
        "thread",
        "fused.cuh",
        "    __syncwarp();  // the stage is free for new copies; other lanes have the pixels in a vertical scan\n",
        "",
    ),
    Mutant(
        "fused: no barrier after the wait",
        "thread",
        "fused.cuh",
        "wait_for_copies<0>();\n    __syncwarp();",
        "wait_for_copies<0>();",
    ),
    Mutant(
        "fused: infinities are not seen",
        "values",
        "step.cuh",
        "if (!any_lane(in && !(probe - probe == A(0)))) {",
        "if (true) {",
    ),
    Mutant(
        "fused: states saved late",
        "values",
        "fused.cuh",
        "due = count > 0 ? i + interval : -1;\n    }",
        "due = count > 0 ? i + interval + 4 : -1;\n    }",
    ),
    Mutant(
        "shared: images before they are there",
        "thread",
        "shared.cuh",
        "warp_sums[at] = A(0); });\n  __syncthreads();",
        "warp_sums[at] = A(0); });",
    ),
    Mutant(
        "shared: no meeting in the middle",
        "thread",
        "shared.cuh",
        "      __syncthreads();\n    }\n  }\n  warp.template",
        "    }\n  }\n  warp.template",
    ),
    Mutant("shared: no slack behind the images", "address", "shared.cuh", " + slack(p);", ";"),
    Mutant("shared: weights of a neighbour's set", "values", "shared.cuh", "channel / l.share)", "first / l.share)"),
    Mutant("gradients: no wait", "values", "row_backward.cuh", "    wait_for_copies<0>();\n", ""),
    Mutant(
        "gradients: stored before they are there",
        "thread",
        "row_backward.cuh",
        "    adjoint.run(begin);\n    __syncwarp();",
        "    adjoint.run(begin);",
    ),
    Mutant(
        "gradients: edges of states stay wrong",
        "values",
        "column_backward.cuh",
        "keep(i0 - begin, h);  // now",
        "// now",
    ),
    Mutant("gradients: edges of rows stay wrong", "values", "row_backward.cuh", "keep(4 * turn, h);  // now", "// now"),
    Mutant(
        "gradients: of a first line", "values", "gradients.cuh", "if (!starts_chunk && kStochastic)", "if (kStochastic)"
    ),
    Mutant("logits do not saturate", "values", "step.cuh", "logit < A(kSaturation) ? A(kSaturation) : logit", "logit"),
    Mutant("sums start anew", "values", "forward.cuh", "if (!first) value += *sums.at(at.col, i, j);", ""),
    Mutant(
        "halo one short", "values", "tile.cuh", "? index * kUseful - C::K : 0", "? index * (kUseful + 1) - C::K : 0"
    ),
    Mutant("edges of states stay wrong", "values", "backward.cuh", "put_row<C>(states, w.i0 - begin, h);", ""),
    Mutant(
        "adjoint leaks at the edge",
        "values",
        "backward.cuh",
        "from_lower_lane<C::kLanes>(c.v[P - 1] * g[P - 1])",
        "__shfl_up_sync(~0u, c.v[P - 1] * g[P - 1], 1, C::kLanes)",
    ),
    Mutant(
        "adjoint loses its own weight", "values", "backward.cuh", "v[q] = b[q] * g[q] + right", "v[q] = g[q] + right"
    ),
    Mutant("last part left out", "values", "partials.cuh", "part < parts; ++part", "part + 1 < parts; ++part"),
    Mutant("one channel too few", "values", "backward.cuh", "c < job.warps;", "c + 1 < job.warps;"),
    Mutant(
        "store to a block that has not started",
        "values",
        "forward.cuh",
        "if (l.cluster > 1) cluster_barrier();  // no block stores",
        "// no block stores",
    ),
    Mutant(
        "store to one in the backward pass",
        "values",
        "backward.cuh",
        "if (l.cluster > 1) cluster_barrier();  // no block stores",
        "// no block stores",
    ),
    Mutant(
        "infinities become NaN",
        "values",
        "step.cuh",
        "const bool careful = (!kSelects && starts_chunk) || !(probe - probe == A(0));",
        "const bool careful = !kSelects && starts_chunk;",
    ),
    Mutant(
        "ends of a line take a state of their lane",
        "values",
        "step.cuh",
        "from_lower_lane<C::kLanes>(h[C::P - 1])",
        "__shfl_up_sync(~0u, h[C::P - 1], 1, C::kLanes)",
    ),
    Mutant(
        "gradient of a first line",
        "values",
        "backward.cuh",
        "if (p.stochastic && !starts)",
        "if (p.stochastic)",
    ),
    Mutant("read past the line", "address", "tile.cuh", "j >= 0 && j < w.length;\n}", "j >= 0 && j <= w.length;\n}"),
    Mutant("shared memory without pads", "address", "forward.cuh", "(WeightTile<C>::size(stochastic) + ", "("),
    Mutant(
        "no barrier after the exchange",
        "thread",
        "tile.cuh",
        "    else\n      __syncthreads();\n    const A* const mine",
        "    const A* const mine",
    ),
    Mutant("one buffer for all exchanges", "thread", "forward.cuh", "exchange(halos, t & 1, h", "exchange(halos, 0, h"),
    Mutant(
        "no barrier before the weights are used",
        "thread",
        "forward.cuh",
        "share_barrier<C>();\n    if (job.active) output.load",
        "if (job.active) output.load",
    ),
    Mutant(
        "no barrier before the tile is stored",
        "thread",
        "forward.cuh",
        "__syncwarp();\n    if (job.active) output.store",
        "if (job.active) output.store",
    ),
    Mutant(
        "no meeting in the middle",
        "thread",
        "forward.cuh",
        "        share_barrier<C>();\n      }\n      __syncthreads();",
        "        share_barrier<C>();\n      }",
    ),
    Mutant(
        "states read before they are there",
        "thread",
        "backward.cuh",
        "adjoint_step<C>(v, part.weights, tile, m);\n      share_barrier<C>();",
        "adjoint_step<C>(v, part.weights, tile, m);",
    ),
)


def _notice(mutant: Mutant, sources: Path, work: Path) -> str:
    """Build a mutant, run the check that must detect it, and return its report; empty if there is none."""
    option = f"-DGSPN_CUDA_SOURCES={sources}"
    if mutant.noticed_by == "values":
        module = build.build_module(work / "build", "", option)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS)]
        command += ["-k", "not bfloat16 and not float16 and not float64"]
        environment = os.environ | {"GSPN_EMULATED_MODULE": str(module), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent.parent)
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        return failed[0] if done.returncode == 1 and failed else ""
    program = build.build_races(mutant.noticed_by, work / "build", option)
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([program, "float32"], capture_output=True, text=True, env=environment)
    said = [line for line in done.stderr.splitlines() if "SUMMARY" in line]
    return said[0] if done.returncode != 0 and said else ""


def _check(mutant: Mutant) -> tuple[Mutant, str, float]:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "csrc" / "cuda"
        shutil.copytree(CUDA.parent, sources.parent)
        for name, storage in STUBS.items():
            (sources / f"kernels_{name}.cu").write_text(STUB.format(storage))
        text = (sources / mutant.file).read_text()
        if text.count(mutant.before) != 1:
            raise RuntimeError(f"{mutant.name}: its text occurs {text.count(mutant.before)} times in {mutant.file}")
        (sources / mutant.file).write_text(text.replace(mutant.before, mutant.after))
        said = _notice(mutant, sources, Path(folder))
    return mutant, said, time.perf_counter() - start


def main() -> int:
    """Return 0 if every mutant was noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="the mutants whose name contains this")
    only = parser.parse_args().only
    if build.missing():
        print(build.missing(), file=sys.stderr)
        return 1
    mutants = [mutant for mutant in MUTANTS if only is None or only in mutant.name]
    unnoticed = 0
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for mutant, said, seconds in pool.map(_check, mutants):
            unchanged = mutant.before == mutant.after
            unnoticed += bool(said) if unchanged else not said
            said = said or ("nothing noticed" if unchanged else "NOT NOTICED")
            print(f"{seconds:4.0f} s  {mutant.name:40s} {mutant.noticed_by:8s} {said}"[:200], flush=True)
    print(f"{len(mutants) - unnoticed} of {len(mutants)} as expected")
    return 1 if unnoticed or not mutants else 0


if __name__ == "__main__":
    sys.exit(main())
