"""ONNX: the translated operators under onnxruntime against PyTorch."""

import importlib
import subprocess
import sys
import warnings

import pytest
import torch
from operator_cases import propagate_inputs, randn

from gspn_core import DIRECTIONS, SpatialPropagation

onnx = pytest.importorskip("onnx", reason="ONNX export needs onnx")
pytest.importorskip("onnxscript", reason="ONNX export needs onnxscript")
onnxruntime = pytest.importorskip("onnxruntime", reason="runs what was exported")

from gspn_core.export import onnx_translations  # noqa: E402

PROPAGATE, LINE_SCAN = torch.ops.gspn.propagate, torch.ops.gspn.line_scan
LOW_RANK = torch.ops.gspn.propagate_low_rank
ALL = [0, 1, 2, 3]


class Call(torch.nn.Module):
    """A module that calls an operator on the tensors of forward and fixed options."""

    def __init__(self, op, *options):
        super().__init__()
        self.op, self.options = op, options

    def forward(self, x, weights, lam, u=None):
        gates = (lam,) if self.op is LINE_SCAN else (lam, u)
        return self.op(x, weights, *gates, *self.options)[0]


def export(module, inputs, path, **options):
    with warnings.catch_warnings():
        # The exporter's own, where several inputs share a name for a dynamic dimension.
        warnings.filterwarnings("ignore", "# The axis name: . will not be used", UserWarning)
        torch.onnx.export(
            module.eval(),
            tuple(inputs),
            path,
            dynamo=True,
            verbose=False,
            custom_translation_table=onnx_translations(),
            **options,
        )
    onnx.checker.check_model(path, full_check=True)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def assert_equal(session, module, inputs, tolerance=1e-5):
    arrays = [t.numpy() for t in inputs if t is not None]
    names = [i.name for i in session.get_inputs()]
    (ours,) = session.run(None, dict(zip(names, arrays, strict=True)))
    with torch.no_grad():
        expected = module(*inputs)
    ours = torch.from_numpy(ours)
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    "groups,lam,u,chunk_size",
    [
        (1, None, 2, None),
        (4, 1, 4, 2),
        (3, 2, 1, 3),
        (1, 4, 4, 100),
        (2, None, None, 1),
        (6, 6, 6, None),
    ],
)
def test_propagate(groups, lam, u, chunk_size, tmp_path):
    c = 6 if groups % 3 == 0 else 4
    inputs = propagate_inputs(2, c, 6, 9, groups=groups, lam=lam, u=u)
    module = Call(PROPAGATE, ALL, chunk_size)
    assert_equal(export(module, inputs, tmp_path / "m.onnx"), module, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_propagate_low_rank(dtype, tmp_path):
    shapes = (2, 3, 6, 9), (2, 2, 6, 9), (4, 5, 3, 2), (4, 5, 3)
    inputs = [randn(*shape, dtype=dtype, seed=i) / 2 for i, shape in enumerate(shapes)]
    module = Call(LOW_RANK, ALL, 4)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3}[dtype]
    assert_equal(export(module, inputs, tmp_path / "m.onnx"), module, inputs, tolerance)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("direction", ALL, ids=DIRECTIONS)
def test_each_direction_alone(direction, chunk_size, tmp_path):
    x, logits, lam, _ = propagate_inputs(1, 4, 7, 5, d=1, groups=2, lam=2)
    module, inputs = Call(LINE_SCAN, direction, chunk_size), (x, logits[:, 0].tanh(), lam[:, 0])
    assert_equal(export(module, inputs, tmp_path / "line_scan.onnx"), module, inputs)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)])
def test_sizes(size, tmp_path):
    inputs = propagate_inputs(1, 2, *size, lam=1, u=2)
    module = Call(PROPAGATE, [3, 0, 2], 2)
    short = [t if t.dim() == 4 else t[:, :3] for t in inputs]
    assert_equal(export(module, short, tmp_path / "m.onnx"), module, short)


def test_saturated_logits(tmp_path):
    """Ratios of sigmoids far below the resolution of 1 come out right; below -28 they are those of -28."""
    x, logits, _, _ = propagate_inputs(1, 2, 6, 5)
    logits = logits * 8 - 20
    logits[..., 3, :] = -60
    logits[..., 4, :] = 60
    module = Call(PROPAGATE, ALL, None)
    assert_equal(export(module, (x, logits, None), tmp_path / "m.onnx"), module, (x, logits, None))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 2**-11), (torch.float64, 1e-13)])
def test_dtypes(dtype, tolerance, tmp_path):
    """The state of a long scan in float16 is float32's: the result differs by its rounding alone."""
    inputs = propagate_inputs(1, 4, 96, 5, groups=2, lam=1, u=4, dtype=dtype)
    module = Call(PROPAGATE, ALL, None)
    assert_equal(export(module, inputs, tmp_path / "m.onnx"), module, inputs, tolerance)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_dynamic_sizes(chunk_size, tmp_path):
    module = Call(PROPAGATE, ALL, chunk_size)
    sizes = {name: torch.export.Dim(name) for name in "nhw"}
    shapes = tuple(
        {0: sizes["n"], dims - 2: sizes["h"], dims - 1: sizes["w"]}  # N first, H and W last
        for dims in (4, 6, 5, 5)
    )
    path = tmp_path / "m.onnx"
    options = {"groups": 2, "lam": 1, "u": 4}
    session = export(module, propagate_inputs(2, 4, 6, 5, **options), path, dynamic_shapes=shapes)
    assert session.get_outputs()[0].shape == ["n", 4, "h", "w"]
    for size in ((2, 6, 5), (3, 5, 6), (1, 1, 1), (1, 17, 2)):
        assert_equal(session, module, propagate_inputs(size[0], 4, *size[1:], **options))


def test_graph_does_not_grow_with_the_image(tmp_path):
    module = Call(PROPAGATE, ALL, None)
    counts = []
    for length in (4, 400):
        export(module, propagate_inputs(1, 1, length, 3), tmp_path / "m.onnx")
        model = onnx.load(tmp_path / "m.onnx")
        counts.append(len(model.graph.node))
        assert {node.domain for node in model.graph.node} == {""}
        assert sum(node.op_type == "Scan" for node in model.graph.node) == 4
    assert counts[0] == counts[1]


@pytest.mark.parametrize("options", [{"opset_version": 18}, {"opset_version": 23}, {"optimize": False}])
def test_module(options, tmp_path):
    module = SpatialPropagation(4, proxy_channels=2, gate_rank=3, chunk_size=4)
    x = (randn(2, 4, 6, 5),)
    session = export(module, x, tmp_path / "m.onnx", dynamic_shapes=({0: "n"},), **options)
    assert_equal(session, module, x)
    assert_equal(session, module, (randn(1, 4, 6, 5),))


def test_checkpoints_are_refused(tmp_path):
    class Training(torch.nn.Module):
        def forward(self, x, logits):
            return PROPAGATE(x, logits, None, None, ALL, None, True)[0]

    with pytest.raises(torch.onnx.OnnxExporterError) as error:
        export(Training(), propagate_inputs(1, 2, 4, 4)[:2], tmp_path / "m.onnx")
    cause = error.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert str(cause) == "save_checkpoints must be False: a model is exported for inference"


def test_missing_packages(monkeypatch):
    """gspn_core itself does without; the error says what to install."""
    message = "ONNX export needs onnx and onnxscript: pip install onnx onnxscript"
    code = "import sys; sys.modules['onnx'] = None; import gspn_core; print('imported'); import gspn_core.export"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"ImportError: {message}" in done.stderr
    assert done.stdout == "imported\n"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "gspn_core.export")
    with pytest.raises(ImportError, match=message):
        importlib.import_module("gspn_core.export")
