"""propagate_low_rank: against the reference, as an operator of PyTorch, and what it keeps in memory."""

import pytest
import torch
from operator_cases import (
    DTYPES,
    ISAS,
    assert_as_accurate,
    covering,
    low_rank_inputs,
    opcheck,
    randn,
    value_and_gradients,
)
from torch.utils.flop_counter import FlopCounterMode

from gspn_core import DIRECTIONS, SpatialPropagation, _backend, _low_rank, propagate, propagate_low_rank, reference

OP, ALL = torch.ops.gspn.propagate_low_rank.default, [0, 1, 2, 3]
# Images, channels around the width of a vector, and ranks around the rows and pixels that kernels hold in registers.
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 2, 5, 7),
    (1, 17, 8, 14, 14),
    (3, 40, 5, 7, 7),
    (2, 16, 9, 33, 29),
    (1, 8, 94, 16, 16),
    (2, 20, 3, 1, 40),
    (1, 9, 4, 40, 1),
    (1, 16, 12, 64, 33),
]


def check(inputs, **options):
    assert_as_accurate(
        lambda *t: propagate_low_rank(*t, **options),
        lambda *t: reference.propagate_low_rank(*t, **options),
        inputs,
        str(options),
    )


@pytest.fixture(params=["kernels", "composed"])
def way(request, monkeypatch):
    """With the kernels, or composed of `propagate`, few channels at a time."""
    if request.param == "composed":
        monkeypatch.setattr(_low_rank, "_has_kernels", lambda x: False)
        monkeypatch.setattr(_low_rank, "_COMPOSED_BYTES", 4 * 20 * 7 * 120)
    return request.param


# ---- values


@pytest.mark.parametrize("size,dtype,isa", covering(SIZES, DTYPES, ISAS), indirect=["isa"], ids=str)
def test_sizes(size, dtype, isa):
    check(low_rank_inputs(*size, dtype=dtype))


@pytest.mark.parametrize("chunk_size,dtype,isa", covering([1, 2, 5, 24, 100], DTYPES, ISAS), indirect=["isa"], ids=str)
def test_chunks(chunk_size, dtype, isa):
    check(low_rank_inputs(2, 19, 5, 33, 21, dtype=dtype), chunk_size=chunk_size)


@pytest.mark.parametrize(
    "directions", [DIRECTIONS[:1], DIRECTIONS[2:0:-1], ("bottom_to_top", "right_to_left", "left_to_right")]
)
def test_directions(directions, way):
    check(low_rank_inputs(2, 10, 3, 6, 20, d=len(directions)), directions=directions)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_composed(dtype, monkeypatch):
    monkeypatch.setattr(_low_rank, "_has_kernels", lambda x: False)
    monkeypatch.setattr(_low_rank, "_COMPOSED_BYTES", 4 * 20 * 7 * 120)
    inputs = low_rank_inputs(2, 20, 3, 7, 9, dtype=dtype)
    if dtype in (torch.float32, torch.float64):
        return check(inputs)
    # The planes have the dtype of the inputs here, as a convolution would write them.
    expected = value_and_gradients(reference.propagate_low_rank, [t.float() for t in inputs])
    for ours, wanted in zip(value_and_gradients(propagate_low_rank, inputs), expected, strict=True):
        assert (ours.float() - wanted).abs().max() <= 0.06 * wanted.abs().max()


def test_strides(way):
    x, r, weight, bias = low_rank_inputs(2, 18, 6, 9, 11)
    check(
        [
            x.to(memory_format=torch.channels_last),
            r.transpose(2, 3).contiguous().transpose(2, 3),
            weight.flip(0).transpose(1, 2).contiguous().transpose(1, 2),
            bias.expand(2, *bias.shape)[1],
        ]
    )


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_same_bits_whatever_threads_and_batch(dtype, isa):
    inputs = low_rank_inputs(5, 35, 6, 18, 13, dtype=dtype)

    def results(threads):
        torch.set_num_threads(threads)
        return value_and_gradients(propagate_low_rank, inputs)

    before = torch.get_num_threads()
    try:
        wanted = results(1)
        for threads in (2, 3, 64):
            assert all(map(torch.equal, results(threads), wanted)), threads
        dy = randn(*inputs[0].shape, seed=4).to(dtype)
        for image in (slice(i, i + 1) for i in range(5)):  # the projection's gradients are sums over the batch
            leaves = [t[image].clone().requires_grad_() for t in inputs[:2]]
            alone = propagate_low_rank(*leaves, *inputs[2:])
            gradients = (alone.detach(), *torch.autograd.grad(alone, leaves, dy[image]))
            assert all(torch.equal(ours, whole[image]) for ours, whole in zip(gradients, wanted[:3], strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_and_nan(value, isa):
    x, r, weight, bias = low_rank_inputs(1, 9, 3, 6, 7)
    x[0, 2, 3, 3] = value
    r[0, 1, 1, 5] = value if value != value else 1.0
    ours, wanted = propagate_low_rank(x, r, weight, bias), reference.propagate_low_rank(x, r, weight, bias)
    torch.testing.assert_close(ours, wanted, equal_nan=True)
    assert not wanted.isfinite().all()


def test_is_propagate_on_the_planes(way):
    x, r, weight, bias = low_rank_inputs(2, 12, 4, 8, 9)
    expected = propagate(x, *reference.low_rank_gates(r, weight, bias), chunk_size=3)
    torch.testing.assert_close(propagate_low_rank(x, r, weight, bias, chunk_size=3), expected)


@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 4), (2, 0, 2, 4, 4), (2, 3, 2, 0, 4), (2, 3, 0, 4, 4)])
def test_empty(shape, way):
    inputs = low_rank_inputs(*shape)
    results = value_and_gradients(propagate_low_rank, inputs)
    if shape == (2, 3, 0, 4, 4):  # gates that are constants
        expected = value_and_gradients(reference.propagate_low_rank, inputs)
    else:
        assert reference.propagate_low_rank(*inputs).shape == inputs[0].shape
        expected = [torch.zeros_like(t) for t in (inputs[0], *inputs)]
    for ours, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, wanted)


# ---- PyTorch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    inputs = [t.requires_grad_() for t in low_rank_inputs(2, 5, 3, 4, 20, dtype=dtype)]
    opcheck(OP, (*inputs, ALL, 2))
    y, checkpoints = OP(*(t.detach() for t in inputs), ALL, None, True)
    backward = torch.ops.gspn.propagate_low_rank_backward.default
    arguments = (torch.ones_like(y), *(t.detach() for t in inputs), checkpoints, ALL, None)
    for mask in ([True] * 4, [True, False, False, False], [False, True, False, False], [False, False, True, True]):
        opcheck(backward, (*arguments, mask))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_gradcheck(wanted, way):
    inputs = low_rank_inputs(1, 3, 2, 4, 5, dtype=torch.float64)
    inputs = [t.requires_grad_() if i in wanted else t for i, t in enumerate(inputs)]
    assert torch.autograd.gradcheck(
        lambda *t: propagate_low_rank(*t, chunk_size=3), inputs, check_forward_ad=True, check_batched_grad=True
    )


def test_torch_func():
    inputs = low_rank_inputs(2, 3, 2, 4, 5, dtype=torch.float64)

    def results(f):
        loss = lambda *t: f(*t).square().sum()  # noqa: E731
        batch = [torch.stack([t, t + 1]) for t in inputs]
        yield from torch.func.grad(loss, argnums=(0, 1, 2, 3))(*inputs)
        yield from torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(*batch)
        yield torch.func.vmap(f, in_dims=(0, 0, None, None))(*batch[:2], *inputs[2:])
        yield torch.func.vmap(f, in_dims=(0, None, 0, None))(batch[0], inputs[1], batch[2], inputs[3])
        yield torch.func.vmap(f)(*(t[:0] for t in batch))
        yield from torch.func.jvp(f, tuple(inputs), tuple(t.cos() for t in inputs))

    for ours, wanted in zip(results(propagate_low_rank), results(reference.propagate_low_rank), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_no_second_derivative():
    inputs = [t.requires_grad_() for t in low_rank_inputs(1, 2, 2, 3, 3)]
    (gradient,) = torch.autograd.grad(propagate_low_rank(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="propagate_low_rank_backward has no derivative"):
        gradient.sum().backward()


def test_autocast_and_meta():
    inputs = low_rank_inputs(1, 4, 2, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert propagate_low_rank(inputs[0], inputs[1].bfloat16(), *inputs[2:]).dtype == torch.bfloat16
        assert propagate_low_rank(inputs[0].double(), *inputs[1:]).dtype == torch.float64
    assert propagate_low_rank(*(t.to("meta") for t in inputs)).shape == inputs[0].shape


def test_flops():
    x, r, weight, bias = (t.requires_grad_() for t in low_rank_inputs(2, 4, 3, 5, 6))
    with FlopCounterMode(display=False) as forward:
        y = propagate_low_rank(x, r, weight, bias)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    scans, products = 2 * 4 * x.numel(), 2 * 4 * 5 * x.numel() * 3
    assert forward.get_total_flops() == 5 * scans + products
    assert backward.get_total_flops() == 12 * scans + 3 * products


@pytest.mark.parametrize(
    "changed,error,message",
    [
        (
            {"r": randn(2, 3, 5, 5)},
            ValueError,
            r"r must have shape \(N, R, H, W\) = \(2, any, 5, 4\), got \(2, 3, 5, 5\)",
        ),
        ({"r": randn(2, 3, 5)}, ValueError, r"r must have shape .* got \(2, 3, 5\)"),
        ({"weight": randn(4, 5, 6, 2)}, ValueError, r"weight must have shape \(D, 5, C, R\) = \(4, 5, 6, 3\), got"),
        (
            {"weight": randn(4, 5, 6, 3).half()},
            TypeError,
            "weight must have the dtype of x, torch.float32, got torch.float16",
        ),
        ({"bias": randn(4, 4, 6)}, ValueError, r"bias must have shape \(D, 5, C\) = \(4, 5, 6\), got \(4, 4, 6\)"),
        ({"bias": None}, TypeError, "bias must be a tensor, got NoneType"),
        ({"bias": torch.empty(4, 5, 6, device="meta")}, ValueError, "bias must be on the device of x, cpu, got meta"),
        ({"directions": DIRECTIONS[:2]}, ValueError, r"weight must have shape .* = \(2, 5, 6, 3\), got \(4, 5, 6, 3\)"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be None or at least 1, got 0"),
    ],
)
def test_bad_input(changed, error, message, monkeypatch):
    monkeypatch.setattr(_backend, "LowRankKernels", None)
    x, r, weight, bias = low_rank_inputs(2, 6, 3, 5, 4)
    with pytest.raises(error, match=message):
        propagate_low_rank(**{"x": x, "r": r, "weight": weight, "bias": bias} | changed)


# ---- in the module


def planes_of(module, x):
    return module.lift(
        propagate(
            *module.project(x), directions=[DIRECTIONS[d] for d in module.directions], chunk_size=module.chunk_size
        )
    )


@pytest.mark.parametrize(
    "options", [{}, {"proxy_channels": 3}, {"chunk_size": 2, "directions": DIRECTIONS[1:3]}], ids=str
)
def test_the_module_computes_what_its_planes_give(options):
    torch.manual_seed(0)
    module = SpatialPropagation(5, gate_rank=2, weight_groups=options.get("proxy_channels", 5), **options)
    with torch.no_grad():
        module.merge.copy_(torch.rand_like(module.merge))
    x = randn(2, 5, 6, 7).requires_grad_()
    results = []
    for f in (module, lambda x: planes_of(module, x)):
        y = f(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_gates_with_a_hook_are_called():
    """As accelerate offloads them, say: their weights are elsewhere until then."""
    module = SpatialPropagation(5, gate_rank=2, weight_groups=5)
    x, called = randn(1, 5, 4, 4), []
    expected = module(x)
    module.gates.register_forward_pre_hook(lambda *_: called.append(True))
    torch.testing.assert_close(module(x), expected)
    assert called


def test_kept_for_the_backward_pass():
    """The inputs, and of each direction's states every 16th line: not the 20 planes of a channel."""
    inputs = [t.requires_grad_() for t in low_rank_inputs(2, 24, 3, 40, 48)]
    kept = {}

    def keep(t):
        kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        propagate_low_rank(*inputs)
    planes = 4 / 16 * inputs[0].nbytes
    assert sum(kept.values()) <= sum(t.nbytes for t in inputs) + planes
