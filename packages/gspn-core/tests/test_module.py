"""SpatialPropagation: its three forms, its numbers against a hand-written forward, and its initialisation."""

import pytest
import torch
import torch.nn.functional as F
from operator_cases import DTYPES, randn
from torch.utils.checkpoint import checkpoint

from gspn_core import DIRECTIONS, SpatialPropagation, propagate, reference

FORMS = {
    "gspn1": {"gate_rank": 2, "weight_groups": 4},
    "gspn2": {"proxy_channels": 2},
    "gspn2_groups": {"proxy_channels": 4, "weight_groups": 2, "bias": False},
    "local": {"proxy_channels": 2, "gate_rank": 3, "chunk_size": 2},
    "two_directions": {"directions": DIRECTIONS[:2]},
}


@pytest.fixture(params=FORMS, ids=str)
def module(request):
    torch.manual_seed(0)
    return SpatialPropagation(4, **FORMS[request.param])


def test_forward_is_what_the_docstring_says(module):
    x = randn(2, 4, 7, 5)
    with torch.no_grad():
        z = module.bottleneck(x)
        d, g, p = len(module.directions), module.weight_groups, module.propagated_channels
        logits, lam, u = module.gates(z).split([3 * d * g, d * p, d * p], dim=1)
        v = module.value(x)
        y = reference.propagate(
            v,
            logits.reshape(2, d, g, 3, 7, 5),
            lam.reshape(2, d, p, 7, 5),
            u.reshape(2, d, p, 7, 5) * module.merge.view(1, d, 1, 1, 1),
            directions=[DIRECTIONS[i] for i in module.directions],
            chunk_size=module.chunk_size,
        )
        torch.testing.assert_close(module(x), module.lift(y))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (33, 7), (1, 40)], ids=str)
def test_any_size_and_every_parameter_has_a_gradient(module, size):
    y = module(randn(2, 4, *size))
    assert y.shape == (2, 4, *size)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    if min(size) > 2:
        assert all(p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(8, 5, 5), ValueError, r"the input must have shape \(N, 8, H, W\), got .*8, 5, 5"),
        (torch.zeros(1, 7, 5, 5), ValueError, r"shape \(N, 8, H, W\), got .*1, 7, 5, 5"),
        (torch.zeros(1, 8, 5, 5, dtype=torch.int64), TypeError, "a floating dtype, got torch.int64"),
    ],
)
def test_a_wrong_input_is_named(x, error, message):
    with pytest.raises(error, match=message):
        SpatialPropagation(8, proxy_channels=2)(x)


@pytest.mark.parametrize(("value", "error"), [(2.5, TypeError), (True, TypeError), ("2", TypeError), (0, ValueError)])
def test_a_wrong_chunk_size_is_what_it_is_for_propagate(value, error):
    x, logits = torch.zeros(1, 8, 5, 5), torch.zeros(1, 4, 1, 3, 5, 5)
    for call in (lambda: SpatialPropagation(8, chunk_size=value), lambda: propagate(x, logits, chunk_size=value)):
        with pytest.raises(error, match=f"chunk_size must be None or .*at least 1, got {value!r}"):
            call()


def test_empty_batch(module):
    assert module(torch.empty(0, 4, 6, 5)).shape == (0, 4, 6, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_and_device_reach_every_parameter(dtype):
    module = SpatialPropagation(4, proxy_channels=2, gate_rank=3, dtype=dtype)
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module(randn(1, 4, 6, 5, dtype=dtype)).dtype == dtype
    on_meta = SpatialPropagation(4, proxy_channels=2, gate_rank=3, device="meta")
    assert {p.device.type for p in on_meta.parameters()} == {"meta"}
    on_meta.to_empty(device="cpu").reset_parameters()
    assert on_meta(randn(1, 4, 6, 5)).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_round_trip(form):
    one, other = (SpatialPropagation(4, **FORMS[form]) for _ in range(2))
    other.load_state_dict(one.state_dict())
    x = randn(1, 4, 6, 5)
    assert torch.equal(other(x), one(x))


def test_chunks_do_not_mix():
    """A change in one chunk of rows reaches no other chunk by the vertical scans."""
    module = SpatialPropagation(4, chunk_size=3, directions=DIRECTIONS[2:])
    x = randn(1, 4, 9, 5)
    changed = x.clone()
    changed[:, :, 4] += 1
    moved = (module(x) != module(changed)).any(1).any(-1)[0]
    assert moved.tolist() == [False] * 3 + [True] * 3 + [False] * 3


def test_context_reaches_the_whole_image():
    module = SpatialPropagation(4, proxy_channels=2).double()
    x = randn(1, 4, 8, 8, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[0, :, 4, 4].sum(), x)
    assert (gradient[0].abs().sum(0) > 0).all()


def test_extra_repr():
    assert SpatialPropagation(8).extra_repr() == "8"
    module = SpatialPropagation(8, proxy_channels=4, gate_rank=3, weight_groups=2, chunk_size=5)
    assert module.extra_repr() == "8, proxy_channels=4, gate_rank=3, weight_groups=2, chunk_size=5"
    assert "directions=('top_to_bottom',)" in repr(SpatialPropagation(8, directions=["top_to_bottom"]))


# ---- initialisation

DEPTH = 50


def smooth_noise(channels: int, size: int) -> torch.Tensor:
    """Noise with the 1/f amplitude spectrum of natural images, of unit variance."""
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
    spectrum = torch.fft.rfft2(randn(1, channels, size, size)) / (fy**2 + fx**2).sqrt().clamp(min=1 / size)
    image = torch.fft.irfft2(spectrum, s=(size, size))
    return image / image.std()


def rms(t: torch.Tensor) -> float:
    return t.square().mean().sqrt().item()


@pytest.mark.parametrize("form,size", [("gspn1", 256), ("gspn2", 512), ("local", 256)])
def test_signals_neither_explode_nor_vanish(form, size):
    """50 pre-norm residual mixers on an image of white noise plus 1/f noise plus a constant per channel.

    A scan accumulates the constant along all lines, and averages the white noise. Outputs and, backwards,
    gradients stay within a factor of ten of what went in, and no branch is lost.
    """
    torch.manual_seed(0)
    c = 4
    x = randn(1, c, size, size) + smooth_noise(c, size) + randn(1, c, 1, 1, seed=1)
    x.requires_grad_()
    branches = []

    def block(x, mixer):
        branch = mixer(F.group_norm(x, 1))
        branches.append(rms(branch.detach()))
        return x + branch

    y = x
    for _ in range(DEPTH):
        y = checkpoint(block, y, SpatialPropagation(c, **FORMS[form]), use_reentrant=False)
    dy = randn(*y.shape, seed=7)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert 0.1 < rms(y.detach()) / rms(x.detach()) < 10
    assert 0.1 < rms(dx) / rms(dy) < 10
    assert min(branches) > 1e-3 and max(branches) < 10
