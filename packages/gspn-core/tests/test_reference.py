"""The reference against results computed by hand, a dense matrix, symmetries and finite differences."""

import pytest
import torch
from operator_cases import DTYPES, check_without_effect, propagate_inputs, randn, value_and_gradients

from gspn_core import _fallback, reference
from gspn_core.reference import DIRECTIONS, line_scan, propagate, row_stochastic

# The result for a 3x3 image of ones with weights a = 0.5 (position j-1), b = 0.25 (j), c = 0.125 (j+1), by hand from
# the equation: line 0 is 1 1 1; line 1 is .375+1, .875+1, .75+1; line 2 from line 1 the same way.
TOP_TO_BOTTOM = [
    [1.0, 1.0, 1.0],
    [1.375, 1.875, 1.75],
    [0.25 * 1.375 + 0.125 * 1.875 + 1, 0.5 * 1.375 + 0.25 * 1.875 + 0.125 * 1.75 + 1, 0.5 * 1.875 + 0.25 * 1.75 + 1],
]


def constant_weights(a: float, b: float, c: float, size: int = 3) -> torch.Tensor:
    return torch.tensor([a, b, c], dtype=torch.float64).view(1, 1, 3, 1, 1).expand(1, 1, 3, size, size)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_hand_computed(direction):
    x = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    expected = torch.tensor(TOP_TO_BOTTOM, dtype=torch.float64)
    if direction == "bottom_to_top":
        expected = expected.flip(0)
    if direction == "left_to_right":
        expected = expected.T
    if direction == "right_to_left":
        expected = expected.T.flip(1)
    h = line_scan(x, constant_weights(0.5, 0.25, 0.125), direction=direction)
    torch.testing.assert_close(h[0, 0], expected, rtol=0, atol=1e-15)


def test_hand_computed_chunks_and_gates():
    x = torch.arange(1.0, 10.0, dtype=torch.float64).view(1, 1, 3, 3)
    lam = torch.full((1, 1, 3, 3), 2.0, dtype=torch.float64)
    h = line_scan(x, constant_weights(0, 1, 0), lam, direction="top_to_bottom", chunk_size=2)
    torch.testing.assert_close(h[0, 0], torch.tensor([[2.0, 4, 6], [10, 14, 18], [14, 16, 18]], dtype=torch.float64))


def test_hand_computed_row_stochastic():
    # sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4: inside 2:2:3 of 7, at the start 2:3 of 5, at the end 2:2 of 4.
    logits = torch.zeros(1, 1, 1, 3, 1, 3, dtype=torch.float64)
    logits[:, :, :, 2] = torch.log(torch.tensor(3.0, dtype=torch.float64))
    w = row_stochastic(logits, directions=["top_to_bottom"])[0, 0, 0, :, 0]
    expected = torch.tensor([[0, 2 / 7, 1 / 2], [2 / 5, 2 / 7, 1 / 2], [3 / 5, 3 / 7, 0]], dtype=torch.float64)
    torch.testing.assert_close(w, expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_dense_matrix(direction, chunk_size):
    """H = G X with G a lower block-triangular matrix of products of tridiagonal matrices."""
    lines, positions = 5, 4
    shape = (lines, positions) if "top" in direction else (positions, lines)
    x, lam = randn(1, 1, *shape, dtype=torch.float64), randn(1, 1, *shape, dtype=torch.float64, seed=5)
    weights = randn(1, 1, 3, *shape, dtype=torch.float64, seed=6)
    a, b, c = reference.to_scan_order(weights[0, 0], direction)
    w = [torch.diag(b[i]) + torch.diag(a[i, 1:], -1) + torch.diag(c[i, :-1], 1) for i in range(lines)]
    lam_d = reference.to_scan_order(lam[0, 0], direction)
    blocks = [[torch.zeros(positions, positions, dtype=torch.float64) for _ in range(lines)] for _ in range(lines)]
    for j in range(lines):
        block = torch.diag(lam_d[j])
        for i in range(j, lines):
            if i > j and chunk_size and i % chunk_size == 0:
                break
            block = w[i] @ block if i > j else block
            blocks[i][j] = block
    dense = torch.cat([torch.cat(row, 1) for row in blocks])
    expected = (dense @ reference.to_scan_order(x[0, 0], direction).flatten()).view(lines, positions)
    h = line_scan(x, weights, lam, direction=direction, chunk_size=chunk_size)
    torch.testing.assert_close(reference.to_scan_order(h[0, 0], direction), expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_constant_field_stays_constant(direction):
    """With lam = 1 on the first line and 0 after it, row-stochastic weights hand a constant on unchanged."""
    lam = reference.to_scan_order(torch.zeros(1, 1, 1, 7, 9, dtype=torch.float64), direction).contiguous()
    lam[..., 0, :] = 1
    lam = reference.from_scan_order(lam, direction)
    logits = randn(1, 1, 1, 3, 7, 9, dtype=torch.float64)
    y = propagate(torch.full((1, 1, 7, 9), 3.5, dtype=torch.float64), logits, lam, directions=[direction])
    torch.testing.assert_close(y, torch.full_like(y, 3.5))


def test_mirror_and_transpose_symmetries():
    x, w = randn(2, 3, 6, 5, dtype=torch.float64), randn(2, 3, 3, 6, 5, dtype=torch.float64)
    down = line_scan(x, w, direction="top_to_bottom")
    torch.testing.assert_close(line_scan(x.flip(-2), w.flip(-2), direction="bottom_to_top").flip(-2), down)
    torch.testing.assert_close(line_scan(x.mT, w.mT, direction="left_to_right").mT, down)
    mirrored = line_scan(x.flip(-2).mT, w.flip(-2).mT, direction="right_to_left").mT.flip(-2)
    torch.testing.assert_close(mirrored, down)


def test_row_stochastic_sums_to_one_and_masks_the_ends():
    w = row_stochastic(100 * randn(2, 4, 2, 3, 5, 6, dtype=torch.float64))
    torch.testing.assert_close(w.sum(3), torch.ones_like(w[:, :, :, 0]))
    assert (w >= 0).all()
    assert (w[:, 0, :, 0, 0] == 0).all() and (w[:, 0, :, 2, -1] == 0).all()  # horizontal: positions are rows
    assert (w[:, 2, :, 0, :, 0] == 0).all() and (w[:, 2, :, 2, :, -1] == 0).all()


def test_logits_without_effect():
    check_without_effect(propagate)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_weights_without_effect(direction):
    """NaN weights of neighbours that do not exist, and of first lines, change nothing; their gradient is 0."""
    x, w = randn(1, 2, 6, 5), randn(1, 1, 3, 6, 5)
    lines = reference.to_scan_order(w.clone(), direction)
    lines[..., 0, :, 0] = lines[..., 2, :, -1] = lines[..., ::3, :] = torch.nan
    poisoned = reference.from_scan_order(lines, direction)

    def scan(*t):
        return line_scan(*t, direction=direction, chunk_size=3)

    clean = value_and_gradients(scan, [x, w])
    for ours, wanted in zip(value_and_gradients(scan, [x, poisoned]), clean, strict=True):
        assert torch.equal(ours, wanted)
    assert (clean[2][poisoned.isnan()] == 0).all()


def test_the_fallback_takes_logits_without_effect_too():
    inputs = propagate_inputs(1, 4, 6, 5, d=1, groups=2)
    inputs[1][..., [0, 3], :] = torch.nan
    gradients = [torch.empty_like(t) for t in inputs[:2]]
    _fallback.backward([*gradients, None, None], randn(1, 4, 6, 5), *inputs, [2], 3)
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[1][..., [0, 3], :] == 0).all()


def test_saturation_and_nan():
    logits = torch.full((1, 1, 1, 3, 1, 3), -1e4)
    w = row_stochastic(logits, directions=["top_to_bottom"])
    torch.testing.assert_close(w[0, 0, 0, :, 0, 1], torch.full((3,), 1 / 3))
    logits[0, 0, 0, 1, 0, 1] = torch.nan
    w = row_stochastic(logits, directions=["top_to_bottom"])
    assert w[..., 1].isnan().all() and not w[..., 0].isnan().any()


@pytest.mark.parametrize("groups,lam,u", [(1, 1, 2), (2, None, 1), (4, 4, None)])
def test_gradcheck(groups, lam, u):
    inputs = propagate_inputs(1, 4, 3, 4, groups=groups, lam=lam, u=u, dtype=torch.float64)
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: propagate(*t, chunk_size=2), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_is_not_kept_in_half_precision(dtype):
    """A sum of 512 ones is exact; in bfloat16 it would stop at 256."""
    x, w = torch.ones(1, 1, 512, 1, dtype=dtype), torch.zeros(1, 1, 3, 512, 1, dtype=dtype)
    w[:, :, 1] = 1
    assert line_scan(x, w, direction="top_to_bottom")[0, 0, -1, 0] == 512


# ---- the fallback's written-out backward, which serves devices without kernels


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("groups,lam,u", [(1, 1, 2), (2, None, 6), (6, 3, None)])
def test_fallback_backward_of_propagate(groups, lam, u, chunk_size):
    inputs = propagate_inputs(2, 6, 5, 4, groups=groups, lam=lam, u=u, dtype=torch.float64)
    inputs[1][0, 0] *= 20  # some logits in saturation
    y, *expected = value_and_gradients(lambda *t: propagate(*t, chunk_size=chunk_size), inputs)
    dy = randn(*y.shape, seed=4).to(y.dtype)
    gradients = [None if t is None else torch.empty_like(t) for t in inputs]
    _fallback.backward(gradients, dy, *inputs, [0, 1, 2, 3], chunk_size)
    for ours, wanted in zip([g for g in gradients if g is not None], expected, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("direction", range(4))
def test_fallback_backward_of_line_scan(direction):
    x, w, lam = randn(2, 4, 5, 3), randn(2, 2, 3, 5, 3), randn(2, 1, 5, 3)
    name = DIRECTIONS[direction]
    h, *expected = value_and_gradients(lambda *t: line_scan(*t, direction=name, chunk_size=3), [x, w, lam])
    gradients = [torch.empty_like(t) for t in (x, w, lam)]
    _fallback.backward((*gradients, None), randn(*h.shape, seed=4).to(h.dtype), x, w, lam, None, [direction], 3)
    for ours, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, wanted)
