"""ONNX for the operators: what `torch.onnx.export` needs to translate models that contain them.

    from gspn_core.export import onnx_translations

    torch.onnx.export(model.eval(), (x,), "model.onnx", dynamo=True, custom_translation_table=onnx_translations())

The graph holds standard operators only. A scan is ONNX's `Scan`, one node per direction, so that the graph does not
grow with the image; chunks of S lines are moved to the batch, so that their scan takes S steps. Results agree with
PyTorch's up to rounding. `torch.export` does not need this module: its programs call the operators.

Limits: batch, height and width may be dynamic as far as the model and the exporter allow, channels may not, and no
dimension may be 0. The state of float16 and bfloat16 is float32. The weights of the first line of a chunk have no
effect, but must be finite: an infinite weight or a NaN logit gives NaN.

Importing this module needs onnx and onnxscript, so `gspn_core` itself does not.
"""

# Annotations are not postponed: onnxscript reads those of a scripted function as objects.

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar, Union

try:
    from onnxscript import DOUBLE, FLOAT, graph, opset18, script
    from onnxscript.values import Opset
except ImportError as error:
    raise ImportError(f"ONNX export needs onnx and onnxscript: pip install onnx onnxscript ({error})") from error

from . import _library, _low_rank
from ._directions import DIRECTIONS, SATURATION

# The exporter writes this version and converts it to the requested one. Its types are of arrays, not of graph values.
op: Any = opset18
_Value: TypeAlias = Any  # a tensor of the graph under construction
_State = TypeVar("_State", bound=Union[FLOAT, DOUBLE])  # noqa: UP007 (onnxscript does not know X | Y)

_FLOAT, _DOUBLE = 1, 11  # of onnx.TensorProto
_END = 2**63 - 1  # a slice up to here goes to the end


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what `torch.onnx.export(..., dynamo=True)` takes as `custom_translation_table`.

    It translates `torch.ops.gspn.propagate`, `propagate_low_rank` and `line_scan`, and so `SpatialPropagation` and
    models that contain it.
    """
    return {
        _library.propagate: _propagate,
        _low_rank.propagate_low_rank: _propagate_low_rank,
        _library.line_scan: _line_scan,
    }


# The next three take the operators' arguments, see _library.py. They have no annotations, because the exporter would
# read them, and has none for "a tensor or None".


def _propagate(x, logits, lam=None, u=None, directions=(), chunk_size=None, save_checkpoints=False):  # type: ignore[no-untyped-def]
    def gates(d: int) -> tuple[_Value, ...]:  # (N, D, ...) to (N, ...)
        index = op.Constant(value_int=d)
        return tuple(None if t is None else op.Gather(t, index, axis=1) for t in (logits, lam, u))

    counts = (logits.shape[2], lam and lam.shape[2], u and u.shape[2])
    y = _directions(x, gates, counts, directions, chunk_size)
    return op.CastLike(y, x), _no_checkpoints(x, y, save_checkpoints)


def _propagate_low_rank(x, r, weight, bias, directions=(), chunk_size=None, save_checkpoints=False):  # type: ignore[no-untyped-def]
    channels, to = x.shape[1], _state_type(x)
    pixels = op.Cast(op.Reshape(r, _shape(r, slice(0, 2), -1)), to=to)  # (N, R, HW)

    def gates(d: int) -> tuple[_Value, ...]:
        index = op.Constant(value_int=d)
        matrix = op.Cast(op.Reshape(op.Gather(weight, index, axis=0), _ints(5 * channels, -1)), to=to)
        offset = op.Cast(op.Reshape(op.Gather(bias, index, axis=0), _ints(5 * channels, 1)), to=to)
        rows = op.Add(op.MatMul(matrix, pixels), offset)  # (N, 5 C, HW)
        rows = op.Reshape(rows, _shape(x, slice(0, 1), 5, channels, slice(2, 4)))
        a, b, c, lam, u = (op.Squeeze(row, _ints(1)) for row in op.Split(rows, axis=1, num_outputs=5))
        logits = op.Concat(*(op.Unsqueeze(row, _ints(2)) for row in (a, b, c)), axis=2)  # (N, C, 3, H, W)
        return logits, lam, u

    y = _directions(x, gates, (channels,) * 3, directions, chunk_size)
    return op.CastLike(y, x), _no_checkpoints(x, y, save_checkpoints)


def _directions(
    x: _Value,
    gates: Callable[[int], tuple[_Value, ...]],
    counts: Sequence[int],
    directions: Sequence[int],
    chunk_size: int | None,
) -> _Value:
    """Sum over directions; gates(d) is logits, lam and u of one of them, `counts` their channels."""
    to, y = _state_type(x), None
    for d, direction in enumerate(directions):
        logits, lam, u = (None if t is None else op.Cast(t, to=to) for t in gates(d))
        weights = _row_stochastic(logits, direction)
        v = _gate(op.Cast(x, to=to), lam, x, counts[1])
        h = _scan(v, weights, x, counts[0], direction, chunk_size)
        h = _gate(h, u, x, counts[2])
        y = h if y is None else op.Add(y, h)
    return y


def _line_scan(x, weights, lam=None, direction=0, chunk_size=None, save_checkpoints=False):  # type: ignore[no-untyped-def]
    to = _state_type(x)
    v = op.Cast(x, to=to)
    if lam is not None:
        v = _gate(v, op.Cast(lam, to=to), x, lam.shape[1])
    h = _scan(v, op.Cast(weights, to=to), x, weights.shape[1], direction, chunk_size)
    return op.CastLike(h, x), _no_checkpoints(x, h, save_checkpoints)


def _state_type(x: _Value) -> int:
    return _DOUBLE if x.dtype == _DOUBLE else _FLOAT


def _no_checkpoints(x: _Value, h: _Value, save: bool) -> _Value:
    """Return an empty tensor, (N, C, 0): checkpoints are for the backward pass."""
    if save:
        raise ValueError("save_checkpoints must be False: a model is exported for inference")
    return op.Expand(_scalar(0.0, h), _shape(x, slice(0, 2), 0))


def _ints(*values: int) -> _Value:
    return op.Constant(value_ints=list(values))


def _scalar(value: float, like: _Value) -> _Value:
    # A Python number would become float32: the exporter does not know the types of intermediate values.
    return op.CastLike(op.Constant(value_float=value), like)


def _shape(x: _Value, *parts: int | slice) -> _Value:
    """Concatenate numbers, and slices of the shape of x, which may be dynamic, to a shape."""
    return op.Concat(
        *(op.Shape(x, start=part.start, end=part.stop) if isinstance(part, slice) else _ints(part) for part in parts),
        axis=0,
    )


def _row_stochastic(logits: _Value, direction: int) -> _Value:
    """Logits to weights, (N, G, 3, H, W) both, as in reference.py."""
    axis = 4 if _is_vertical(direction) else 3  # of positions
    count = op.Shape(logits, start=axis, end=axis + 1)
    position = op.Range(op.Constant(value_int=0), op.Squeeze(count), op.Constant(value_int=1))  # (P,)
    offset = op.Unsqueeze(_ints(-1, 0, 1), _ints(1))  # (3, 1)
    neighbour = op.Add(offset, position)  # (3, P)
    exists = op.And(op.GreaterOrEqual(neighbour, 0), op.Less(neighbour, count))
    exists = op.Unsqueeze(exists, _ints(1 if axis == 4 else 2))  # (3, 1, W) or (3, H, 1)
    # Not op.Sigmoid: ratios of tiny values matter, and onnxruntime's Sigmoid is off by 7% at -14 and 0 below -18.
    exponential = op.Exp(op.Neg(op.Clip(logits, _scalar(SATURATION, logits))))
    sigma = op.Reciprocal(op.Add(exponential, _scalar(1.0, logits)))
    sigma = op.Where(exists, sigma, _scalar(0.0, logits))
    return op.Div(sigma, op.ReduceSum(sigma, _ints(2)))


def _gate(v: _Value, gate: _Value, x: _Value, groups: int) -> _Value:
    """Multiply v, (N, C, H, W) as x is, by a gate (N, C', H, W) or None."""
    if gate is None:
        return v
    grouped = op.Mul(_grouped(v, x, groups), op.Unsqueeze(gate, _ints(2)))
    return op.Reshape(grouped, op.Shape(x))


def _grouped(v: _Value, x: _Value, groups: int) -> _Value:
    """(N, C, H, W), as x is, to (N, G, C/G, H, W)."""
    return op.Reshape(v, _shape(x, slice(0, 1), groups, x.shape[1] // groups, slice(2, 4)))


def _is_vertical(direction: int) -> bool:
    return DIRECTIONS[direction] in ("top_to_bottom", "bottom_to_top")


def _is_reverse(direction: int) -> bool:
    return DIRECTIONS[direction] in ("right_to_left", "bottom_to_top")


def _scan(v: _Value, weights: _Value, x: _Value, groups: int, direction: int, chunk_size: int | None) -> _Value:
    """Scan v, (N, C, H, W) as x is, with weights (N, G, 3, H, W)."""
    lines = 3 if _is_vertical(direction) else 4  # their axis in (N, G, C/G, H, W)
    reverse = _is_reverse(direction)
    count = x.shape[lines - 1]
    static = isinstance(count, int)
    size = 0 if chunk_size is None or (static and count <= chunk_size) else chunk_size
    padded = size > 0 and not (static and count % size == 0)
    order = [lines, 0, 1, 2, 7 - lines]  # to (L, N, G, C/G, P)
    if size:
        order = [lines + 1, lines, 0, 1, 2, 5 if lines == 3 else 3]  # to (S, K, N, G, C/G, P)
    if padded:
        # The last chunk may be shorter: pad its end, in scan order.
        length, zero, axis = _shape(x, slice(lines - 1, lines)), _ints(0), _ints(lines)
        missing = op.Mod(op.Neg(length), _ints(size))
        pads = op.Concat(missing, zero, axis=0) if reverse else op.Concat(zero, missing, axis=0)
        kept = (missing, _ints(_END), axis) if reverse else (zero, length, axis)

    def in_scan_order(t: _Value) -> _Value:
        if padded:
            t = op.Pad(t, pads, None, axis)
        if size:
            t = op.Reshape(t, _shape(t, slice(0, lines), -1, size, slice(lines + 1, 5)))
        return op.Transpose(t, perm=order)

    v = in_scan_order(_grouped(v, x, groups))
    a, b, c = (in_scan_order(w) for w in op.Split(weights, axis=2, num_outputs=3))
    start = op.Expand(_scalar(0.0, v), op.Shape(v, start=1))
    h = _scan_lines(start, v, a, b, c, inputs=[int(reverse)] * 4, outputs=[int(reverse)])
    h = op.Transpose(h, perm=[order.index(axis) for axis in range(len(order))])
    if size:
        h = op.Reshape(h, _shape(h, slice(0, lines), -1, slice(lines + 2, 6)))
    if padded:
        h = op.Slice(h, *kept)
    return op.Reshape(h, op.Shape(x))


@script(Opset("gspn_core", 1), default_opset=op)
def _scan_lines(
    start: _State, v: _State, a: _State, b: _State, c: _State, inputs: Sequence[int], outputs: Sequence[int]
) -> _State:
    """h[i] = a[i] h[i-1] to the left + b[i] h[i-1] + c[i] h[i-1] to the right + v[i], lines along the first axis."""

    @graph()
    def step(h, v_i, a_i, b_i, c_i):  # type: ignore[no-untyped-def]
        axis = op.Constant(value_ints=[-1])
        padded = op.Pad(h, op.Constant(value_ints=[1, 1]), None, axis)
        left = op.Slice(padded, op.Constant(value_ints=[0]), op.Constant(value_ints=[-2]), axis)
        right = op.Slice(padded, op.Constant(value_ints=[2]), op.Constant(value_ints=[_END]), axis)
        line = a_i * left + b_i * h + c_i * right + v_i
        return line, op.Identity(line)  # as state and as output, which must differ in name

    _last, h = op.Scan(
        start,
        v,
        a,
        b,
        c,
        body=step,
        num_scan_inputs=4,
        scan_input_directions=inputs,
        scan_output_directions=outputs,
    )
    return h  # type: ignore[no-any-return]
