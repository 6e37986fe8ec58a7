"""What only hardware shows, in a minute: every kernel and dtype, clusters, large sizes, bits, streams, graphs, devices.

Each check is a case of its own, so that one that fails, or takes the process with it, costs its own row alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import gspn_core
from gspn_core import DIRECTIONS, reference
from gspn_core.bench.harness import (
    TOLERANCES,
    Case,
    DisagreementError,
    Figures,
    Lab,
    UnavailableError,
    require_close,
)

__all__ = ["make_checks"]  # nothing else here is meant for others

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True, kw_only=True)
class Check(Case):
    """A check that raises DisagreementError, or UnavailableError where the machine has no place for it."""

    test: Callable[[Lab], None]
    group: str = "smoke"
    passes: tuple[str, ...] = ("checked",)
    op: str = "propagate"

    def measure(self, lab: Lab) -> Iterator[tuple[str, Figures]]:
        began = time.perf_counter()
        self.test(lab)
        if lab.cuda:
            torch.cuda.synchronize()
        yield "checked", {"seconds": time.perf_counter() - began}


@dataclass(frozen=True, kw_only=True)
class Call:
    """Arguments of propagate, made from sizes: `gates` is the number of channels of lam and u."""

    shape: tuple[int, int, int, int]  # (N, C, H, W)
    groups: int
    gates: int
    dtype: torch.dtype = F32
    directions: tuple[str, ...] = DIRECTIONS
    chunk_size: int | None = None

    def inputs(self, lab: Lab) -> list[Tensor]:
        n, c, h, w = self.shape
        d = len(self.directions)
        sizes = ((n, c, h, w), (n, d, self.groups, 3, h, w), (n, d, self.gates, h, w), (n, d, self.gates, h, w))
        return [lab.randn(*size, dtype=self.dtype, seed=i) for i, size in enumerate(sizes)]

    def run(
        self, inputs: list[Tensor], lab: Lab, propagate: Callable[..., Tensor] = gspn_core.propagate
    ) -> list[Tensor]:
        """Return the output, and the gradient of every input."""
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = propagate(*leaves, directions=self.directions, chunk_size=self.chunk_size)
        dy = lab.randn(*self.shape, dtype=self.dtype, seed=9).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy, materialize_grads=True)]


def _accurate(*calls: Call) -> Callable[[Lab], None]:
    def test(lab: Lab) -> None:
        for call in calls:
            inputs = call.inputs(lab)
            exact = call.run([t.double() for t in inputs], lab, reference.propagate)
            for i, (got, want) in enumerate(zip(call.run(inputs, lab), exact, strict=True)):
                what = f"{call.shape}, {'output' if i == 0 else f'gradient of input {i - 1}'}"
                require_close(what, got, want, TOLERANCES[call.dtype])

    return test


def _same(what: str, ours: list[Tensor], wanted: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(ours, wanted, strict=True)):
        if not torch.equal(a, b):
            raise DisagreementError(f"{what}: result {i} differs in {int((a != b).sum())} of {a.numel()} elements")


def _needs_gpu(lab: Lab) -> None:
    if not lab.cuda:
        raise UnavailableError("needs a GPU")


# One image through all kernels: of all directions at once with weights of every channel, shared ones, or any; rows and
# columns of vectors; lines of any stride and length; one warp, several, a cluster.
SHORT = ((2, 9, 16, 16), 9, 9), ((2, 16, 14, 14), 1, 1), ((1, 8, 74, 74), 1, 1), ((2, 4, 15, 13), 4, 1)
LONG = ((1, 3, 144, 160), 3, 3), ((1, 4, 160, 144), 1, 1), ((1, 2, 147, 131), 2, 2), ((1, 3, 20, 300), 1, 3)
REPEATED = (*SHORT, *LONG)


def _deterministic(lab: Lab) -> None:
    for shape, groups, gates in REPEATED[:2] if lab.quick else REPEATED:
        for dtype in (F32, BF16):
            call = Call(shape=shape, groups=groups, gates=gates, dtype=dtype)
            inputs = call.inputs(lab)
            first = call.run(inputs, lab)
            for _ in range(5):
                _same(f"{shape} {dtype}, run again", call.run(inputs, lab), first)


def _beyond_32_bits(lab: Lab) -> None:
    """The first and the last image of a batch with more than 2^31 weights are what they are alone, bit for bit."""
    n, c, h, w = (3, 4, 16, 16) if lab.quick else (12, 1024, 256, 256)
    if lab.cuda and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        raise UnavailableError("needs 40 GiB of free GPU memory")
    call = Call(shape=(n, c, h, w), groups=c, gates=1, dtype=BF16, directions=("bottom_to_top",))
    inputs = call.inputs(lab)
    results = call.run(inputs, lab)
    dy = lab.randn(*call.shape, dtype=BF16, seed=9)
    for image in (0, n - 1):
        leaves = [t[image : image + 1].clone().requires_grad_() for t in inputs]
        y = gspn_core.propagate(*leaves, directions=call.directions)
        alone = [y.detach(), *torch.autograd.grad(y, leaves, dy[image : image + 1])]
        _same(f"image {image} of {n}", [t[image : image + 1] for t in results], alone)


def _streams(lab: Lab) -> None:
    """Inputs that arrive late on a stream; two streams at once."""
    _needs_gpu(lab)
    for shape, groups, gates in REPEATED:
        call = Call(shape=shape, groups=groups, gates=gates)
        inputs = call.inputs(lab)
        expected, late, got = call.run(inputs, lab), [torch.zeros_like(t) for t in inputs], []
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(2)]
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)
                ours = [t.copy_(source) for t, source in zip([torch.empty_like(t) for t in late], inputs, strict=True)]
                got.append(call.run(ours, lab))
        torch.cuda.synchronize()
        for ours in got:
            _same(f"{shape} on another stream", ours, expected)


def _graphs(lab: Lab) -> None:
    """A captured forward and backward, replayed with other inputs."""
    _needs_gpu(lab)
    for shape, groups, gates in REPEATED:
        call = Call(shape=shape, groups=groups, gates=gates, dtype=BF16)
        inputs = call.inputs(lab)
        leaves, dy = [t.detach().requires_grad_() for t in inputs], lab.randn(*shape, dtype=BF16, seed=9)

        def run(leaves: list[Tensor] = leaves, dy: Tensor = dy) -> list[Tensor]:
            y = gspn_core.propagate(*leaves)
            return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=lab.stream):
            captured = run()
        with torch.no_grad():
            for t in leaves:
                t.mul_(0.5)
        graph.replay()
        torch.cuda.synchronize()
        _same(f"{shape}, replayed", captured, run())


def _devices(lab: Lab) -> None:
    _needs_gpu(lab)
    if torch.cuda.device_count() < 2:
        raise UnavailableError("needs two GPUs")
    for shape, groups, gates in REPEATED:
        call = Call(shape=shape, groups=groups, gates=gates)
        leaves = [t.to("cuda:1").requires_grad_() for t in call.inputs(lab)]
        y = gspn_core.propagate(*leaves)  # the current device is the other one
        dy = lab.randn(*shape, seed=9).to("cuda:1")
        ours = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
        _same(f"{shape} on the second GPU", [t.to("cuda:0") for t in ours], call.run(call.inputs(lab), lab))


def make_checks(*, quick: bool) -> list[Case]:
    """Return the checks, quick ones first."""
    checks: list[Case] = []

    def add(name: str, test: Callable[[Lab], None]) -> None:
        checks.append(Check(name=name, test=test))

    for dtype in (F32, BF16, F16, F64):
        for label, calls in (("short lines", SHORT), ("long lines", LONG)):
            few = calls[:1] if quick else calls
            found = [Call(shape=shape, groups=groups, gates=gates, dtype=dtype) for shape, groups, gates in few]
            add(f"{label}, {str(dtype).removeprefix('torch.')}", _accurate(*found))
    add("chunks", _accurate(*(Call(shape=(1, 2, 50, 64), groups=2, gates=2, chunk_size=k) for k in (1, 7, 16))))
    for length in (200, 600) if quick else (200, 600, 1024, 2048, 4096):
        for few, name in ((1, "one scan"), (3, "three scans")):
            down = Call(shape=(1, few, 12, length), groups=few, gates=1, directions=("top_to_bottom",))
            left = Call(shape=(1, few, length, 16), groups=few, gates=1, directions=("right_to_left",))
            add(f"clusters: lines of {length}, {name}", _accurate(down, left))
    add("the same bits in every run", _deterministic)
    add("more than 2^31 elements", _beyond_32_bits)
    add("streams", _streams)
    add("CUDA graphs", _graphs)
    add("two devices", _devices)
    return checks
