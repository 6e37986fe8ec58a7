"""The mixer against its equation, and what it takes from an attention."""

import re

import pytest
import torch
from diffusers.models.attention_processor import Attention

from gspn_core import DIRECTIONS, reference
from gspn_t2i import SelfAttentionMixer


def mixer(kind="gspn2", seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"bottleneck": 4, "proxy": 3, "chunk_size": 4, **changes}
    made = SelfAttentionMixer(16, 24, kind=kind, **shape)
    with torch.no_grad():
        made.merge.normal_()
    return made


def tokens(n, length, seed=1):
    return torch.randn(n, length, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["gspn", "gspn2"])
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("grid", [(5, 7), (9, 2), (1, 6)])
def test_the_equation(kind, chunk_size, grid):
    """In float64, pixel by pixel indexed (row, column), with one scan per direction."""
    made = mixer(kind, chunk_size=chunk_size).double()
    height, width = grid
    x = tokens(2, height * width).double()
    ours = made(x, grid)
    q, k, v = (x @ getattr(made, name).weight.T for name in ("to_q", "to_k", "to_v"))
    reduced = x @ made.bottleneck.weight.T + made.bottleneck.bias
    gates = (reduced @ made.gates.weight.T + made.gates.bias).view(2, height, width, 4, made.groups, 3)
    logits = gates.permute(0, 3, 4, 5, 1, 2)
    scanned = k * v if kind == "gspn" else (k * v) @ made.down.weight.T
    scanned = scanned.view(2, height, width, -1).permute(0, 3, 1, 2)
    weights = reference.row_stochastic(logits)
    h = sum(
        made.merge[d].view(-1, 1, 1)
        * reference.line_scan(scanned, weights[:, d], direction=name, chunk_size=chunk_size)
        for d, name in enumerate(DIRECTIONS)
    )
    h = h.permute(0, 2, 3, 1).flatten(1, 2)
    h = h if kind == "gspn" else h @ made.lift.weight.T
    expected = (q * h) @ made.to_out[0].weight.T + made.to_out[0].bias
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("kind", ["gspn", "gspn2"])
def test_every_parameter_learns(kind):
    made = mixer(kind)
    made(tokens(2, 24), (4, 6)).square().sum().backward()
    assert [name for name, p in made.named_parameters() if p.grad is None or p.grad.abs().sum() == 0] == []


@pytest.mark.parametrize("bias", [False, True])
def test_projections_of_an_attention(bias):
    torch.manual_seed(0)
    attention = Attention(16, heads=3, dim_head=8, bias=bias)
    made = mixer(bias=bias)
    made.copy_projections(attention)
    for name, ours in (("to_q", made.to_q), ("to_k", made.to_k), ("to_v", made.to_v), ("to_out.0", made.to_out[0])):
        theirs = attention.get_submodule(name)
        assert torch.equal(ours.weight, theirs.weight)
        assert (ours.bias is None) == (theirs.bias is None)
        assert ours.bias is None or torch.equal(ours.bias, theirs.bias)
    keys = {name for name, _ in attention.named_parameters()}
    assert keys <= {name for name, _ in made.named_parameters()}


def test_quantized_projections_are_refused():
    attention = Attention(16, heads=3, dim_head=8)
    attention.to_k.weight = torch.nn.Parameter(torch.zeros(24, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"projections must be floating-point to be copied, got torch\.int8"):
        mixer().copy_projections(attention)


def test_the_proxy_is_a_low_rank_form_of_the_scan():
    """With as many proxy channels as there are, down and lift cancel."""
    made = mixer(proxy=24)
    torch.testing.assert_close(made.lift.weight @ made.down.weight, torch.eye(24), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gspn", "gspn2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    made = mixer(kind)
    expected = made(tokens(1, 36), (6, 6))
    out = made.to(dtype)(tokens(1, 36).to(dtype), (6, 6))
    assert out.dtype == dtype
    assert (out.float() - expected).norm() < 0.05 * expected.norm()


def test_wrong_calls():
    made = mixer()
    for grid in (None, (5, 5)):
        with pytest.raises(ValueError, match=rf"the grid must have 24 places, got {re.escape(str(grid))}"):
            made(tokens(2, 24), grid)
    with pytest.raises(ValueError, match="mixer must be one of gspn, gspn2, got 'mamba'"):
        mixer("mamba")


def test_gates_of_low_rank_are_those_of_the_planes():
    """What a layer with a hook, as of offloading, computes in two steps."""
    made = mixer("gspn")
    x = tokens(2, 30)
    ours = made(x, (5, 6))
    made.gates.register_forward_pre_hook(lambda *_: None)
    torch.testing.assert_close(ours, made(x, (5, 6)))
