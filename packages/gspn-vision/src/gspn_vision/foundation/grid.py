"""How height and width of the patch grid reach the mixers: with each call, from the patch embedding of that call.

timm hands a block its tokens and no grid. So the patch embedding of a converted model notes the grid of its own output,
for the time of that call and in that thread, and mixers look it up. A thread-local value serves, since torch.compile
traces one (it does not trace setting a context variable). Gradient checkpointing calls a block again later, maybe in
another thread: so converted blocks do their own checkpointing, which hands the grid over as an argument.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

from timm.models._manipulate import checkpoint
from torch import Tensor, nn

Grid = tuple[int, int]
_call = threading.local()  # grid: of the call that this thread is in


def current_grid() -> Grid:
    """Return height and width of the patch grid of this thread's call.

    Raises:
        RuntimeError: it is in no call of a converted model.
    """
    grid: Grid | None = getattr(_call, "grid", None)
    if grid is None:
        raise RuntimeError(
            "a mixer needs the grid of its tokens: call the model's forward, forward_features or forward_intermediates,"
            " and switch gradient checkpointing on by its set_grad_checkpointing"
        )
    return grid


@contextlib.contextmanager
def _within(grid: Grid | None) -> Iterator[None]:
    """Make a grid that of this thread's call, meanwhile."""
    before: Grid | None = getattr(_call, "grid", None)
    _call.grid = grid
    try:
        yield
    finally:
        _call.grid = before


def note_grid(patch_embed: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Note the grid of a patch embedding's output, (N, H, W, C) or (N, H W, C); a forward hook."""
    if getattr(patch_embed, "strict_img_size", False) and patch_embed.grid_size is not None:
        _call.grid = tuple(patch_embed.grid_size)  # numbers, where torch.fx has no shapes
    elif output.ndim == 4:
        _call.grid = (output.shape[1], output.shape[2])
    else:
        height, width = patch_embed.dynamic_feat_size(inputs[0].shape[-2:])
        _call.grid = (height, width)


class GridModel(nn.Module):
    """What a converted model does otherwise: a grid lasts for a call, and its blocks do the checkpointing."""

    blocks: Any

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """Do as the timm model does."""
        with _within(None):
            return super().forward_features(*args, **kwargs)  # type: ignore[misc]

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Do as the timm model does."""
        with _within(None):
            return super().forward_intermediates(*args, **kwargs)  # type: ignore[misc]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of blocks to save memory, or not."""
        super().set_grad_checkpointing(enable)  # type: ignore[misc]
        self.grad_checkpointing = False  # timm's own would call a block without its grid
        for block in self.blocks:
            block.recompute = enable

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _remake, (GridModel, type(self).__mro__[2]), self.__dict__


class GridBlock(nn.Module):
    """What a converted model's block does otherwise: it checkpoints itself, with the grid of the call."""

    recompute: bool = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do as the timm block does."""
        if not self.recompute:
            return super().forward(*args, **kwargs)
        return checkpoint(self._forward_on, current_grid(), *args, **kwargs)

    def _forward_on(self, grid: Grid, *args: Any, **kwargs: Any) -> Any:
        if getattr(_call, "grid", None) == grid:  # torch.compile forbids to set it here, and needs not to
            return super().forward(*args, **kwargs)
        with _within(grid):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _remake, (GridBlock, type(self).__mro__[2]), self.__dict__


@functools.cache
def grid_class(mixin: Any, base: Any) -> Any:
    """Return the class `base` with what `mixin` does otherwise."""
    return type(base.__name__, (mixin, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def _remake(mixin: Any, base: Any) -> Any:
    cls = grid_class(mixin, base)
    return cls.__new__(cls)
