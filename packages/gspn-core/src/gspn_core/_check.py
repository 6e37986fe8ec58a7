"""Validation of the operator's arguments, once for every backend: shapes, dtypes, devices, options."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from ._directions import DIRECTIONS

LONGEST = 2**63 - 1  # no image has as many lines, so longer chunks are the same
_STRIDED = torch.strided  # once: every call compares with it
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensors(names: str, *arguments: object, optional: int = 0) -> None:
    """Raise TypeError unless all arguments are tensors, or None for the last `optional` ones.

    The dispatcher would refuse them too, but its message is about a schema.
    """
    required = len(arguments) - optional
    for i, argument in enumerate(arguments):
        if not isinstance(argument, Tensor) and (argument is not None or i < required):
            raise TypeError(f"{names.split()[i]} must be a tensor, got {type(argument).__name__}")


def direction_index(direction: str, argument: str = "direction") -> int:
    """Return the index of a direction, which the operators take."""
    if direction not in DIRECTIONS:
        raise ValueError(f"{argument} must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    return DIRECTIONS.index(direction)


def direction_indices(directions: Sequence[str]) -> list[int]:
    """Return the indices of the directions."""
    if directions is DIRECTIONS:
        return [0, 1, 2, 3]
    if isinstance(directions, str) or not isinstance(directions, Sequence):
        raise TypeError(f"directions must be a sequence of direction names, got {directions!r}")
    return [direction_index(direction, "directions") for direction in directions]


def chunk_size_argument(chunk_size: int | None) -> int | None:
    """Return a chunk size that the operators take, or raise TypeError or ValueError."""
    if chunk_size is None or isinstance(chunk_size, torch.SymInt):
        return chunk_size
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, Integral):
        raise TypeError(f"chunk_size must be None or an integer of at least 1, got {chunk_size!r}")
    _check_chunk_size(chunk_size)
    return min(int(chunk_size), LONGEST)


def distinct_directions(directions: Sequence[str]) -> list[int]:
    """Return the indices of one to four different directions, or raise ValueError."""
    indices = direction_indices(directions)
    _check_distinct(indices)
    return indices


def _check_distinct(directions: Sequence[int]) -> None:
    if directions == [0, 1, 2, 3]:
        return  # the common case, fast because every call checks it
    count = len(directions)
    if not 1 <= count <= 4 or len(set(directions)) != count or not all(0 <= d < 4 for d in directions):
        names = [DIRECTIONS[d] if 0 <= d < 4 else d for d in directions]
        raise ValueError(f"directions must be one to four different ones of {DIRECTIONS}, got {names}")


def check_propagate(
    x: Tensor, logits: Tensor, lam: Tensor | None, u: Tensor | None, directions: Sequence[int], chunk_size: int | None
) -> None:
    """Raise ValueError or TypeError unless these are arguments of `propagate` (directions as indices)."""
    _check_distinct(directions)
    count = len(directions)
    _check_image(x)
    _check_chunk_size(chunk_size)
    n, c, h, w = x.shape
    groups = logits.shape[2] if logits.dim() == 6 else 1
    _check_like(x, logits, "logits", "(N, D, G, 3, H, W)", (n, count, groups, 3, h, w))
    _check_groups("logits", "G", groups, c)
    for gate, name in ((lam, "lam"), (u, "u")):
        if gate is not None:
            channels = gate.shape[2] if gate.dim() == 5 else 1
            _check_like(x, gate, name, "(N, D, C', H, W)", (n, count, channels, h, w))
            _check_groups(name, "C'", channels, c)


def check_low_rank(
    x: Tensor, r: Tensor, weight: Tensor, bias: Tensor, directions: Sequence[int], chunk_size: int | None
) -> None:
    """Raise ValueError or TypeError unless these are arguments of `propagate_low_rank` (directions as indices)."""
    _check_distinct(directions)
    count = len(directions)
    _check_image(x)
    _check_chunk_size(chunk_size)
    n, c, h, w = x.shape
    rank = r.shape[1] if r.dim() == 4 else 1
    _check_like(x, r, "r", "(N, R, H, W)", (n, rank, h, w))
    _check_like(x, weight, "weight", "(D, 5, C, R)", (count, 5, c, rank))
    _check_like(x, bias, "bias", "(D, 5, C)", (count, 5, c))


def check_line_scan(x: Tensor, weights: Tensor, lam: Tensor | None, direction: int, chunk_size: int | None) -> None:
    """Raise ValueError or TypeError unless these are arguments of `line_scan` (the direction as an index)."""
    if not 0 <= direction < 4:
        raise ValueError(f"direction must be 0 to 3, the index of one of {DIRECTIONS}, got {direction}")
    _check_image(x)
    _check_chunk_size(chunk_size)
    n, c, h, w = x.shape
    groups = weights.shape[1] if weights.dim() == 5 else 1
    _check_like(x, weights, "weights", "(N, G, 3, H, W)", (n, groups, 3, h, w))
    _check_groups("weights", "G", groups, c)
    if lam is not None:
        channels = lam.shape[1] if lam.dim() == 4 else 1
        _check_like(x, lam, "lam", "(N, C', H, W)", (n, channels, h, w))
        _check_groups("lam", "C'", channels, c)


def check_logits(logits: Tensor, directions: Sequence[int]) -> None:
    """Raise ValueError or TypeError unless logits is (N, D, G, 3, H, W) with one entry per direction."""
    if logits.layout is not _STRIDED:
        raise _not_strided(logits, "logits")
    _check_floating(logits, "logits")
    shape = tuple(logits.shape)
    if len(shape) != 6 or shape[1] != len(directions) or shape[3] != 3:
        expected = f"(N, D, G, 3, H, W) with D = {len(directions)} directions"
        raise ValueError(f"logits must have shape {expected}, got {shape}")


@torch.fx.wrap
def check_module_input(x: Tensor, channels: int) -> None:
    """Raise ValueError or TypeError unless x is an input of a module of so many channels; TorchScript compiles this."""
    if not torch.jit.is_tracing():
        if not x.is_floating_point():
            raise TypeError(f"the input must have a floating dtype, got {x.dtype}")
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"the input must have shape (N, {channels}, H, W), got {x.shape}")


def check_gradient(dy: Tensor, x: Tensor, name: str) -> None:
    """Raise ValueError or TypeError unless the output's gradient matches x."""
    if dy.layout is not _STRIDED:
        raise _not_strided(dy, name)
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device:
        raise ValueError(
            f"{name} must have the shape, dtype and device of x, {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"got {tuple(dy.shape)} {dy.dtype} on {dy.device}"
        )


def check_checkpoints(checkpoints: Tensor, x: Tensor, size: int) -> None:
    """Raise ValueError unless these are the checkpoints a forward of x returns with save_checkpoints=True."""
    if checkpoints.layout is not _STRIDED:
        raise _not_strided(checkpoints, "checkpoints")
    expected, dtype = (x.shape[0], x.shape[1], size), torch.promote_types(x.dtype, torch.float32)
    fits = checkpoints.shape == expected and checkpoints.dtype == dtype and checkpoints.device == x.device
    if not fits or not checkpoints.is_contiguous():
        raise ValueError(
            f"checkpoints must be contiguous of shape {expected}, {dtype} on {x.device}, as the forward returns them "
            f"with save_checkpoints=True, got {tuple(checkpoints.shape)}, {checkpoints.dtype} on {checkpoints.device}"
        )


def check_mask(mask: Sequence[bool], count: int) -> None:
    """Raise ValueError unless the mask of wanted gradients has an entry for each tensor."""
    if len(mask) != count:
        raise ValueError(f"mask must have {count} entries, one for each tensor, got {len(mask)}")


def _not_strided(t: Tensor, name: str) -> TypeError:
    return TypeError(f"{name} must be a strided tensor, got one of layout {t.layout}")


def _check_floating(t: Tensor, name: str) -> None:
    if t.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {t.dtype}")


def _check_image(x: Tensor) -> None:
    if x.layout is not _STRIDED:
        raise _not_strided(x, "x")
    _check_floating(x, "x")
    if x.dim() != 4:
        raise ValueError(f"x must have shape (N, C, H, W), got {tuple(x.shape)}")


def _check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be None or at least 1, got {chunk_size}")


def _check_like(x: Tensor, t: Tensor, name: str, legend: str, shape: tuple[int, ...]) -> None:
    if t.layout is not _STRIDED:
        raise _not_strided(t, name)
    if t.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")
    if t.shape != shape:
        letters = legend.strip("()").split(", ")
        wanted = ", ".join(
            "any" if s in ("G", "C'") or (s == "R" and name == "r") else str(n)
            for s, n in zip(letters, shape, strict=True)
        )
        raise ValueError(f"{name} must have shape {legend} = ({wanted}), got {tuple(t.shape)}")


def _check_groups(name: str, letter: str, groups: int, channels: int) -> None:
    if groups < 1 or channels % groups != 0:
        raise ValueError(f"{name} must have {letter} dividing the {channels} channels of x, got {letter} = {groups}")
