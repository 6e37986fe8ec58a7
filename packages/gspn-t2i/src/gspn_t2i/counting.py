"""What one forward pass computes and holds, without doing it: a model on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class FusedAttention(TorchFunctionMode):
    """Let softmax attention allocate its result alone, as FlashAttention does, whatever the device would do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3] if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


class PeakMemory(TorchDispatchMode):
    """Follow the bytes of tensors made by torch's operators while they live; `peak` is the most at one time.

    Storage that was there before counts nothing, views count once, and what an operator uses and frees inside does not
    show.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key in before or key in self._known:
                continue
            size = storage.nbytes()
            self._known.add(key)
            self.live += size
            weakref.finalize(storage, self._forget, key, size)
        self.peak = max(self.peak, self.live)
        return out


@dataclass(frozen=True)
class Counts:
    """One forward pass."""

    flops: int  # two per multiply-add
    weight_bytes: int
    activation_bytes: int  # the most held at one time, beside weights and inputs, with fused softmax attention


@torch.no_grad()
def count(model: torch.nn.Module, call: Callable[[], Any]) -> Counts:
    """Count a forward pass of a model, on any device; on meta nothing is computed.

    Args:
        model: whose weights are counted.
        call: runs it.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with FlopCounterMode(display=False) as flops:
        call()
    with FusedAttention(), PeakMemory() as memory:
        call()
    return Counts(int(flops.get_total_flops()), weights, memory.peak)
