"""The cases that gpu.py measures: functions, their inputs, and how each is checked against float64."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gspn_core
from gspn_core import DIRECTIONS, reference

if TYPE_CHECKING:
    from gpu import Lab

FORWARD, SAVING, BACKWARD = PASSES = ("forward", "forward, checkpoints saved", "backward")
INTERVAL = gspn_core.info()["checkpoint_interval"]

# Largest difference from the float64 reference, over the largest value in it.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

Shape = tuple[int, int, int, int]
MaybeTensors = Sequence[Tensor | None]


class DisagreementError(Exception):
    """A measured function and the reference computed different results."""


@dataclass(frozen=True)
class Target:
    """What a row is to reach: `time_us` or, of copy bandwidth, `copy_fraction`, or `speedup` over another case."""

    quantity: str
    comparison: str
    value: float

    def met_by(self, row: dict[str, Any]) -> bool | None:
        """Tell whether the row reaches it; None where the quantity is not there."""
        value = row.get(self.quantity)
        if value is None:
            return None
        return bool(value <= self.value if self.comparison == "<=" else value >= self.value)


# ---- what is measured


@dataclass(frozen=True, kw_only=True)
class Job:
    """A case of the benchmark: a function, its inputs, and how it is checked."""

    group: str
    name: str
    passes: tuple[str, ...] = PASSES
    targets: Mapping[str, tuple[Target, ...]] = field(default_factory=dict)  # by pass
    versus: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # by pass: another case, and its pass
    published: dict[str, Any] | None = None  # what a paper reports for it, with the source

    def facts(self) -> dict[str, Any]:
        """What a row says about the case."""
        raise NotImplementedError

    def bytes(self, which: str) -> int | None:
        """Bytes that a pass has to move, None where nobody counted."""
        return None

    def memory(self, which: str) -> int:
        """Bytes of device memory that a pass takes, about."""
        raise NotImplementedError

    def reason(self, lab: Lab) -> str | None:
        """Why the case cannot run here, None if it can."""
        return None

    def gate_key(self) -> object:
        """What tells cases with the same small version from others."""
        return self

    def check(self, lab: Lab) -> None:
        """Compare a small version with float64; raise DisagreementError."""
        raise NotImplementedError

    def contestant(self, lab: Lab) -> tuple[Callable[..., Tensor], list[Tensor | None], list[Tensor]]:
        """Return a function, its inputs, and parameters that want gradients too."""
        raise NotImplementedError

    def verify(self, inputs: MaybeTensors, y: Tensor, dy: Tensor | None, dx: Tensor | None) -> None:
        """Compare part of the very results that are measured; raise DisagreementError."""


@dataclass(frozen=True)
class Scan:
    """One call of the operator: `op` is propagate, line_scan, or line_launch, the comparison."""

    shape: Shape
    dtype: torch.dtype
    groups: int
    lam: int | None  # C' of the gates
    u: int | None
    directions: tuple[str, ...] = DIRECTIONS
    op: str = "propagate"

    def sizes(self) -> list[tuple[int, ...] | None]:
        """Shapes of x, the weights (or logits), lam and u."""
        n, _, h, w = self.shape
        d = (len(self.directions),) if self.op == "propagate" else ()
        gates = [None if channels is None else (n, *d, channels, h, w) for channels in (self.lam, self.u)]
        return [self.shape, (n, *d, self.groups, 3, h, w), *gates]

    def bytes(self, which: str) -> int:
        """The planes of cuda.md section 1 for inputs, outputs and checkpoints, in bytes."""
        image, *others = (0 if size is None else math.prod(size) * self.dtype.itemsize for size in self.sizes())
        checkpoints = len(self.directions) * math.prod(self.shape) * 4 // INTERVAL
        if which == FORWARD:
            return 2 * image + sum(others)
        return (2 * image + sum(others) if which == SAVING else 3 * image + 2 * sum(others)) + checkpoints

    def tensors(self, lab: Lab) -> list[Tensor | None]:
        """Random inputs. Weights that are used as given sum to less than one, so that the state stays bounded."""
        sizes = self.sizes()
        inputs = [None if size is None else lab.randn(*size, dtype=self.dtype, seed=i) for i, size in enumerate(sizes)]
        if self.op != "propagate":
            assert inputs[1] is not None
            inputs[1].uniform_(0, 1 / 3, generator=torch.Generator(lab.device).manual_seed(9))
        return inputs

    def function(self, lab: Lab | None) -> Callable[..., Tensor]:
        """The operator with this call's options; without a lab, the reference."""
        if self.op == "propagate":
            propagate = gspn_core.propagate if lab else reference.propagate
            return lambda *t: propagate(*t, directions=self.directions)
        (direction,) = self.directions
        if lab and self.op == "line_launch":
            assert isinstance(lab.line_launch, LineLaunch)
            launch = lab.line_launch(direction)
            return lambda x, weights, lam, _: launch(x, weights, lam)
        line_scan = gspn_core.line_scan if lab else reference.line_scan
        return lambda x, weights, lam, _: line_scan(x, weights, lam, direction=direction)

    def tolerance(self) -> float:
        """The tolerance of the dtype, and for a state kept in bfloat16 a rounding per line, which adds up."""
        extra = 0.0
        if self.op == "line_launch" and self.dtype == torch.bfloat16:
            extra = max(self.shape[2:]) * 2.0**-9
        return TOLERANCES[self.dtype] + extra


@dataclass(frozen=True, kw_only=True)
class ScanJob(Job):
    """A call of the operator, or of the comparison with one launch per line."""

    scan: Scan

    def facts(self) -> dict[str, Any]:
        """Shapes and options of the call."""
        scan = self.scan
        return {
            "op": scan.op,
            "dtype": str(scan.dtype).removeprefix("torch."),
            "shape": list(scan.shape),
            "directions": list(scan.directions),
            "weight_groups": scan.groups,
            "lam_channels": scan.lam,
            "u_channels": scan.u,
        }

    def bytes(self, which: str) -> int:
        """See `Scan.bytes`."""
        return self.scan.bytes(which)

    def memory(self, which: str) -> int:
        """What is moved has a place; a fifth more for the output that autograd keeps and for partial sums."""
        return int(1.2 * self.scan.bytes(which)) + 2**28

    def reason(self, lab: Lab) -> str | None:
        """The comparison has to be built."""
        if self.scan.op == "line_launch" and isinstance(lab.line_launch, str):
            return lab.line_launch
        return None

    def _small(self) -> Scan:
        scan = self.scan
        n, c, h, w = scan.shape
        few = min(c, 4)
        groups, lam, u = (k if k is None or k == 1 else few for k in (scan.groups, scan.lam, scan.u))
        assert groups is not None
        return replace(scan, shape=(min(n, 2), few, min(h, 200), min(w, 200)), groups=groups, lam=lam, u=u)

    def gate_key(self) -> object:
        """The small version itself."""
        return self._small()

    def check(self, lab: Lab) -> None:
        """Compare output and every gradient."""
        scan = self._small()
        inputs = scan.tensors(lab)
        dy = lab.randn(*scan.shape, dtype=scan.dtype, seed=5)
        ours = _value_and_gradients(scan.function(lab), inputs, dy)
        exact = _value_and_gradients(scan.function(None), [None if t is None else t.double() for t in inputs], dy)
        for i, (got, want) in enumerate(zip(ours, exact, strict=True)):
            what = "output" if i == 0 else f"gradient {i - 1}"
            _require_close(f"{self.name}, small version {scan.shape}, {what}", got, want, scan.tolerance())

    def contestant(self, lab: Lab) -> tuple[Callable[..., Tensor], list[Tensor | None], list[Tensor]]:
        """The operator on inputs of full size."""
        return self.scan.function(lab), self.scan.tensors(lab), []

    def verify(self, inputs: MaybeTensors, y: Tensor, dy: Tensor | None, dx: Tensor | None) -> None:
        """Compare the last channel of the last image: output, and where there is one, the gradient of x."""
        last = [None if t is None else _last_channel(t, i, self.scan.op) for i, t in enumerate(inputs)]
        exact = [None if t is None else t.double() for t in last]
        with torch.set_grad_enabled(dx is not None):
            leaf = exact[0].requires_grad_(dx is not None)  # type: ignore[union-attr]
            expected = self.scan.function(None)(*exact)
        tolerance = self.scan.tolerance()
        where = f"{self.name}, last channel of the last image at full size"
        _require_close(f"{where}, output", y[-1:, -1:], expected.detach(), tolerance)
        if dx is not None and dy is not None:
            (expected_dx,) = torch.autograd.grad(expected, leaf, dy[-1:, -1:].double())
            _require_close(f"{where}, gradient of x", dx[-1:, -1:], expected_dx, tolerance)


@dataclass(frozen=True, kw_only=True)
class SubLayerJob(Job):
    """The whole mixer module: projections, gates, propagation, lift."""

    shape: Shape
    proxy: int

    def facts(self) -> dict[str, Any]:
        """Shape and widths."""
        return {
            "op": f"SpatialPropagation(proxy_channels={self.proxy})",
            "dtype": "bfloat16",
            "shape": list(self.shape),
        }

    def memory(self, which: str) -> int:
        """Input, output, their gradients, and the gates."""
        n, c, h, w = self.shape
        return n * h * w * 2 * (4 * c + 40 * self.proxy) + 2**30

    def gate_key(self) -> object:
        """One check for every size."""
        return type(self)

    def check(self, lab: Lab) -> None:
        """Compare with the same module in float64 around the reference."""
        module = self._module(16, 4, lab)
        x = lab.randn(2, 16, 33, 29, dtype=torch.bfloat16, seed=1)
        with torch.no_grad():
            got = module(x)
            exact = self._module(16, 4, lab).double()
            expected = exact.lift(reference.propagate(*exact.project(x.double())))
        # A convolution before and one after the scan round too.
        _require_close(f"{self.name}, small version", got, expected, 3 * TOLERANCES[torch.bfloat16])

    def _module(self, channels: int, proxy: int, lab: Lab) -> gspn_core.SpatialPropagation:
        torch.manual_seed(0)
        module = gspn_core.SpatialPropagation(channels, proxy_channels=proxy)
        return module.to(lab.device, torch.bfloat16)

    def contestant(self, lab: Lab) -> tuple[Callable[..., Tensor], list[Tensor | None], list[Tensor]]:
        """The module on an image."""
        module = self._module(self.shape[1], self.proxy, lab)
        return module, [lab.randn(*self.shape, dtype=torch.bfloat16, seed=1)], list(module.parameters())


@dataclass(frozen=True, kw_only=True)
class AttentionJob(Job):
    """Attention over the same tokens. `kind`: flash or cudnn, a backend of scaled_dot_product_attention; projected,
    flash between its linear layers; linear, the chunked linear attention of flash-linear-attention.
    """

    batch: int
    tokens: int
    channels: int
    kind: str
    heads: int = 16

    def facts(self) -> dict[str, Any]:
        """Heads and backend."""
        ops = {
            "flash": "scaled_dot_product_attention, flash backend forced",
            "cudnn": "scaled_dot_product_attention, cuDNN backend forced",
            "projected": "linear q, k, v; scaled_dot_product_attention, flash backend forced; linear",
            "linear": "fla.ops.linear_attn.chunk_linear_attn, without normalisation",
        }
        return {
            "op": ops[self.kind],
            "dtype": "bfloat16",
            "tokens": self.tokens,
            "batch": self.batch,
            "channels": self.channels,
            "heads": f"{self.heads} of {self.channels // self.heads}",
        }

    def memory(self, which: str) -> int:
        """A few tensors of the tokens' size, in float32 for gradients."""
        return 32 * self.batch * self.tokens * self.channels + 2**30

    def reason(self, lab: Lab) -> str | None:
        """The backend or the package may be missing."""
        if self.kind == "linear":
            try:
                importlib.import_module("fla.ops.linear_attn")
            except ImportError as error:
                return f"flash-linear-attention is not installed ({error})"
            return None
        return lab.attention_reason("flash" if self.kind == "projected" else self.kind)

    def gate_key(self) -> object:
        """One check for every number of tokens."""
        return self.kind, self.heads

    def _function(self) -> Callable[..., Tensor]:
        if self.kind == "linear":
            chunked = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
            return lambda q, k, v: chunked(q, k, v, scale=1.0, normalize=False)[0]
        return attention("flash" if self.kind == "projected" else self.kind)

    def _inputs(self, lab: Lab, batch: int, tokens: int) -> list[Tensor]:
        sizes = (self.heads, tokens) if self.kind != "linear" else (tokens, self.heads)
        shape = (batch, *sizes, self.channels // self.heads)
        return [lab.randn(*shape, dtype=torch.bfloat16, seed=i) for i in range(3)]

    def check(self, lab: Lab) -> None:
        """Compare with the formula in float64."""
        inputs = self._inputs(lab, 1, 64)
        with torch.no_grad():
            got = self._function()(*inputs)
        q, k, v = (t.double() if self.kind != "linear" else t.double().transpose(1, 2) for t in inputs)
        scores = q @ k.mT
        if self.kind == "linear":
            expected = (scores.tril() @ v).transpose(1, 2)
        else:
            expected = (scores / q.shape[-1] ** 0.5).softmax(-1) @ v
        _require_close(f"{self.name}, 64 tokens", got, expected, TOLERANCES[torch.bfloat16])

    def contestant(self, lab: Lab) -> tuple[Callable[..., Tensor], list[Tensor | None], list[Tensor]]:
        """Attention on random q, k, v; between linear layers, on random tokens (N, L, C)."""
        attention = self._function()
        if self.kind != "projected":
            return attention, [*self._inputs(lab, self.batch, self.tokens)], []
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Linear(self.channels, k * self.channels) for k in (3, 1))
        layers.to(lab.device, torch.bfloat16)

        def function(x: Tensor) -> Tensor:
            q, k, v = layers[0](x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            out: Tensor = layers[1](attention(q, k, v).transpose(1, 2).flatten(2))
            return out

        x = lab.randn(self.batch, self.tokens, self.channels, dtype=torch.bfloat16, seed=0)
        return function, [x], list(layers.parameters())


def _last_channel(t: Tensor, place: int, op: str) -> Tensor:
    dim = 1 if place == 0 or op != "propagate" else 2
    return t[-1:].narrow(dim, t.shape[dim] - 1, 1)


def _value_and_gradients(f: Callable[..., Tensor], inputs: MaybeTensors, dy: Tensor) -> list[Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))]


def _require_close(what: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1e-30)
    if not error <= tolerance:  # NaN is a disagreement
        raise DisagreementError(f"{what}: off by {error:.2e} of the largest value, {tolerance:.1e} is allowed")


# ---- the contestants that are not ours


def attention(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return scaled_dot_product_attention by the backend flash or cudnn."""
    kind = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[backend]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v)

    return call


class LineLaunch:
    """The kernels of line_launch.cu through ctypes."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        sizes, pointer = [ctypes.c_int, ctypes.c_int, *(ctypes.c_int64,) * 3], ctypes.c_void_p
        self._forward, self._backward = library.line_launch_forward, library.line_launch_backward
        self._forward.argtypes = [*sizes, *(pointer,) * 5]
        self._backward.argtypes = [*sizes, *(pointer,) * 10]

    @classmethod
    def build(cls, architecture: str) -> LineLaunch | str:
        """Compile for an architecture unless that was done before; return why where it cannot be."""
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            return "line_launch.cu was not built: nvcc is not on PATH"
        source = Path(__file__).with_name("line_launch.cu")
        command = [nvcc, "-O3", "-std=c++17", f"-arch={architecture}", "-shared", "-Xcompiler", "-fPIC"]
        digest = hashlib.sha256(" ".join(command).encode() + source.read_bytes()).hexdigest()[:16]
        cache = Path(tempfile.gettempdir()) / f"gspn-line-launch-{os.getuid()}"
        cache.mkdir(mode=0o700, exist_ok=True)
        path = cache / f"{digest}.so"
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            done = subprocess.run(
                [*command, "-o", str(unfinished), str(source)], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                return f"line_launch.cu was not built: {done.stderr.strip()}"
            unfinished.replace(path)
        return cls(path)

    def __call__(self, direction: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return a differentiable function of x, weights (N, C, 3, H, W) and lam (N, C, H, W)."""
        forward, backward, index = self._forward, self._backward, DIRECTIONS.index(direction)

        def launch(function: Any, *tensors: Tensor) -> None:
            x = tensors[0]
            n, c, h, w = x.shape
            assert all(t.is_contiguous() for t in tensors)
            stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None
            pointers = [t.data_ptr() for t in tensors]
            error = function(x.dtype == torch.bfloat16, index, n * c, h, w, *pointers, stream)
            if error:
                raise RuntimeError(f"line_launch failed with CUDA error {error}")

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor, weights: Tensor, lam: Tensor) -> Tensor:
                h = torch.empty_like(x)
                launch(forward, x, weights, lam, h)
                ctx.save_for_backward(x, weights, lam, h)
                return h

            @staticmethod
            def backward(ctx: Any, dh: Tensor) -> Any:
                x, weights, lam, h = ctx.saved_tensors
                gradients = [torch.empty_like(t) for t in (x, weights, lam)]
                positions = x.shape[2] if index < 2 else x.shape[3]
                scratch = x.new_empty(2 * x.shape[0] * x.shape[1] * positions, dtype=torch.float32)
                launch(backward, x, weights, lam, h, dh.contiguous(), *gradients, scratch)
                return tuple(gradients)

        return Function.apply


# ---- the list

# cuda.md section 1, (H, W, N, C).
SHAPES = (
    (56, 56, 128, 2),
    (28, 28, 128, 16),
    (14, 14, 128, 64),
    (7, 7, 128, 64),
    (74, 74, 32, 64),
    (147, 147, 32, 64),
    (16, 16, 32, 1200),
    (16, 16, 256, 1200),
    (1024, 512, 2, 160),
    (2048, 1024, 2, 160),
    (1024, 1024, 16, 8),
)
# GSPN-2's table of bandwidths on an A100, (H, W, N, C) and GB/s of GSPN-1 and GSPN-2. It names neither direction nor
# dtype; here they are those of its other benchmark: one direction, float32, weights for every channel.
GSPN2_TABLE = (
    ((32, 32, 32, 196), 114, 1832),
    ((64, 64, 1, 768), 86, 1847),
    ((64, 64, 1, 1152), 35, 1837),
    ((64, 64, 1, 32), 125, 1830),
    ((128, 128, 1, 32), 98, 1865),
    ((256, 256, 1, 64), 76, 1842),
    ((256, 256, 8, 64), 94, 1858),
    ((512, 512, 1, 128), 64, 1840),
)
DOWN, RIGHT = "top_to_bottom", "left_to_right"


def make_jobs(*, quick: bool) -> list[Job]:
    """All cases, those that matter most first. Quick ones are shrunk, say so in their names, and have no targets."""
    jobs: list[Job] = []

    def shrunk(shape: Shape) -> Shape:
        n, c, h, w = shape
        return (min(n, 2), min(c, 4), min(h, 18), min(w, 11)) if quick else shape

    def scan(
        group: str,
        name: str,
        hwnc: tuple[int, int, int, int],
        dtype: torch.dtype,
        *,
        per_channel: bool = False,
        gates: str = "like weights",
        u: bool = True,
        **options: Any,
    ) -> None:
        h, w, n, c = hwnc
        shape = shrunk((n, c, h, w))
        groups = shape[1] if per_channel else 1
        channels = shape[1] if gates == "per channel" else groups
        scan_options = {key: options.pop(key) for key in ("directions", "op") if key in options}
        call = Scan(shape, dtype, groups, channels, channels if u else None, **scan_options)
        jobs.append(ScanJob(group=group, name=name, scan=call, **options))

    def at_most(us: float) -> tuple[Target, ...]:
        return (Target("time_us", "<=", us),)

    f32, bf16 = torch.float32, torch.bfloat16
    group, launch = "targets", "one launch per line"
    a_targets = {FORWARD: (*at_most(830), Target("copy_fraction", ">=", 0.9)), BACKWARD: at_most(1600)}
    a_shape = (1024, 1024, 16, 8)
    for direction in (DOWN, RIGHT):
        rival = f"{launch}, A {direction}"
        options: dict[str, Any] = {"op": "line_scan", "directions": (direction,), "per_channel": True, "u": False}
        versus = {which: (rival, which) for which in (FORWARD, BACKWARD)}
        scan(group, f"A {direction}", a_shape, f32, targets=a_targets, versus=versus, **options)
    scan(
        *(group, f"A {DOWN}, from logits", a_shape, f32),
        per_channel=True,
        u=False,
        directions=(DOWN,),
        targets=a_targets,
    )
    scan(group, "B", (74, 74, 32, 64), bf16, targets={FORWARD: at_most(35)})
    scan(group, "C", (16, 16, 32, 1200), bf16, per_channel=True, targets={FORWARD: at_most(125)})
    few = (1024, 1024, 1, 2)
    for dtype, direction in ((f32, DOWN), (bf16, DOWN), (f32, RIGHT), (bf16, RIGHT)):
        name = f"N1 C2 {_short(dtype)} {direction}"
        scan(group, name, few, dtype, directions=(direction,), targets={FORWARD: at_most(60)})
    scan(group, "N1 C2 bf16, four directions", few, bf16)
    for side in (74, 147):
        shape = (32, 1152, side, side) if not quick else (2, 16, 8, 7)
        faster = {FORWARD: (Target("speedup", ">=", 50),)} if side == 74 else {}
        versus = {which: (f"flash attention {side}x{side}", which) for which in (FORWARD, BACKWARD)}
        name = f"sub-layer {side}x{side}"
        proxy = 64 if not quick else 4
        jobs.append(SubLayerJob(group=group, name=name, shape=shape, proxy=proxy, targets=faster, versus=versus))

    group = "comparison"
    for direction in (DOWN, RIGHT):
        options = {"op": "line_launch", "directions": (direction,), "per_channel": True, "u": False}
        passes = (FORWARD, BACKWARD)
        scan(group, f"{launch}, A {direction}", a_shape, f32, passes=passes, **options)
    for dtype in (f32, bf16):
        small = f"128x128 N1 C32 {_short(dtype)} {DOWN}"
        options = {"directions": (DOWN,), "per_channel": True, "u": False, "passes": (FORWARD, BACKWARD)}
        versus = {which: (f"{launch}, {small}", which) for which in options["passes"]}
        scan(group, small, (128, 128, 1, 32), dtype, op="line_scan", versus=versus, **options)
        scan(group, f"{launch}, {small}", (128, 128, 1, 32), dtype, op="line_launch", **options)
    for side in (74, 147):
        batch, tokens, channels, heads = (32, side * side, 1152, 16) if not quick else (2, 56, 144, 2)
        for kind, name, count in (
            ("flash", "flash attention", heads),
            ("cudnn", "cuDNN attention", heads),
            ("projected", "flash attention between its linear layers", heads),
            ("linear", "flash-linear-attention, heads of 72", heads),
            ("linear", "flash-linear-attention, heads of 64", 18 if not quick else 2),
        ):
            if kind == "linear" and quick and "64" in name:
                channels = 128
            jobs.append(
                AttentionJob(
                    group=group,
                    name=f"{name} {side}x{side}",
                    passes=(FORWARD, BACKWARD),
                    batch=batch,
                    tokens=tokens,
                    channels=channels,
                    heads=count,
                    kind=kind,
                )
            )

    group = "GSPN-2's shapes"
    for hwnc, first, second in GSPN2_TABLE:
        published = {
            "GSPN-1": first * 1e9,
            "GSPN-2": second * 1e9,
            "unit": "bytes/s",
            "device": "A100",
            "source": "GSPN-2, arXiv 2512.07884, which states neither direction nor dtype",
        }
        options = {"op": "line_scan", "directions": (DOWN,), "per_channel": True, "u": False, "published": published}
        scan(group, f"{_label(hwnc)} f32 {DOWN}", hwnc, f32, **options)

    group = "shapes"
    for dtype in (bf16, f32):
        for hwnc in SHAPES:
            for per_channel in (False, True):
                name = f"{_label(hwnc)} {_short(dtype)} G=C'={'C' if per_channel else '1'}"
                scan(group, name, hwnc, dtype, per_channel=per_channel)
        for hwnc in (SHAPES[4], SHAPES[5], SHAPES[10]):
            scan(group, f"{_label(hwnc)} {_short(dtype)} G=1 C'=C", hwnc, dtype, gates="per channel")

    if not quick:
        return jobs
    suffix = ", shrunk"
    return [
        replace(
            job,
            name=job.name + suffix,
            targets={},
            versus={which: (case + suffix, other) for which, (case, other) in job.versus.items()},
            published=None,
        )
        for job in jobs
    ]


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]


def _label(hwnc: tuple[int, int, int, int]) -> str:
    return "{}x{} N{} C{}".format(*hwnc)
