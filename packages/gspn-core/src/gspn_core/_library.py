"""The operators `torch.ops.gspn.*`: schema, implementation, fake, autograd, autocast and vmap of each.

    propagate(x, logits, lam, u, directions, chunk_size)  -> (y, checkpoints)
    line_scan(x, weights, lam, direction, chunk_size)     -> (h, checkpoints)

and a backward for each that is an operator of its own. Directions are places in `DIRECTIONS`. `checkpoints` is empty
unless `save_checkpoints` is set, which autograd does; it holds the state of the scan every few lines, and nothing
that has a gradient. A line scan is the propagation of one direction with given weights, so the two share every body.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backend, _check, _fallback

library = torch.library.Library("gspn", "DEF")
for _schema in (
    "propagate(Tensor x, Tensor logits, Tensor? lam, Tensor? u, int[] directions, SymInt? chunk_size=None, "
    "bool save_checkpoints=False) -> (Tensor y, Tensor checkpoints)",
    "propagate_backward(Tensor dy, Tensor x, Tensor logits, Tensor? lam, Tensor? u, Tensor checkpoints, "
    "int[] directions, SymInt? chunk_size, bool[4] mask) -> (Tensor dx, Tensor dlogits, Tensor dlam, Tensor du)",
    "line_scan(Tensor x, Tensor weights, Tensor? lam, int direction, SymInt? chunk_size=None, "
    "bool save_checkpoints=False) -> (Tensor h, Tensor checkpoints)",
    "line_scan_backward(Tensor dh, Tensor x, Tensor weights, Tensor? lam, Tensor checkpoints, int direction, "
    "SymInt? chunk_size, bool[3] mask) -> (Tensor dx, Tensor dweights, Tensor dlam)",
):
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

propagate = torch.ops.gspn.propagate.default
propagate_backward = torch.ops.gspn.propagate_backward.default
line_scan = torch.ops.gspn.line_scan.default
line_scan_backward = torch.ops.gspn.line_scan_backward.default

_MaybeTensors = Sequence[Tensor | None]


# ---- schema, fake and implementation: one body per operator, with and without running the kernel


def _outputs(x: Tensor, directions: Sequence[int], chunk_size: int | None, save: bool) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not save:
        return y, x.new_empty(0)
    n, c, h, w = x.shape
    size = _backend.checkpoint_size(h, w, directions, chunk_size)
    return y, x.new_empty((n, c, size), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _gradients(inputs: _MaybeTensors, mask: Sequence[bool]) -> list[Tensor | None]:
    return [t.new_empty(t.shape) if t is not None and want else None for t, want in zip(inputs, mask, strict=True)]


def _returned(gradients: _MaybeTensors, x: Tensor) -> tuple[Tensor, ...]:
    # A schema has no optional outputs: what is not wanted is an empty tensor.
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _propagate(
    x: Tensor,
    logits: Tensor,
    lam: Tensor | None,
    u: Tensor | None,
    directions: list[int],
    chunk_size: int | None = None,
    save_checkpoints: bool = False,
    *,
    run: bool,
) -> tuple[Tensor, Tensor]:
    _check.check_propagate(x, logits, lam, u, directions, chunk_size)
    y, checkpoints = _outputs(x, directions, chunk_size, save_checkpoints)
    if run and _backend.has_kernels(x):
        kernels = _backend.Kernels(x, True, directions, chunk_size)
        kernels.forward(x, logits, lam, u, y, checkpoints if save_checkpoints else None)
    elif run:
        _fallback.forward(y, x, logits, lam, u, directions, chunk_size)
    return y, checkpoints


def _line_scan(
    x: Tensor,
    weights: Tensor,
    lam: Tensor | None,
    direction: int,
    chunk_size: int | None = None,
    save_checkpoints: bool = False,
    *,
    run: bool,
) -> tuple[Tensor, Tensor]:
    _check.check_line_scan(x, weights, lam, direction, chunk_size)
    h, checkpoints = _outputs(x, [direction], chunk_size, save_checkpoints)
    if run and _backend.has_kernels(x):
        kernels = _backend.Kernels(x, False, [direction], chunk_size)
        kernels.forward(x, weights, lam, None, h, checkpoints if save_checkpoints else None)
    elif run:
        _fallback.forward(h, x, weights, lam, None, [direction], chunk_size)
    return h, checkpoints


def _propagate_backward(
    dy: Tensor,
    x: Tensor,
    logits: Tensor,
    lam: Tensor | None,
    u: Tensor | None,
    checkpoints: Tensor,
    directions: list[int],
    chunk_size: int | None,
    mask: list[bool],
    *,
    run: bool,
) -> tuple[Tensor, ...]:
    _check.check_propagate(x, logits, lam, u, directions, chunk_size)
    _check.check_gradient(dy, x, "dy")
    gradients = _gradients((x, logits, lam, u), mask)
    if run and _backend.has_kernels(x):
        if mask[1] or mask[3]:
            size = _backend.checkpoint_size(x.shape[2], x.shape[3], directions, chunk_size)
            _check.check_checkpoints(checkpoints, x, size)
        kernels = _backend.Kernels(x, True, directions, chunk_size)
        kernels.backward(dy, x, logits, lam, u, checkpoints, gradients)
    elif run:
        _fallback.backward(gradients, dy, x, logits, lam, u, directions, chunk_size)
    return _returned(gradients, x)


def _line_scan_backward(
    dh: Tensor,
    x: Tensor,
    weights: Tensor,
    lam: Tensor | None,
    checkpoints: Tensor,
    direction: int,
    chunk_size: int | None,
    mask: list[bool],
    *,
    run: bool,
) -> tuple[Tensor, ...]:
    _check.check_line_scan(x, weights, lam, direction, chunk_size)
    _check.check_gradient(dh, x, "dh")
    gradients = _gradients((x, weights, lam), mask)
    if run and _backend.has_kernels(x):
        if mask[1]:
            size = _backend.checkpoint_size(x.shape[2], x.shape[3], [direction], chunk_size)
            _check.check_checkpoints(checkpoints, x, size)
        kernels = _backend.Kernels(x, False, [direction], chunk_size)
        kernels.backward(dh, x, weights, lam, None, checkpoints, (*gradients, None))
    elif run:
        _fallback.backward((*gradients, None), dh, x, weights, lam, None, [direction], chunk_size)
    return _returned(gradients, x)


def _name_of(op: Any) -> str:
    return str(op._schema.name).removeprefix("gspn::")


def _register_implementation(name: str, body: Callable[..., Any]) -> None:
    def implementation(*args: Any) -> Any:
        return body(*args, run=True)

    def fake(*args: Any) -> Any:
        return body(*args, run=False)

    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gspn::{name}", fake, lib=library)


# ---- autograd. A Function on the dispatch key costs a third of torch.library.register_autograd per call.


class _Propagate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor, lam: Tensor | None, u: Tensor | None, *options: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = propagate(x, logits, lam, u, *options)
        ctx.options = options[:2]
        ctx.save_for_backward(x, logits, lam, u, output[1])
        ctx.mark_non_differentiable(output[1])
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any) -> Any:
        needed = ctx.needs_input_grad[:4]
        gradients = propagate_backward(dy, *ctx.saved_tensors, *ctx.options, needed)
        return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None, None


class _LineScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, lam: Tensor | None, *options: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = line_scan(x, weights, lam, *options)
        ctx.options = options[:2]
        ctx.save_for_backward(x, weights, lam, output[1])
        ctx.mark_non_differentiable(output[1])
        return output

    @staticmethod
    def backward(ctx: Any, dh: Tensor, _: Any) -> Any:
        needed = ctx.needs_input_grad[:3]
        gradients = line_scan_backward(dh, *ctx.saved_tensors, *ctx.options, needed)
        return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None, None


def _register_autograd(op: Any, function: type[torch.autograd.Function], needs_states: Sequence[int]) -> None:
    """Differentiate op by function; the states are saved where one of the arguments at these places has a gradient."""
    tensors = 4 if op is propagate else 3

    def autograd(keys: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            needed = [t is not None and t.requires_grad for t in args[:tensors]]
            if True in needed:
                options = (*args[tensors:], None, False)[:2]  # the dispatcher drops trailing defaults
                save = args[-1] is True or any(needed[i] for i in needs_states)
                return function.apply(*args[:tensors], *options, save)
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    library.impl(_name_of(op), autograd, "Autograd", with_keyset=True)


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Any, *args: Any) -> Any:
        ctx.name = op.name()
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} has no derivative: gspn_core computes first derivatives only. For second derivatives use "
            "gspn_core.reference, which autograd differentiates as often as wanted."
        )


def _register_once_differentiable(op: Any) -> None:
    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return _OnceDifferentiable.apply(op, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    library.impl(_name_of(op), autograd, "Autograd")


# ---- autocast: to the lower precision, as for convolutions; the state stays in float32


def _register_autocast(op: Any, device_type: str, key: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [
            a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 else a
            for a in args
        ]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast)

    library.impl(_name_of(op), autocast, key)


# ---- vmap: the mapped dimension joins the batch


def _register_vmap(op: Any) -> None:
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, int]:
        size = info.batch_size

        def join(t: Any, dim: int | None) -> Any:
            if not isinstance(t, Tensor):
                return t
            t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            return t.flatten(0, 1)

        outputs = op(*(join(a, dim) for a, dim in zip(args, in_dims, strict=True)))
        # An output that was not wanted is empty and has no batch; give it one.
        return tuple(o.unflatten(0, (size, -1)) if o.dim() > 1 else o.new_empty((size, 0)) for o in outputs), (
            0,
        ) * len(outputs)  # type: ignore[return-value]

    torch.library.register_vmap(op, vmap, lib=library)


for _name, _body in (
    ("propagate", _propagate),
    ("propagate_backward", _propagate_backward),
    ("line_scan", _line_scan),
    ("line_scan_backward", _line_scan_backward),
):
    _register_implementation(_name, _body)
_register_autograd(propagate, _Propagate, (1, 3))
_register_autograd(line_scan, _LineScan, (1,))
_register_once_differentiable(propagate_backward)
_register_once_differentiable(line_scan_backward)
for _op in (propagate, propagate_backward, line_scan, line_scan_backward):
    _register_vmap(_op)
for _op in (propagate, line_scan):
    for _device in ("CPU", "CUDA", "XPU", "MPS"):
        _register_autocast(_op, _device.lower(), f"Autocast{_device}")
