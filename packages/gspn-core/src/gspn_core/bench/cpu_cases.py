"""The cases of `gspn-core bench`: the CPU kernels against the reference, a copy, and an empty operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _library, reference
from .._directions import DIRECTIONS
from ..ops import line_scan, propagate
from .harness import Case, Figures, Function, Lab, Target, require_close

Shape = tuple[int, int, int, int]  # (N, C, H, W)
OURS = "gspn_core"
PIXEL: Shape = (1, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class CpuCase(Case):
    """A case whose functions take turns. `prepare` checks their results and returns them by name."""

    prepare: Callable[[], Mapping[str, Function]]
    shape: Shape
    passes: tuple[str, ...] = (OURS,)
    op: str = "line_scan"
    dtype: torch.dtype = torch.float32
    weight_groups: int = 1
    moved: Mapping[str, int] = field(default_factory=dict)  # bytes by function
    # In a turn: the first call after another function pays for the memory that one has given back.
    calls: int = 5

    def bytes(self, name: str) -> int | None:
        """Return the bytes that a function moves, where they are counted."""
        return self.moved.get(name)

    def measure(self, lab: Lab) -> Iterator[tuple[str, Figures]]:
        """Check and time the functions."""
        yield from lab.time(self.prepare(), self.calls)


class SavedMemory(CpuCase):
    """The bytes that autograd keeps for the backward of propagate, each storage counted once."""

    def measure(self, lab: Lab) -> Iterator[tuple[str, Figures]]:
        """Compare with the inputs and one line in 16 of each direction's state, in float32."""
        inputs = _propagate_inputs(self.shape, 1, requires_grad=True)
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = propagate(*inputs)
        expected = reference.propagate(*inputs)
        _require_equal(self.name, *([t, *torch.autograd.grad(t.sum(), inputs)] for t in (y, expected)))
        planes = len(DIRECTIONS) * 4 * inputs[0].numel() / _backend.CHECKPOINT_INTERVAL
        allowed, saved = sum(t.numel() * t.element_size() for t in inputs) + planes, sum(kept.values())
        yield OURS, {"saved_bytes": saved, "allowed_bytes": allowed, "fraction": saved / allowed}


def make_cases(*, quick: bool) -> list[Case]:
    """Return all cases; quick ones have tiny shapes and no targets, which are meant for the full sizes."""
    small: Shape = (2, 8, 14, 14) if quick else (8, 64, 56, 56)
    large: Shape = (2, 4, 48, 48) if quick else (16, 8, 1024, 1024)
    horizontal, vertical = DIRECTIONS[0], DIRECTIONS[2]
    cases: list[Case] = []

    def add(group: str, name: str, prepare: Callable[..., Mapping[str, Function]], *args: Any, **options: Any) -> None:
        cases.append(CpuCase(group=group, name=name, prepare=partial(prepare, name, *args), **options))

    def limit(quantity: str, comparison: str, value: float, name: str = OURS) -> dict[str, tuple[Target, ...]]:
        return {} if quick else {name: (Target(quantity, comparison, value),)}

    for direction in DIRECTIONS:
        name = f"line_scan forward {direction}"
        options: dict[str, Any] = {"versus": {OURS: (name, "reference")}, "targets": limit("speedup", ">=", 15)}
        add("reference", name, _line_scan, small, direction, shape=small, **options)
    for backward in (False, True):
        for gates, channels in (("shared", 1), ("per-channel", small[1])):
            name = f"propagate {'forward+backward' if backward else 'forward'}, {gates} gates"
            options = {"versus": {OURS: (name, "reference")}, "targets": limit("speedup", ">=", 10)}
            add("reference", name, _propagate, small, channels, backward, shape=small, op="propagate", **options)

    name, as_fast = "horizontal/vertical, small", limit("slowdown", "<=", 1.5, horizontal)
    options = {"passes": (horizontal,), "versus": {horizontal: (name, vertical)}, "targets": as_fast, "calls": 10}
    add("directions", name, _horizontal_and_vertical, small, shape=small, **options)

    name = "large maps: bandwidth, horizontal/vertical"
    plane, scans = 4 * math.prod(large), (*DIRECTIONS, "public call")
    moved = dict.fromkeys(scans, 5 * plane)  # x, three weights, h
    moved |= dict.fromkeys(("copy_", "clone"), 6 * plane)  # three weights, read and written
    targets = limit("copy_fraction", ">=", 0.8, vertical) | limit("copy_fraction", ">=", 0.8, DIRECTIONS[3])
    options = {"passes": scans, "versus": {horizontal: (name, vertical)}, "targets": targets | as_fast, "calls": 1}
    options["roof"] = {**dict.fromkeys(DIRECTIONS, "copy_"), "public call": "clone"}
    add("bandwidth", name, _large_maps, large, shape=large, weight_groups=large[1], moved=moved, **options)

    for op in ("propagate", "line_scan"):
        name, passes = f"call cost {op}", ("no gradients", "forward for gradients", "forward+backward")
        options = {"passes": passes, "versus": {which: (name, f"bare operator, {which}") for which in passes}}
        targets = limit("time_us", "<=", 25, passes[0]) | limit("time_us", "<=", 50, passes[1])
        add("call cost", name, _call_cost, op, shape=PIXEL, op=op, targets=targets, calls=200, **options)

    options = {"shape": (2, 4, 33, 20) if quick else (2, 16, 64, 64), "targets": limit("fraction", "<=", 1)}
    return [*cases, SavedMemory(group="memory", name="saved memory", op="propagate", prepare=dict, **options)]


# ---- inputs and checks


def _propagate_inputs(shape: Shape, gates: int, *, requires_grad: bool = False) -> list[Tensor]:
    """Return x, logits with G = 1, lam and u with C' = gates."""
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, c, h, w), (n, 4, 1, 3, h, w), (n, 4, gates, h, w), (n, 4, gates, h, w))
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    return [t.requires_grad_(requires_grad) for t in inputs]


def scan_inputs(shape: Shape, groups: int) -> list[Tensor]:
    """Return x, and weights whose sum is below one, so that the state stays bounded."""
    n, _, h, w = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    return [x, torch.empty(n, groups, 3, h, w).uniform_(0, 1 / 3, generator=generator)]


def _require_equal(what: str, ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (got, want) in enumerate(zip(ours, expected, strict=True)):
        require_close(f"{what}, {'output' if i == 0 else f'gradient {i - 1}'}", got.detach(), want.detach())


# ---- what the cases time


def _line_scan(name: str, shape: Shape, direction: str) -> dict[str, Function]:
    x, weights = scan_inputs(shape, 1)
    scans = {OURS: line_scan, "reference": reference.line_scan}
    functions = {key: partial(scan, x, weights, direction=direction) for key, scan in scans.items()}
    _require_equal(name, *([f()] for f in functions.values()))
    return {**functions}


def _propagate(name: str, shape: Shape, gates: int, backward: bool) -> dict[str, Function]:
    inputs = _propagate_inputs(shape, gates, requires_grad=backward)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            y = function(*inputs)
        return [y, *torch.autograd.grad(y, inputs, dy)] if backward else [y]

    functions = {OURS: partial(run, propagate), "reference": partial(run, reference.propagate)}
    _require_equal(name, *(f() for f in functions.values()))
    return {**functions}


def _horizontal_and_vertical(name: str, shape: Shape) -> dict[str, Function]:
    return {d: _line_scan(f"{name}, {d}", shape, d)[OURS] for d in (DIRECTIONS[0], DIRECTIONS[2])}


def _large_maps(name: str, shape: Shape) -> dict[str, Function]:
    """Return each direction's kernel and a copy, on memory that is already mapped, and a public call and a clone."""
    n, c = shape[:2]
    x, weights = scan_inputs(shape, c)
    h, copied = torch.empty_like(x), torch.empty_like(weights)
    functions: dict[str, Function] = {}
    for index, direction in enumerate(DIRECTIONS):
        kernels = _backend.Kernels(x, False, [index], None)
        functions[direction] = partial(kernels.forward, x, weights, None, None, h, None)
        h.fill_(torch.nan)
        functions[direction]()
        # Images of a batch are independent: the first and the last keep the reference within the memory there is.
        for i in sorted({0, n - 1}):
            expected = reference.line_scan(x[i : i + 1], weights[i : i + 1], direction=direction)
            require_close(f"{name}, {direction}", h[i : i + 1], expected)
    public = partial(line_scan, x, weights, direction=DIRECTIONS[2])
    return functions | {"public call": public, "copy_": partial(copied.copy_, weights), "clone": weights.clone}


def _call_cost(name: str, op: str) -> dict[str, Function]:
    """Return calls on one pixel, where only the way to the kernel and back takes time, and on an empty operator."""
    bare = _bare_operator(op)
    calls: dict[str, Callable[..., Tensor]]
    if op == "propagate":
        inputs = _propagate_inputs(PIXEL, 1)
        calls = {"": propagate, "bare operator, ": lambda *t: bare(*t, [0, 1, 2, 3])[0]}
        expected = reference.propagate(*inputs)
    else:
        inputs = [*scan_inputs(PIXEL, 1), torch.ones(PIXEL)]
        calls = {"": partial(line_scan, direction=DIRECTIONS[2]), "bare operator, ": lambda *t: bare(*t, 2)[0]}
        expected = reference.line_scan(*inputs, direction=DIRECTIONS[2])
    _require_equal(name, [calls[""](*inputs)], [expected])
    leaves, dy = [t.clone().requires_grad_() for t in inputs], torch.ones(PIXEL)

    def forward_and_backward(function: Callable[..., Tensor]) -> None:
        torch.autograd.grad(function(*leaves), leaves, dy)

    functions: dict[str, Function] = {}
    for prefix, function in calls.items():
        functions[f"{prefix}no gradients"] = partial(function, *inputs)
        functions[f"{prefix}forward for gradients"] = partial(function, *leaves)
        functions[f"{prefix}forward+backward"] = partial(forward_and_backward, function)
    return functions


_bare_library = torch.library.Library("gspn_bench", "FRAGMENT")


@cache
def _bare_operator(name: str) -> Callable[..., Any]:
    """Return an operator with the schema of gspn::name that only allocates, registered as torch.library documents."""
    schema = str(getattr(_library, name)._schema).partition("::")[2]
    _bare_library.define(schema)
    _bare_library.impl(name, lambda x, *_: (torch.empty_like(x), x.new_empty(0)), "CompositeExplicitAutograd")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(t for t in inputs if isinstance(t, Tensor)))
        ctx.count = len(inputs)

    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = [torch.empty_like(t) for t in ctx.saved_tensors]
        return *gradients, *(None,) * (ctx.count - len(gradients))

    torch.library.register_autograd(f"gspn_bench::{name}", backward, setup_context=setup_context, lib=_bare_library)
    bare: Callable[..., Any] = getattr(torch.ops.gspn_bench, name).default
    return bare
