"""The CUDA kernels' own source, run on the CPU by the emulation in tests/emulation, against the reference."""

import os

import pytest
import torch
from emulation import build
from operator_cases import (
    DTYPES,
    assert_as_accurate,
    channels_last,
    check_infinities,
    check_line_scan,
    check_propagate,
    check_without_effect,
    covering,
    low_rank_inputs,
    part_of_a_wider_buffer,
    propagate_inputs,
    randn,
    transposed,
    value_and_gradients,
)

from gspn_core import DIRECTIONS, _backend, _low_rank, line_scan, propagate, propagate_low_rank, reference

pytestmark = pytest.mark.skipif(build.missing() != "", reason=build.missing())

# Capability, multiprocessors, shared memory of a block.
H100 = (9, 132, 227 * 1024)
WITHOUT_CLUSTERS = (8, 108, 163 * 1024)


@pytest.fixture(scope="session")
def module():
    return build.load_module(os.environ.get("GSPN_EMULATED_MODULE") or build.build_module())


@pytest.fixture(autouse=True)
def emulated(module, monkeypatch):
    """Route tensors of the CPU through the CUDA side of the bindings, and poison its scratch memory."""

    class EmulatedKernels(_backend.Kernels):
        def __init__(self, x, stochastic, directions, chunk_size):
            super().__init__(x, stochastic, directions, chunk_size)
            launch = module.Launch(0, 0, lambda size: torch.full((size,), 0xFF, dtype=torch.uint8))
            dtype, interval = _backend._DTYPE_NAMES[x.dtype], _backend.CHECKPOINT_INTERVAL
            self._launch = (launch, module.Call(dtype, stochastic, directions, chunk_size or 0, interval, 1))
            self._forward, self._backward = module.cuda_forward, module.cuda_backward

    monkeypatch.setattr(_backend, "Kernels", EmulatedKernels)
    yield module
    module.cuda_select_path("auto")
    module.emulate_device(*H100)


PATHS = ("resident", "strip", "cluster")
# (H, W): size 1; lines of a quarter, half and a whole warp and one more; the widths of the published models.
SIZES = [(1, 1), (2, 2), (7, 7), (8, 8), (14, 14), (16, 17), (32, 32), (33, 29), (64, 64), (65, 56), (74, 74), (128, 3)]
LONG = [(5, 147), (147, 5), (3, 260), (130, 129)]


# DTYPES without float16, which the emulation leaves out. float32, which mutants.py runs, takes all paths at all sizes.
@pytest.mark.parametrize(
    "dtype,size,path", [*covering(DTYPES[:1], SIZES, PATHS), *covering(DTYPES[1:3], SIZES, PATHS)], ids=str
)
def test_sizes(emulated, dtype, size, path):
    emulated.cuda_select_path(path)
    check_propagate(propagate_inputs(2, 3, *size, groups=1, lam=3, u=1, dtype=dtype))


@pytest.mark.parametrize(
    "dtype,size,groups,path",
    [*covering(DTYPES[:1], LONG, [1, 3], PATHS[1:]), *covering(DTYPES[1:3], LONG, [1, 3], PATHS[1:])],
    ids=str,
)
def test_lines_of_several_strips(emulated, dtype, size, groups, path):
    emulated.cuda_select_path(path)
    check_propagate(propagate_inputs(1, 3, *size, groups=groups, lam=1, u=3, dtype=dtype))


# Rows of whole vectors, with weights for every channel: vertical scans load straight into registers, by narrow warps,
# or by wide ones where there are enough of them for the device.
@pytest.mark.parametrize(
    "dtype,size,chunk_size,path,processors",
    [
        *covering([torch.float32, torch.bfloat16], [(39, 56), (11, 128), (19, 252)], [None, 7], PATHS[1:], [132]),
        *covering([torch.float32, torch.bfloat16], [(39, 56), (11, 128), (19, 252)], [None, 7], PATHS[1:], [0]),
    ],
    ids=str,
)
def test_rows_of_vectors(emulated, dtype, size, chunk_size, path, processors):
    emulated.cuda_select_path(path)
    emulated.emulate_device(9, processors, 227 * 1024)
    height, width = size
    check_propagate(propagate_inputs(2, 3, *size, groups=3, lam=3, u=1, dtype=dtype), chunk_size=chunk_size)
    check_propagate(propagate_inputs(1, 2, *size, groups=2, dtype=dtype), chunk_size=chunk_size)
    weights = 0.5 * randn(2, 3, 3, height, width, dtype=dtype)
    for direction in ("top_to_bottom", "bottom_to_top"):
        inputs = [randn(2, 3, height, width, dtype=dtype), weights, randn(2, 3, height, width, dtype=dtype)]
        check_line_scan(inputs, direction=direction, chunk_size=chunk_size)
    inputs[0] = randn(2, 3, height, width + 1, dtype=dtype)[..., 1:]  # not aligned: the general kernels
    check_line_scan(inputs, direction="top_to_bottom", chunk_size=chunk_size)


# The same for horizontal scans, which copy sectors of 32 bytes of rows of 16; the last sector may be half a one.
@pytest.mark.parametrize(
    "dtype,size,chunk_size,path",
    covering([torch.float32, torch.bfloat16], [(7, 8), (56, 48), (132, 24), (132, 48)], [None, 7, 16], PATHS[1:]),
    ids=str,
)
def test_rows_of_sectors(emulated, dtype, size, chunk_size, path):
    emulated.cuda_select_path(path)
    height, width = size
    directions = ["right_to_left", "left_to_right"]
    check_propagate(
        propagate_inputs(2, 2, *size, d=2, groups=2, lam=2, u=1, dtype=dtype),
        directions=directions,
        chunk_size=chunk_size,
    )
    check_propagate(propagate_inputs(1, 2, *size, groups=2, dtype=dtype), chunk_size=chunk_size)
    weights = 0.5 * randn(1, 2, 3, height, width, dtype=dtype)
    for direction in directions:
        inputs = [randn(1, 2, height, width, dtype=dtype), weights, randn(1, 2, height, width, dtype=dtype)]
        check_line_scan(inputs, direction=direction, chunk_size=chunk_size)


# Small images with weights for every channel, in one launch: all lengths of a lane group, whole and not; more channels
# than a warp has; gates of every channel, of all, none; chunks, and directions of one axis.
@pytest.mark.parametrize(
    "dtype,size,channels,gates,chunk_size",
    covering(
        [torch.float32, torch.bfloat16],
        [(16, 16), (12, 8), (4, 24), (36, 40), (64, 16), (68, 8)],
        [3, 9],
        [("C", "C"), (1, None), (None, 1), (None, None)],
        [None, 5, 8],
    ),
    ids=str,
)
def test_fused(emulated, dtype, size, channels, gates, chunk_size):
    lam, u = (channels if gate == "C" else gate for gate in gates)
    inputs = propagate_inputs(2, channels, *size, groups=channels, lam=lam, u=u, dtype=dtype)
    check_propagate(inputs, chunk_size=chunk_size)
    some = propagate_inputs(1, channels, *size, d=2, groups=channels, lam=lam, u=u, dtype=dtype)
    check_propagate(some, directions=["bottom_to_top", "top_to_bottom"], chunk_size=chunk_size)
    check_propagate(some, directions=["right_to_left", "left_to_right"], chunk_size=chunk_size)


# Small images with weights and gates that eight channels or more share: all lengths of a lane group; one warp and
# several for a direction; a ragged last block; groups that end within a warp.
@pytest.mark.parametrize(
    "dtype,size,channels,gates,chunk_size,processors",
    covering(
        [torch.float32, torch.bfloat16],
        [(7, 5), (14, 9), (3, 20), (28, 22), (41, 10), (6, 74), (9, 100), (120, 5)],
        [(9, 1), (16, 2), (40, 1)],
        [(1, None), (None, 1), (1, 1)],
        [None, 4, 7],
        [1, 132],
    ),
    ids=str,
)
def test_shared(emulated, dtype, size, channels, gates, chunk_size, processors):
    emulated.emulate_device(9, processors, 227 * 1024)
    c, groups = channels
    inputs = propagate_inputs(2, c, *size, groups=groups, lam=gates[0], u=gates[1], dtype=dtype)
    check_propagate(inputs, chunk_size=chunk_size)
    some = propagate_inputs(1, c, *size, d=3, groups=groups, lam=gates[0], u=gates[1], dtype=dtype)
    some[0] = transposed(some[0])
    some[1] = part_of_a_wider_buffer(some[1])
    check_propagate(some, directions=["bottom_to_top", "left_to_right", "top_to_bottom"], chunk_size=chunk_size)


def test_float16_has_kernels_of_its_own(emulated):
    """They are not part of the emulation, see emulation/unbuilt.cpp; the call finds them."""
    with pytest.raises(ValueError, match="built without Float16"):
        check_propagate(propagate_inputs(1, 1, 2, 2, dtype=torch.float16))


@pytest.mark.parametrize("device", [H100, WITHOUT_CLUSTERS], ids=str)
def test_a_line_of_a_thousand(emulated, device):
    emulated.emulate_device(*device)
    check_propagate(propagate_inputs(1, 1, 20, 1100, d=1, lam=1, u=1), directions=["top_to_bottom"])


def test_a_line_too_long_for_the_device_is_refused(emulated):
    emulated.emulate_device(8, 108, 99 * 1024)
    x, logits, _, _ = propagate_inputs(1, 1, 2, 20000, d=1)
    with pytest.raises(ValueError, match="20000 positions"):
        propagate(x, logits, directions=["top_to_bottom"])


@pytest.mark.parametrize(
    "dtype,chunk_size,path",
    covering([torch.float32, torch.bfloat16], [None, 1, 2, 7, 16, 48, 1000, 2**32], PATHS),
    ids=str,
)
def test_chunks(emulated, dtype, chunk_size, path):
    emulated.cuda_select_path(path)
    check_propagate(propagate_inputs(1, 2, 50, 37, groups=2, lam=2, u=2, dtype=dtype), chunk_size=chunk_size)


@pytest.mark.parametrize("dtype,chunk_size,direction,path", covering(DTYPES[:3], [None, 5], DIRECTIONS, PATHS), ids=str)
def test_line_scan(emulated, dtype, chunk_size, direction, path):
    emulated.cuda_select_path(path)
    inputs = [randn(2, 4, 35, 19, dtype=dtype), 0.5 * randn(2, 2, 3, 35, 19, dtype=dtype)]
    check_line_scan([*inputs, None], direction=direction, chunk_size=chunk_size)
    check_line_scan([*inputs, randn(2, 1, 35, 19, dtype=dtype)], direction=direction, chunk_size=chunk_size)


@pytest.mark.parametrize(
    "path,size,channels,gates",
    covering(
        PATHS,
        [(9, 11), (18, 35)],
        [(6, 1), (6, 2), (6, 3), (6, 6), (10, 2), (12, 1)],  # and weight groups
        [(None, None), (1, "C"), ("C", 1), (2, "C"), (None, 2)],
    ),
    ids=str,
)
def test_groups(emulated, channels, gates, size, path):
    emulated.cuda_select_path(path)
    c, groups = channels
    lam, u = (c if gate == "C" else gate for gate in gates)
    check_propagate(propagate_inputs(2, c, *size, groups=groups, lam=lam, u=u))


SOME = [("bottom_to_top",), ("right_to_left", "top_to_bottom"), ("bottom_to_top", "left_to_right", "right_to_left")]


@pytest.mark.parametrize("dtype,directions,path", covering([torch.float32, torch.bfloat16], SOME, PATHS), ids=str)
def test_some_directions_in_any_order(emulated, dtype, directions, path):
    emulated.cuda_select_path(path)
    inputs = propagate_inputs(2, 2, 21, 34, d=len(directions), groups=2, lam=1, u=2, dtype=dtype)
    check_propagate(inputs, directions=directions)


@pytest.mark.parametrize(
    "dtype,wanted,path,shape",
    covering(
        [torch.float32, torch.bfloat16],
        [(0,), (1,), (2,), (3,), (0, 3), (1, 2)],
        PATHS,
        [((18, 35), 2), ((36, 32), 6)],  # weights of groups, and of every channel
    ),
    ids=str,
)
def test_only_wanted_gradients(emulated, dtype, wanted, path, shape):
    """A gradient is the same bits whether the others are computed or not, if the same kernel computes it."""
    emulated.cuda_select_path(path)
    size, groups = shape
    inputs = propagate_inputs(1, 6, *size, groups=groups, lam=6 if groups == 6 else 3, u=6, dtype=dtype)
    everything = value_and_gradients(propagate, inputs)[1:]
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    y = propagate(*leaves)
    dy = randn(*y.shape, seed=4).to(dtype)
    gradients = torch.autograd.grad(y, [leaves[i] for i in wanted], dy)
    for i, gradient in zip(wanted, gradients, strict=True):
        if groups == 6 and not {1, 3} & set(wanted):  # without the states
            torch.testing.assert_close(gradient, everything[i], atol=1e-4, rtol=1e-2)
        else:
            assert torch.equal(gradient, everything[i])


def test_low_rank_is_composed_of_the_kernels(emulated, monkeypatch):
    monkeypatch.setattr(_low_rank, "_has_kernels", lambda x: False)
    monkeypatch.setattr(_low_rank, "_COMPOSED_BYTES", 20 * 2 * 7 * 9 * 3 * 4)
    assert_as_accurate(propagate_low_rank, reference.propagate_low_rank, low_rank_inputs(2, 7, 3, 7, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_rank_on_a_gpu_is_composed_channels_last(emulated, monkeypatch, dtype):
    monkeypatch.setattr(_backend, "is_on_gpu", lambda t: True)
    monkeypatch.setattr(_low_rank, "_has_kernels", lambda x: False)
    monkeypatch.setattr(_low_rank, "_COMPOSED_BYTES_ON_GPU", 20 * 2 * 7 * 9 * 32 * 4)
    for layout in (channels_last, torch.Tensor.contiguous):
        inputs = [layout(t) if t.dim() == 4 else t for t in low_rank_inputs(2, 52, 3, 7, 9, dtype=dtype)]
        assert_as_accurate(propagate_low_rank, reference.propagate_low_rank, inputs)


# ---- images of channels_last, whose channels are lanes


def lanes_of(t, dim):
    """Return a tensor with dimension `dim` last in memory."""
    return t if t is None else t.movedim(dim, -1).contiguous().movedim(-1, dim)


@pytest.mark.parametrize(
    "dtype,size,channels,gates,chunk_size",
    covering(
        [torch.float32, torch.bfloat16],
        [(7, 7), (14, 14), (16, 9), (60, 23), (1, 40), (36, 74), (5, 6)],
        [(16, 16), (40, 40), (72, 1)],
        [("C", "C"), (None, None), ("C", None), (None, "C")],
        [None, 5, 16],
    ),
    ids=str,
)
def test_channels_are_lanes(emulated, monkeypatch, dtype, size, channels, gates, chunk_size):
    monkeypatch.setattr(_backend, "is_on_gpu", lambda t: True)
    c, groups = channels
    lam, u = (c if gate == "C" else gate for gate in gates)
    inputs = propagate_inputs(2, c, *size, d=3, groups=groups, lam=lam, u=u, dtype=dtype)
    inputs = [lanes_of(t, 1 if t is inputs[0] else 2) for t in inputs]
    directions = ["bottom_to_top", "left_to_right", "top_to_bottom"]
    y = propagate(*inputs, directions=directions, chunk_size=chunk_size)
    assert y.is_contiguous(memory_format=torch.channels_last)  # which no other kernel writes
    check_propagate(inputs, directions=directions, chunk_size=chunk_size)
    one = [t if t is None else t[:, :1] for t in inputs[1:]]
    check_propagate([inputs[0], *one], directions=["right_to_left"], chunk_size=chunk_size)
    weights = lanes_of(0.5 * randn(2, groups, 3, *size, dtype=dtype), 1)
    for direction in DIRECTIONS[::2]:
        gate = None if lam is None else inputs[2][:, 0]
        check_line_scan([inputs[0], weights, gate], direction=direction, chunk_size=chunk_size)


def test_channels_are_lanes_only_where_all_tensors_have_them(emulated, monkeypatch):
    monkeypatch.setattr(_backend, "is_on_gpu", lambda t: True)
    inputs = propagate_inputs(1, 16, 9, 8, groups=16, lam=16, u=16)
    for number in range(4):
        some = [lanes_of(t, 1 if i == 0 else 2) if i == number else t for i, t in enumerate(inputs)]
        assert propagate(*some).is_contiguous()
        check_propagate(some)
    for c in (15, 20):  # too few, not in units
        check_propagate([channels_last(t) for t in propagate_inputs(1, c, 9, 8, groups=c, lam=c, u=c)])
    gates = propagate_inputs(1, 16, 9, 8, groups=1, lam=1, u=1)
    assert propagate(*(lanes_of(t, 1 if t is gates[0] else 2) for t in gates)).is_contiguous()


def test_lanes_out_of_a_wider_tensor_need_not_be_aligned(emulated, monkeypatch):
    """As the gates of a module, which a convolution has made of one tensor."""
    monkeypatch.setattr(_backend, "is_on_gpu", lambda t: True)
    x, logits, _, _ = propagate_inputs(2, 16, 9, 8)
    wide = lanes_of(randn(2, 12 + 4 * 16, 9, 8), 1)
    lam = wide[:, 12:].unflatten(1, (4, 16))
    assert propagate(lanes_of(x, 1), logits, lam).is_contiguous(memory_format=torch.channels_last)
    check_propagate([lanes_of(x, 1), logits, lam, lanes_of(randn(2, 4, 16, 9, 8, seed=7), 2)])


def test_gradient_of_lanes_alone(emulated, monkeypatch):
    """Without gradients that take the states, other kernels serve the call; dy may have any layout."""
    monkeypatch.setattr(_backend, "is_on_gpu", lambda t: True)
    inputs = propagate_inputs(1, 16, 9, 8, groups=16, lam=16, u=16)
    leaves = [lanes_of(t, 1 if i == 0 else 2).requires_grad_() for i, t in enumerate(inputs)]
    everything = torch.autograd.grad(propagate(*leaves), leaves, randn(1, 16, 9, 8, seed=4))
    for i in range(4):
        leaf = leaves[i].detach().requires_grad_()
        one = [leaf if i == j else t.detach() for j, t in enumerate(leaves)]
        (gradient,) = torch.autograd.grad(propagate(*one), leaf, randn(1, 16, 9, 8, seed=4))
        torch.testing.assert_close(gradient, everything[i], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("groups", [1, 16])
def test_nan_in_lanes_propagates_along_its_cone(emulated, monkeypatch, groups):
    monkeypatch.setattr(_backend, "is_on_gpu", lambda t: True)
    inputs = propagate_inputs(1, 16, 9, 14, d=1, groups=groups, lam=16, u=16)
    inputs[0][0, 3, 2, 7] = float("nan")
    y = propagate(*(lanes_of(t, 1 if t is inputs[0] else 2) for t in inputs), directions=["top_to_bottom"])
    cone = torch.tensor([[i >= 2 and abs(j - 7) <= i - 2 for j in range(14)] for i in range(9)])
    assert torch.equal(y[0, 3].isnan(), cone) and not y[0, 4].isnan().any()


# ---- strides


@pytest.mark.parametrize(
    "dtype,layout,path",
    covering([torch.float32, torch.bfloat16], [channels_last, part_of_a_wider_buffer, transposed], PATHS),
    ids=lambda value: getattr(value, "__name__", str(value)),  # mutants.py leaves out types by these names
)
def test_strides(emulated, dtype, layout, path):
    emulated.cuda_select_path(path)
    inputs = propagate_inputs(2, 4, 19, 42, groups=2, lam=4, u=1, dtype=dtype)
    laid_out = [layout(t) for t in inputs]
    dense = value_and_gradients(propagate, inputs)
    for ours, wanted in zip(value_and_gradients(propagate, laid_out), dense, strict=True):
        assert torch.equal(ours, wanted)


# ---- numbers


@pytest.mark.parametrize("path", PATHS)
def test_nan_and_saturation(emulated, path):
    emulated.cuda_select_path(path)
    x, logits, _, _ = propagate_inputs(1, 1, 12, 40, dtype=torch.float32)
    logits[..., 3, 4] = -1000.0
    logits[..., 5, 6] = 1000.0
    assert propagate(x, logits).isfinite().all()
    x[..., 6, 20] = torch.nan
    y = propagate(x, logits)
    assert torch.equal(y.isnan(), reference.propagate(x, logits).isnan())


@pytest.mark.parametrize("path,groups,size", covering(PATHS, [1, 4], [(12, 9), (8, 32), (5, 130)]), ids=str)
def test_logits_without_effect(emulated, path, groups, size):
    emulated.cuda_select_path(path)
    check_without_effect(propagate, *size, groups=groups)


@pytest.mark.parametrize(
    "path,size,chunk_size,groups",
    covering(PATHS, [(8, 8), (6, 16), (12, 24), (9, 32), (7, 128), (5, 140)], [None, 3], [1, 4]),
    ids=str,
)
def test_infinities(emulated, path, size, chunk_size, groups):
    emulated.cuda_select_path(path)
    check_infinities(*size, groups=groups, chunk_size=chunk_size)


@pytest.mark.parametrize("path,length,groups", covering(PATHS, [8, 40, 128, 140], [1, 2]), ids=str)
def test_nan_spreads_by_one_position_a_line(emulated, path, length, groups):
    """From anywhere, and not from one end of a lane's positions to the other."""
    emulated.cuda_select_path(path)
    for position in (0, 1, 3, length - 4, length - 1):
        x, weights = randn(1, 2, 8, length), randn(1, groups, 3, 8, length)
        x[..., 1, position] = torch.nan
        rows, columns = torch.meshgrid(torch.arange(8), torch.arange(length), indexing="ij")
        cone = (rows >= 1) & ((columns - position).abs() <= rows - 1)
        y = propagate(x, weights[:, None], directions=["top_to_bottom"])
        for result in (line_scan(x, weights, direction="top_to_bottom"), y):
            assert torch.equal(result.isnan(), cone.expand(1, 2, -1, -1)), position


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("groups,size", covering([1, 2], [(40, 30), (20, 150), (40, 32)]), ids=str)
def test_a_constant_field_stays_constant(emulated, size, groups, path):
    """With no input after the first line, row-stochastic weights keep a constant state exactly."""
    emulated.cuda_select_path(path)
    x = torch.ones(1, 2, *size)
    logits = 3 * randn(1, 1, groups, 3, *size)
    lam = torch.zeros(1, 1, 1, *size)
    lam[..., 0, :] = 1
    assert torch.equal(propagate(x, logits, lam, directions=["top_to_bottom"]), x)


@pytest.mark.parametrize(
    "path,size,channels,gates",
    [
        (path, *case)
        for path in ("auto", *PATHS)
        for case in (((20, 33), 4, 1), ((20, 33), 5, 5), ((7, 7), 8, 1), ((21, 13), 17, 1), ((16, 16), 9, 9))
    ],
    ids=str,
)
def test_an_image_does_not_depend_on_its_batch(emulated, path, size, channels, gates):
    """Nor do its gradients, bit for bit."""
    emulated.cuda_select_path(path)
    inputs = propagate_inputs(3, channels, *size, groups=gates, lam=gates, u=gates, dtype=torch.float32)
    dy = randn(*inputs[0].shape, seed=4)

    def run(rows):
        leaves = [t[rows].detach().clone().requires_grad_() for t in inputs]
        y = propagate(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy[rows])]

    whole = run(slice(None))
    for n in range(3):
        for ours, theirs in zip(run(slice(n, n + 1)), whole, strict=True):
            assert torch.equal(ours, theirs[n : n + 1])
