"""How mixers stand in for the self-attentions of a UNet, without taking them out of it.

A mounted attention stays the object that it was, with its weights, processor and hooks, in its place in the UNet. Only
its class changes, and with it what it computes. So whatever happens to the UNet meanwhile happens to the attention too:
LoRA that is loaded, fused or unloaded, moves, casts, offloading. The mixers are the UNet's child `gspn_adapter`.

The grid travels with the call, within `cross_attention_kwargs`: gradient checkpointing recomputes a block with the
arguments that it had, in whatever thread, and calls at the same time do not see each other.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from accelerate.utils.modeling import has_offloaded_params
from diffusers.hooks import HookRegistry
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading as regroup
from diffusers.models import attention_processor as processors
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor, nn

from .mixers import SelfAttentionMixer, base_of

CHILD = "gspn_adapter"
_GRID = "gspn_grid"
# Ways to compute the same softmax attention. Any other processor computes something else, which mixers would drop.
_SOFTMAX = (
    processors.AttnProcessor,
    processors.AttnProcessor2_0,
    processors.FusedAttnProcessor2_0,
    processors.SlicedAttnProcessor,
    processors.XFormersAttnProcessor,
    processors.XLAFlashAttnProcessor2_0,
    processors.AttnProcessorNPU,
)


def self_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """Return a UNet's self-attentions by name, in order: modules called attn1 within transformer blocks."""
    return {name: module for name, module in unet.named_modules() if name.endswith(".attn1")}


def unmounted(unet: Any) -> Any:
    """Return a UNet, or the one within a `torch.compile`d one, whose modules have other names.

    Raises:
        TypeError: it is no module, such as a pipeline.
        ValueError: an adapter is mounted on it.
    """
    if not isinstance(unet, nn.Module):
        hint = "; pass pipeline.unet" if hasattr(unet, "unet") else ""
        raise TypeError(f"unet must be a UNet2DConditionModel, got a {type(unet).__name__}{hint}")
    unet = unet._orig_mod if is_compiled_module(unet) else unet
    if hasattr(unet, CHILD):
        raise ValueError(f"another adapter is mounted on the UNet, unmount it first: unet.{CHILD}.unmount()")
    return unet


def _check_processor(name: str, processor: Any) -> None:
    if type(processor) not in _SOFTMAX:
        raise ValueError(
            f"{name} must be a plain self-attention to be replaced by a mixer, its processor is a "
            f"{type(processor).__name__}; build the adapter with keep_attention=[{name!r}] or a part of that name"
        )


class MixedAttention(processors.Attention):
    """A self-attention whose mixer computes in its stead.

    `mixer` and `name` are plain attributes: the mixer is registered within the adapter.
    """

    mixer: SelfAttentionMixer
    name: str

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        gspn_grid: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Mix tokens (N, L, C) on the grid of this call.

        Raises:
            ValueError: another sequence or a mask is given, or the grid does not have L places.
        """
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("a mixer is a self-attention without a mask, got another sequence or a mask")
        mixed: Tensor = self.mixer(hidden_states, gspn_grid)
        return mixed

    def fuse_projections(self, fuse: bool = True) -> None:
        """Fuse the attention's projections, unless they were discarded."""
        if self._modules:
            super().fuse_projections(fuse)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "processor":
            _check_processor(self.name, value)
        super().__setattr__(name, value)


def shape_of(unet: nn.Module, name: str) -> dict[str, Any]:
    """Return the shape of the projections of a self-attention.

    Raises:
        ValueError: a mixer cannot replace it.
    """
    attention: Any = unet.get_submodule(name)
    keep = "; keep_attention can leave it as it is"
    path = name.split(".")
    owner = unet.get_submodule(".".join(path[:-3]))
    block = unet.get_submodule(".".join(path[:-1]))
    if (
        type(owner) is not Transformer2DModel
        or not owner.is_input_continuous
        or type(block) is not BasicTransformerBlock
    ):
        raise ValueError(
            f"{name} must be within a Transformer2DModel, which mixes the tokens of one image, is within "
            f"{type(owner).__name__}{keep}"
        )
    if type(attention) is not processors.Attention or "forward" in vars(attention):
        raise ValueError(f"{name} must be diffusers' own Attention, its class or its forward is another{keep}")
    for part in ("group_norm", "spatial_norm", "norm_q", "norm_k", "add_k_proj"):
        if getattr(attention, part, None) is not None:
            raise ValueError(f"{name} must be a plain self-attention, has {part}{keep}")
    if attention.is_cross_attention:
        raise ValueError(f"{name} must be a self-attention, is a cross-attention{keep}")
    _check_processor(name, attention.processor)
    layers = [base_of(getattr(attention, part)) for part in ("to_q", "to_k", "to_v")]
    shapes = [{"channels": q.in_features, "inner": q.out_features, "bias": q.bias is not None} for q in layers]
    if not shapes[0] == shapes[1] == shapes[2]:
        raise ValueError(f"{name} must project queries, keys and values alike{keep}")
    return shapes[0]


def _give_grid(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Hand height and width of a transformer's input (N, C, H, W) to its blocks, before it runs."""
    hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
    place = 5  # of cross_attention_kwargs among positional arguments
    given = args[place] if len(args) > place else kwargs.get("cross_attention_kwargs")
    extended = {**(given or {}), _GRID: tuple(hidden_states.shape[-2:])}
    if len(args) > place:
        return (*args[:place], extended, *args[place + 1 :]), kwargs
    return args, kwargs | {"cross_attention_kwargs": extended}


def _drop_grid(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Hide the grid from an attention without a mixer, which would warn of it."""
    return args, {name: value for name, value in kwargs.items() if name != _GRID}


def _refuse_part(attention: Any, prefix: str, _: bool) -> None:
    """Refuse the state of a part of a UNet, as a ControlNet is made of; LoRAs look into that of the whole."""
    if prefix != f"{attention.name}.":
        _refuse_state()


def _refuse_state() -> NoReturn:
    raise ValueError(
        "a UNet whose self-attentions were discarded cannot be saved or copied; load it again, or save the adapter"
    )


def _save_without_adapter(unet: Any, *args: Any, **kwargs: Any) -> None:
    """Save a mounted UNet as the UNet that it is without the adapter.

    Raises:
        ValueError: its self-attentions were discarded.
    """
    adapter = getattr(unet, CHILD)
    if adapter.__dict__["_mounted"]["discard"]:
        _refuse_state()
    del unet._modules[CHILD]
    try:
        type(unet).save_pretrained(unet, *args, **kwargs)
    finally:
        unet._modules[CHILD] = adapter


def attach(adapter: nn.Module, unet: Any, mixers: dict[str, SelfAttentionMixer], discard: bool) -> dict[str, Any]:
    """Put mixers, by the names of self-attentions, into a UNet; return what `detach` needs."""
    attentions: dict[str, Any] = {name: unet.get_submodule(name) for name in mixers}
    layer = base_of(next(iter(attentions.values())).to_q)
    # The adapter of a UNet that accelerate offloads layer by layer is offloaded likewise; diffusers offers `regroup`.
    offload = layer._hf_hook.execution_device if has_offloaded_params(layer) else None
    for name, attention in attentions.items():
        vars(attention).update(mixer=mixers[name], name=name)
        attention.__class__ = MixedAttention
        if discard:
            attention._modules.clear()
    handles = [a.register_state_dict_pre_hook(_refuse_part) for a in attentions.values() if discard]
    for name in sorted({name.rpartition(".transformer_blocks.")[0] for name in mixers}):
        transformer: Any = unet.get_submodule(name)
        handles.append(transformer.register_forward_pre_hook(_give_grid, with_kwargs=True))
        others = [attention for block in transformer.transformer_blocks for attention in (block.attn1, block.attn2)]
        for other in others:
            if other is not None and not isinstance(other, MixedAttention):
                handles.append(other.register_forward_pre_hook(_drop_grid, with_kwargs=True))
    setattr(unet, CHILD, adapter)
    if offload is not None:
        cpu_offload(adapter, offload)
    if hasattr(unet, "save_pretrained"):
        save = functools.partial(_save_without_adapter, unet)
        # Pipelines read its signature.
        unet.save_pretrained = functools.update_wrapper(save, type(unet).save_pretrained)
    regroup(unet)
    return {"unet": unet, "attentions": attentions, "handles": handles, "discard": discard}


def detach(adapter: nn.Module, mounted: dict[str, Any]) -> None:
    """Undo `attach`; offloading that the UNet has laid upon the adapter goes, too."""
    unet = mounted["unet"]
    for attention in mounted["attentions"].values():
        attention.__class__ = processors.Attention
        del attention.__dict__["mixer"], attention.__dict__["name"]
    for handle in mounted["handles"]:
        handle.remove()
    vars(unet).pop("save_pretrained", None)
    remove_hook_from_module(adapter, recurse=True)
    registry = HookRegistry.check_if_exists_or_initialize(adapter)
    for kind in ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"):
        registry.remove_hook(kind, recurse=True)
    delattr(unet, CHILD)
    regroup(unet)


def place(adapter: nn.Module, unet: nn.Module, name: str, dtype: torch.dtype | None) -> None:
    """Cast an adapter, and bring it where the self-attention of that name has its weights; meta is no such place."""
    device = base_of(unet.get_submodule(name).to_q).weight.device
    # diffusers' own `to` warns that nothing is left in float32.
    nn.Module.to(adapter, device=None if device.type == "meta" else device, dtype=dtype)


def dtype_of(unet: nn.Module) -> torch.dtype:
    """Return the dtype that a UNet computes in; diffusers' own property handles layerwise casting."""
    dtype: torch.dtype = getattr(unet, "dtype", None) or next(unet.parameters()).dtype
    return dtype
