"""The operators `torch.ops.gspn.*`: schema, implementation, fake, autograd, autocast and vmap of each.

    propagate(x, logits, lam, u, directions, chunk_size)  -> (y, checkpoints)
    line_scan(x, weights, lam, direction, chunk_size)     -> (h, checkpoints)

and for each a backward that is an operator of its own. Directions are indices into `DIRECTIONS`. `checkpoints` holds
the state of the scan every few lines if `save_checkpoints` is set, as autograd does, and is empty otherwise; it has no
gradient. A line scan propagates along one direction with weights as they are, so one pair of bodies, `_forward` and
`_backward`, serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from . import _backend, _check, _fallback, _forward_mode

library: torch.library.Library = torch.library.Library("gspn", "DEF")
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


# ---- implementation and fake: one body, with and without running the kernel


def _forward(
    run: bool,
    stochastic: bool,
    tensors: _MaybeTensors,
    directions: Sequence[int],
    chunk_size: int | None = None,
    save_checkpoints: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the output and the checkpoints for `tensors`, which are x, weights (or logits), lam and u."""
    x, weights, lam, u = _checked(stochastic, tensors, directions, chunk_size)
    y = _backend.empty_output(x, weights, lam, u)
    checkpoints = x.new_empty(0)
    if save_checkpoints:
        size = _backend.checkpoint_size(x.shape[2], x.shape[3], directions, chunk_size)
        checkpoints = x.new_empty((*x.shape[:2], size), dtype=torch.promote_types(x.dtype, torch.float32))
    if run and _backend.has_kernels(x):
        kernels = _backend.Kernels(x, stochastic, directions, chunk_size)
        kernels.forward(x, weights, lam, u, y, checkpoints if save_checkpoints else None)
    elif run:
        _fallback.forward(y, x, weights, lam, u, directions, chunk_size)
    return y, checkpoints


def _backward(
    run: bool,
    stochastic: bool,
    dy: Tensor,
    tensors: _MaybeTensors,
    checkpoints: Tensor,
    directions: Sequence[int],
    chunk_size: int | None,
    mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Return a gradient for each entry of the mask: an empty tensor if it is not wanted, for a schema has no None."""
    x, weights, lam, u = _checked(stochastic, tensors, directions, chunk_size)
    _check.check_tensors("dy checkpoints", dy, checkpoints)
    _check.check_gradient(dy, x, "dy" if stochastic else "dh")
    wanted = [*mask, False][:4]
    _check.check_mask(mask, 4 if stochastic else 3)
    gradients = _backend.empty_gradients(x, weights, lam, u, wanted)
    if gradients[1] is not None or gradients[3] is not None:
        size = _backend.checkpoint_size(x.shape[2], x.shape[3], directions, chunk_size)
        _check.check_checkpoints(checkpoints, x, size)
    if run and x.numel() == 0:  # without channels there are weights and gates, on which nothing depends
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
    elif run and _backend.has_kernels(x):
        kernels = _backend.Kernels(x, stochastic, directions, chunk_size)
        kernels.backward(dy, x, weights, lam, u, checkpoints, gradients)
    elif run:
        _fallback.backward(gradients, dy, x, weights, lam, u, directions, chunk_size)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients[: len(mask)])


def _checked(
    stochastic: bool, tensors: _MaybeTensors, directions: Sequence[int], chunk_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    x, weights, lam, u = tensors
    if x is None or weights is None:  # the dispatcher takes None for any tensor
        raise TypeError(f"{'x' if x is None else 'logits' if stochastic else 'weights'} must be a tensor, got None")
    if stochastic:
        _check.check_propagate(x, weights, lam, u, directions, chunk_size)
    else:
        _check.check_line_scan(x, weights, lam, directions[0], chunk_size)
    return x, weights, lam, u


def register_implementation(name: str, body: Callable[..., Any]) -> None:
    """Register body(run, *args), which runs the kernel or, for torch.compile and export, only allocates the outputs."""
    library.impl(name, partial(body, True), "CompositeExplicitAutograd")
    torch.library.register_fake(f"gspn::{name}", partial(body, False), lib=library)


def _name_of(op: Any) -> str:
    return str(op._schema.name).removeprefix("gspn::")


# ---- autograd. Per call, a Function on the dispatch key takes a third of the time of torch.library.register_autograd.
# The dispatcher calls the key once for each level of torch.func, with that level's tensors: so the Functions are of a
# single level, where torch.autograd.Function would ask torch.func for all levels again.


def _apply(function: Any, op: Any, *args: Any) -> Any:
    if not torch._C._are_functorch_transforms_active():
        return function.apply(op, *args)
    # A Function turns gradients off in its forward, where the levels below this one still need them.
    reverse, forward = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()

    def below(*args: Any) -> Any:
        with torch.set_grad_enabled(reverse), forward_ad._set_fwd_grad_enabled(forward):
            return op(*args)

    with enable_single_level_autograd_function():
        return function.apply(below, *args)


def _in_forward_mode() -> bool:
    """Tell whether tensors may have tangents: of torch.autograd.forward_ad, or of a transform such as torch.func.jvp.

    While torch.compile traces torch.func.jvp, forward_ad does not know the level; the transforms are known.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class _Differentiable(_SingleLevelFunction):
    """An operator and its derivatives, on `count` tensors; then come direction(s) and chunk size, whether to save."""

    @staticmethod
    def forward(ctx: Any, op: Any, backward_op: Any, tangent: Any, count: int, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
        ctx.backward_op, ctx.tangent, ctx.count, ctx.options = backward_op, tangent, count, args[count : count + 2]
        ctx.save_for_backward(*args[:count], output[1])
        ctx.mark_non_differentiable(output[1])
        if _in_forward_mode():
            ctx.save_for_forward(*args[:count])
            ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> Any:
        needed = ctx.needs_input_grad[4 : 4 + ctx.count]
        if dy is None:  # only in forward mode, which materializes no gradients
            return (None,) * (ctx.count + 7)
        gradients = ctx.backward_op(dy, *ctx.saved_tensors, *ctx.options, needed)
        wanted = (g if need else None for g, need in zip(gradients, needed, strict=True))
        return None, None, None, None, *wanted, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        # forward_ad.unpack_dual does nothing while torch.compile traces torch.func.jvp; level 0 is the only one.
        primals = [None if t is None else torch._VF._unpack_dual(t, level=0)[0] for t in ctx.saved_tensors]
        # Nothing here has a tangent at this level, but at the levels below it may have one.
        with forward_ad._set_fwd_grad_enabled(True):
            dy = ctx.tangent(primals, tangents[4 : 4 + ctx.count], *ctx.options)
        return dy, None


def register_autograd(
    op: Any, backward_op: Any, count: int, tangent: Callable[..., Tensor], saved_for: Sequence[int]
) -> None:
    """Differentiate op, of `count` tensors, by backward_op; in forward mode by tangent(primals, tangents, *options).

    States are saved if one of the tensors `saved_for` needs a gradient.
    """

    def autograd(keys: Any, *args: Any) -> Any:
        forward_mode = _in_forward_mode()
        if forward_mode or torch.is_grad_enabled():
            needed = [t is not None and t.requires_grad for t in args[:count]]
            if forward_mode or True in needed:
                options = (*args[count:], None, False)[:2]  # the dispatcher drops trailing defaults
                save = args[-1] is True or any(needed[i] for i in saved_for)
                return _apply(_Differentiable, op, backward_op, tangent, count, *args[:count], *options, save)
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    library.impl(_name_of(op), autograd, "Autograd", with_keyset=True)


class _OnceDifferentiable(_SingleLevelFunction):
    @staticmethod
    def forward(ctx: Any, op: Any, name: str, *args: Any) -> Any:
        ctx.name = name
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} has no derivative: gspn_core computes first derivatives only. For second derivatives use "
            "gspn_core.reference, which autograd differentiates as often as wanted."
        )

    jvp = backward


def register_once_differentiable(op: Any) -> None:
    """Raise where a backward operator is to be differentiated."""

    def autograd(*args: Any) -> Any:
        if _in_forward_mode() or (
            torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        ):
            return _apply(_OnceDifferentiable, op, op.name(), *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    library.impl(_name_of(op), autograd, "Autograd")


# ---- autocast to the lower precision, as for convolutions; the state stays in float32. As there, float64 stays what it
# is; beside it, all tensors become float64.


def register_autocast(op: Any) -> None:
    """Cast the tensors of a call under autocast."""
    for device in ("CPU", "CUDA", "XPU", "MPS"):
        _register_autocast(op, device.lower(), f"Autocast{device}")


def _register_autocast(op: Any, device_type: str, key: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def autocast(*args: Any) -> Any:
        floating = [isinstance(a, Tensor) and a.is_floating_point() for a in args]
        wide = any(f and a.dtype == torch.float64 for f, a in zip(floating, args, strict=True))
        dtype = torch.float64 if wide else torch.get_autocast_dtype(device_type)
        cast = [a.to(dtype) if f else a for f, a in zip(floating, args, strict=True)]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast)

    library.impl(_name_of(op), autocast, key)


# ---- vmap: the mapped dimension is merged into the batch


def register_vmap(op: Any) -> None:
    """Merge the mapped dimension of all tensors into the batch."""

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, int]:
        size = info.batch_size

        def join(t: Any, dim: int | None) -> Any:
            if not isinstance(t, Tensor):
                return t
            t = t.unsqueeze(0).expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
            return t.reshape(size * t.shape[1], *t.shape[2:])

        joined = [join(a, dim) for a, dim in zip(args, in_dims, strict=True)]
        outputs = op(*joined)
        images = args[0].shape[0 if in_dims[0] is None or in_dims[0] > 0 else 1]  # the batch of a call that is mapped
        # An output that is not wanted is empty, without a batch dimension.
        split = (o.reshape(size, images, *o.shape[1:]) if o.dim() > 1 else o.new_empty((size, 0)) for o in outputs)
        return tuple(split), (0,) * len(outputs)  # type: ignore[return-value]

    torch.library.register_vmap(op, vmap, lib=library)


# From each schema to the bodies: x, weights, lam and u as a tuple, and directions as a list.
register_implementation("propagate", lambda run, x, w, lam, u, *rest: _forward(run, True, (x, w, lam, u), *rest))
register_implementation(
    "line_scan",
    lambda run, x, w, lam, direction, *rest: _forward(run, False, (x, w, lam, None), [direction], *rest),
)
register_implementation(
    "propagate_backward",
    lambda run, dy, x, w, lam, u, *rest: _backward(run, True, dy, (x, w, lam, u), *rest),
)
register_implementation(
    "line_scan_backward",
    lambda run, dh, x, w, lam, saved, direction, *rest: _backward(
        run, False, dh, (x, w, lam, None), saved, [direction], *rest
    ),
)
register_autograd(
    propagate,
    propagate_backward,
    4,
    lambda *arguments: _forward_mode.tangent(line_scan, *arguments),  # which may not be there yet
    (1, 3),
)
register_autograd(
    line_scan,
    line_scan_backward,
    3,
    lambda primals, tangents, direction, chunk_size: _forward_mode.tangent(
        line_scan, [*primals[:3], None], [*tangents, None], [direction], chunk_size
    ),
    (1,),
)
register_once_differentiable(propagate_backward)
register_once_differentiable(line_scan_backward)
for _op in (propagate, propagate_backward, line_scan, line_scan_backward):
    register_vmap(_op)
for _op in (propagate, line_scan):
    register_autocast(_op)

from . import _low_rank  # noqa: E402, F401  (further operators)
