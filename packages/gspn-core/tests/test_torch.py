"""The operators in PyTorch: schema, fake, autograd, autocast, vmap, compile, export, TorchScript, fx."""

import io
import os
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from operator_cases import DTYPES, opcheck, propagate_inputs, randn, value_and_gradients
from torch.utils.flop_counter import FlopCounterMode

import gspn_core
from gspn_core import DIRECTIONS, SpatialPropagation, _backend, line_scan, propagate, reference

PROPAGATE, LINE_SCAN = torch.ops.gspn.propagate.default, torch.ops.gspn.line_scan.default
ALL = [0, 1, 2, 3]


def leaves(inputs):
    return [None if t is None else t.detach().requires_grad_() for t in inputs]


# ---- schema, fake, autograd


@pytest.mark.parametrize("groups,lam,u,chunk_size", [(1, 1, 4, None), (2, None, 1, 2), (4, 4, None, 3)])
def test_opcheck_propagate(groups, lam, u, chunk_size):
    inputs = propagate_inputs(2, 4, 5, 18, groups=groups, lam=lam, u=u)
    opcheck(PROPAGATE, (*leaves(inputs), ALL, chunk_size))
    checkpoints = PROPAGATE(*inputs, ALL, chunk_size, True)[1]
    mask = [True, True, lam is not None, False]
    arguments = (randn(2, 4, 5, 18), *inputs, checkpoints, ALL, chunk_size, mask)
    opcheck(torch.ops.gspn.propagate_backward.default, arguments)


@pytest.mark.parametrize("lam", [None, 1])
@pytest.mark.parametrize("direction", ALL)
def test_opcheck_line_scan(direction, lam):
    x, w = randn(2, 4, 20, 18), randn(2, 2, 3, 20, 18)
    lam = None if lam is None else randn(2, lam, 20, 18)
    opcheck(LINE_SCAN, (*leaves([x, w, lam]), direction, None))
    checkpoints = LINE_SCAN(x, w, lam, direction, None, True)[1]
    arguments = (x, x, w, lam, checkpoints, direction, None, [True, True, lam is not None])
    opcheck(torch.ops.gspn.line_scan_backward.default, arguments)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("groups,lam,u", [(1, 1, 2), (2, None, 1), (4, 4, None), (1, 2, 4)])
def test_gradcheck_propagate(groups, lam, u, chunk_size):
    inputs = propagate_inputs(1, 4, 4, 3, groups=groups, lam=lam, u=u, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: propagate(*t, chunk_size=chunk_size), leaves(inputs))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("groups,lam", [(1, 2), (4, None)])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradcheck_line_scan(chunk_size, groups, lam, direction):
    inputs = [randn(1, 4, 4, 3, dtype=torch.float64), randn(1, groups, 3, 4, 3, dtype=torch.float64)]
    inputs.append(None if lam is None else randn(1, lam, 4, 3, dtype=torch.float64))
    scan = lambda *t: line_scan(*t, direction=direction, chunk_size=chunk_size)  # noqa: E731
    assert torch.autograd.gradcheck(scan, leaves(inputs))


def test_gradcheck_row_stochastic():
    logits = randn(1, 2, 1, 3, 3, 4, dtype=torch.float64).requires_grad_()
    directions = ["right_to_left", "top_to_bottom"]
    assert torch.autograd.gradcheck(lambda t: gspn_core.row_stochastic(t, directions=directions), [logits])


@pytest.mark.parametrize("op", ["propagate", "line_scan"])
def test_double_backward_is_a_clear_error(op):
    x, logits, _, _ = leaves(propagate_inputs(1, 2, 4, 4))
    y = propagate(x, logits) if op == "propagate" else line_scan(x, logits[:, 0], direction=DIRECTIONS[0])
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}_backward has no derivative.*gspn_core.reference"):
        torch.autograd.grad(dx.sum(), logits)


def test_checkpoints_have_no_gradient():
    x, logits, _, _ = leaves(propagate_inputs(1, 2, 40, 4))
    y, checkpoints = PROPAGATE(x, logits, None, None, ALL, None)
    assert y.requires_grad and not checkpoints.requires_grad and checkpoints.numel() > 0


@pytest.mark.parametrize("groups", [1, 3])
def test_gradients_without_channels_are_zero(groups):
    """Weights and gates may have elements where x has none; their memory is not what was there before."""
    inputs = leaves([randn(2, 0, 5, 4), *propagate_inputs(2, 3, 5, 4, groups=groups, lam=3, u=1)[1:]])
    y = propagate(*inputs)
    gradients = torch.autograd.grad(y, inputs, torch.empty_like(y))
    gradients += torch.autograd.grad(line_scan(inputs[0], inputs[1][:, 0], direction="top_to_bottom"), inputs[1], y)
    assert all((g == 0).all() for g in gradients)


# ---- torch.func, and forward mode

FUNCTIONS = {
    "propagate": (propagate, reference.propagate, {"chunk_size": 2}),
    "line_scan": (line_scan, reference.line_scan, {"direction": "right_to_left", "chunk_size": 3}),
}


@pytest.fixture(params=FUNCTIONS)
def operator(request):
    """Return an operator, its reference, and inputs: small, for the reference is slow in torch.func."""
    ours, plain, options = FUNCTIONS[request.param]
    inputs = propagate_inputs(1, 2, 4, 3, groups=2, lam=1, u=2, dtype=torch.float64)
    inputs = inputs if request.param == "propagate" else [inputs[0], inputs[1][:, 0], inputs[2][:, 0]]
    return (lambda *t: ours(*t, **options)), (lambda *t: plain(*t, **options)), inputs


def every(f):
    return torch.func.grad(lambda *t: f(*t).square().sum(), argnums=(0, 1, 2))


TRANSFORMS = {
    "grad": lambda f, *t: every(f)(*t),
    "vjp": lambda f, *t: torch.func.vjp(f, *t)[1](t[0]),
    "jvp": lambda f, *t: torch.func.jvp(f, t, tuple(v.cos() for v in t)),
    "jvp of some": lambda f, *t: torch.func.jvp(lambda w: f(t[0], w, *t[2:]), (t[1],), (t[1].cos(),)),
    "jacrev": lambda f, *t: torch.func.jacrev(f, argnums=(0, 1, 2))(*t),
    "jacfwd": lambda f, *t: torch.func.jacfwd(f, argnums=(0, 1, 2))(*t),
    "per sample": lambda f, *t: torch.func.vmap(every(f))(*(torch.stack([v, v + 1]) for v in t)),
    "of vmap": lambda f, *t: every(torch.func.vmap(f))(*(torch.stack([v, v + 1]) for v in t)),
    "grad of jvp": lambda f, *t: every(lambda *v: torch.func.jvp(f, v, t)[1])(*t),
    "jvp of jvp": lambda f, *t: torch.func.jvp(lambda *v: torch.func.jvp(f, v, v)[1], t, t)[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(operator, transform):
    ours, plain, inputs = operator
    results = [torch.utils._pytree.tree_leaves(TRANSFORMS[transform](f, *inputs)) for f in (ours, plain)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
        assert b.count_nonzero() > 0


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jvp of some", "per sample"])
def test_compiled_torch_func(operator, transform):
    ours, _, inputs = operator

    def plain(*t):
        return torch.utils._pytree.tree_leaves(TRANSFORMS[transform](ours, *t))

    for a, b in zip(torch.compile(plain, backend="aot_eager")(*inputs), plain(*inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("transform", [torch.func.hessian, lambda f: torch.func.jacrev(torch.func.grad(f))])
def test_torch_func_of_a_second_derivative_is_a_clear_error(operator, transform):
    ours, _, inputs = operator
    with pytest.raises(RuntimeError, match=r"_backward has no derivative.*gspn_core\.reference"):
        transform(lambda x: ours(x, *inputs[1:]).square().sum())(inputs[0])


@pytest.mark.parametrize("grad", [True, False])
def test_dual_numbers(operator, grad):
    ours, plain, inputs = operator
    tangents = tuple(t.cos() for t in inputs)
    forward_ad = torch.autograd.forward_ad
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        y = forward_ad.unpack_dual(ours(*map(forward_ad.make_dual, leaves(inputs), tangents)))
    expected = torch.func.jvp(plain, tuple(inputs), tangents)
    torch.testing.assert_close((y.primal, y.tangent), expected)
    assert y.primal.requires_grad == grad


def test_gradcheck_of_every_mode(operator):
    ours, _, inputs = operator
    modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(ours, leaves(inputs), **modes)


def test_forward_mode_in_saturation_and_on_first_lines():
    """Logits below saturation have no effect, and nor have NaN ones on a first line or of a missing neighbour."""
    x, logits, _, _ = propagate_inputs(1, 2, 6, 5, d=1, groups=2, dtype=torch.float64)
    logits[..., 1, 2] = -100
    clean = logits.clone()
    logits[..., [0, 3], :] = logits[..., 0, :, 0] = logits[..., 2, :, -1] = torch.nan

    def scan(logits):
        return propagate(x, logits, directions=["top_to_bottom"], chunk_size=3)

    ones = torch.ones_like(logits)
    tangent = torch.func.jvp(scan, (logits,), (ones,))[1]
    torch.testing.assert_close(tangent, torch.func.jvp(scan, (clean,), (ones,))[1])
    assert tangent.count_nonzero() > 0


# ---- autocast, vmap


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    x, logits, lam, u = leaves(propagate_inputs(1, 2, 6, 5, groups=1, lam=1, u=2))
    with torch.autocast("cpu", dtype):
        y = propagate(x, logits.to(dtype), lam, u)
        h = line_scan(x, logits[:, 0], direction="top_to_bottom")
    assert y.dtype == h.dtype == dtype
    expected = propagate(*(t.to(dtype) for t in (x, logits, lam, u)))
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, logits, lam, u))


def test_autocast_leaves_float64_alone():
    x, logits, _, _ = propagate_inputs(1, 2, 6, 5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert propagate(x, logits).dtype == torch.float64


def test_autocast_beside_float64():
    """float64 is not lowered, so what stands beside it is raised."""
    x, logits, lam, _ = propagate_inputs(1, 2, 6, 5, lam=1)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = propagate(x.double(), logits, lam.half()), line_scan(x, logits[:, 0].double(), direction="top_to_bottom")
    assert torch.equal(y, propagate(x.double(), logits.double(), lam.half().double()))
    assert h.dtype == torch.float64


@pytest.mark.parametrize("in_dims", [(0, 0, 0, 0), (1, None, 2, 0), (None, 0, None, None)])
def test_vmap_propagate(in_dims):
    shapes = propagate_inputs(2, 4, 5, 6, groups=2, lam=1, u=4)
    batched = [
        t if dim is None else torch.stack([t + i for i in range(3)], dim)
        for t, dim in zip(shapes, in_dims, strict=True)
    ]
    one = [[t if dim is None else t.select(dim, i) for t, dim in zip(batched, in_dims, strict=True)] for i in range(3)]
    expected = torch.stack([propagate(*t) for t in one])
    assert torch.equal(torch.vmap(propagate, in_dims=in_dims)(*batched), expected)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("images", [0, 2])
def test_vmap_over_nothing(batch, images):
    """Of a batch of 0, and of calls with 0 images: shapes, and gradients of what is there."""
    inputs = propagate_inputs(images, 2, 4, 3, lam=1)[:3]
    stacked = leaves([t.expand(batch, *t.shape) for t in inputs])
    y = torch.vmap(propagate)(*stacked)
    assert y.shape == (batch, images, 2, 4, 3)
    gradients = torch.autograd.grad(y.sum(), stacked)
    assert [g.shape for g in gradients] == [t.shape for t in stacked]


def test_vmap_line_scan():
    x, w = randn(3, 2, 4, 5, 6), randn(2, 2, 3, 3, 5, 6)
    ours = torch.vmap(lambda x, w: line_scan(x, w, direction="right_to_left"), in_dims=(0, 2))(x, w)
    assert torch.equal(ours, torch.stack([line_scan(x[i], w[:, :, i], direction="right_to_left") for i in range(3)]))


def test_vmap_of_the_backward():
    """Batched gradients, as a Jacobian computes them."""
    x, logits, lam, _ = leaves(propagate_inputs(1, 2, 5, 4, lam=1))
    y = propagate(x, logits, lam)
    dy = randn(3, *y.shape)
    batched = torch.autograd.grad(y, (x, logits, lam), dy, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, (x, logits, lam), g, retain_graph=True) for g in dy]
    for i, ours in enumerate(batched):
        torch.testing.assert_close(ours, torch.stack([g[i] for g in single]))


# ---- compile, export, TorchScript, fx, meta


def compiled(f, **kwargs):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, **kwargs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def f(x, logits, lam, u):
        return propagate(x.sin(), logits, lam, u, chunk_size=3).exp() * 0.1

    ours = compiled(f, dynamic=dynamic)
    for size in ((5, 20), (33, 4)) if dynamic else ((5, 20),):
        inputs = propagate_inputs(2, 4, *size, groups=2, lam=1, u=4)
        for a, b in zip(value_and_gradients(ours, inputs), value_and_gradients(f, inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_compile_line_scan_and_module():
    module = SpatialPropagation(4, proxy_channels=2, gate_rank=3)

    def f(x, w):
        return line_scan(module(x), w, direction="bottom_to_top")

    inputs = [randn(1, 4, 18, 7), randn(1, 1, 3, 18, 7)]
    for a, b in zip(value_and_gradients(compiled(f), inputs), value_and_gradients(f, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_export_round_trip(tmp_path):
    module = SpatialPropagation(4, proxy_channels=2, gate_rank=3, chunk_size=4).eval()
    dim = torch.export.Dim
    shapes = {"x": {0: dim("n"), 2: dim("h", min=2), 3: dim("w", min=2)}}
    program = torch.export.export(module, (randn(2, 4, 6, 5),), dynamic_shapes=shapes)
    assert any(node.target is PROPAGATE for node in program.graph.nodes)
    torch.export.save(program, tmp_path / "module.pt2")
    x = randn(3, 4, 9, 17)
    assert torch.equal(torch.export.load(tmp_path / "module.pt2").module()(x), module(x))


@pytest.mark.parametrize("how", ["script", "trace", "fx"])
def test_script_trace_fx(how):
    module = SpatialPropagation(4, gate_rank=3, weight_groups=4, chunk_size=4)
    x = randn(2, 4, 6, 5)
    if how == "script":
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(module), buffer)
        buffer.seek(0)
        other = torch.jit.load(buffer)
    else:
        other = torch.jit.trace(module, x) if how == "trace" else torch.fx.symbolic_trace(module)
    for y in (x, randn(1, 4, 9, 17)):
        for ours, wanted in zip(value_and_gradients(other, [y]), value_and_gradients(module, [y]), strict=True):
            assert torch.equal(ours, wanted)


def test_fx_graph_holds_the_operator():
    graph = torch.fx.symbolic_trace(SpatialPropagation(4)).graph
    assert any(node.target is torch.ops.gspn.propagate for node in graph.nodes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_meta_device(dtype):
    inputs = [t.to("meta") for t in propagate_inputs(2, 4, 5, 6, groups=2, lam=1, u=4, dtype=dtype)]
    y, *gradients = value_and_gradients_on_meta(propagate, inputs)
    assert y.device.type == "meta" and y.shape == (2, 4, 5, 6) and y.dtype == dtype
    assert [g.shape for g in gradients] == [t.shape for t in inputs]


def value_and_gradients_on_meta(f, inputs):
    inputs = leaves(inputs)
    y = f(*inputs)
    return [y, *torch.autograd.grad(y, inputs, torch.empty_like(y))]


def test_output_is_contiguous_whatever_the_input():
    x = randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    assert propagate(x, randn(2, 4, 1, 3, 5, 6)).is_contiguous()


def test_gradient_checkpointing():
    module = SpatialPropagation(4, proxy_channels=2)

    def f(x):
        return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)

    x = randn(2, 4, 18, 7)
    for ours, wanted in zip(value_and_gradients(f, [x]), value_and_gradients(module, [x]), strict=True):
        assert torch.equal(ours, wanted)


# ---- devices without kernels, and importing


def test_device_without_kernels_runs_the_reference_with_one_warning(monkeypatch):
    inputs = propagate_inputs(1, 4, 6, 5, groups=2, lam=1, u=4)
    expected = value_and_gradients(propagate, inputs)
    _backend._warn_once.cache_clear()
    monkeypatch.setattr(_backend, "extension", lambda: ImportError("no such file"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = value_and_gradients(propagate, inputs)
        h = line_scan(inputs[0], inputs[1][:, 0], direction="top_to_bottom")
    messages = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(messages) == 1 and "install gspn-core again" in messages[0]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(h, reference.line_scan(inputs[0], inputs[1][:, 0], direction="top_to_bottom"))
    _backend._warn_once.cache_clear()


@pytest.mark.parametrize("how", ["plain", "gradients", "module", "autocast", "vmap"])
def test_the_warning_points_to_the_code_that_called(monkeypatch, how):
    x, logits, _, _ = propagate_inputs(1, 4, 6, 5)
    module = SpatialPropagation(4)
    calls = {
        "plain": lambda: propagate(x, logits),
        "gradients": lambda: propagate(x.requires_grad_(), logits),
        "module": lambda: module(x),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16)(propagate)(x, logits),
        "vmap": lambda: torch.vmap(propagate)(x[None], logits[None]),
    }
    _backend._warn_once.cache_clear()
    monkeypatch.setattr(_backend, "extension", lambda: ImportError("no such file"))
    with pytest.warns(RuntimeWarning, match="slow PyTorch reference") as caught:
        calls[how]()
    _backend._warn_once.cache_clear()
    assert [w.filename for w in caught if w.category is RuntimeWarning] == [__file__]


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_that_the_build_has_no_kernels_for(monkeypatch, supported):
    """The reference runs, with a warning that names what was built."""
    module = types.ModuleType("_C")
    module.cuda_forward = None
    module.cuda_supports = lambda device: supported
    module.build_info = lambda: {"cuda": {"architectures": "80 90"}}
    monkeypatch.setattr(_backend, "extension", lambda: module)
    x = types.SimpleNamespace(is_cpu=False, is_cuda=True, get_device=lambda: 0, device=torch.device("cuda", 0))
    _backend._warn_once.cache_clear()
    _backend._supports_gpu.cache_clear()
    if supported:
        assert _backend.has_kernels(x)
    else:
        with pytest.warns(RuntimeWarning, match="kernels for the compute capabilities 80, 90 and none for this GPU"):
            assert not _backend.has_kernels(x)
    _backend._warn_once.cache_clear()
    _backend._supports_gpu.cache_clear()


USE = "import torch, gspn_core; gspn_core.propagate(torch.ones(1, 1, 1, 1), torch.ones(1, 4, 1, 3, 1, 1))"


@pytest.mark.parametrize("call", [USE, "-m"], ids=["use", "info"])
def test_an_unknown_instruction_set_is_named_with_the_choices(call):
    command = [sys.executable, "-c", call] if call != "-m" else [sys.executable, "-m", "gspn_core", "info"]
    environment = os.environ | {"GSPN_CPU_ISA": "nonsense"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    choices = ", ".join(_backend.extension().build_info()["supported_isas"])
    message = f"GSPN_CPU_ISA must be one of auto, {choices} on this machine, got 'nonsense'"
    assert message in done.stderr.splitlines()[-1]
    if call == "-m":
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_calls_of_several_python_threads():
    """The extension releases the GIL, and declares that it needs none."""
    inputs = propagate_inputs(2, 4, 33, 20, groups=2, lam=1, u=4)
    expected = value_and_gradients(propagate, inputs)
    with ThreadPoolExecutor(8) as pool:
        for ours in pool.map(lambda _: value_and_gradients(propagate, inputs), range(32)):
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_import_changes_nothing_and_prints_nothing(tmp_path):
    """The environment variable GSPN_CPU_ISA, which is read on the way, chooses the instruction set."""
    code = (
        "import torch; before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), "
        "torch.initial_seed(), torch.are_deterministic_algorithms_enabled()); import gspn_core; "
        "assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), "
        "torch.initial_seed(), torch.are_deterministic_algorithms_enabled()); "
        "assert gspn_core.info()['cpu']['isa'] == 'baseline'"
    )
    command, environment = [sys.executable, "-c", code], {"GSPN_CPU_ISA": "baseline"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, env=environment)
    assert done.returncode == 0 and done.stdout == "" and done.stderr == "" and not list(tmp_path.iterdir())


def test_info():
    info = gspn_core.info()
    assert info["cpu"]["compiled"] and info["cpu"]["isa"] in info["cpu"]["supported_isas"]
    assert info["threads"] == torch.get_num_threads() and info["torch"] == torch.__version__
    assert info["cuda"] == {"compiled": False, "architectures": []}


def test_kernel_headers_know_neither_torch_nor_pybind11():
    from pathlib import Path

    csrc = Path(__file__).parents[1] / "csrc"
    headers = [*csrc.glob("**/*.hpp"), *(csrc / "cpu").glob("*.cpp")]
    assert headers
    for header in headers:
        includes = [line for line in header.read_text().splitlines() if line.startswith("#include")]
        assert not [line for line in includes if "torch" in line or "pybind11" in line or "ATen" in line], header


# ---- torch.utils.flop_counter


def test_flops_are_counted():
    """Two per multiply-add: three neighbours and each gate, for every element and direction."""
    x, logits, lam, u = propagate_inputs(2, 4, 5, 6, d=3, lam=1, u=4)
    elements = 2 * 4 * 5 * 6
    names = DIRECTIONS[:3]
    with FlopCounterMode(display=False) as counter:
        propagate(x, logits, lam, u, directions=names)
    assert counter.get_total_flops() == 2 * 3 * elements * 5
    with FlopCounterMode(display=False) as counter:
        propagate(x, logits, lam.requires_grad_(), directions=names).sum().backward()
    assert counter.get_total_flops() == 2 * 3 * elements * (4 + (3 + 3 + 2))
    with FlopCounterMode(display=False) as counter:
        line_scan(x.requires_grad_(), logits[:, 0].requires_grad_(), direction="top_to_bottom").sum().backward()
    assert counter.get_total_flops() == 2 * elements * (3 + (3 + 3 + 2))
