"""The compiled kernels against the reference: output and every gradient, for every dtype, direction, chunk and group.

`nox -s sanitize` runs this file with the kernels built under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import (
    DTYPES,
    ISAS,
    channels_last,
    check_infinities,
    check_line_scan,
    check_propagate,
    check_without_effect,
    covering,
    part_of_a_wider_buffer,
    propagate_inputs,
    randn,
    transposed,
    value_and_gradients,
)

from gspn_core import DIRECTIONS, line_scan, propagate, reference

# (H, W): size 1, shorter and longer than a vector and a tile of lines, odd, thin both ways.
SIZES = [(1, 1), (2, 2), (7, 7), (14, 14), (33, 29), (56, 56), (74, 74), (64, 1), (1, 64)]
CHUNKS = [None, 1, 2, 7, 16, 48, 1000]  # dividing and not dividing, a tile, several tiles, larger than the image


@pytest.mark.parametrize("dtype,size,isa", covering(DTYPES, SIZES, ISAS), indirect=["isa"], ids=str)
def test_sizes(dtype, size, isa):
    check_propagate(propagate_inputs(2, 3, *size, groups=1, lam=3, u=1, dtype=dtype))


@pytest.mark.parametrize("dtype,size,isa", covering(DTYPES, [(300, 131), (128, 520)], ISAS), indirect=["isa"], ids=str)
def test_planes_of_several_tiles(dtype, size, isa):
    """Planes that are prefetched, in both orders, with a last tile and a last vector that are not full."""
    check_propagate(propagate_inputs(1, 2, *size, groups=1, lam=1, u=2, dtype=dtype))


@pytest.mark.parametrize(
    "dtype,directions,isa",
    covering(DTYPES, [("left_to_right", "top_to_bottom"), ("right_to_left", "bottom_to_top")], ISAS),
    indirect=["isa"],
    ids=str,
)
def test_outputs_larger_than_the_caches(dtype, directions, isa):
    """Such columns are written past the caches; scanning the transposed image does the same sums by rows."""
    h, w = 512, 1056
    planes = (1 << 26) // (h * w * dtype.itemsize) + 1  # 64 MiB
    x = randn(1, 1, h, w, dtype=dtype).expand(1, planes, h, w) * torch.arange(1, planes + 1).view(-1, 1, 1)
    weights = torch.rand(1, 1, 3, h, w, generator=torch.Generator().manual_seed(0)).to(dtype) / 3
    x = x.to(dtype)
    horizontal = line_scan(x, weights, direction=directions[0])
    vertical = line_scan(x.mT.contiguous(), weights.mT.contiguous(), direction=directions[1])
    assert horizontal.isfinite().all()
    assert torch.equal(horizontal, vertical.mT)


@pytest.mark.parametrize(
    "dtype,direction,isa",
    covering([torch.float32, torch.bfloat16, torch.float16], ["left_to_right", "right_to_left"], ISAS),
    indirect=["isa"],
    ids=str,
)
def test_bands(dtype, direction, isa):
    """Many planes with weights of their own are scanned in bands, to the same bits as these planes alone. Weights of
    the first line, and those that have no neighbour to weigh, have no effect."""
    h, w = 144, 1280
    planes = (1 << 26) // (h * w * dtype.itemsize) + 2  # 64 MiB
    x, dy = randn(2, 2, h, w, dtype=dtype)
    weights = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(0)).to(dtype) / 3
    weights[:, 0, 0] = weights[:, 2, -1] = torch.nan
    weights[..., 0 if direction == "left_to_right" else -1] = torch.nan

    def scan(index):
        inputs = [x[index].requires_grad_(), weights[index].requires_grad_()]
        y = line_scan(*inputs, direction=direction)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy[index])]

    index = torch.randint(2, (2, planes // 2), generator=torch.Generator().manual_seed(1))
    for ours, wanted in zip(scan(index), scan(torch.tensor([[0, 1]])), strict=True):
        assert wanted.isfinite().all()
        assert torch.equal(ours, wanted[0, index])


@pytest.mark.parametrize("n,groups", [(5, 1), (3, 13), (2, 39)])
def test_small_planes_beyond_the_caches(n, groups):
    """Whole planes, of which the next are prefetched; 39 channels do not fill the last task, nor the last pair."""
    inputs = propagate_inputs(n, 39, 56, 57, groups=groups, lam=13, u=39, dtype=torch.float32)
    assert sum(t.numel() * t.element_size() for t in inputs) > 14 * 2**20
    check_propagate(inputs)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks(dtype, chunk_size):
    check_propagate(propagate_inputs(1, 2, 50, 37, groups=2, lam=2, u=2, dtype=dtype), chunk_size=chunk_size)


@pytest.mark.parametrize(
    "dtype,chunk_size,direction,isa", covering(DTYPES, [None, 5], DIRECTIONS, ISAS), indirect=["isa"], ids=str
)
def test_line_scan(dtype, chunk_size, direction, isa):
    inputs = [randn(2, 4, 35, 19, dtype=dtype), 0.5 * randn(2, 2, 3, 35, 19, dtype=dtype)]
    check_line_scan([*inputs, None], direction=direction, chunk_size=chunk_size)
    check_line_scan([*inputs, randn(2, 1, 35, 19, dtype=dtype)], direction=direction, chunk_size=chunk_size)


@pytest.mark.parametrize(
    "n,groups,gates",
    covering([1, 3], [1, 2, 3, 6], [(None, None), (1, 6), (6, 1), (2, 3), (3, None), (None, 2)]),
    ids=str,
)
def test_groups(n, groups, gates):
    lam, u = gates
    check_propagate(propagate_inputs(n, 6, 9, 11, groups=groups, lam=lam, u=u))


@pytest.mark.parametrize("c,groups,lam,u", [(96, 1, 1, 96), (96, 2, 3, 1), (90, 5, 1, 2), (128, 128, 1, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_channels_split_between_tasks(dtype, c, groups, lam, u):
    """A small batch of many channels sharing weights or gates: partial sums of several tasks."""
    check_propagate(propagate_inputs(1, c, 18, 10, groups=groups, lam=lam, u=u, dtype=dtype))


@pytest.mark.parametrize(
    "directions",
    [("bottom_to_top",), ("right_to_left", "top_to_bottom"), ("bottom_to_top", "left_to_right", "right_to_left")],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_some_directions_in_any_order(dtype, directions):
    inputs = propagate_inputs(2, 2, 21, 34, d=len(directions), groups=2, lam=1, u=2, dtype=dtype)
    check_propagate(inputs, directions=directions)


# ---- strides


def every_second_column(t):
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1).flatten(-2)[..., ::2]


@pytest.mark.parametrize("layout", [channels_last, part_of_a_wider_buffer, every_second_column, transposed])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, layout):
    inputs = propagate_inputs(2, 4, 19, 22, groups=2, lam=4, u=1, dtype=dtype)
    laid_out = [layout(t) for t in inputs]
    assert not laid_out[0].is_contiguous()
    dense = value_and_gradients(propagate, inputs)
    for ours, wanted in zip(value_and_gradients(propagate, laid_out), dense, strict=True):
        assert torch.equal(ours, wanted)


def test_expanded_inputs_and_gradient():
    x = torch.ones(1, 1, 1, 1).expand(2, 4, 20, 17).requires_grad_()
    logits = randn(1, 4, 1, 3, 1, 1).expand(2, 4, 1, 3, 20, 17)
    propagate(x, logits).sum().backward()  # the gradient of sum is expanded too
    y = x.detach().clone().requires_grad_()
    reference.propagate(y, logits).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_offsets_beyond_32_bits():
    """Images 2^31 elements apart; of the buffer only the touched pages exist."""
    buffer = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    x = buffer.as_strided((2, 2, 5, 6), (2**31, 64, 8, 1))
    x.copy_(randn(2, 2, 5, 6))
    logits = randn(2, 4, 1, 3, 5, 6, dtype=torch.bfloat16)
    assert torch.equal(propagate(x, logits), propagate(x.contiguous(), logits))


def test_memory_that_was_taken_away():
    """An empty storage is an error: as a null pointer it would stand for an absent gate."""
    inputs = propagate_inputs(1, 2, 40, 4, lam=1, u=2)
    operators = torch.ops.gspn
    checkpoints = operators.propagate(*inputs, [0, 1, 2, 3], None, True)[1]
    arguments = [*inputs, checkpoints]
    for i, t in enumerate(arguments):
        taken = [t.clone() if i == j else other for j, other in enumerate(arguments)]
        taken[i].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="memory"):
            operators.propagate_backward(inputs[0], *taken, [0, 1, 2, 3], None, [True] * 4)
        if i < 4:
            with pytest.raises(ValueError, match="memory"):
                operators.propagate(*taken[:4], [0, 1, 2, 3], None)


@pytest.mark.parametrize("chunk_size", [2**63 - 1, 2**70])
def test_chunks_of_any_size(chunk_size):
    x, logits, _, _ = propagate_inputs(1, 2, 20, 5)
    assert torch.equal(propagate(x, logits, chunk_size=chunk_size), propagate(x, logits))


# ---- edges


@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0)])
def test_empty(shape):
    n, c, h, w = shape
    ours = value_and_gradients(propagate, propagate_inputs(n, c, h, w, groups=1, lam=3, u=1))
    assert [t.shape for t in ours] == [(n, c, h, w), (n, c, h, w), (n, 4, 1, 3, h, w), (n, 4, 3, h, w), (n, 4, 1, h, w)]


@pytest.mark.parametrize(
    "dtype,groups,isa",
    covering([torch.float32, torch.bfloat16, torch.float64], [1, 2], ISAS),
    indirect=["isa"],
    ids=str,
)
def test_logits_without_effect(dtype, groups, isa):
    check_without_effect(propagate, groups=groups, dtype=dtype)


@pytest.mark.parametrize("groups", [1, 2])
def test_logits_without_effect_in_sums_of_several_tasks(groups):
    """Their gradients come from sums that several tasks have made."""
    inputs = propagate_inputs(1, 96, 6, 5, d=1, groups=groups)
    inputs[1][..., [0, 3], :] = torch.nan
    gradients = value_and_gradients(lambda *t: propagate(*t, directions=["top_to_bottom"], chunk_size=3), inputs)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(
    "size,chunk_size,dtype,isa",
    covering([(6, 9), (24, 33), (40, 1), (150, 130)], [None, 2, 5], [torch.float32, torch.float64], ISAS),
    indirect=["isa"],
    ids=str,
)
def test_infinities(size, chunk_size, dtype, isa):
    check_infinities(*size, dtype, chunk_size=chunk_size)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 20])
@pytest.mark.parametrize("direction", ["top_to_bottom", "right_to_left"])
def test_missing_neighbours_have_no_effect(direction, length, isa):
    def turned(t):
        return t if direction == "top_to_bottom" else t.mT.contiguous()

    def scan(*inputs):
        return propagate(*inputs, directions=[direction])

    x, logits, _, _ = propagate_inputs(1, 1, 8, length, d=1)
    weights = randn(1, 1, 3, 8, length)
    for function, clean in ((scan, logits), (partial(line_scan, direction=direction), weights)):
        poisoned = clean.clone()
        poisoned[..., 0, :, 0] = poisoned[..., 2, :, -1] = torch.nan
        for ours, wanted in zip(
            value_and_gradients(function, [turned(x), turned(poisoned)]),
            value_and_gradients(function, [turned(x), turned(clean)]),
            strict=True,
        ):
            assert torch.equal(ours, wanted)


def test_nan_propagates_along_its_cone():
    x, logits, _, _ = propagate_inputs(1, 1, 6, 9, d=1)
    logits[0, 0, 0, 1, 2, 4] = torch.nan
    nan = propagate(x, logits, directions=["top_to_bottom"])[0, 0].isnan()
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(9), indexing="ij")
    assert torch.equal(nan, (rows >= 2) & ((columns - 4).abs() <= rows - 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype, isa):
    """Saturation below -28, weights of 0 and 1 far above, infinities; no NaN from finite logits."""
    x, logits, _, _ = propagate_inputs(1, 2, 20, 18, groups=2, dtype=dtype)
    logits = (logits * 30).to(dtype)
    logits[0, :, :, :, 3] = -torch.inf
    logits[0, :, :, 1, 4] = torch.inf
    check_propagate([x, logits])


def test_constant_field_stays_exactly_constant(isa):
    lam = torch.zeros(1, 1, 1, 300, 40)
    lam[..., 0, :] = 1
    y = propagate(torch.full((1, 1, 300, 40), 0.1), randn(1, 1, 1, 3, 300, 40), lam, directions=["top_to_bottom"])
    assert (y == torch.tensor(0.1)).all()


# ---- determinism, work that is not wanted, memory


# N, C, H, W, G, C' of lam and u: one channel, pairs and odd ones; short lines and several tiles; channels that share
# weights and gates within a task, in several, and in groups that do not end where parts of a sum end.
INVARIANT = [
    (3, 1, 5, 24, 1, 1, 1),
    (1, 2, 4, 24, 1, 1, 2),
    (1, 4, 1, 32, 1, 4, None),
    (3, 3, 9, 17, 1, 3, 1),
    (3, 5, 20, 33, 5, 1, 5),
    (1, 2, 160, 128, 1, 1, 2),
    (2, 64, 14, 14, 64, 64, 2),
    (7, 90, 6, 10, 2, 3, 5),
    (17, 90, 6, 10, 1, 3, 2),
]


@pytest.mark.parametrize(
    "case,dtype,isa", [(c, d, i) for c in INVARIANT for d in DTYPES[:3] for i in ISAS], indirect=["isa"], ids=str
)
def test_same_bits_whatever_threads_and_batch(case, dtype, isa):
    """With 1 to 64 threads, and for each image alone and in a batch: the output and every gradient."""
    n, c, h, w, groups, lam, u = case
    inputs = propagate_inputs(n, c, h, w, groups=groups, lam=lam, u=u, dtype=dtype)
    dy = randn(n, c, h, w, dtype=dtype, seed=4)

    def results(images, threads):
        torch.set_num_threads(threads)
        leaves = [None if t is None else t[images].detach().requires_grad_() for t in inputs]
        y = propagate(*leaves)
        return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy[images])]

    before = torch.get_num_threads()
    try:
        wanted = results(slice(None), 1)
        for threads in (2, 3, 7, 64):
            for ours, one in zip(results(slice(None), threads), wanted, strict=True):
                assert torch.equal(ours, one), threads
        for i in {0, n // 2, n - 1}:
            for ours, whole in zip(results(slice(i, i + 1), 2), wanted, strict=True):
                assert torch.equal(ours, whole[i : i + 1]), i
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone_is_the_same(wanted):
    inputs = propagate_inputs(1, 4, 20, 21, groups=2, lam=1, u=4)
    every = value_and_gradients(propagate, inputs)[1:]
    leaves = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    y = propagate(*leaves)
    y.backward(randn(*y.shape, seed=4))
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, every[i]) if i == wanted else leaf.grad is None


def test_unwanted_gradients_are_not_computed():
    """The backward operator returns nothing, and is handed no output, for what needs no gradient."""
    x, logits, lam, u = propagate_inputs(1, 4, 9, 8, groups=2, lam=1, u=4)
    checkpoints = torch.ops.gspn.propagate(x, logits, lam, u, [0, 1, 2, 3], None, True)[1]
    sizes = [
        t.numel()
        for t in torch.ops.gspn.propagate_backward(
            x, x, logits, lam, u, checkpoints, [0, 1, 2, 3], None, [True, False, False, True]
        )
    ]
    assert sizes == [x.numel(), 0, 0, u.numel()]


@pytest.mark.parametrize("dtype,state", [(torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)], ids=str)
def test_bytes_kept_for_backward(dtype, state):
    """At most the inputs and D/16 planes of the state's type."""
    n, c, h, w = 2, 3, 40, 64
    inputs = propagate_inputs(n, c, h, w, groups=3, lam=3, u=1, dtype=dtype)
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        propagate(*(t.requires_grad_() for t in inputs))
    inputs_bytes = sum(t.untyped_storage().nbytes() for t in inputs)
    assert inputs_bytes < sum(kept.values()) <= inputs_bytes + 4 * n * c * h * w * state // 16


# ---- anything at all


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    groups, lam, u = (data.draw(st.sampled_from([1, 2, 3, 4])) for _ in range(3))
    c = groups * lam * u
    n, h, w = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    directions = data.draw(st.permutations(DIRECTIONS))[: data.draw(st.integers(1, 4))]
    chunk_size = data.draw(st.none() | st.integers(1, 45))
    gates = (lam if data.draw(st.booleans()) else None, u if data.draw(st.booleans()) else None)
    dtype = data.draw(st.sampled_from(DTYPES))
    inputs = propagate_inputs(n, c, h, w, d=len(directions), groups=groups, lam=gates[0], u=gates[1], dtype=dtype)
    check_propagate(inputs, directions=directions, chunk_size=chunk_size)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.1, 100), h=st.integers(1, 30), w=st.integers(1, 30))
def test_linear_in_x_and_bounded(scale, h, w):
    """y is linear in x, and row-stochastic weights let no line exceed the sum of what was put in."""
    x, logits, _, _ = propagate_inputs(1, 2, h, w, dtype=torch.float64)
    y = propagate(x, logits)
    torch.testing.assert_close(propagate(scale * x, logits), scale * y)
    assert y.abs().max() <= x.abs().max() * 2 * (h + w) * (1 + 1e-12)
