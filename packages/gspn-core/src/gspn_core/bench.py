"""Benchmarks of the operator against the reference, as ratios measured in one process.

Timings of one machine vary from minute to minute, so contestants take turns and medians are compared. Every case
checks the results first; one disagreement with the reference and nothing is reported. Only `gspn-core bench` and
tests import this module.
"""

from __future__ import annotations

import dataclasses
import operator
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import _backend, _library, reference
from ._info import info
from .ops import line_scan, propagate
from .reference import DIRECTIONS

# Largest difference from the reference, over the largest magnitude in the reference.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

Shape = tuple[int, int, int, int]
Contestant = Callable[[], Any]


class DisagreementError(Exception):
    """The kernels and the reference computed different results."""


class UnavailableError(Exception):
    """There is nothing to measure: no compiled kernels, or no case of that name."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and repetitions. Small maps, large maps and the operator whose saved memory is counted are (N, C, H, W)."""

    small: Shape = (8, 64, 56, 56)
    large: Shape = (16, 8, 1024, 1024)
    memory: Shape = (2, 16, 64, 64)
    repeats: int = 101
    seconds: float = 20.0  # after which a comparison ends, though not before three rounds
    calls: int = 200  # per repeat, where a single call is too short for the clock
    targets: bool = True  # targets are meant for the full sizes


QUICK = Settings(small=(2, 8, 14, 14), large=(2, 4, 48, 48), memory=(2, 4, 33, 20), repeats=3, calls=5, targets=False)

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a row's `ratio` or `ours` is to reach."""

    of: str
    comparison: str
    value: float

    def met_by(self, row: Row) -> bool:
        """Tell whether the row reaches it."""
        return _COMPARISONS[self.comparison](getattr(row, self.of), self.value)

    def __str__(self) -> str:
        return f"{self.of} {self.comparison} {self.value:g}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: ours and another, both in `unit`, and the ratio that `ratio_of` describes."""

    name: str
    shape: str
    unit: str
    ours: float
    versus: str
    other: float
    ratio: float
    ratio_of: str
    target: Target | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, `met` among them (None without a target), as JSON can hold them."""
        return dataclasses.asdict(self) | {"met": None if self.target is None else self.target.met_by(self)}


@dataclass(frozen=True)
class Case:
    """A name to select by, and what yields its rows."""

    name: str
    rows: Callable[[Settings], Iterator[Row]]


def run(settings: Settings, *, only: str = "", progress: bool = True) -> dict[str, Any]:
    """Run the cases whose name contains `only`; return rows, device, `gspn_core.info()` and date for JSON.

    Raises:
        DisagreementError: a kernel differs from the reference by more than `TOLERANCES` allows.
        UnavailableError: the extension is not compiled, or no case has such a name.
    """
    extension = _backend.extension()
    if not isinstance(extension, ModuleType):
        raise UnavailableError(f"there are no compiled kernels to measure: {extension}")
    cases = [case for case in CASES if only in case.name]
    if not cases:
        raise UnavailableError(f"no case contains {only!r}; there are {', '.join(repr(case.name) for case in CASES)}")
    rows: list[Row] = []
    with tqdm(cases, unit="case", disable=not progress) as bar:
        for case in bar:
            bar.set_postfix_str(case.name)
            rows.extend(case.rows(settings))
    if not settings.targets:
        rows = [dataclasses.replace(row, target=None) for row in rows]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": _cpu_model(),
        "info": info(),
        "settings": dataclasses.asdict(settings),
        "rows": [row.as_dict() for row in rows],
    }


def table(result: dict[str, Any]) -> str:
    """Lay out what `run` returned for reading."""
    header = ("case", "shape", "ours", "versus", "other", "unit", "ratio", "", "target", "met")
    cells = [header]
    for row in result["rows"]:
        target = "" if row["target"] is None else str(Target(**row["target"]))
        met = {None: "", True: "yes", False: "no"}[row["met"]]
        ours, other, ratio = (f"{row[key]:.4g}" for key in ("ours", "other", "ratio"))
        name, shape, versus, unit = (row[key] for key in ("name", "shape", "versus", "unit"))
        cells.append((name, shape, ours, versus, other, unit, ratio, row["ratio_of"], target, met))
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    right = {header.index(name) for name in ("ours", "other", "ratio")}
    lines = [
        "  ".join(
            f"{cell:>{width}}" if i in right else f"{cell:<{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    threads, versions = result["info"]["threads"], f"gspn-core {result['info']['gspn_core']}"
    lines.append(
        f"{result['device']}, {threads} threads, {result['info']['cpu']['isa']}; "
        f"{versions}, torch {result['info']['torch']}; {result['date']}"
    )
    return "\n".join(lines)


# ---- measuring


def _medians(contestants: Sequence[Contestant], settings: Settings, calls: int = 1) -> list[float]:
    """Return each contestant's median seconds per call.

    They take turns, in an order drawn anew each round: one that always came after the same other would find the caches
    and the memory as that one leaves them.
    """
    for contestant in contestants:
        contestant()
    times: list[list[float]] = [[] for _ in contestants]
    order = list(range(len(contestants)))
    shuffle = random.Random(0).shuffle
    began = time.perf_counter()
    for repeat in range(settings.repeats):
        shuffle(order)
        for i in order:
            contestant = contestants[i]
            start = time.perf_counter_ns()
            for _ in range(calls):
                contestant()
            times[i].append((time.perf_counter_ns() - start) / calls * 1e-9)
        if repeat >= 2 and time.perf_counter() - began > settings.seconds:
            break
    return [statistics.median(t) for t in times]


def _require_agreement(case: str, ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for i, (got, want) in enumerate(zip(ours, expected, strict=True)):
        tolerance = TOLERANCES[got.dtype]
        error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)
        if not error <= tolerance:  # NaN is a disagreement
            raise DisagreementError(
                f"{case}: result {i} of the kernels is off the reference's by {error:.2e} of its largest value, "
                f"{tolerance:.0e} is allowed for {got.dtype}"
            )


def _duel(
    name: str, shape: str, ours: Contestant, other: Contestant, versus: str, target: Target, settings: Settings
) -> Row:
    # Several calls in a turn: the first after the other contestant pays for the memory that one has given back.
    seconds = _medians((ours, other), settings, max(1, settings.calls // 40))
    return Row(
        name=name,
        shape=shape,
        unit="ms",
        ours=seconds[0] * 1e3,
        versus=versus,
        other=seconds[1] * 1e3,
        ratio=seconds[1] / seconds[0],
        ratio_of="other/ours",
        target=target,
    )


def _label(shape: Shape, groups: int) -> str:
    return "x".join(map(str, shape)) + f" G={groups}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


# ---- inputs


def _propagate_inputs(shape: Shape, gates: int, *, requires_grad: bool = False) -> list[Tensor]:
    """x, logits with G = 1, lam and u with C' = gates."""
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, c, h, w), (n, 4, 1, 3, h, w), (n, 4, gates, h, w), (n, 4, gates, h, w))
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    return [t.requires_grad_(requires_grad) for t in inputs]


def _scan_inputs(shape: Shape, groups: int) -> list[Tensor]:
    """x, and weights whose sum is below one, so that the state stays bounded."""
    n, _, h, w = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    weights = torch.empty(n, groups, 3, h, w).uniform_(0, 1 / 3, generator=generator)
    return [x, weights]


# ---- cases


def _line_scan_forward(direction: str) -> Case:
    name = f"line_scan forward {direction}"

    def rows(settings: Settings) -> Iterator[Row]:
        x, weights = _scan_inputs(settings.small, 1)

        def ours() -> Tensor:
            return line_scan(x, weights, direction=direction)

        def other() -> Tensor:
            return reference.line_scan(x, weights, direction=direction)

        _require_agreement(name, [ours()], [other()])
        target = Target(of="ratio", comparison=">=", value=15)
        yield _duel(name, _label(settings.small, 1), ours, other, "reference", target, settings)

    return Case(name, rows)


def _propagate_case(gates: str, with_backward: bool) -> Case:
    name = f"propagate {'forward+backward' if with_backward else 'forward'}, {gates} gates"

    def rows(settings: Settings) -> Iterator[Row]:
        gate_channels = settings.small[1] if gates == "per-channel" else 1
        inputs = _propagate_inputs(settings.small, gate_channels, requires_grad=with_backward)
        dy = torch.randn(settings.small, generator=torch.Generator().manual_seed(1))

        def contestant(function: Callable[..., Tensor]) -> list[Tensor]:
            with torch.set_grad_enabled(with_backward):
                y = function(*inputs)
            return [y, *torch.autograd.grad(y, inputs, dy)] if with_backward else [y]

        def ours() -> list[Tensor]:
            return contestant(propagate)

        def other() -> list[Tensor]:
            return contestant(reference.propagate)

        _require_agreement(name, [t.detach() for t in ours()], [t.detach() for t in other()])
        target = Target(of="ratio", comparison=">=", value=10)
        yield _duel(name, _label(settings.small, 1), ours, other, "reference", target, settings)

    return Case(name, rows)


def _small_horizontal(settings: Settings) -> Iterator[Row]:
    x, weights = _scan_inputs(settings.small, 1)
    name = "horizontal/vertical, small"

    def scan(direction: str) -> Contestant:
        expected = reference.line_scan(x, weights, direction=direction)
        _require_agreement(name, [line_scan(x, weights, direction=direction)], [expected])
        return lambda: line_scan(x, weights, direction=direction)

    horizontal, vertical = scan("left_to_right"), scan("top_to_bottom")
    seconds = _medians((horizontal, vertical), settings, max(1, settings.calls // 20))
    yield _horizontal_row(name, _label(settings.small, 1), *seconds)


def _horizontal_row(name: str, shape: str, horizontal: float, vertical: float) -> Row:
    return Row(
        name=name,
        shape=shape,
        unit="ms",
        ours=horizontal * 1e3,
        versus="vertical",
        other=vertical * 1e3,
        ratio=horizontal / vertical,
        ratio_of="ours/other",
        target=Target(of="ratio", comparison="<=", value=1.5),
    )


def _large_maps(settings: Settings) -> Iterator[Row]:
    """Compare each direction's kernel with a copy, both on memory that is already mapped, and a call with a clone."""
    n, c = settings.large[:2]
    x, weights = _scan_inputs(settings.large, c)
    h_out, copied = torch.empty_like(x), torch.empty_like(weights)

    def kernel(index: int) -> Contestant:
        kernels = _backend.Kernels(x, False, [index], None)
        return lambda: kernels.forward(x, weights, None, None, h_out, None)

    kernels = [kernel(index) for index in range(4)]
    for direction, contestant in zip(DIRECTIONS, kernels, strict=True):
        h_out.fill_(torch.nan)
        contestant()
        # Images of a batch are independent: the first and the last keep the reference within the memory there is.
        for i in sorted({0, n - 1}):
            expected = reference.line_scan(x[i : i + 1], weights[i : i + 1], direction=direction)
            _require_agreement(f"large maps {direction}", [h_out[i : i + 1]], [expected])

    contestants = [
        *kernels,
        lambda: copied.copy_(weights),
        lambda: line_scan(x, weights, direction="top_to_bottom"),
        lambda: weights.clone(),
    ]
    *scans, copy, call, clone = _medians(contestants, settings)
    plane = x.numel() * x.element_size()
    moved, copied_bytes = 5 * plane, 2 * weights.numel() * weights.element_size()  # x, three weights, h; read, written
    shape = _label(settings.large, c)

    def bandwidth(name: str, seconds: float, versus: str, other: float, target: Target | None) -> Row:
        ours_rate, other_rate = moved / seconds * 1e-9, copied_bytes / other * 1e-9
        return Row(
            name=f"bandwidth {name}",
            shape=shape,
            unit="GB/s",
            ours=ours_rate,
            versus=versus,
            other=other_rate,
            ratio=ours_rate / other_rate,
            ratio_of="ours/other",
            target=target,
        )

    for i, direction in enumerate(DIRECTIONS):
        target = Target(of="ratio", comparison=">=", value=0.8) if i >= 2 else None
        yield bandwidth(f"kernel {direction}", scans[i], "copy_", copy, target)
    yield bandwidth("public call top_to_bottom", call, "clone", clone, None)
    yield _horizontal_row("horizontal/vertical, large", shape, scans[0], scans[2])


@contextmanager
def _bare_operator(op: Any) -> Iterator[Callable[..., Any]]:
    """Register an operator with the schema of `op` that only allocates, in the way torch.library documents."""
    name = op._schema.name.split("::")[1]
    library = torch.library.Library("gspn_bench", "FRAGMENT")
    try:
        library.define(str(op._schema).partition("::")[2])
        library.impl(name, lambda x, *_: (torch.empty_like(x), x.new_empty(0)), "CompositeExplicitAutograd")

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*(t for t in inputs if isinstance(t, Tensor)))
            ctx.count = len(inputs)

        def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
            gradients = [torch.empty_like(t) for t in ctx.saved_tensors]
            return *gradients, *(None,) * (ctx.count - len(gradients))

        torch.library.register_autograd(f"gspn_bench::{name}", backward, setup_context=setup_context, lib=library)
        yield getattr(torch.ops.gspn_bench, name).default
    finally:
        library._destroy()


def _call_cost(name: str) -> Case:
    """Return the case of a call on a single pixel, where nothing but the way to the kernel and back takes time."""
    shape: Shape = (1, 1, 1, 1)

    def rows(settings: Settings) -> Iterator[Row]:
        if name == "propagate":
            op, inputs = _library.propagate, _propagate_inputs(shape, 1)
            options: tuple[Any, ...] = ([0, 1, 2, 3],)
            _require_agreement(name, [propagate(*inputs)], [reference.propagate(*inputs)])
        else:
            op, inputs = _library.line_scan, _scan_inputs(shape, 1)
            inputs.append(torch.ones(1, 1, 1, 1))
            options = (2,)
            got, expected = (f(*inputs, direction=DIRECTIONS[2]) for f in (line_scan, reference.line_scan))
            _require_agreement(name, [got], [expected])
        leaves = [t.clone().requires_grad_() for t in inputs]
        dy = torch.ones(shape)

        def ours(tensors: list[Tensor]) -> Tensor:
            if name == "propagate":
                return propagate(*tensors)
            return line_scan(*tensors, direction=DIRECTIONS[2])

        with _bare_operator(op) as bare:

            def other(tensors: list[Tensor]) -> Tensor:
                y: Tensor = bare(*tensors, *options)[0]
                return y

            for what, tensors, backward, target in (
                ("no gradients", inputs, False, Target(of="ours", comparison="<=", value=25)),
                ("forward for gradients", leaves, False, Target(of="ours", comparison="<=", value=50)),
                ("forward+backward", leaves, True, None),
            ):

                def contestant(
                    function: Callable[[list[Tensor]], Tensor],
                    tensors: list[Tensor] = tensors,
                    backward: bool = backward,
                ) -> None:
                    y = function(tensors)
                    if backward:
                        torch.autograd.grad(y, tensors, dy)

                contestants = [lambda f=f, run=contestant: run(f) for f in (ours, other)]
                seconds = _medians(contestants, settings, settings.calls)
                yield Row(
                    name=f"call cost {name}, {what}",
                    shape=_label(shape, 1),
                    unit="us",
                    ours=seconds[0] * 1e6,
                    versus="bare operator",
                    other=seconds[1] * 1e6,
                    ratio=seconds[0] / seconds[1],
                    ratio_of="ours/other",
                    target=target,
                )

    return Case(f"call cost {name}", rows)


def _saved_memory(settings: Settings) -> Iterator[Row]:
    """Count the bytes that autograd keeps, each storage once."""
    inputs = _propagate_inputs(settings.memory, 1, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = propagate(*inputs)
    gradients = torch.autograd.grad(y.sum(), inputs)
    expected = reference.propagate(*inputs)
    expected_gradients = torch.autograd.grad(expected.sum(), inputs)
    _require_agreement("saved memory", [y.detach(), *gradients], [expected.detach(), *expected_gradients])
    x = inputs[0]
    planes = len(DIRECTIONS) / 16 * x.numel() * 4
    limit = sum(t.numel() * t.element_size() for t in inputs) + planes
    ours = sum(kept.values())
    yield Row(
        name="saved memory",
        shape=_label(settings.memory, 1),
        unit="bytes",
        ours=ours,
        versus="inputs + D/16 fp32 planes",
        other=limit,
        ratio=ours / limit,
        ratio_of="ours/other",
        target=Target(of="ratio", comparison="<=", value=1),
    )


CASES = (
    *(_line_scan_forward(direction) for direction in DIRECTIONS),
    *(_propagate_case(gates, backward) for backward in (False, True) for gates in ("shared", "per-channel")),
    Case("horizontal/vertical, small", _small_horizontal),
    Case("large maps: bandwidth, horizontal/vertical", _large_maps),
    _call_cost("propagate"),
    _call_cost("line_scan"),
    Case("saved memory", _saved_memory),
)
