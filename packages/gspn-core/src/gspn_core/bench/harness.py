"""What a benchmark case is, how its results are checked, and how its functions are timed.

A case times one or more functions, its passes, and each pass becomes a row. Before it is timed, a case compares its
results with the reference; a case that disagrees fails and reports no figures.
"""

from __future__ import annotations

import math
import operator
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Largest difference from the reference, over the largest magnitude in the reference.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# GPU calls below, which the host may bind, are also timed several in a row, and replayed from a CUDA graph.
SHORT_US = 1000.0

Function = Callable[[], object]
Figures = dict[str, Any]


class DisagreementError(Exception):
    """A measured function and the reference computed different results."""


class UnavailableError(Exception):
    """A function that is compared with cannot run here, or is not installed."""


def require_close(what: str, got: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    """Raise DisagreementError unless `got` is `want`, within the tolerance of its dtype if none is named."""
    tolerance = TOLERANCES[got.dtype] if tolerance is None else tolerance
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)
    if not error <= tolerance:  # NaN is a disagreement
        raise DisagreementError(f"{what}: off by {error:.2e} of the largest value, {tolerance:.1e} is allowed")


@dataclass(frozen=True)
class Target:
    """A limit for one quantity of a row, such as `time_us` <= 25."""

    quantity: str
    comparison: str
    value: float

    def met_by(self, row: Mapping[str, Any]) -> bool | None:
        """Tell whether the row meets the limit; None if the row lacks the quantity."""
        compare = {"<=": operator.le, ">=": operator.ge}[self.comparison]
        return None if self.quantity not in row else bool(compare(row[self.quantity], self.value))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One benchmark case; a subclass has `measure`, and attributes that rows repeat. Mappings are keyed by pass."""

    group: str
    name: str
    passes: tuple[str, ...]
    targets: Mapping[str, tuple[Target, ...]] = field(default_factory=dict)
    versus: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # the case and the pass to compare with
    roof: Mapping[str, str] = field(default_factory=dict)  # the timed copy that bounds a pass; default: the lab's copy
    published: dict[str, Any] | None = None  # what a paper reports for the case, with the source

    def bytes(self, name: str) -> int | None:
        """Return the bytes that a pass, or a function it is compared with, must move; None if not counted."""
        return None

    def measure(self, lab: Lab) -> Iterator[tuple[str, Figures]]:
        """Check the results (DisagreementError), then yield the figures of passes and functions they are compared with.

        A case that cannot run here raises UnavailableError.
        """
        raise NotImplementedError


class Lab:
    """The device ("cuda" or "cpu") a benchmark runs on, its budget in seconds, and its stopwatch."""

    def __init__(self, device: str, *, quick: bool, repeats: int | None = None, budget: float = math.inf) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.quick = quick
        self.repeats = repeats or (3 if quick else 200 if self.cuda else 101)  # at most
        self.budget, self._began = budget, time.perf_counter()
        # For all repeats of a timing; on a CPU, where several functions take turns, three rounds are run in any case.
        self.seconds = (0.01 if quick else 0.25) if self.cuda else 20.0
        # A backward runs on the stream of its forward, and only a stream other than the default can be captured.
        self.stream = torch.cuda.Stream() if self.cuda else None
        # Several times the size of the cache; clearing it takes long enough for the next call to be enqueued behind.
        self._flush = torch.empty(2**29, dtype=torch.uint8, device=self.device) if self.cuda else None

    def left(self) -> float:
        """Return the seconds of the budget that remain."""
        return self.budget - (time.perf_counter() - self._began)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Return normal random numbers, the same in every run."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(generator=generator)

    def time(self, functions: Mapping[str, Function], calls: int = 1) -> Iterator[tuple[str, Figures]]:
        """Yield the median microseconds of a call of each function, with quartiles and the number of repeats.

        On a GPU one call is timed after another with the second-level cache flushed, by CUDA events. On a CPU, whose
        speed varies from minute to minute, the functions take turns of several calls, in a new random order each
        round: one that always followed the same other would find caches and memory as that one leaves them.
        """
        if self.cuda:
            for name, function in functions.items():
                yield name, self._time_on_gpu(function)
            return
        turn = min(5, calls) if self.quick else calls
        for function in functions.values():
            function()
        times: dict[str, list[float]] = {name: [] for name in functions}
        order, shuffle, began = list(functions), random.Random(0).shuffle, time.perf_counter()
        for repeat in range(self.repeats):
            shuffle(order)
            for name in order:
                function, start = functions[name], time.perf_counter_ns()
                for _ in range(turn):
                    function()
                times[name].append((time.perf_counter_ns() - start) / turn * 1e-3)
            if repeat >= 2 and time.perf_counter() - began > self.seconds:
                break
        yield from ((name, _statistics(times[name])) for name in functions)

    def _time_on_gpu(self, function: Function) -> Figures:
        for _ in range(2):
            function()
        estimate = statistics.median(self._event_times(function, 3))
        repeats = max(min(5, self.repeats), min(self.repeats, int(self.seconds * 1e6 / max(estimate, 1.0))))
        figures = _statistics(self._event_times(function, repeats))
        if figures["time_us"] < SHORT_US:
            calls = max(2, min(50, int(1000 / max(figures["time_us"], 1.0))))

            def several() -> None:
                for _ in range(calls):
                    function()

            def per_call(function: Function) -> float:
                return statistics.median(self._event_times(function, max(5, repeats // 4), flush=False)) / calls

            figures |= {"calls_in_a_row": calls, "row_us": per_call(several), "graph_us": None}
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.stream):
                    several()
                graph.replay()
                figures["graph_us"] = per_call(graph.replay)
            except RuntimeError as error:
                figures["graph_reason"] = f"capture failed: {str(error).splitlines()[0]}"
        return figures

    def _event_times(self, function: Function, repeats: int, *, flush: bool = True) -> list[float]:
        assert self._flush is not None
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            if flush:
                self._flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]

    def copy(self) -> Figures:
        """Time a large copy; return its bytes per second, those read and those written counted, with the timing."""
        size = 2**20 if not self.cuda or self.quick else min(2**32, torch.cuda.mem_get_info()[0] // 4)
        source = self.randn(size // 4)
        target = torch.empty_like(source)
        ((_, figures),) = self.time({"copy": lambda: target.copy_(source)})
        moved = 2 * source.numel() * source.element_size()
        return {"bytes_per_s": moved / figures["time_us"] * 1e6, "bytes": moved, **figures}


def _statistics(times: list[float]) -> Figures:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"time_us": median, "quartiles_us": [low, high], "repeats": len(times)}
