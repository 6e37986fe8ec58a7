"""An adapter that replaces a UNet's self-attentions by GSPN mixers, and restores them.

    adapter = GSPNAdapter.for_unet(pipeline.unet, mixer="gspn2")
    adapter.mount(pipeline.unet)
    ...
    adapter.unmount()                        the attention is back, bit for bit
    adapter.save_pretrained("adapter")       the mixers alone

The adapter is a diffusers model of its own: a pipeline whose UNet is saved with mixers in it could not be loaded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .mixers import KINDS, SelfAttentionMixer

INITS = ("qkv", "random")


def self_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """Return a UNet's self-attentions by name, in order: modules called attn1 within transformer blocks."""
    return {name: module for name, module in unet.named_modules() if name.endswith(".attn1")}


def _transformers(unet: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return the transformers around attentions, `X.transformer_blocks.0.attn1` being within X."""
    outer = {name.rpartition(".transformer_blocks.")[0] for name in names}
    return {name: unet.get_submodule(name) for name in sorted(outer)}


def _set_grid(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set the grid of a transformer's mixers to height and width of its input (N, C, H, W), before it runs.

    It reads the transformer alone, so that a copy of the UNet sets its own mixers.
    """
    hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
    grid = (int(hidden_states.shape[-2]), int(hidden_states.shape[-1]))
    for block in transformer.transformer_blocks:  # type: ignore[union-attr]
        if isinstance(block.attn1, SelfAttentionMixer):
            block.attn1.grid = grid


class GSPNAdapter(ModelMixin, ConfigMixin):
    """Mixers for the self-attentions of a UNet.

    Args:
        layers: for each self-attention, its name in the UNet and the shape of its projections:
            {"down_blocks.0.attentions.0.transformer_blocks.0.attn1": {"channels": 320, "inner": 320, "bias": False}}.
        mixer: "gspn" (weights per channel) or "gspn2" (shared weights in a proxy space).
        proxy: scanned channels as a share of the projections', for "gspn2".
        bottleneck: channels that weights are made from, as a share of the tokens'.
        chunk_size: lines per independent chunk; None scans the whole image.

    `for_unet` builds one from a UNet.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        layers: dict[str, dict[str, Any]],
        mixer: str = "gspn2",
        proxy: float = 0.125,
        bottleneck: float = 0.125,
        chunk_size: int | None = 4,
    ) -> None:
        super().__init__()
        if mixer not in KINDS:
            raise ValueError(f"mixer must be one of {', '.join(KINDS)}, got {mixer!r}")
        for name, share in (("proxy", proxy), ("bottleneck", bottleneck)):
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {share}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, or None, got {chunk_size}")
        if not layers:
            raise ValueError("layers must name at least one self-attention, got none")
        self.mixers = nn.ModuleDict(
            {
                # A module's name cannot have dots.
                name.replace(".", "-"): SelfAttentionMixer(
                    shape["channels"],
                    shape["inner"],
                    kind=mixer,
                    bottleneck=max(1, round(bottleneck * shape["channels"])),
                    proxy=max(1, round(proxy * shape["inner"])),
                    chunk_size=chunk_size,
                    bias=shape["bias"],
                )
                for name, shape in layers.items()
            }
        )
        # Not an attribute, which would register the UNet as a module of ours, to be saved.
        self.__dict__["_mounted"] = None

    @classmethod
    def for_unet(
        cls,
        unet: nn.Module,
        *,
        mixer: str = "gspn2",
        proxy: float = 1 / 8,
        bottleneck: float = 1 / 8,
        chunk_size: int | None = 4,
        init: str = "qkv",
        keep_attention: Sequence[str] = (),
    ) -> GSPNAdapter:
        """Build an adapter for all self-attentions of a UNet, on its device and in its dtype; the UNet is not changed.

        Args:
            unet: a diffusers UNet, as of SD 1.5, SD 2.x or SDXL.
            mixer, proxy, bottleneck, chunk_size: as of the class.
            init: "qkv" starts from the projections of the attentions, "random" does not.
            keep_attention: parts of names, such as "mid_block", of self-attentions that stay.

        Raises:
            ValueError: the UNet has no self-attention, or one that a mixer cannot replace, or an option does not fit.
        """
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        attentions = self_attentions(unet)
        if not attentions:
            raise ValueError(f"unet must have self-attentions called attn1, {type(unet).__name__} has none")
        for part in keep_attention:
            if not any(part in name for name in attentions):
                raise ValueError(f"keep_attention: no self-attention name contains {part!r}")
        replaced = {n: a for n, a in attentions.items() if not any(part in n for part in keep_attention)}
        if not replaced:
            raise ValueError(
                f"keep_attention must leave a self-attention to replace, {list(keep_attention)} leaves none"
            )
        layers = {name: _shape_of(name, attention) for name, attention in replaced.items()}
        adapter = cls(layers, mixer=mixer, proxy=proxy, bottleneck=bottleneck, chunk_size=chunk_size)
        parameter = next(unet.parameters())
        adapter.mixers.to(device=parameter.device, dtype=_dtype(unet))
        if init == "qkv":
            for name, attention in replaced.items():
                adapter.mixer_of(name).copy_projections(attention)
        return adapter

    def mixer_of(self, name: str) -> SelfAttentionMixer:
        """Return the mixer for the self-attention of that name."""
        mixer = self.mixers[name.replace(".", "-")]
        assert isinstance(mixer, SelfAttentionMixer)
        return mixer

    @property
    def mounted_on(self) -> nn.Module | None:
        """The UNet that the adapter is mounted on, if any."""
        mounted = self.__dict__["_mounted"]
        return mounted["unet"] if mounted else None

    def mount(self, unet: nn.Module) -> None:
        """Replace the UNet's self-attentions by the mixers.

        Raises:
            ValueError: the adapter is mounted already, or is for another UNet; nothing has changed then.
        """
        if self.mounted_on is not None:
            raise ValueError("the adapter must be unmounted before it is mounted again")
        attentions = self_attentions(unet)
        for name, shape in self.config.layers.items():
            if name not in attentions:
                raise ValueError(f"the adapter is for another UNet: {type(unet).__name__} has no {name}")
            if isinstance(attentions[name], SelfAttentionMixer):
                raise ValueError(f"another adapter is mounted on the UNet: {name} is a mixer")
            have = _shape_of(name, attentions[name])
            if have != dict(shape):
                raise ValueError(f"the adapter is for another UNet: {name} must be {dict(shape)}, is {have}")
        originals = {}
        for name in self.config.layers:
            originals[name] = attentions[name]
            mixer = self.mixer_of(name)
            mixer.train(attentions[name].training)
            unet.set_submodule(name, mixer)
        transformers = _transformers(unet, list(originals)).values()
        hooks = [module.register_forward_pre_hook(_set_grid, with_kwargs=True) for module in transformers]
        self.__dict__["_mounted"] = {
            "unet": unet,
            "dtype": _dtype(unet),
            "originals": originals,
            "hooks": hooks,
        }

    def unmount(self) -> nn.Module:
        """Put the self-attentions back and return the UNet.

        Raises:
            ValueError: the adapter is not mounted.
        """
        mounted = self.__dict__["_mounted"]
        if mounted is None:
            raise ValueError("the adapter must be mounted to be unmounted")
        unet: nn.Module = mounted["unet"]
        device, dtype = next(unet.parameters()).device, _dtype(unet)
        for name, attention in mounted["originals"].items():
            # The UNet may have moved or been cast in the meantime.
            attention.to(device=device, dtype=None if dtype == mounted["dtype"] else dtype)
            unet.set_submodule(name, attention)
        for hook in mounted["hooks"]:
            hook.remove()
        self.__dict__["_mounted"] = None
        return unet


def _dtype(unet: nn.Module) -> torch.dtype:
    """Return the dtype that a UNet computes in; diffusers' own property handles layerwise casting."""
    dtype: torch.dtype = getattr(unet, "dtype", None) or next(unet.parameters()).dtype
    return dtype


def _shape_of(name: str, attention: Any) -> dict[str, Any]:
    """Return the shape of an attention's projections.

    Raises:
        ValueError: it has parts that a mixer lacks.
    """
    for part in ("group_norm", "spatial_norm", "norm_q", "norm_k", "add_k_proj"):
        if getattr(attention, part, None) is not None:
            raise ValueError(f"{name} must be a plain self-attention, has {part}")
    if getattr(attention, "is_cross_attention", False):
        raise ValueError(f"{name} must be a self-attention, is a cross-attention")
    inner, channels = attention.to_q.weight.shape
    if attention.to_k.weight.shape != (inner, channels) or attention.to_v.weight.shape != (inner, channels):
        raise ValueError(f"{name} must project queries, keys and values alike")
    return {"channels": channels, "inner": inner, "bias": attention.to_q.bias is not None}
