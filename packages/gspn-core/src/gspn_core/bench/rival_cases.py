"""What one could call instead of `line_scan` on a CPU: a compiled loop over rows, first-order scans of others."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..ops import line_scan
from .cpu_cases import OURS, CpuCase, Shape, scan_inputs
from .harness import Case, Figures, Function, Lab, Target, UnavailableError, require_close

DOWN = "top_to_bottom"
COMPILED = "torch.compile of a row loop"


def rows(x: Tensor, weights: Tensor) -> Tensor:
    """Scan downwards as the equation reads, a row at a time; weights of every channel."""
    a, b, c = weights.unbind(2)
    h = x[:, :, 0]
    out = [h]
    for i in range(1, x.shape[2]):
        padded = F.pad(h, (1, 1))
        h = a[:, :, i] * padded[..., :-2] + b[:, :, i] * h + c[:, :, i] * padded[..., 2:] + x[:, :, i]
        out.append(h)
    return torch.stack(out, 2)


def associative(x: Tensor, weights: Tensor) -> Tensor:
    """Scan downwards by torch's associative scan; only the weight of the same position counts."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return second[0] * first[0], second[0] * first[1] + second[1]

    scanned = associative_scan(combine, (weights[:, :, 1], x), dim=2, combine_mode="generic")
    out: Tensor = scanned[1]
    return out


class RowLoop(CpuCase):
    """line_scan beside what torch.compile makes of the loop, its compile time included."""

    def measure(self, lab: Lab) -> Iterator[tuple[str, Figures]]:
        """Compile, check, time."""
        x, weights = scan_inputs(self.shape, self.shape[1])
        compiled, seconds = _compiled(rows, x, weights)
        functions: dict[str, Function] = {
            OURS: lambda: line_scan(x, weights, direction=DOWN),
            COMPILED: lambda: compiled(x, weights),
        }
        yield from _checked(self, lab, functions, reference.line_scan(x, weights, direction=DOWN), {COMPILED: seconds})


class FirstOrder(CpuCase):
    """The special case of weights 0, w, 0: a first-order recurrence, which other libraries have."""

    def measure(self, lab: Lab) -> Iterator[tuple[str, Figures]]:
        """Compile, check, time."""
        x, weights = scan_inputs(self.shape, self.shape[1])
        weights[:, :, ::2] = 0
        functions: dict[str, Function] = {OURS: lambda: line_scan(x, weights, direction=DOWN)}
        compiled, seconds = _compiled(associative, x, weights)
        functions["torch's associative_scan"] = lambda: compiled(x, weights)
        with contextlib.suppress(ImportError):
            scan = importlib.import_module("accelerated_scan.ref").scan
            gates, tokens = (t.mT.flatten(1, 2).contiguous() for t in (weights[:, :, 1], x))  # (N, C W, H)
            functions["accelerated-scan's reference"] = lambda: scan(gates, tokens)
        expected = reference.line_scan(x, weights, direction=DOWN)
        yield from _checked(self, lab, functions, expected, {"torch's associative_scan": seconds})


def make_cases(*, quick: bool) -> list[Case]:
    """Return the cases; quick ones have tiny shapes and no targets."""
    shape: Shape = (2, 4, 8, 6) if quick else (8, 64, 64, 64)
    cases: list[Case] = []
    for kind, name, rival in (
        (RowLoop, "line_scan, weights of every channel", COMPILED),
        (FirstOrder, "line_scan, weights 0 w 0", "torch's associative_scan"),
    ):
        targets = {OURS: (Target("speedup", ">=", 4),)} if kind is RowLoop and not quick else {}
        options = {"versus": {OURS: (name, rival)}, "targets": targets, "weight_groups": shape[1], "prepare": dict}
        cases.append(kind(group="rivals", name=name, shape=shape, **options))  # type: ignore[arg-type]
    return cases


def _compiled(f: Callable[..., Tensor], *inputs: Tensor) -> tuple[Callable[..., Tensor], float]:
    """Return the compiled function and the seconds that its first call took."""
    torch.compiler.reset()
    compiled, began = torch.compile(f), time.perf_counter()
    try:
        compiled(*inputs)
    except Exception as error:  # without a C++ compiler, for one
        raise UnavailableError(f"torch.compile does not work here: {str(error).splitlines()[0]}") from None
    return compiled, time.perf_counter() - began


def _checked(
    case: CpuCase, lab: Lab, functions: dict[str, Function], expected: Tensor, compile_s: dict[str, float]
) -> Iterator[tuple[str, Figures]]:
    for name, function in functions.items():
        got = function()
        assert isinstance(got, Tensor)
        require_close(f"{case.name}, {name}", _image_of(got, expected), expected)
    for name, figures in lab.time(functions, case.calls):
        yield name, figures | ({"compile_s": compile_s[name]} if name in compile_s else {})


def _image_of(got: Tensor, expected: Tensor) -> Tensor:
    """Return a result as an image: accelerated-scan's is (N, C W, H)."""
    n, c, h, w = expected.shape
    return got if got.dim() == 4 else got.unflatten(1, (c, w)).mT.reshape(n, c, h, w)
