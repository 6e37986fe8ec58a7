"""Floating-point operations of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

A multiply-add counts as two operations, as in torch's count of matrix products. Per element and direction the forward
has one multiply-add for each of three neighbours and each gate. Normalising the weights is elementwise and not counted,
as torch counts no activations. The backward has three for the adjoint, three to recompute the state, two for the
gradients of the weights if wanted, and two for each gate. Gates of low rank add their products with R numbers: five
rows per element and direction, once forward, and backward once again and once for each gradient wanted of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _library, _low_rank  # noqa: F401  (define the operators)

_Shape = Sequence[int]


def _forward(x: _Shape, directions: int, gates: int) -> int:
    return 2 * directions * prod(x) * (3 + gates)


def _backward(x: _Shape, directions: int, gates: int, weights: bool) -> int:
    return 2 * directions * prod(x) * (3 + 3 + (2 if weights else 0) + 2 * gates)


def _count(*gates: _Shape | None) -> int:
    return sum(gate is not None for gate in gates)


@register_flop_formula([torch.ops.gspn.propagate])
def _propagate(
    x: _Shape, logits: _Shape, lam: _Shape | None, u: _Shape | None, directions: Sequence[int], *_: Any, **__: Any
) -> int:
    return _forward(x, len(directions), _count(lam, u))


@register_flop_formula([torch.ops.gspn.line_scan])
def _line_scan(x: _Shape, weights: _Shape, lam: _Shape | None, *_: Any, **__: Any) -> int:
    return _forward(x, 1, _count(lam))


@register_flop_formula([torch.ops.gspn.propagate_backward])
def _propagate_backward(
    dy: _Shape,
    x: _Shape,
    logits: _Shape,
    lam: _Shape | None,
    u: _Shape | None,
    checkpoints: _Shape,
    directions: Sequence[int],
    chunk_size: int | None,
    mask: Sequence[bool],
    **_: Any,
) -> int:
    return _backward(x, len(directions), _count(lam, u), mask[1])


@register_flop_formula([torch.ops.gspn.line_scan_backward])
def _line_scan_backward(
    dh: _Shape,
    x: _Shape,
    weights: _Shape,
    lam: _Shape | None,
    checkpoints: _Shape,
    direction: int,
    chunk_size: int | None,
    mask: Sequence[bool],
    **_: Any,
) -> int:
    return _backward(x, 1, _count(lam), mask[1])


def _products(x: _Shape, r: _Shape, directions: int) -> int:
    return 2 * directions * 5 * prod(x) * r[1]


@register_flop_formula([torch.ops.gspn.propagate_low_rank])
def _propagate_low_rank(
    x: _Shape, r: _Shape, weight: _Shape, bias: _Shape, directions: Sequence[int], *_: Any, **__: Any
) -> int:
    return _forward(x, len(directions), 2) + _products(x, r, len(directions))


@register_flop_formula([torch.ops.gspn.propagate_low_rank_backward])
def _propagate_low_rank_backward(
    dy: _Shape,
    x: _Shape,
    r: _Shape,
    weight: _Shape,
    bias: _Shape,
    checkpoints: _Shape,
    directions: Sequence[int],
    chunk_size: int | None,
    mask: Sequence[bool],
    **_: Any,
) -> int:
    count = len(directions)
    return _backward(x, count, 2, any(mask[1:])) + (1 + mask[1] + mask[2]) * _products(x, r, count)
