"""Inputs and the accuracy criterion that the operator's tests share."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gspn_core import DIRECTIONS, _backend, line_scan, propagate, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

EXTENSION = _backend.extension()
ISAS = EXTENSION.build_info()["supported_isas"]  # of the CPU kernels

# Allowed in addition to twice the error of the reference: one rounding of the result, relative to its largest value;
# for float64, whose reference has no error by definition, the rounding of the sums of a scan.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def propagate_inputs(
    n: int,
    c: int,
    h: int,
    w: int,
    *,
    d: int = 4,
    groups: int = 1,
    lam: int | None = None,
    u: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor | None]:
    """Return x, logits, lam, u; lam and u are the numbers of their channels, None for an absent gate."""
    return [
        randn(n, c, h, w, dtype=dtype),
        randn(n, d, groups, 3, h, w, dtype=dtype, seed=1),
        None if lam is None else randn(n, d, lam, h, w, dtype=dtype, seed=2),
        None if u is None else randn(n, d, u, h, w, dtype=dtype, seed=3),
    ]


def low_rank_inputs(
    n: int, c: int, rank: int, h: int, w: int, *, d: int = 4, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return x, r, weight and bias of propagate_low_rank."""
    shapes = (n, c, h, w), (n, rank, h, w), (d, 5, c, rank), (d, 5, c)
    scales = 1, 1, 0.5 * (8 / max(rank, 8)) ** 0.5, 0.5
    return [
        (randn(*shape, seed=i) * scale).to(dtype) for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
    ]


def value_and_gradients(f: Callable[..., Tensor], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Return f(*inputs) and, for a fixed random gradient of it, the gradients of all inputs that are not None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = f(*leaves)
    wanted = [t for t in leaves if t is not None]
    if out.grad_fn is None:  # an empty tensor
        return [out, *(torch.zeros_like(t) for t in wanted)]
    dy = randn(*out.shape, seed=4).to(out.dtype)
    gradients = torch.autograd.grad(out, wanted, dy, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, gradients, strict=True))]


def assert_as_accurate(
    kernel: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor | None], label: str = ""
) -> None:
    """Output and every gradient are at most twice as far from the float64 result as the reference in this dtype."""
    exact = value_and_gradients(reference, [None if t is None else t.double() for t in inputs])
    plain = value_and_gradients(reference, inputs)
    ours = value_and_gradients(kernel, inputs)
    names = ["output", *(f"gradient of input {i}" for i, t in enumerate(inputs) if t is not None)]
    for name, o, p, e in zip(names, ours, plain, exact, strict=True):
        assert o.shape == e.shape and o.dtype == p.dtype, (label, name, o.shape, o.dtype)
        if e.numel() == 0:
            continue
        error, allowed = (o.double() - e).abs().max(), 2 * (p.double() - e).abs().max()
        allowed = allowed + ROUNDING[o.dtype] * e.abs().max().clamp(min=1)
        assert error <= allowed, f"{label} {name}: error {error:.3g}, allowed {allowed:.3g}"


def check_propagate(inputs: Sequence[Tensor | None], **options: Any) -> None:
    assert_as_accurate(
        lambda *t: propagate(*t, **options), lambda *t: reference.propagate(*t, **options), inputs, str(options)
    )


def check_line_scan(inputs: Sequence[Tensor | None], **options: Any) -> None:
    assert_as_accurate(
        lambda *t: line_scan(*t, **options), lambda *t: reference.line_scan(*t, **options), inputs, str(options)
    )


def check_infinities(h: int, w: int, dtype: torch.dtype = torch.float32, groups: int = 1, **options: Any) -> None:
    """Infinities of x and lam, in corners and of both signs, reach the output and the gradients as in the reference.

    But for the gradients of logits, which are differences of infinities.
    """
    places = [(0, 0, torch.inf)], [(h // 3, w // 2, torch.inf), (h // 2, w // 3, -torch.inf)], [(h - 1, 0, -torch.inf)]
    for gate, infinities in itertools.product((0, 2), places):
        inputs = propagate_inputs(2, 4, h, w, groups=groups, lam=4, u=4 if groups == 4 else 2, dtype=dtype)
        for row, column, value in infinities:
            inputs[gate][..., 1, row, column] = value  # type: ignore[index]
        ours, wanted = (
            value_and_gradients(lambda *t, f=f: f(*t, **options), inputs) for f in (propagate, reference.propagate)
        )
        assert not wanted[0].isfinite().all()
        for i in (0, 1, 3, 4):
            torch.testing.assert_close(ours[i], wanted[i], atol=1e-4, rtol=1e-3, equal_nan=True)


def check_without_effect(
    function: Callable[..., Tensor], h: int = 12, w: int = 9, groups: int = 1, dtype: torch.dtype = torch.float32
) -> None:
    """NaN logits on first lines of chunks and for neighbours that do not exist change nothing; their gradient is 0."""
    for direction in DIRECTIONS:
        inputs = propagate_inputs(1, 4, h, w, d=1, groups=groups, dtype=dtype)
        poisoned = inputs[1].clone()
        lines = reference.to_scan_order(poisoned, direction)
        lines[..., 0, :, 0] = lines[..., 2, :, -1] = lines[..., ::3, :] = torch.nan
        poisoned = reference.from_scan_order(lines, direction)
        mask = poisoned.isnan()

        def scan(*t: Tensor, direction: str = direction) -> Tensor:
            return function(*t, directions=[direction], chunk_size=3)

        clean = value_and_gradients(scan, inputs)
        for ours, wanted in zip(value_and_gradients(scan, [inputs[0], poisoned]), clean, strict=True):
            assert torch.equal(ours, wanted)
        assert (clean[2][mask] == 0).all() and mask.any()


def opcheck(op: Any, arguments: Sequence[Any]) -> None:
    """Check an operator's schema, fake, autograd and compilation with torch's own tests."""
    with warnings.catch_warnings():
        # opcheck's own: it looks at .grad of copies it has made differentiable.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        torch.library.opcheck(op, tuple(arguments))


def covering(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return combinations in which every pair of values of two axes occurs: far fewer than the full product."""
    indices = [range(len(axis)) for axis in axes]

    def pairs(combination: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        places = itertools.combinations(range(len(axes)), 2)
        return {(i, combination[i], j, combination[j]) for i, j in places}

    candidates = list(itertools.product(*indices))
    missing = set().union(*map(pairs, candidates))
    combinations = []
    while missing:
        best = max(candidates, key=lambda candidate: len(pairs(candidate) & missing))
        missing -= pairs(best)
        combinations.append(tuple(axis[index] for axis, index in zip(axes, best, strict=True)))
    return combinations


# ---- layouts of a tensor's memory


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(-3, -1).contiguous().movedim(-1, -3)


def part_of_a_wider_buffer(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-2], t.shape[-2] + 3, t.shape[-1] + 5), torch.nan, dtype=t.dtype)
    return wide[..., 2:-1, 1:-4].copy_(t)


def transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT
