"""Forward and backward in PyTorch for devices without compiled kernels.

The forward is the reference. The backward is written out, because autograd does not run inside an operator's
implementation. Line i is in scan order; g_i is the gradient of h_i, and v_i the part of it that comes from line i + 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._directions import DIRECTIONS, SATURATION


def forward(
    out: Tensor,
    x: Tensor,
    weights: Tensor,
    lam: Tensor | None,
    u: Tensor | None,
    directions: Sequence[int],
    chunk_size: int | None,
) -> None:
    """Write the result of line_scan to `out`, or of propagate if the weights have a dimension of directions."""
    names = [DIRECTIONS[d] for d in directions]
    if weights.dim() == 6:
        out.copy_(reference.propagate(x, weights, lam, u, directions=names, chunk_size=chunk_size))
    else:
        out.copy_(reference.line_scan(x, weights, lam, direction=names[0], chunk_size=chunk_size))


def backward(
    gradients: Sequence[Tensor | None],
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    lam: Tensor | None,
    u: Tensor | None,
    directions: Sequence[int],
    chunk_size: int | None,
) -> None:
    """Write the gradients of x, weights, lam and u, those that are not None."""
    dx, dweights, dlam, du = gradients
    names = [DIRECTIONS[d] for d in directions]
    state = torch.promote_types(x.dtype, torch.float32)
    stochastic = weights.dim() == 6
    if not stochastic:
        weights = weights.unsqueeze(1)
        lam = None if lam is None else lam.unsqueeze(1)
        dweights = None if dweights is None else dweights.unsqueeze(1)
        dlam = None if dlam is None else dlam.unsqueeze(1)
    raw_weights = weights.to(state)
    if stochastic:
        raw_weights = reference.without_first_lines(raw_weights, names, chunk_size)
    w = reference.row_stochastic(raw_weights, directions=names) if stochastic else raw_weights
    dx_sum = torch.zeros_like(x, dtype=state)
    for d, name in enumerate(names):

        def lines(t: Tensor, name: str = name) -> Tensor:  # (N, C, lines, positions)
            return reference.to_scan_order(reference.spread(t.to(state), x.shape[1], 1), name)

        x_d, dy_d = lines(x), lines(dy)
        lam_d = None if lam is None else lines(lam[:, d])
        scaled = dy_d if u is None else dy_d * lines(u[:, d])
        a, b, c = lines(w[:, d]).unbind(2)
        h = reference.line_scan(
            x.to(state), w[:, d], None if lam is None else lam[:, d].to(state), direction=name, chunk_size=chunk_size
        )
        h = reference.to_scan_order(h, name)
        previous, g = torch.zeros_like(h), torch.zeros_like(h)
        v = torch.zeros_like(h[:, :, 0])
        for i in reversed(range(h.shape[2])):
            g[:, :, i] = scaled[:, :, i] + v
            if i % (chunk_size or h.shape[2]) == 0:
                v = torch.zeros_like(v)
            else:
                previous[:, :, i] = h[:, :, i - 1]
                ag, cg = a[:, :, i] * g[:, :, i], c[:, :, i] * g[:, :, i]
                v = b[:, :, i] * g[:, :, i]
                v[..., :-1] += ag[..., 1:]
                v[..., 1:] += cg[..., :-1]
        dx_sum += reference.from_scan_order(g if lam_d is None else lam_d * g, name)
        if dlam is not None:
            dlam[:, d] = reference.from_scan_order(_group_sum(g * x_d, dlam.shape[2]), name)
        if du is not None:
            du[:, d] = reference.from_scan_order(_group_sum(dy_d * h, du.shape[2]), name)
        if dweights is not None:
            left, right = torch.zeros_like(previous), torch.zeros_like(previous)
            left[..., 1:], right[..., :-1] = previous[..., :-1], previous[..., 1:]
            sums = torch.stack([_group_sum(g * t, weights.shape[2]) for t in (left, previous, right)], dim=2)
            sums = reference.from_scan_order(sums, name)  # (N, G, 3, H, W)
            dweights[:, d] = _logit_gradient(raw_weights[:, d], w[:, d], sums) if stochastic else sums
    if dx is not None:
        dx.copy_(dx_sum)


def _group_sum(t: Tensor, groups: int) -> Tensor:
    summed: Tensor = t.unflatten(1, (groups, -1)).sum(2)
    return summed


def _logit_gradient(logits: Tensor, w: Tensor, dw: Tensor) -> Tensor:
    """Multiply by the Jacobian of w_k = sigma_k / sum_m sigma_m: w_k (1 - sigma_k) (dw_k - sum_m w_m dw_m)."""
    mean = (w * dw).sum(2, keepdim=True)
    return torch.where((logits < SATURATION) | (w == 0), 0, w * (1 - logits.sigmoid()) * (dw - mean))
