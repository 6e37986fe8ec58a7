"""The derivative in forward mode: a scan with the same weights of another input.

With tangents written d, line by line in scan order,

    dy     = sum over directions of  du h + u dh
    dh[i]  = sum over k of w_k[i] dh[i-1, j+k]  +  s[i]
    s[i]   = dlam x + lam dx + sum over k of dw_k[i] h[i-1, j+k]

Everything here is differentiable itself, so that reverse mode and forward mode may follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._directions import DIRECTIONS, SATURATION

_MaybeTensors = Sequence[Tensor | None]


def tangent(
    scan: Callable[..., tuple[Tensor, Tensor]],
    primals: _MaybeTensors,
    tangents: _MaybeTensors,
    directions: Sequence[int],
    chunk_size: int | None,
) -> Tensor:
    """Return the tangent of line_scan, or of propagate if the weights have a dimension of directions.

    `scan` is the operator line_scan; primals and tangents are x, weights (or logits), lam and u, which may be None.
    """
    x, weights = primals[0], primals[1]
    assert x is not None and weights is not None
    state, channels, stochastic = torch.promote_types(x.dtype, torch.float32), x.shape[1], weights.dim() == 6
    x, weights, lam, u = (None if t is None else t.to(state) for t in primals)
    dx, dweights, dlam, du = (None if t is None else t.to(state) for t in tangents)
    assert x is not None and weights is not None
    names = [DIRECTIONS[d] for d in directions]
    if stochastic:
        logits = reference.without_first_lines(weights, names, chunk_size)
        weights = reference.row_stochastic(logits, directions=names)
        dweights = None if dweights is None else _normalisation(logits, weights, dweights)

    def of(t: Tensor | None, d: int) -> Tensor | None:
        return t[:, d] if t is not None and stochastic else t

    def wide(t: Tensor) -> Tensor:
        return reference.spread(t, channels, 1)

    total = torch.zeros_like(x)
    for d, name in enumerate(names):
        w_d, dw_d, lam_d, dlam_d, u_d, du_d = (of(t, d) for t in (weights, dweights, lam, dlam, u, du))
        sources = []
        if dx is not None:
            sources.append(dx if lam_d is None else dx * wide(lam_d))
        if dlam_d is not None:
            sources.append(x * wide(dlam_d))
        if dw_d is not None or du_d is not None:
            h = scan(x, w_d, lam_d, directions[d], chunk_size)[0]
            if dw_d is not None:
                sources.append(_from_the_previous_line(h, wide(dw_d), name, chunk_size))
            if du_d is not None:
                total = total + h * wide(du_d)
        if sources:
            dh = scan(sum(sources), w_d, None, directions[d], chunk_size)[0]
            total = total + (dh if u_d is None else dh * wide(u_d))
    return total.to(primals[0].dtype)  # type: ignore[union-attr]


def _normalisation(logits: Tensor, w: Tensor, dlogits: Tensor) -> Tensor:
    """Differentiate w_k = sigma_k / sum_m sigma_m: dw_k = z_k - w_k sum_m z_m, z_k = w_k (1 - sigma_k) dlogits_k."""
    z = torch.where((logits < SATURATION) | (w == 0), 0, w * (1 - logits.sigmoid()) * dlogits)
    return z - w * z.sum(3, keepdim=True)


def _from_the_previous_line(h: Tensor, dw: Tensor, direction: str, chunk_size: int | None) -> Tensor:
    """Return sum_k dw_k[i] h[i-1, j+k], which is zero on the first line of a chunk; dw is (N, C, 3, H, W)."""
    previous = F.pad(reference.to_scan_order(h, direction)[..., :-1, :], (1, 1, 1, 0))
    neighbours = torch.stack([previous[..., :-2], previous[..., 1:-1], previous[..., 2:]], dim=2)
    dw = reference.to_scan_order(dw, direction)
    lines, positions = dw.shape[-2:]
    counted = torch.ones(3, lines, positions, dtype=torch.bool, device=dw.device)
    counted[:, :: chunk_size or max(lines, 1)] = False
    counted[0, :, :1] = counted[2, :, positions - 1 :] = False
    return reference.from_scan_order(torch.where(counted, dw * neighbours, 0).sum(2), direction)
