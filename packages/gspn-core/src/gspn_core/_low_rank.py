"""The operators of `propagate_low_rank`, and what computes them where there are no kernels.

    propagate_low_rank(x, r, weight, bias, directions, chunk_size)  -> (y, checkpoints)

and a backward that is an operator of its own; see _library.py. Without kernels some channels at a time are composed of
`propagate`, so that the gates' planes in memory are bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backend, _check, _forward_mode, _library, reference

library = _library.library
for _schema in (
    "propagate_low_rank(Tensor x, Tensor r, Tensor weight, Tensor bias, int[] directions, SymInt? chunk_size=None, "
    "bool save_checkpoints=False) -> (Tensor y, Tensor checkpoints)",
    "propagate_low_rank_backward(Tensor dy, Tensor x, Tensor r, Tensor weight, Tensor bias, Tensor checkpoints, "
    "int[] directions, SymInt? chunk_size, bool[4] mask) -> (Tensor dx, Tensor dr, Tensor dweight, Tensor dbias)",
):
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

propagate_low_rank = torch.ops.gspn.propagate_low_rank.default
propagate_low_rank_backward = torch.ops.gspn.propagate_low_rank_backward.default

# Bytes of the gates' planes that the composition holds at once: more on a GPU, which scans many channels at a time.
_COMPOSED_BYTES, _COMPOSED_BYTES_ON_GPU = 2**27, 2**28

_Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _forward(
    run: bool,
    x: Tensor,
    r: Tensor,
    weight: Tensor,
    bias: Tensor,
    directions: Sequence[int],
    chunk_size: int | None = None,
    save_checkpoints: bool = False,
) -> tuple[Tensor, Tensor]:
    _check.check_low_rank(x, r, weight, bias, directions, chunk_size)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    checkpoints = x.new_empty(0)
    if save_checkpoints:
        size = _backend.checkpoint_size(x.shape[2], x.shape[3], directions, chunk_size)
        checkpoints = x.new_empty((*x.shape[:2], size), dtype=torch.promote_types(x.dtype, torch.float32))
    if not run or x.numel() == 0:
        return y, checkpoints
    if _has_kernels(x):
        kernels = _backend.LowRankKernels(x, directions, chunk_size)
        kernels.forward(x, r, weight, bias, y, checkpoints if save_checkpoints else None)
    else:
        last = _channels_are_last(x)
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        flat = _pixels(r, last)
        for part in _parts(x, weight):
            planes = _planes(x, flat, weight[:, :, part], bias[:, :, part], last)
            output = _library.propagate(x[:, part], *planes, directions, chunk_size, save_checkpoints)
            y[:, part] = output[0]
            if save_checkpoints:
                checkpoints[:, part] = output[1]
    return y, checkpoints


def _backward(
    run: bool,
    dy: Tensor,
    x: Tensor,
    r: Tensor,
    weight: Tensor,
    bias: Tensor,
    checkpoints: Tensor,
    directions: Sequence[int],
    chunk_size: int | None,
    mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return a gradient for each entry of the mask: an empty tensor if it is not wanted."""
    _check.check_low_rank(x, r, weight, bias, directions, chunk_size)
    _check.check_tensors("dy checkpoints", dy, checkpoints)
    _check.check_gradient(dy, x, "dy")
    _check.check_mask(mask, 4)
    inputs = (x, r, weight, bias)
    gradients = [t.new_empty(t.shape) if wanted else None for t, wanted in zip(inputs, mask, strict=True)]
    if any(mask[1:]):
        size = _backend.checkpoint_size(x.shape[2], x.shape[3], directions, chunk_size)
        _check.check_checkpoints(checkpoints, x, size)
    if run and (x.numel() == 0 or r.shape[1] == 0 or not _has_kernels(x)):
        _composed_backward(gradients, dy, inputs, checkpoints, directions, chunk_size)
    elif run:
        kernels = _backend.LowRankKernels(x, directions, chunk_size)
        kernels.backward(dy, x, r, weight, bias, checkpoints, gradients)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _has_kernels(x: Tensor) -> bool:
    return x.is_cpu and _backend.has_kernels(x)


# ---- composed of `propagate`


def _channels_are_last(x: Tensor) -> bool:
    """Tell whether the gates are made channels_last: small images on a GPU are, which has kernels for them."""
    return _backend.has_lanes(x, backward=True)


def _parts(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Yield parts of the channels whose planes are few enough; on a GPU whole warps of channels if it can be."""
    n, channels, h, w = x.shape
    most = _COMPOSED_BYTES_ON_GPU if _backend.is_on_gpu(x) else _COMPOSED_BYTES
    size = max(1, most // max(1, n * weight.shape[0] * 5 * h * w * x.element_size()))
    size = size // 32 * 32 if size >= 32 else size
    return (slice(c, min(c + size, channels)) for c in range(0, channels, size))


def _pixels(r: Tensor, last: bool) -> Tensor:
    """Return r as a matrix of an image's pixels, (N, R, H W), or of all images' with the channels last, (N H W, R)."""
    return r.movedim(1, -1).flatten(0, 2) if last else r.flatten(2)


def _rows(t: Tensor, last: bool) -> Tensor:
    """Return (D, 5, C, ...) as (5 D C, ...), ordered so that products with it are arguments of `propagate`.

    That is logits (D, C, 3), lam and u (D, C), or logits (D, 3, C) where channels are last.
    """
    logits = t[:, :3] if last else t[:, :3].transpose(1, 2)
    return torch.cat([logits.flatten(0, 2), t[:, 3].flatten(0, 1), t[:, 4].flatten(0, 1)])


def _from_rows(rows: Tensor, shape: torch.Size, last: bool) -> Tensor:
    """Undo `_rows`: return `shape`, (D, 5, C, ...)."""
    count, _, channels, *rest = shape
    logits, lam, u = rows.split([3 * count * channels, count * channels, count * channels])
    gates = [t.reshape(count, 1, channels, *rest) for t in (lam, u)]
    logits = (
        logits.reshape(count, 3, channels, *rest) if last else logits.reshape(count, channels, 3, *rest).transpose(1, 2)
    )
    return torch.cat([logits, *gates], dim=1)


def _planes(x: Tensor, flat: Tensor, weight: Tensor, bias: Tensor, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, lam and u, which lie in memory as a product of matrices leaves them; `flat` is of `_pixels`."""
    n, _, h, w = x.shape
    count, _, channels = bias.shape
    sizes = [3 * count * channels, count * channels, count * channels]
    matrix, rows = _rows(weight, last), _rows(bias, last)
    if last:
        logits, lam, u = (t.unflatten(0, (n, h, w)) for t in torch.addmm(rows, flat, matrix.mT).split(sizes, dim=1))
        logits = logits.unflatten(-1, (count, 3, channels)).permute(0, 3, 5, 4, 1, 2)
        return logits, *(t.unflatten(-1, (count, channels)).permute(0, 3, 4, 1, 2) for t in (lam, u))
    gates = torch.baddbmm(rows.view(1, -1, 1), matrix.expand(n, -1, -1), flat)
    logits, lam, u = gates.split(sizes, dim=1)
    shape = (n, count, channels)
    return logits.view(*shape, 3, h, w), lam.view(*shape, h, w), u.view(*shape, h, w)


def _product(a: Tensor, b: Tensor, state: torch.dtype) -> Tensor:
    """Return the product or the batch of products a @ b, summed and given in `state`."""
    if not a.is_cuda or a.dtype == state:
        return a.to(state) @ b.to(state)
    # Reads 16 bits; other devices have no such product.
    return torch.bmm(a, b, out_dtype=state) if a.dim() == 3 else torch.mm(a, b, out_dtype=state)


def _composed_backward(
    gradients: Sequence[Tensor | None],
    dy: Tensor,
    inputs: _Inputs,
    checkpoints: Tensor,
    directions: Sequence[int],
    chunk_size: int | None,
) -> None:
    """Write the gradients of x, r, weight and bias, those that are not None."""
    x, r, weight, bias = inputs
    dx, dr, dweight, dbias = gradients
    state, last = torch.promote_types(x.dtype, torch.float32), _channels_are_last(x)
    layout = torch.channels_last if last else torch.contiguous_format
    dy, x, flat = dy.contiguous(memory_format=layout), x.contiguous(memory_format=layout), _pixels(r, last)
    dr_sum = torch.zeros_like(flat, dtype=state)
    gated = any(gradient is not None for gradient in (dr, dweight, dbias))
    for part in _parts(x, weight):
        planes = _planes(x, flat, weight[:, :, part], bias[:, :, part], last)
        saved = checkpoints[:, part].contiguous() if gated else checkpoints
        dx_part, *parts = _library.propagate_backward(
            dy[:, part], x[:, part], *planes, saved, directions, chunk_size, (dx is not None, gated, gated, gated)
        )
        if dx is not None:
            dx[:, part] = dx_part
        if not gated:
            continue
        shape = (*bias.shape[:2], planes[1].shape[2])
        matrix, sizes = _rows(weight[:, :, part], last), [t.shape[1:-2].numel() for t in parts]
        if last:  # (N H W, 3 D C), and twice (N H W, D C)
            rows = [t.movedim((-2, -1), (1, 2)).flatten(0, 2) for t in (parts[0].transpose(2, 3), *parts[1:])]
            rows = [t.flatten(1) for t in rows]
        else:  # (N, 3 D C, H W), and twice (N, D C, H W)
            rows = [t.flatten(1, -3).flatten(2) for t in parts]
        if dr is not None:
            for m, t in zip(matrix.split(sizes), rows, strict=True):
                dr_sum += _product(t, m, state) if last else _product(m.mT.expand(len(t), -1, -1), t, state)
        if dweight is not None:
            products = [_product(t.mT, flat, state) if last else _product(t, flat.mT, state).sum(0) for t in rows]
            dweight[:, :, part] = _from_rows(torch.cat(products), torch.Size((*shape, r.shape[1])), last).to(x.dtype)
        if dbias is not None:
            sums = torch.cat([t.sum(0 if last else (0, 2), dtype=state) for t in rows])
            dbias[:, :, part] = _from_rows(sums, torch.Size(shape), last).to(x.dtype)
    if dr is not None and last:
        dr.copy_(dr_sum.unflatten(0, (r.shape[0], *r.shape[2:])).movedim(-1, 1))
    elif dr is not None:
        dr.copy_(dr_sum.view(r.shape))


# ---- autograd, autocast, vmap


def _tangent(
    primals: _Inputs, tangents: Sequence[Tensor | None], directions: Sequence[int], chunk_size: int | None
) -> Tensor:
    """Return the tangent of y: that of the gates, which are products, and then that of `propagate`."""
    state = torch.promote_types(primals[0].dtype, torch.float32)
    x, r, weight, bias = (t.to(state) for t in primals)
    dx, dr, dweight, dbias = (None if t is None else t.to(state) for t in tangents)
    dgates = None
    for a, b in ((dr, weight), (r, dweight)):
        if a is not None and b is not None:
            product = torch.einsum("dgcr,nrhw->ndgchw", b, a)
            dgates = product if dgates is None else dgates + product
    if dbias is not None:
        rows = dbias[..., None, None].expand(x.shape[0], *dbias.shape, *x.shape[2:])
        dgates = rows if dgates is None else dgates + rows
    planes: list[Tensor | None] = [None] * 3
    if dgates is not None:
        planes = [dgates[:, :, :3].transpose(2, 3), dgates[:, :, 3], dgates[:, :, 4]]
    gates = reference.low_rank_gates(r, weight, bias)
    return _forward_mode.tangent(_library.line_scan, [x, *gates], [dx, *planes], directions, chunk_size).to(
        primals[0].dtype
    )


def _register_vmap(op: Any, first: int) -> None:
    """Merge the mapped dimension into the batch, or call op for each entry where a sum over the batch would not do.

    The tensors from `first` on have no batch.
    """

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size

        mapped = [isinstance(a, Tensor) and dim is not None for a, dim in zip(args, in_dims, strict=True)]
        if op is propagate_low_rank_backward or any(mapped[first:]):
            entries = [a.movedim(dim, 0) if m else a for a, dim, m in zip(args, in_dims, mapped, strict=True)]
            outputs = [op(*(a[i] if m else a for a, m in zip(entries, mapped, strict=True))) for i in range(size)]
            if not outputs:  # one of zeros, for the shapes
                entry = (a.new_zeros(a.shape[1:]) if m else a for a, m in zip(entries, mapped, strict=True))
                outputs = [op(*entry)]
            return tuple(torch.stack(o)[:size] for o in zip(*outputs, strict=True)), (0,) * len(outputs[0])

        def join(t: Tensor, dim: int | None) -> Tensor:
            t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            return t.reshape(size * t.shape[1], *t.shape[2:])

        joined = [join(a, dim) for a, dim in zip(args[:first], in_dims[:first], strict=True)]
        outputs = op(*joined, *args[first:])
        images = args[0].shape[0 if in_dims[0] is None or in_dims[0] > 0 else 1]
        split = (o.reshape(size, images, *o.shape[1:]) if o.dim() > 1 else o.new_empty((size, 0)) for o in outputs)
        return tuple(split), (0, 0)

    torch.library.register_vmap(op, vmap, lib=library)


_library.register_implementation("propagate_low_rank", _forward)
_library.register_implementation("propagate_low_rank_backward", _backward)
_library.register_autograd(propagate_low_rank, propagate_low_rank_backward, 4, _tangent, (1, 2, 3))
_library.register_once_differentiable(propagate_low_rank_backward)
_library.register_autocast(propagate_low_rank)
_register_vmap(propagate_low_rank, 2)
_register_vmap(propagate_low_rank_backward, 3)

from . import _flops  # noqa: E402, F401  (torch counts the operators, all of which exist now)
