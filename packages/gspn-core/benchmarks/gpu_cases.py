"""The cases that gpu.py measures: calls of the operator, the mixer module, and what they are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import rivals
import torch
from torch import Tensor, nn

import gspn_core
from gspn_core import DIRECTIONS, reference
from gspn_core._command import first_line
from gspn_core.bench.harness import TOLERANCES, Case, Figures, Function, Lab, Target, UnavailableError, require_close

__all__ = ["make_cases"]  # nothing else here is meant for others

FORWARD, SAVING, BACKWARD = PASSES = ("forward", "forward, checkpoints saved", "backward")
INTERVAL = gspn_core.info()["checkpoint_interval"]

MaybeTensors = Sequence[Tensor | None]
Problem = tuple[Callable[..., Tensor], list[Tensor | None], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class GpuCase(Case):
    """A differentiable function: `problem(lab)` returns it, its inputs, and parameters that need gradients too.

    `check(lab)` compares a small version with float64.
    """

    passes: tuple[str, ...] = PASSES

    def verify(self, inputs: MaybeTensors, y: Tensor, dy: Tensor | None = None, dx: Tensor | None = None) -> None:
        """Compare part of the results at full size; raise DisagreementError."""

    def measure(self, lab: Lab) -> Iterator[tuple[str, Figures]]:
        self.check(lab)
        f, inputs, parameters = self.problem(lab)
        leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]

        def forward() -> Tensor:
            with torch.no_grad():
                return f(*inputs)

        y, dy = forward(), None
        self.verify(inputs, y)
        functions: dict[str, Function] = {FORWARD: forward, SAVING: lambda: f(*leaves)}
        yield from lab.time({name: functions[name] for name in self.passes if name != BACKWARD})
        if BACKWARD in self.passes:
            dy = torch.empty_like(y).normal_(generator=torch.Generator(lab.device).manual_seed(5))
            saved, wanted = f(*leaves), [*(t for t in leaves if t is not None), *parameters]

            def backward() -> tuple[Tensor, ...]:
                return torch.autograd.grad(saved, wanted, dy, retain_graph=True)

            self.verify(inputs, y, dy, backward()[0])
            del y
            yield from lab.time({BACKWARD: backward})


@dataclass(frozen=True, kw_only=True)
class ScanCase(GpuCase):
    """One call of the operator: `op` is propagate, line_scan, or line_launch, the comparison."""

    shape: tuple[int, int, int, int]  # (N, C, H, W)
    dtype: torch.dtype
    weight_groups: int
    lam_channels: int
    u_channels: int | None
    directions: tuple[str, ...] = DIRECTIONS
    op: str = "propagate"
    channels_last: bool = False

    def sizes(self) -> list[tuple[int, ...] | None]:
        """Return the shapes of x, the weights (or logits), lam and u."""
        n, _, h, w = self.shape
        d = (len(self.directions),) if self.op == "propagate" else ()
        gates = [c and (n, *d, c, h, w) for c in (self.lam_channels, self.u_channels)]
        return [self.shape, (n, *d, self.weight_groups, 3, h, w), *gates]

    def bytes(self, name: str) -> int:
        image, *others = (0 if size is None else math.prod(size) * self.dtype.itemsize for size in self.sizes())
        checkpoints = len(self.directions) * math.prod(self.shape) * 4 // INTERVAL
        if name == FORWARD:
            return 2 * image + sum(others)
        return (2 * image + sum(others) if name == SAVING else 3 * image + 2 * sum(others)) + checkpoints

    def tolerance(self) -> float:
        """Return the tolerance of the dtype, and for a state kept in bfloat16 a rounding per line, which adds up."""
        rounded = self.op == "line_launch" and self.dtype == torch.bfloat16
        return TOLERANCES[self.dtype] + (max(self.shape[2:]) * 2.0**-9 if rounded else 0.0)

    def function(self, op: str) -> Callable[..., Tensor]:
        """Return the operator with this call's options, of gspn_core, of the reference or of one launch per line."""
        if self.op == "propagate":
            propagate = reference.propagate if op == "reference" else gspn_core.propagate
            return lambda *t: propagate(*t, directions=self.directions)
        scan = {"reference": reference.line_scan, "line_scan": gspn_core.line_scan, "line_launch": rivals.line_launch}
        return lambda x, weights, lam, _: scan[op](x, weights, lam, direction=self.directions[0])

    def problem(self, lab: Lab) -> Problem:
        sizes = self.sizes()
        inputs = [None if size is None else lab.randn(*size, dtype=self.dtype, seed=i) for i, size in enumerate(sizes)]
        if self.op != "propagate":  # weights that sum to less than one, so that the state stays bounded
            inputs[1].uniform_(0, 1 / 3, generator=torch.Generator(lab.device).manual_seed(9))
        if self.channels_last:
            for number, t in enumerate(inputs):
                if t is not None:
                    dim = t.dim() - (4 if number == 1 else 3)
                    inputs[number] = t.movedim(dim, -1).contiguous().movedim(-1, dim)
        return self.function(self.op), inputs, []

    def small(self) -> ScanCase:
        """Return the same call on a small image."""
        n, c, h, w = self.shape
        few = min(c, 16 if self.channels_last else 4)
        counts = {name: getattr(self, name) for name in ("weight_groups", "lam_channels", "u_channels")}
        channels = {name: few if count not in (None, 1) else count for name, count in counts.items()}
        return replace(self, shape=(min(n, 2), few, min(h, 200), min(w, 200)), **channels)

    def check(self, lab: Lab) -> None:
        """Compare output and every gradient of the small version."""
        small = self.small()
        f, inputs, _ = small.problem(lab)
        dy = lab.randn(*small.shape, dtype=small.dtype, seed=5)

        def run(f: Callable[..., Tensor], inputs: MaybeTensors) -> list[Tensor]:
            leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
            y = f(*leaves)
            return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))]

        ours = run(f, inputs)
        exact = run(small.function("reference"), [None if t is None else t.double() for t in inputs])
        for i, (got, want) in enumerate(zip(ours, exact, strict=True)):
            what = "output" if i == 0 else f"gradient {i - 1}"
            require_close(f"small version {small.shape}, {what}", got, want, small.tolerance())

    def verify(self, inputs: MaybeTensors, y: Tensor, dy: Tensor | None = None, dx: Tensor | None = None) -> None:
        """Compare the last channel of the last image: output, and where there is one, the gradient of x."""

        def last_channel(t: Tensor, place: int) -> Tensor:
            dim = 1 if place == 0 or self.op != "propagate" else 2
            return t[-1:].narrow(dim, t.shape[dim] - 1, 1).double()

        exact = [None if t is None else last_channel(t, i) for i, t in enumerate(inputs)]
        with torch.set_grad_enabled(dx is not None):
            leaf = exact[0].requires_grad_(dx is not None)
            expected = self.function("reference")(*exact)
        where = "last channel of the last image"
        require_close(f"{where}, output", y[-1:, -1:], expected.detach(), self.tolerance())
        if dx is not None:
            (expected_dx,) = torch.autograd.grad(expected, leaf, dy[-1:, -1:].double())
            require_close(f"{where}, gradient of x", dx[-1:, -1:], expected_dx, self.tolerance())


@dataclass(frozen=True, kw_only=True)
class SubLayerCase(GpuCase):
    """The whole mixer module: projections, gates, propagation, lift."""

    op: str
    shape: tuple[int, int, int, int]
    proxy: int
    dtype: torch.dtype = torch.bfloat16

    def check(self, lab: Lab) -> None:
        module, exact = _module(16, 4, lab), _module(16, 4, lab).double()
        x = lab.randn(2, 16, 33, 29, dtype=torch.bfloat16, seed=1)
        with torch.no_grad():
            expected = exact.lift(reference.propagate(*exact.project(x.double())))
            # A convolution before and one after the scan round too.
            require_close("small version", module(x), expected, 3 * TOLERANCES[torch.bfloat16])

    def problem(self, lab: Lab) -> Problem:
        module = _module(self.shape[1], self.proxy, lab)
        return module, [lab.randn(*self.shape, dtype=torch.bfloat16, seed=1)], list(module.parameters())


def _module(channels: int, proxy: int, lab: Lab) -> gspn_core.SpatialPropagation:
    torch.manual_seed(0)
    return gspn_core.SpatialPropagation(channels, proxy_channels=proxy).to(lab.device, torch.bfloat16)


ATTENTION_OPS = {
    "flash": "scaled_dot_product_attention, flash backend forced",
    "cudnn": "scaled_dot_product_attention, cuDNN backend forced",
    "projected": "linear q, k, v; scaled_dot_product_attention, flash backend forced; linear",
    "linear": "fla.ops.linear_attn.chunk_linear_attn, without normalisation",
}


@dataclass(frozen=True, kw_only=True)
class AttentionCase(GpuCase):
    """Attention over the same tokens by one of the kinds of ATTENTION_OPS."""

    batch: int
    tokens: int
    channels: int
    heads: int
    kind: str
    op: str
    dtype: torch.dtype = torch.bfloat16
    passes: tuple[str, ...] = (FORWARD, BACKWARD)

    def check(self, lab: Lab) -> None:
        inputs = self._inputs(lab, 1, 64)
        try:
            got = rivals.attention(self.kind)(*inputs)
        except Exception as error:  # PyTorch without the backend, a package that is not installed
            raise UnavailableError(first_line(error)) from error
        q, k, v = (t.double() if self.kind != "linear" else t.double().transpose(1, 2) for t in inputs)
        scores = q @ k.mT
        softmax = (scores / q.shape[-1] ** 0.5).softmax(-1) @ v
        require_close("64 tokens", got, softmax if self.kind != "linear" else (scores.tril() @ v).transpose(1, 2))

    def _inputs(self, lab: Lab, batch: int, tokens: int) -> list[Tensor]:
        sizes = (tokens, self.heads) if self.kind == "linear" else (self.heads, tokens)
        shape = (batch, *sizes, self.channels // self.heads)
        return [lab.randn(*shape, dtype=torch.bfloat16, seed=i) for i in range(3)]

    def problem(self, lab: Lab) -> Problem:
        attention = rivals.attention(self.kind)
        if self.kind != "projected":
            return attention, [*self._inputs(lab, self.batch, self.tokens)], []
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Linear(self.channels, k * self.channels) for k in (3, 1))
        layers.to(lab.device, torch.bfloat16)

        def function(x: Tensor) -> Tensor:  # (N, L, C)
            q, k, v = layers[0](x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            return layers[1](attention(q, k, v).transpose(1, 2).flatten(2))

        x = lab.randn(self.batch, self.tokens, self.channels, dtype=torch.bfloat16)
        return function, [x], list(layers.parameters())


# ---- the table

# (H, W, N, C)
SHAPES = (
    *((56, 56, 128, 2), (28, 28, 128, 16), (14, 14, 128, 64), (7, 7, 128, 64), (74, 74, 32, 64), (147, 147, 32, 64)),
    *((16, 16, 32, 1200), (16, 16, 256, 1200), (1024, 512, 2, 160), (2048, 1024, 2, 160), (1024, 1024, 16, 8)),
)
BACKBONE = ((56, 56, 64, 96), (28, 28, 64, 192), (14, 14, 64, 384), (7, 7, 64, 768))  # maps of its stages
# GSPN-2's table of bandwidths on an A100, (H, W, N, C) and GB/s of GSPN-1 and GSPN-2. It names neither direction nor
# dtype; here they are those of its other benchmark: one direction, float32, weights for every channel.
GSPN2_TABLE = (
    *(((32, 32, 32, 196), 114, 1832), ((64, 64, 1, 768), 86, 1847), ((64, 64, 1, 1152), 35, 1837)),
    *(((64, 64, 1, 32), 125, 1830), ((128, 128, 1, 32), 98, 1865), ((256, 256, 1, 64), 76, 1842)),
    *(((256, 256, 8, 64), 94, 1858), ((512, 512, 1, 128), 64, 1840)),
)
SOURCE = {"unit": "bytes/s", "device": "A100"}
SOURCE["source"] = "GSPN-2, arXiv 2512.07884, which states neither direction nor dtype"
ATTENTION = {  # by kind and number of heads
    ("flash", 16): "flash attention",
    ("cudnn", 16): "cuDNN attention",
    ("projected", 16): "flash attention between its linear layers",
    ("linear", 16): "flash-linear-attention, heads of 72",
    ("linear", 18): "flash-linear-attention, heads of 64",
}
DOWN, RIGHT = "top_to_bottom", "left_to_right"
F32, BF16 = torch.float32, torch.bfloat16
NAMES, LABEL = {F32: "f32", BF16: "bf16"}, "{}x{} N{} C{}"


def make_cases(*, quick: bool) -> list[Case]:
    """Return all cases, those that matter most first. Quick ones are shrunk, named so, and have no targets."""
    cases: list[Case] = []

    def scan(group: str, name: str, hwnc: tuple[int, ...], dtype: torch.dtype, **options: Any) -> None:
        """Add a call. Weights, and gates unless they are said to be, are shared by all channels or `per_channel`."""
        h, w, n, c = (min(k, most) for k, most in zip(hwnc, (18, 11, 2, 4), strict=True)) if quick else hwnc
        per_channel, one = options.pop("per_channel", False), options.pop("one_direction", None)
        gates = c if options.pop("gates_per_channel", per_channel) else 1
        if one is not None:  # as line_scan has it, without output gate
            options |= {"directions": (one,), "u_channels": None}
        channels = {"weight_groups": c if per_channel else 1, "lam_channels": gates, "u_channels": gates}
        cases.append(ScanCase(group=group, name=name, shape=(n, c, h, w), dtype=dtype, **channels | options))

    def share(of_copy: float) -> tuple[Target, ...]:
        """Return a target as a share of the copy's bandwidth, so that GPUs of different memory are judged alike."""
        return (Target("copy_fraction", ">=", of_copy),)

    both, launch, group = (FORWARD, BACKWARD), "one launch per line", "targets"
    large, few = (1024, 1024, 16, 8), (1024, 1024, 1, 2)
    targets = {FORWARD: share(0.9), BACKWARD: share(0.86)}
    one: dict[str, Any] = {"per_channel": True, "targets": targets}
    for direction in (DOWN, RIGHT):
        versus = {name: (f"{launch}, A {direction}", name) for name in both}
        scan(group, f"A {direction}", large, F32, op="line_scan", one_direction=direction, versus=versus, **one)
    scan(group, f"A {DOWN}, from logits", large, F32, one_direction=DOWN, **one)
    scan(group, "B", (74, 74, 32, 64), BF16, targets={FORWARD: share(0.33)})
    scan(group, "C", (16, 16, 32, 1200), BF16, per_channel=True, targets={FORWARD: share(0.8)})
    for dtype, direction in ((F32, DOWN), (BF16, DOWN), (F32, RIGHT), (BF16, RIGHT)):
        name = f"N1 C2 {NAMES[dtype]} {direction}"
        # Bound by the latency of lines that depend on one another, and that is not the memory's.
        latency = {FORWARD: (Target("time_us", "<=", 60),)}
        scan(group, name, few, dtype, directions=(direction,), targets=latency)
    scan(group, "N1 C2 bf16, four directions", few, BF16)
    for side in (74, 147):
        shape, proxy = ((2, 16, 8, 7), 4) if quick else ((32, 1152, side, side), 64)
        targets = {FORWARD: (Target("speedup", ">=", 50),)} if side == 74 else {}
        versus = {name: (f"flash attention {side}x{side}", name) for name in both}
        about = {"name": f"sub-layer {side}x{side}", "op": f"SpatialPropagation(proxy_channels={proxy})"}
        cases.append(SubLayerCase(group=group, shape=shape, proxy=proxy, targets=targets, versus=versus, **about))

    group = "comparison"
    for direction in (DOWN, RIGHT):
        options = {"op": "line_launch", "one_direction": direction, "per_channel": True, "passes": both}
        scan(group, f"{launch}, A {direction}", large, F32, **options)
    for dtype in (F32, BF16):
        name, shape = f"128x128 N1 C32 {NAMES[dtype]} {DOWN}", (128, 128, 1, 32)
        options = {"one_direction": DOWN, "per_channel": True, "passes": both}
        versus = {which: (f"{launch}, {name}", which) for which in both}
        scan(group, name, shape, dtype, op="line_scan", versus=versus, **options)
        scan(group, f"{launch}, {name}", shape, dtype, op="line_launch", **options)
    for hwnc in (SHAPES[6], *BACKBONE):
        name = f"{LABEL.format(*hwnc)} bf16 G=C'=C, channels last"
        scan("channels last", name, hwnc, BF16, per_channel=True, channels_last=True)
    for hwnc in (SHAPES[4], (64, 64, 2, 640)):
        name, options = f"{LABEL.format(*hwnc)} bf16 G=1 C'=C, channels last", {"gates_per_channel": True}
        scan("channels last", name, hwnc, BF16, channels_last=True, **options)
    for side in (74, 147):
        for (kind, heads), name in ATTENTION.items():
            sizes = {"batch": 32, "tokens": side * side, "channels": 1152, "heads": heads}
            if quick:
                sizes = {"batch": 2, "tokens": 56, "channels": 2 * 1152 // heads, "heads": 2}
            about = {"name": f"{name} {side}x{side}", "kind": kind, "op": ATTENTION_OPS[kind]}
            cases.append(AttentionCase(group=group, **about, **sizes))

    for hwnc, first, second in GSPN2_TABLE:
        published = {"GSPN-1": first * 1e9, "GSPN-2": second * 1e9, **SOURCE}
        options = {"op": "line_scan", "one_direction": DOWN, "per_channel": True, "published": published}
        scan("GSPN-2's shapes", f"{LABEL.format(*hwnc)} f32 {DOWN}", hwnc, F32, **options)

    group = "shapes"
    for dtype in (BF16, F32):
        for hwnc in SHAPES:
            for per_channel in (False, True):
                name = f"{LABEL.format(*hwnc)} {NAMES[dtype]} G=C'={'C' if per_channel else '1'}"
                scan(group, name, hwnc, dtype, per_channel=per_channel)
        for hwnc in (SHAPES[4], SHAPES[5], SHAPES[10]):
            scan(group, f"{LABEL.format(*hwnc)} {NAMES[dtype]} G=1 C'=C", hwnc, dtype, gates_per_channel=True)
    if not quick:
        return cases
    versus = [{name: (f"{rival}, shrunk", other) for name, (rival, other) in case.versus.items()} for case in cases]
    shrunk = [{"name": f"{case.name}, shrunk", "targets": {}, "published": None} for case in cases]
    return [replace(case, versus=v, **s) for case, v, s in zip(cases, versus, shrunk, strict=True)]
