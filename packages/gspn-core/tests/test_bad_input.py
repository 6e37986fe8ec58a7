"""Every wrong argument is refused before any kernel runs; the message names it, what it must be and what it was."""

import pytest
import torch
from operator_cases import propagate_inputs, randn

from gspn_core import SpatialPropagation, _backend, line_scan, propagate, row_stochastic


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a kernel ran on bad input")

    monkeypatch.setattr(_backend.Kernels, "forward", refuse)
    monkeypatch.setattr(_backend.Kernels, "backward", refuse)


def call(**changed):
    x, logits, lam, u = propagate_inputs(2, 6, 5, 4, groups=2, lam=3, u=6)
    options = {"x": x, "logits": logits, "lam": lam, "u": u, **changed}
    return propagate(options.pop("x"), options.pop("logits"), options.pop("lam"), options.pop("u"), **options)


LOGITS = r"logits must have shape \(N, D, G, 3, H, W\) = \(2, 4, any, 3, 5, 4\), got "


@pytest.mark.parametrize(
    "changed,error,message",
    [
        ({"x": randn(6, 5, 4)}, ValueError, r"x must have shape \(N, C, H, W\), got \(6, 5, 4\)"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(2, 6, 5, 4, dtype=torch.int64)}, TypeError, "x must be float32.*got torch.int64"),
        ({"x": torch.ones(2, 6, 5, 4, dtype=torch.complex64)}, TypeError, "x must be float32.*got torch.complex64"),
        ({"u": 1.0}, TypeError, "u must be a tensor, got float"),
        ({"logits": randn(2, 4, 3, 5, 4)}, ValueError, LOGITS + r"\(2, 4, 3, 5, 4\)"),
        ({"logits": randn(3, 4, 2, 3, 5, 4)}, ValueError, LOGITS + r"\(3, 4, 2, 3, 5, 4\)"),
        ({"logits": randn(2, 4, 2, 3, 6, 4)}, ValueError, LOGITS + r"\(2, 4, 2, 3, 6, 4\)"),
        ({"logits": randn(2, 4, 2, 3, 5, 5)}, ValueError, LOGITS + r"\(2, 4, 2, 3, 5, 5\)"),
        ({"logits": randn(2, 4, 2, 2, 5, 4)}, ValueError, LOGITS + r"\(2, 4, 2, 2, 5, 4\)"),
        ({"logits": randn(2, 3, 2, 3, 5, 4)}, ValueError, LOGITS + r"\(2, 3, 2, 3, 5, 4\)"),
        ({"logits": randn(2, 4, 4, 3, 5, 4)}, ValueError, "logits must have G dividing the 6 channels of x, got G = 4"),
        ({"logits": randn(2, 4, 0, 3, 5, 4)}, ValueError, "logits must have G dividing the 6 channels of x, got G = 0"),
        (
            {"logits": randn(2, 4, 2, 3, 5, 4).double()},
            TypeError,
            "logits must have the dtype of x, torch.float32, got",
        ),
        ({"logits": torch.ones(2, 4, 2, 3, 5, 4).int()}, TypeError, "logits must have the dtype of x.*torch.int32"),
        ({"logits": torch.empty(2, 4, 2, 3, 5, 4, device="meta")}, ValueError, "logits must be on the device of x"),
        ({"lam": randn(2, 4, 4, 5, 4)}, ValueError, "lam must have C' dividing the 6 channels of x, got C' = 4"),
        ({"lam": randn(2, 4, 5, 4)}, ValueError, r"lam must have shape \(N, D, C', H, W\).*got \(2, 4, 5, 4\)"),
        ({"u": randn(2, 4, 5, 5, 4)}, ValueError, "u must have C' dividing the 6 channels of x, got C' = 5"),
        ({"u": randn(2, 4, 6, 5, 3)}, ValueError, r"u must have shape .* got \(2, 4, 6, 5, 3\)"),
        ({"u": randn(2, 4, 6, 5, 4).half()}, TypeError, "u must have the dtype of x, torch.float32, got torch.float16"),
        ({"directions": "left_to_right"}, TypeError, "directions must be a sequence.*'left_to_right'"),
        ({"directions": ["up"]}, ValueError, "directions must be one of left_to_right,.*got 'up'"),
        ({"directions": ["left_to_right"] * 4}, ValueError, "directions must be one to four different"),
        ({"directions": None}, TypeError, "directions must be a sequence of direction names, got None"),
        ({"directions": {"top_to_bottom"}}, TypeError, "directions must be a sequence of direction names, got {"),
        ({"directions": [3]}, ValueError, "directions must be one of.*got 3"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size must be None or an integer of at least 1, got 2.0"),
        ({"chunk_size": "2"}, TypeError, "chunk_size must be None or an integer of at least 1, got '2'"),
        ({"chunk_size": True}, TypeError, "chunk_size must be None or an integer of at least 1, got True"),
        ({"chunk_size": -(2**70)}, ValueError, "chunk_size must be None or at least 1, got -"),
        ({"x": torch.zeros(2, 6, 5, 4).to_sparse()}, TypeError, "x must be a strided tensor.*torch.sparse_coo"),
        ({"lam": randn(2, 4, 3, 5, 4).to_sparse()}, TypeError, "lam must be a strided tensor.*torch.sparse_coo"),
        ({"directions": []}, ValueError, "directions must be one to four different"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be None or at least 1, got 0"),
        ({"chunk_size": -2}, ValueError, "chunk_size must be None or at least 1, got -2"),
    ],
    ids=lambda v: None if isinstance(v, dict) else "",
)
def test_propagate(changed, error, message):
    with pytest.raises(error, match=message):
        call(**changed)


@pytest.mark.parametrize(
    "changed,error,message",
    [
        ({"x": randn(4, 5, 4)}, ValueError, r"x must have shape \(N, C, H, W\)"),
        (
            {"weights": randn(2, 2, 2, 5, 4)},
            ValueError,
            r"weights must have shape \(N, G, 3, H, W\) = \(2, any, 3, 5, 4\)",
        ),
        ({"weights": randn(2, 3, 3, 5, 4)}, ValueError, "weights must have G dividing the 4 channels of x, got G = 3"),
        ({"weights": randn(2, 2, 3, 5, 4).double()}, TypeError, "weights must have the dtype of x"),
        ({"lam": randn(2, 3, 5, 4)}, ValueError, "lam must have C' dividing the 4 channels of x, got C' = 3"),
        ({"lam": randn(2, 4, 4, 4)}, ValueError, r"lam must have shape \(N, C', H, W\)"),
        ({"direction": "diagonal"}, ValueError, "direction must be one of left_to_right,.*got 'diagonal'"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be None or at least 1, got 0"),
    ],
    ids=lambda v: None if isinstance(v, dict) else "",
)
def test_line_scan(changed, error, message):
    options = {"x": randn(2, 4, 5, 4), "weights": randn(2, 2, 3, 5, 4), "direction": "top_to_bottom", **changed}
    with pytest.raises(error, match=message):
        line_scan(options.pop("x"), options.pop("weights"), options.pop("lam", None), **options)


@pytest.mark.parametrize(
    "logits,directions,error,message",
    [
        (randn(1, 2, 1, 3, 4), ["top_to_bottom"] * 2, ValueError, r"logits must have shape .* got \(1, 2, 1, 3, 4\)"),
        (randn(1, 2, 1, 3, 4, 5), ["top_to_bottom"], ValueError, "with D = 1 directions"),
        (torch.ones(1, 1, 1, 3, 4, 5).long(), ["top_to_bottom"], TypeError, "logits must be float32"),
        (randn(1, 1, 1, 3, 4, 5), ["sideways"], ValueError, "directions must be one of"),
    ],
    ids=["rank", "directions", "dtype", "unknown"],
)
def test_row_stochastic(logits, directions, error, message):
    with pytest.raises(error, match=message):
        row_stochastic(logits, directions=directions)


def test_operators_called_by_number():
    x, logits, _, _ = propagate_inputs(2, 6, 5, 4, groups=2)
    with pytest.raises(ValueError, match="directions must be one to four different ones"):
        torch.ops.gspn.propagate(x, logits, None, None, [0, 1, 2, 7])
    with pytest.raises(ValueError, match="direction must be 0 to 3"):
        torch.ops.gspn.line_scan(x, logits[:, 0], None, 4)


X, LOGITS_OF_X, _, _ = propagate_inputs(1, 2, 40, 4, d=3)
CHECKPOINTS = torch.zeros(1, 2, 16)
MUST_BE = r"checkpoints must be contiguous of shape \(1, 2, 16\), torch.float32 on cpu.*got "


@pytest.mark.parametrize(
    "changed,error,message",
    [
        ({"checkpoints": CHECKPOINTS[..., 1:]}, ValueError, MUST_BE + r"\(1, 2, 15\)"),
        ({"checkpoints": CHECKPOINTS.mT.contiguous().mT}, ValueError, MUST_BE),
        ({"checkpoints": CHECKPOINTS.half()}, ValueError, MUST_BE + r".*torch.float16"),
        ({"checkpoints": CHECKPOINTS.double()}, ValueError, MUST_BE + r".*torch.float64"),
        ({"checkpoints": CHECKPOINTS.to(torch.int8)}, ValueError, MUST_BE + r".*torch.int8"),
        ({"checkpoints": CHECKPOINTS.to("meta")}, ValueError, MUST_BE + r".*on meta"),
        ({"checkpoints": CHECKPOINTS.to_sparse()}, TypeError, "checkpoints must be a strided tensor"),
        ({"checkpoints": None}, TypeError, "checkpoints must be a tensor, got NoneType"),
        ({"dy": None}, TypeError, "dy must be a tensor, got NoneType"),
        ({"dy": X.half()}, ValueError, r"dy must have the shape, dtype and device of x.*got .* torch.float16"),
        ({"x": None}, TypeError, "x must be a tensor, got None"),
        ({"logits": None}, TypeError, "logits must be a tensor, got None"),
        ({"mask": [True] * 3}, ValueError, "mask must have 4 entries, one for each tensor, got 3"),
        ({"mask": [True] * 5}, ValueError, "mask must have 4 entries, one for each tensor, got 5"),
    ],
    ids=str,
)
def test_backward_called_directly(changed, error, message):
    arguments = {
        **{"dy": X, "x": X, "logits": LOGITS_OF_X, "lam": None, "u": None, "checkpoints": CHECKPOINTS[..., :16]},
        **{"directions": [0, 2, 3], "chunk_size": None, "mask": [True, True, False, False]},
        **changed,
    }
    with pytest.raises(error, match=message):
        torch.ops.gspn.propagate_backward(*arguments.values())


def test_gradient_of_the_wrong_shape():
    x, logits, _, _ = propagate_inputs(2, 6, 5, 4, groups=2)
    with pytest.raises(ValueError, match=r"dy must have the shape, dtype and device of x, \(2, 6, 5, 4\)"):
        torch.ops.gspn.propagate_backward(
            randn(2, 6, 5, 3), x, logits, None, None, torch.empty(2, 6, 0), [0, 1, 2, 3], None, [True] + [False] * 3
        )


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"channels": 0}, "channels must be an integer of at least 1, got 0"),
        ({"channels": 8, "proxy_channels": -1}, "proxy_channels must be an integer of at least 1, got -1"),
        ({"channels": 8, "gate_rank": 0}, "gate_rank must be an integer of at least 1, got 0"),
        ({"channels": 8, "gate_rank": 2.5}, "gate_rank must be an integer of at least 1, got 2.5"),
        ({"channels": True}, "channels must be an integer of at least 1, got True"),
        ({"channels": 8, "weight_groups": 3}, "weight_groups must divide the 8 propagated channels, got 3"),
        ({"channels": 8, "proxy_channels": 2, "weight_groups": 4}, "must divide the 2 propagated channels, got 4"),
        ({"channels": 8, "directions": ["left"]}, "directions must be one of"),
        ({"channels": 8, "directions": ["left_to_right"] * 2}, "directions must be one to four different"),
    ],
    ids=str,
)
def test_module(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpatialPropagation(**arguments)
