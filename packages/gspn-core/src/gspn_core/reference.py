"""The line scan as a plain PyTorch loop, which every kernel is tested against.

It runs on any device, is differentiable by autograd, and reads as the equation. Shapes use the letters
N batch, C channels, H rows, W columns, D directions, G weight groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._directions import DIRECTIONS, SATURATION


def to_scan_order(t: Tensor, direction: str) -> Tensor:
    """View (..., H, W) as (..., lines, positions), line 0 first in scan order. Its own inverse is `from_scan_order`."""
    t = t.mT if direction in ("left_to_right", "right_to_left") else t
    return t.flip(-2) if direction in ("right_to_left", "bottom_to_top") else t


def from_scan_order(t: Tensor, direction: str) -> Tensor:
    """Undo `to_scan_order`: (..., lines, positions) back to (..., H, W)."""
    t = t.flip(-2) if direction in ("right_to_left", "bottom_to_top") else t
    return t.mT if direction in ("left_to_right", "right_to_left") else t


def row_stochastic(logits: Tensor, *, directions: Sequence[str] = DIRECTIONS) -> Tensor:
    """w_k = sigmoid(a_k) / sum of sigmoid(a_k') over the neighbours that exist; (N, D, G, 3, H, W) to the same."""
    weights = []
    for d, direction in enumerate(directions):
        a = to_scan_order(logits[:, d], direction)  # (N, G, 3, lines, positions)
        exists = _neighbour_exists(a)
        # The inner one too, or a NaN in the place of a missing neighbour would reach the gradient: 0 NaN is NaN.
        sigma = torch.where(exists[:, None], a, 0).clamp(min=SATURATION).sigmoid()
        sigma = torch.where(exists[:, None], sigma, 0)
        weights.append(from_scan_order(sigma / sigma.sum(dim=2, keepdim=True), direction))
    return torch.stack(weights, dim=1)


def _neighbour_exists(t: Tensor) -> Tensor:
    """Return (3, positions) for t, (..., positions): whether position j has neighbours j-1, j and j+1."""
    exists = torch.ones(3, t.shape[-1], dtype=torch.bool, device=t.device)
    exists[0, :1] = exists[2, t.shape[-1] - 1 :] = False
    return exists


def without_first_lines(logits: Tensor, directions: Sequence[str], chunk_size: int | None) -> Tensor:
    """Replace the logits of every chunk's first line by 0: they have no effect, whatever they are."""
    kept = []
    for d, direction in enumerate(directions):
        a = to_scan_order(logits[:, d], direction)  # (N, G, 3, lines, positions)
        first = torch.arange(a.shape[-2], device=a.device) % (chunk_size or max(a.shape[-2], 1)) == 0
        kept.append(from_scan_order(torch.where(first[:, None], 0, a), direction))
    return torch.stack(kept, dim=1)


def line_scan(
    x: Tensor, weights: Tensor, lam: Tensor | None = None, *, direction: str, chunk_size: int | None = None
) -> Tensor:
    """h[i, j] = sum_k w_k[i, j] h[i-1, j+k] + lam[i, j] x[i, j], with h[i-1] = 0 where i % chunk_size == 0."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 and float16 carry their state in float32
    channels = x.shape[1]
    gated = to_scan_order(x.to(dtype), direction)  # lam x
    if lam is not None:
        gated = gated * to_scan_order(spread(lam.to(dtype), channels, 1), direction)
    w = to_scan_order(spread(weights.to(dtype), channels, 1), direction)  # (N, C, 3, lines, positions)
    w = torch.where(_neighbour_exists(w)[:, None], w, 0)
    h: list[Tensor] = []
    for i, (gated_i, w_i) in enumerate(zip(gated.unbind(2), w.unbind(3), strict=True)):
        if i % (chunk_size or gated.shape[2]) == 0:
            h.append(gated_i)
        else:
            a, b, c = w_i.unbind(2)
            left, right = F.pad(h[-1][..., :-1], (1, 0)), F.pad(h[-1][..., 1:], (0, 1))  # h[i-1, j-1], h[i-1, j+1]
            h.append(a * left + b * h[-1] + c * right + gated_i)
    return from_scan_order(torch.stack(h, dim=2) if h else gated, direction).to(x.dtype)


def propagate(
    x: Tensor,
    logits: Tensor,
    lam: Tensor | None = None,
    u: Tensor | None = None,
    *,
    directions: Sequence[str] = DIRECTIONS,
    chunk_size: int | None = None,
) -> Tensor:
    """y = sum_d u_d * h_d, each h_d a `line_scan` with the `row_stochastic` weights of direction d."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = without_first_lines(logits.to(dtype), directions, chunk_size)
    weights = row_stochastic(logits, directions=directions)
    y = torch.zeros_like(x, dtype=dtype)
    for d, direction in enumerate(directions):
        lam_d = None if lam is None else lam[:, d].to(dtype)
        h = line_scan(x.to(dtype), weights[:, d], lam_d, direction=direction, chunk_size=chunk_size)
        y = y + (h if u is None else h * spread(u[:, d].to(dtype), x.shape[1], 1))
    return y.to(x.dtype)


def low_rank_gates(r: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (N, D, C, 3, H, W), lam and u (N, D, C, H, W): rows of weight @ r + bias at every pixel."""
    gates = torch.einsum("dgcr,nrhw->ndgchw", weight, r) + bias[..., None, None]  # (N, D, 5, C, H, W)
    return gates[:, :, :3].transpose(2, 3), gates[:, :, 3], gates[:, :, 4]


def propagate_low_rank(
    x: Tensor,
    r: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    directions: Sequence[str] = DIRECTIONS,
    chunk_size: int | None = None,
) -> Tensor:
    """`propagate` with the gates that r (N, R, H, W), weight (D, 5, C, R) and bias (D, 5, C) give."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    gates = low_rank_gates(r.to(dtype), weight.to(dtype), bias.to(dtype))
    return propagate(x.to(dtype), *gates, directions=directions, chunk_size=chunk_size).to(x.dtype)


def spread(t: Tensor, channels: int, dim: int) -> Tensor:
    """Repeat each of the groups along `dim` for the consecutive channels that share it."""
    return t.repeat_interleave(channels // max(t.shape[dim], 1), dim=dim)
