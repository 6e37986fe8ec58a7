"""Operations and memory of a forward pass, counted on the meta device, where nothing is computed."""

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
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)  # of their shapes
    return flops


# torch's counter does not know softmax attention on a CPU.
_MORE_OPERATORS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class FusedAttention(TorchFunctionMode):
    """Let softmax attention allocate nothing but its result, as FlashAttention does, whatever the device would do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args[:3] if len(args) >= 3 else (kwargs["query"], kwargs["key"], kwargs["value"])
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


class PeakMemory(TorchDispatchMode):
    """Track the bytes of live tensors that torch's operators returned; `peak` is their maximum.

    Storage from before is not counted, views count once, and memory that an operator allocates and frees inside is not
    seen.
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
    with FlopCounterMode(display=False, custom_mapping=_MORE_OPERATORS) as flops:
        call()
    with FusedAttention(), PeakMemory() as memory:
        call()
    return Counts(int(flops.get_total_flops()), weights, memory.peak)
