"""The CUDA kernels on a GPU: accuracy against the float64 reference on the CPU, and behaviour on streams and in graphs.

`pytest -m cuda` runs this file; without a GPU, or without CUDA kernels in the build, every test is skipped with the
reason. GSPN_TEST_SECONDS in the environment is a time budget: tests that would start later are skipped, and say so.
"""

import gc
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager

import pytest
import torch
from operator_cases import DTYPES, ROUNDING, low_rank_inputs, propagate_inputs, randn

import gspn_core
from gspn_core import DIRECTIONS, SpatialPropagation, line_scan, propagate, propagate_low_rank, reference

pytestmark = pytest.mark.cuda

BEGAN = time.monotonic()
ALL = [0, 1, 2, 3]

# (H, W): size 1, shorter and longer than a warp covers, odd, thin both ways, the widths of the published models.
SIZES = [(1, 1), (2, 2), (7, 7), (8, 8), (14, 14), (16, 17), (32, 32), (33, 29), (56, 56), (64, 1), (1, 64), (65, 56)]
SIZES += [(74, 74), (128, 3), (129, 130), (147, 147)]
LONG = [(5, 1024), (1024, 5), (20, 1023), (3, 2048)]
CHUNKS = [None, 1, 2, 7, 16, 48, 1000]  # dividing and not dividing, the checkpoints' interval, larger than the image


def missing():
    """Return why these tests cannot run here, or an empty string."""
    if not torch.cuda.is_available():
        return "needs a GPU that torch sees: torch.cuda.is_available() is false"
    if not gspn_core.info()["cuda"]["compiled"]:
        return "this gspn_core was built without CUDA kernels, see `gspn-core info`"
    return ""


@pytest.fixture(autouse=True)
def gpu():
    reason = missing()
    if reason:
        pytest.skip(reason)
    budget = float(os.environ.get("GSPN_TEST_SECONDS", "inf"))
    if time.monotonic() - BEGAN > budget:
        pytest.skip(f"not run: GSPN_TEST_SECONDS={budget:g} are used up")
    yield
    torch.cuda.synchronize()  # so that an error is reported in the test that caused it


def require_memory(gibibytes):
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory, {free:.1f} are free")


@contextmanager
def others_warnings():
    """Ignore warnings about torch itself: prototype features, hints on precision, deprecations in its compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- the criterion of operator_cases.py across devices: the reference on the CPU, the kernel on the GPU


def same(t):
    return t


def value_and_gradients(f, inputs, device="cuda", layout=same):
    """Return, on the CPU, f(*inputs) and for a fixed random gradient of it those of all inputs that are there."""
    leaves = [None if t is None else layout(t.detach().to(device)).detach().requires_grad_() for t in inputs]
    out = f(*leaves)
    wanted = [t for t in leaves if t is not None]
    if out.grad_fn is None:  # an empty tensor
        return [out.cpu(), *(torch.zeros_like(t, device="cpu") for t in wanted)]
    dy = layout(randn(*out.shape, seed=4).to(device, out.dtype))
    gradients = torch.autograd.grad(out, wanted, dy, allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, gradients, strict=True)]
    return [t.detach().cpu() for t in (out, *gradients)]


def require_as_accurate(name, ours, plain, exact):
    assert ours.shape == exact.shape and ours.dtype == plain.dtype, (name, ours.shape, ours.dtype)
    if exact.numel() > 0:
        error, allowed = (ours.double() - exact).abs().max(), 2 * (plain.double() - exact).abs().max()
        allowed = allowed + ROUNDING[ours.dtype] * exact.abs().max().clamp(min=1)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_as_accurate(kernel, reference, inputs, label="", layout=same):
    exact = value_and_gradients(reference, [None if t is None else t.double() for t in inputs], "cpu")
    plain = value_and_gradients(reference, inputs, "cpu")
    ours = value_and_gradients(kernel, inputs, "cuda", layout)
    names = ["output", *(f"gradient of input {i}" for i, t in enumerate(inputs) if t is not None)]
    for name, *results in zip(names, ours, plain, exact, strict=True):
        require_as_accurate(f"{label} {name}", *results)


def check_propagate(inputs, layout=same, **options):
    ours, theirs = (lambda *t, f=f: f(*t, **options) for f in (propagate, reference.propagate))
    assert_as_accurate(ours, theirs, inputs, str(options), layout)


def check_line_scan(inputs, layout=same, **options):
    ours, theirs = (lambda *t, f=f: f(*t, **options) for f in (line_scan, reference.line_scan))
    assert_as_accurate(ours, theirs, inputs, str(options), layout)


def on_gpu(inputs, requires_grad=False):
    return [None if t is None else t.cuda().requires_grad_(requires_grad) for t in inputs]


def assert_same_bits(ours, wanted):
    for a, b in zip(ours, wanted, strict=True):
        assert torch.equal(a, b)


# ---- accuracy


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype, size):
    check_propagate(propagate_inputs(2, 3, *size, groups=1, lam=3, u=1, dtype=dtype))


@pytest.mark.parametrize("size", LONG, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_lines(dtype, size):
    check_propagate(propagate_inputs(1, 2, *size, groups=2, lam=1, u=2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_image_of_1024(dtype):
    inputs = propagate_inputs(1, 2, 1024, 1024, d=2, groups=1, lam=1, u=1, dtype=dtype)
    check_propagate(inputs, directions=["left_to_right", "bottom_to_top"])


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks(dtype, chunk_size):
    check_propagate(propagate_inputs(1, 2, 50, 37, groups=2, lam=2, u=2, dtype=dtype), chunk_size=chunk_size)
    check_propagate(propagate_inputs(1, 2, 19, 260, groups=1, lam=1, dtype=dtype), chunk_size=chunk_size)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_line_scan(dtype, chunk_size, direction):
    for size in ((35, 19), (147, 150)):
        inputs = [randn(2, 4, *size, dtype=dtype), 0.3 * randn(2, 2, 3, *size, dtype=dtype)]
        check_line_scan([*inputs, None], direction=direction, chunk_size=chunk_size)
        check_line_scan([*inputs, randn(2, 1, *size, dtype=dtype)], direction=direction, chunk_size=chunk_size)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("lam,u", [(None, None), (1, 6), (6, 1), (2, 3), (3, None), (None, 2)])
@pytest.mark.parametrize("n", [1, 3])
def test_groups(n, lam, u, groups):
    check_propagate(propagate_inputs(n, 6, 9, 11, groups=groups, lam=lam, u=u))
    check_propagate(propagate_inputs(n, 6, 10, 135, groups=groups, lam=lam, u=u, dtype=torch.bfloat16))


@pytest.mark.parametrize("c,groups,lam,u", [(96, 1, 1, 96), (96, 2, 3, 1), (90, 5, 1, 2), (128, 128, 1, None)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_many_channels(dtype, c, groups, lam, u):
    check_propagate(propagate_inputs(2, c, 18, 10, groups=groups, lam=lam, u=u, dtype=dtype))


@pytest.mark.parametrize(
    "directions",
    [("bottom_to_top",), ("right_to_left", "top_to_bottom"), ("bottom_to_top", "left_to_right", "right_to_left")],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_some_directions_in_any_order(dtype, directions):
    inputs = propagate_inputs(2, 2, 21, 34, d=len(directions), groups=2, lam=1, u=2, dtype=dtype)
    check_propagate(inputs, directions=directions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype):
    """Saturation below -28, weights of 0 and 1 far above, infinities; no NaN from finite logits."""
    x, logits, _, _ = propagate_inputs(1, 2, 20, 18, groups=2, dtype=dtype)
    logits = (logits * 30).to(dtype)
    logits[0, :, :, :, 3] = -torch.inf
    logits[0, :, :, 1, 4] = torch.inf
    check_propagate([x, logits])


def test_constant_field_stays_exactly_constant():
    lam = torch.zeros(1, 1, 1, 300, 40, device="cuda")
    lam[..., 0, :] = 1
    x, logits = torch.full((1, 1, 300, 40), 0.1).cuda(), randn(1, 1, 1, 3, 300, 40).cuda()
    assert (propagate(x, logits, lam, directions=["top_to_bottom"]).cpu() == torch.tensor(0.1)).all()


@pytest.mark.parametrize("width", [9, 260])
def test_nan_propagates_along_its_cone(width):
    x, logits, _, _ = propagate_inputs(1, 1, 6, width, d=1)
    logits[0, 0, 0, 1, 2, 4] = torch.nan
    nan = propagate(x.cuda(), logits.cuda(), directions=["top_to_bottom"])[0, 0].isnan().cpu()
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(width), indexing="ij")
    assert torch.equal(nan, (rows >= 2) & ((columns - 4).abs() <= rows - 2))


@pytest.mark.parametrize("wanted", range(4))
def test_each_gradient_alone_is_the_same(wanted):
    inputs = propagate_inputs(1, 4, 20, 21, groups=2, lam=1, u=4)
    every = value_and_gradients(propagate, inputs)[1:]
    leaves = [t.cuda().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    y = propagate(*leaves)
    y.backward(randn(*y.shape, seed=4).cuda())
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad.cpu(), every[i]) if i == wanted else leaf.grad is None


# ---- strides, offsets, sizes beyond 32 bits


def channels_last(t):
    return t.movedim(-3, -1).contiguous().movedim(-1, -3)


def part_of_a_wider_buffer(t):
    wide = t.new_full((*t.shape[:-2], t.shape[-2] + 3, t.shape[-1] + 5), torch.nan)
    return wide[..., 2:-1, 1:-4].copy_(t)


def every_second_column(t):
    return torch.stack([t, torch.full_like(t, torch.nan)], dim=-1).flatten(-2)[..., ::2]


def transposed(t):
    return t.mT.contiguous().mT


def odd_offset(t):
    """Dense, one element past an aligned address."""
    return t.new_full((t.numel() + 1,), torch.nan)[1:].view(t.shape).copy_(t)


LAYOUTS = [channels_last, part_of_a_wider_buffer, every_second_column, transposed, odd_offset]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(19, 22), (24, 74), (10, 300)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, size, layout):
    check_propagate(propagate_inputs(2, 4, *size, groups=2, lam=4, u=1, dtype=dtype), layout)
    weights = 0.3 * randn(2, 4, 3, *size, dtype=dtype)
    check_line_scan([randn(2, 4, *size, dtype=dtype), weights], layout, direction="right_to_left")


@pytest.mark.parametrize("groups,lam", [(40, 40), (1, 40), (40, None)])
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (56, 28), (60, 9), (5, 74)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_channels_last(dtype, size, groups, lam):
    """Kernels of their own, whose lanes are channels, up to 80 positions; output and gradients are channels_last."""
    inputs = propagate_inputs(2, 40, *size, groups=groups, lam=lam, u=lam, dtype=dtype)

    def last(t):  # x, logits or a gate
        dim = {4: 1, 6: 2, 5: 2}[t.dim()]
        return t.movedim(dim, -1).contiguous().movedim(-1, dim)

    check_propagate(inputs, last)
    check_propagate(inputs, last, chunk_size=5)
    ours = on_gpu([None if t is None else last(t) for t in inputs], requires_grad=True)
    y = propagate(*ours)
    assert y.is_contiguous(memory_format=torch.channels_last)
    leaves = [t for t in ours if t is not None]
    first = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, leaves, torch.ones_like(y)), first)


@pytest.mark.parametrize("size", [(20, 17), (6, 200)], ids=str)
def test_expanded_inputs_and_gradient(size):
    results = []
    for device, f in (("cuda", propagate), ("cpu", reference.propagate)):
        x = torch.ones(1, 1, 1, 1, device=device).requires_grad_()
        logits = randn(1, 4, 1, 3, 1, 1).to(device).expand(2, 4, 1, 3, *size)
        f(x.expand(2, 4, *size), logits).sum().backward()  # the gradient of sum is expanded too
        results.append(x.grad.cpu())
    torch.testing.assert_close(*results)


def test_output_is_contiguous_whatever_the_input():
    """But for images of channels_last with enough channels, see test_channels_last."""
    x = randn(2, 4, 5, 6).cuda().to(memory_format=torch.channels_last)
    assert propagate(x, randn(2, 4, 1, 3, 5, 6).cuda()).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0)])
def test_empty(shape):
    n, c, h, w = shape
    ours = value_and_gradients(propagate, propagate_inputs(n, c, h, w, groups=1, lam=3, u=1))
    assert [t.shape for t in ours] == [(n, c, h, w), (n, c, h, w), (n, 4, 1, 3, h, w), (n, 4, 3, h, w), (n, 4, 1, h, w)]


@pytest.mark.parametrize("size", [(30, 28), (20, 70)], ids=str)  # the second is too large for kernels of channels_last
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank(dtype, size):
    """Composed of the kernels, some channels at a time; only the inputs and sparse states are kept."""
    inputs = low_rank_inputs(2, 40, 8, *size, dtype=dtype)
    wanted = value_and_gradients(reference.propagate_low_rank, [t.double() for t in inputs])
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 0.1)
    for o, w in zip(value_and_gradients(propagate_low_rank, inputs), wanted, strict=True):
        assert (o.double() - w).abs().max() <= tolerance * w.abs().max()
    planes = 20 * 512 * 512 * 4  # bytes, of one channel
    x, r, weight, bias = (t.cuda().requires_grad_() for t in low_rank_inputs(1, 64, 8, 512, 512))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    propagate_low_rank(x, r, weight, bias).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 64 * planes / 2


def test_offsets_beyond_32_bits():
    """Images 2^31 elements apart."""
    require_memory(6)
    buffer = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    x = buffer.as_strided((2, 2, 5, 6), (2**31, 64, 8, 1))
    x.copy_(randn(2, 2, 5, 6))
    logits = randn(2, 4, 1, 3, 5, 6, dtype=torch.bfloat16).cuda()
    assert torch.equal(propagate(x, logits), propagate(x.contiguous(), logits))


def big_randn(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()


def test_more_than_2_to_31_elements_of_x():
    require_memory(24)
    directions = ("left_to_right", "top_to_bottom")
    x = big_randn(33, 1024, 256, 256).requires_grad_()
    assert x.numel() > 2**31
    logits, dy = big_randn(33, 2, 1, 3, 256, 256), big_randn(*x.shape)
    y = propagate(x, logits, directions=directions)
    (dx,) = torch.autograd.grad(y, x, dy)
    for n, c in ((0, 0), (32, 1023)):
        results = [y.detach()[n : n + 1, c : c + 1].cpu(), dx[n : n + 1, c : c + 1].cpu()]
        expected = []
        for dtype in (torch.bfloat16, torch.float64):
            leaf = x.detach()[n : n + 1, c : c + 1].cpu().to(dtype).requires_grad_()
            part = reference.propagate(leaf, logits[n : n + 1].cpu().to(dtype), directions=directions)
            gradient = torch.autograd.grad(part, leaf, dy[n : n + 1, c : c + 1].cpu().to(dtype))
            expected.append([part.detach(), *gradient])
        for name, *compared in zip(("y", "dx"), results, *expected, strict=True):
            require_as_accurate(f"image {n}, channel {c}, {name}", *compared)


def test_more_than_2_to_31_elements_of_weights():
    require_memory(24)
    x = big_randn(12, 1024, 256, 256).requires_grad_()
    weights = big_randn(12, 1024, 3, 256, 256).mul_(0.2).requires_grad_()
    assert weights.numel() > 2**31
    dh = big_randn(*x.shape)
    h = line_scan(x, weights, direction="bottom_to_top")
    dx, dweights = torch.autograd.grad(h, (x, weights), dh)
    for n, c in ((0, 0), (11, 1023)):
        results = [t.detach()[n : n + 1, c : c + 1].cpu() for t in (h, dx, dweights)]
        expected = []
        for dtype in (torch.bfloat16, torch.float64):
            leaves = [t.detach()[n : n + 1, c : c + 1].cpu().to(dtype).requires_grad_() for t in (x, weights)]
            part = reference.line_scan(*leaves, direction="bottom_to_top")
            gradients = torch.autograd.grad(part, leaves, dh[n : n + 1, c : c + 1].cpu().to(dtype))
            expected.append([part.detach(), *gradients])
        for name, *compared in zip(("h", "dx", "dweights"), results, *expected, strict=True):
            require_as_accurate(f"image {n}, channel {c}, {name}", *compared)


# ---- integration with PyTorch


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("groups,lam,u", [(1, 1, 2), (2, None, 1), (4, 4, None)])
def test_gradcheck_propagate(groups, lam, u, chunk_size):
    inputs = on_gpu(propagate_inputs(1, 4, 4, 3, groups=groups, lam=lam, u=u, dtype=torch.float64), True)
    assert torch.autograd.gradcheck(lambda *t: propagate(*t, chunk_size=chunk_size), inputs)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck_line_scan(direction):
    sizes = ((1, 4, 4, 3), (1, 2, 3, 4, 3), (1, 1, 4, 3))
    inputs = on_gpu([randn(*size, dtype=torch.float64) for size in sizes], True)
    assert torch.autograd.gradcheck(lambda *t: line_scan(*t, direction=direction), inputs)


def opcheck(op, arguments):
    with warnings.catch_warnings():
        # opcheck's own: it looks at .grad of copies it has made differentiable.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("groups,lam,u,chunk_size", [(1, 1, 4, None), (4, 4, None, 3)])
def test_opcheck_propagate(groups, lam, u, chunk_size):
    inputs = on_gpu(propagate_inputs(2, 4, 5, 18, groups=groups, lam=lam, u=u))
    op = torch.ops.gspn.propagate.default
    opcheck(op, (*(None if t is None else t.clone().requires_grad_() for t in inputs), ALL, chunk_size))
    checkpoints = op(*inputs, ALL, chunk_size, True)[1]
    arguments = (torch.ones_like(inputs[0]), *inputs, checkpoints, ALL, chunk_size, [True, True, True, False])
    opcheck(torch.ops.gspn.propagate_backward.default, arguments)


@pytest.mark.parametrize("direction", ALL)
def test_opcheck_line_scan(direction):
    x, w, lam = on_gpu([randn(2, 4, 20, 18), randn(2, 2, 3, 20, 18), randn(2, 1, 20, 18)])
    op = torch.ops.gspn.line_scan.default
    opcheck(op, (*(t.clone().requires_grad_() for t in (x, w, lam)), direction, None))
    checkpoints = op(x, w, lam, direction, None, True)[1]
    opcheck(torch.ops.gspn.line_scan_backward.default, (x, x, w, lam, checkpoints, direction, None, [True, True, True]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def f(x, logits, lam, u):
        return propagate(x * 2, logits, lam, u, chunk_size=3) * 0.5

    torch._dynamo.reset()
    ours = torch.compile(f, fullgraph=True, dynamic=dynamic)
    for size in ((5, 20), (33, 4)):
        inputs = propagate_inputs(2, 4, *size, groups=2, lam=1, u=4)
        with others_warnings():
            compiled = value_and_gradients(ours, inputs)
        assert_same_bits(compiled, value_and_gradients(f, inputs))  # products with powers of two are exact


def test_compile_line_scan_and_module():
    module = SpatialPropagation(4, proxy_channels=2, gate_rank=3).cuda()

    def f(x, w):
        return line_scan(module(x), w, direction="bottom_to_top")

    torch._dynamo.reset()
    inputs = [randn(1, 4, 18, 7), randn(1, 1, 3, 18, 7)]
    with others_warnings():
        ours = value_and_gradients(torch.compile(f, fullgraph=True), inputs)
    for a, b in zip(ours, value_and_gradients(f, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # a convolution may use another algorithm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, logits, lam, u = on_gpu(propagate_inputs(1, 2, 6, 5, groups=1, lam=1, u=2), True)
    with torch.autocast("cuda", dtype):
        y = propagate(x, logits.to(dtype), lam, u)
        h = line_scan(x, logits[:, 0], direction="top_to_bottom")
    assert y.dtype == h.dtype == dtype
    assert torch.equal(y, propagate(*(t.to(dtype) for t in (x, logits, lam, u))))
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, logits, lam, u))


def test_vmap():
    x, logits, lam, _ = on_gpu(propagate_inputs(2, 4, 5, 6, groups=2, lam=1))
    batched = torch.stack([x + i for i in range(3)])
    ours = torch.vmap(propagate, in_dims=(0, None, None))(batched, logits, lam)
    assert torch.equal(ours, torch.stack([propagate(t, logits, lam) for t in batched]))


# ---- determinism, streams, graphs, devices

# A resident shape, strips of one warp and of several, and sums over many channels: (N, C, H, W), groups, lam, u.
CALLS = [((2, 8, 30, 41), 1, 1, 8), ((1, 3, 20, 300), 3, 3, 1), ((1, 2, 40, 1024), 1, 1, 1), ((4, 96, 14, 14), 2, 1, 3)]


@pytest.mark.parametrize("shape,groups,lam,u", CALLS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_20_runs(dtype, shape, groups, lam, u):
    inputs = propagate_inputs(*shape, groups=groups, lam=lam, u=u, dtype=dtype)
    first = value_and_gradients(propagate, inputs)
    for _ in range(19):
        assert_same_bits(value_and_gradients(propagate, inputs), first)


@pytest.mark.parametrize("shape,groups,lam,u", CALLS, ids=str)
def test_graph_replays_with_other_inputs(shape, groups, lam, u):
    inputs = on_gpu(propagate_inputs(*shape, groups=groups, lam=lam, u=u), True)
    dy = randn(*shape, seed=7).cuda()

    def call():
        y = propagate(*inputs)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in (11, 12):
        with torch.no_grad():
            for i, t in enumerate(inputs):
                t.copy_(randn(*t.shape, seed=seed + i))
        graph.replay()
        assert_same_bits(captured, call())


def delay(seconds=0.1):
    """Keep the current stream busy."""
    torch.cuda._sleep(int(seconds * 1.5e9))


@pytest.mark.parametrize("shape,groups,lam,u", CALLS, ids=str)
def test_two_streams_at_once(shape, groups, lam, u):
    dy = randn(*shape, seed=7).cuda()
    both = [on_gpu(propagate_inputs(*shape, groups=groups, lam=lam, u=u), True) for _ in range(2)]
    with torch.no_grad():
        both[1][0].mul_(-3).add_(1)

    def call(inputs):
        y = propagate(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy)]

    alone = [call(inputs) for inputs in both]
    streams = [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    together = []
    for _ in range(10):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together.append((i, call(both[i])))
    torch.cuda.synchronize()
    for i, ours in together:
        assert_same_bits(ours, alone[i])


def test_runs_on_the_current_stream():
    """The input arrives late on that stream, and the next reader of the output on it gets the right values."""
    inputs = on_gpu(propagate_inputs(2, 4, 30, 150, groups=2, lam=1, u=4), True)
    dy = torch.ones(2, 4, 30, 150, device="cuda")
    expected = propagate(*inputs)
    gradients = torch.autograd.grad(expected, inputs, dy)
    late = [torch.zeros_like(t) for t in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        delay()
        for t, source in zip(late, inputs, strict=True):
            t.copy_(source.detach())
        leaves = [t.requires_grad_() for t in late]
        y = propagate(*leaves)
        ours = [t.clone() for t in (y.detach(), *torch.autograd.grad(y, leaves, dy))]
    stream.synchronize()
    assert_same_bits(ours, [expected, *gradients])


@pytest.mark.parametrize("shape,groups,lam,u", CALLS, ids=str)
def test_a_call_waits_for_nothing(shape, groups, lam, u):
    inputs = on_gpu(propagate_inputs(*shape, groups=groups, lam=lam, u=u), True)
    dy = torch.ones(shape, device="cuda")

    def call():
        return torch.autograd.grad(propagate(*inputs), inputs, dy)

    kept = [call() for _ in range(2)]  # so that the allocator has the memory
    del kept
    torch.cuda.synchronize()
    with others_warnings():  # the mode is a prototype, torch says
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # The mode detects synchronisation by torch; that the device is still busy afterwards covers our launches too.
    torch.cuda.synchronize()
    delay(1.0)
    busy = torch.cuda.Event()
    busy.record()
    kept = call()
    assert not busy.query(), "the call came back only when the work before it was done"
    del kept


def test_runs_on_the_device_of_its_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there is {torch.cuda.device_count()}")
    inputs = propagate_inputs(2, 4, 30, 150, groups=2, lam=1, u=4)
    assert torch.cuda.current_device() == 0
    ours = value_and_gradients(propagate, inputs, "cuda:1")
    assert torch.cuda.current_device() == 0
    assert_same_bits(ours, value_and_gradients(propagate, inputs, "cuda:0"))


@pytest.mark.parametrize("shape,groups,lam,u", CALLS, ids=str)
def test_50_calls_take_no_more_memory_than_one(shape, groups, lam, u):
    inputs = on_gpu(propagate_inputs(*shape, groups=groups, lam=lam, u=u), True)
    dy = torch.ones(shape, device="cuda")

    def state():
        torch.cuda.synchronize()
        gc.collect()
        device = torch.cuda.mem_get_info()[0]  # also counts memory that torch did not allocate
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), device

    for _ in range(5):
        torch.autograd.grad(propagate(*inputs), inputs, dy)
    before, resident = state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(50):
        torch.autograd.grad(propagate(*inputs), inputs, dy)
    assert state() == before
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident  # KiB
    assert grown < 16 * 1024, f"the process grew by {grown} KiB"


# ---- which kernels


def kernels_of(f):
    """Return the names of the kernels that f launches."""
    f()
    torch.cuda.synchronize()
    with others_warnings(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        f()
        torch.cuda.synchronize()
    names = {event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA}
    if not names:
        pytest.skip("torch's profiler saw no kernel on this machine")
    return names


@pytest.mark.parametrize(
    "kind,size,directions,channels,groups",
    [
        ("resident", (74, 74), DIRECTIONS, 2, 1),
        ("shared", (14, 14), DIRECTIONS, 8, 1),
        ("fused", (16, 16), DIRECTIONS, 2, 2),
        ("column", (36, 200), ["top_to_bottom"], 2, 2),
        ("row", (200, 48), ["left_to_right"], 2, 2),
        ("strip", (10, 201), DIRECTIONS, 2, 1),
        ("strip", (74, 74), ["top_to_bottom"], 2, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_of_a_shape(dtype, kind, size, directions, channels, groups):
    """A small image in several directions takes one launch; long lines of aligned rows with weights of every channel
    have kernels of their own, forward and backward; others pass in strips.
    """
    if kind == "resident" and torch.cuda.get_device_capability() not in ((8, 0), (9, 0), (10, 0)):
        pytest.skip("the shared memory of a block on this device may be too small for the resident kernel at 74x74")
    inputs = propagate_inputs(1, channels, *size, d=len(directions), groups=groups, lam=groups, u=groups, dtype=dtype)
    inputs = on_gpu(inputs, True)
    dy = torch.ones(1, channels, *size, dtype=dtype, device="cuda")

    def forward():
        with torch.no_grad():
            propagate(*inputs, directions=directions)

    ours = [name for name in kernels_of(forward) if "gspn" in name]
    assert ours and all(kind in name for name in ours), ours
    y = propagate(*inputs, directions=directions)
    names = kernels_of(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True))
    backward = kind if kind in ("row", "column") else "strip"
    assert any(backward in name and "backward" in name for name in names), names


# ---- under compute-sanitizer

SANITIZED = """
import torch
from gspn_core import propagate
for shape, groups, dtype in (((1, 6, 9, 37), 1, torch.bfloat16), ((1, 3, 7, 150), 3, torch.float32),
                             ((1, 2, 5, 600), 1, torch.float32), ((1, 2, 6, 40), 2, torch.float64)):
    n, c, h, w = shape
    sizes = (shape, (n, 4, groups, 3, h, w), (n, 4, 1, h, w), (n, 4, c, h, w))
    inputs = [torch.randn(size).to("cuda", dtype).requires_grad_() for size in sizes]
    for chunk_size in (None, 4):
        y = propagate(*inputs, chunk_size=chunk_size)
        torch.autograd.grad(y, inputs, torch.ones_like(y))
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool, tmp_path):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    script = tmp_path / "script.py"
    script.write_text(SANITIZED)
    command = [sanitizer, "--tool", tool, "--error-exitcode", "77", "--kernel-regex", "kns=gspn"]
    # Without torch's caching allocator every tensor is a separate allocation: an access past its end is an error.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command += [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=240)
    output = done.stdout + done.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device or runtime")
    assert done.returncode == 0 and "done" in done.stdout, output[-4000:]
