"""An adapter that replaces a UNet's self-attentions by GSPN mixers, and restores them.

    adapter = GSPNAdapter.for_unet(pipeline.unet, mixer="gspn2")
    adapter.mount(pipeline.unet)
    ...
    adapter.unmount()                        the attention is back, bit for bit
    adapter.save_pretrained("adapter")       the mixers alone

The adapter is a diffusers model of its own, and a mounted UNet is saved without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from .mixers import KINDS, SelfAttentionMixer, base_of, with_data
from .mounting import attach, detach, dtype_of, place, self_attentions, shape_of, unmounted

INITS = ("qkv", "random")
# Arguments of `from_pretrained` that say where a model lies.
_WHERE = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")


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
        *,  # diffusers takes those given by position for defaults, and leaves them out of a configuration
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
            if isinstance(share, bool) or not isinstance(share, (int, float)):
                raise TypeError(f"{name} must be a number, got {share!r}")
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {share}")
        if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int)):
            raise TypeError(f"chunk_size must be an integer, or None, got {chunk_size!r}")
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
                # In an order that a saved configuration keeps: optimizers and averages go by position.
                for name, shape in sorted(layers.items())
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
        if isinstance(keep_attention, str):
            raise ValueError(f"keep_attention must be a list of parts of names, got {keep_attention!r}")
        unet = unmounted(unet)
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
        layers = {name: shape_of(unet, name) for name in replaced}
        adapter = cls(layers=layers, mixer=mixer, proxy=proxy, bottleneck=bottleneck, chunk_size=chunk_size)
        place(adapter, unet, next(iter(layers)), dtype_of(unet))
        if init == "qkv":
            for name, attention in replaced.items():
                adapter.mixer_of(name).copy_projections(attention)
        return adapter

    def own_weights(self) -> dict[str, Tensor]:
        """Return the state without what peft or offloading wraps around it, as an adapter of `config` holds it."""
        weights = {}
        for name, module in self._like(self).named_modules():
            with with_data(base_of(self.get_submodule(name))) as own:
                for key, _ in module.named_parameters(recurse=False):
                    weights[f"{name}.{key}"] = getattr(own, key).detach().clone()
        return weights

    @classmethod
    def _like(cls, other: GSPNAdapter) -> GSPNAdapter:
        """Return an adapter of another's shape, on meta."""
        with torch.device("meta"):
            made: GSPNAdapter = cls.from_config(other.config)
        return made

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the mixers' own weights, whether mounted, offloaded or wrapped by a LoRA; arguments as in diffusers."""
        plain = self._like(self)
        plain.load_state_dict(self.own_weights(), assign=True)
        super(GSPNAdapter, plain).save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, name: Any, **kwargs: Any) -> Any:
        """Load an adapter; arguments as in diffusers.

        Raises:
            OSError: there is none of this name, or it cannot be downloaded.
            ValueError: it is another model's, a weight is missing, has another shape or is not finite.
        """
        where = {key: kwargs[key] for key in _WHERE if key in kwargs}
        kind = cls.load_config(name, **where).get("_class_name")
        if kind != cls.__name__:
            raise ValueError(f"{name} must hold a {cls.__name__}, holds a {kind}")
        wanted = kwargs.pop("output_loading_info", False)
        stem, variant = SAFETENSORS_WEIGHTS_NAME.removesuffix("safetensors"), kwargs.get("variant")
        file = Path(
            name, kwargs.get("subfolder") or "", f"{stem}{variant}.safetensors" if variant else f"{stem}safetensors"
        )
        try:
            adapter, info = super().from_pretrained(name, output_loading_info=True, **kwargs)
        except (ValueError, RuntimeError) as error:
            if "expected shape" not in str(error) and "size mismatch" not in str(error):
                raise
            reason = str(error).partition(". If you want")[0]
            raise ValueError(f"{file} must hold the weights of its config.json: {reason}") from None
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                raise ValueError(
                    f"{file} must hold the weights of its config.json, {problem}: {sorted(info[problem])[:3]}"
                )
        broken = [key for key, value in adapter.named_parameters() if not value.isfinite().all()]
        if broken:
            raise ValueError(f"{file} must hold finite weights, {len(broken)} are not, such as {broken[0]}")
        return (adapter, info) if wanted else adapter

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

    def mount(self, unet: nn.Module, *, cast: bool = True, discard: bool = False) -> GSPNAdapter:
        """Replace the UNet's self-attentions by the mixers, and return the adapter.

        The UNet keeps the adapter as its child `gspn_adapter`, and its self-attentions in their place: what is done to
        the UNet meanwhile, such as a move, a cast, offloading, or a LoRA that is loaded or fused, is done to them too.

        Args:
            unet: as of `for_unet`.
            cast: give the mixers the UNet's dtype; False leaves them, for training under autocast.
            discard: free the weights of the attentions that are replaced; the UNet can then neither be unmounted nor
                saved.

        Raises:
            ValueError: the adapter is mounted already, or is for another UNet; nothing has changed then.
        """
        if self.mounted_on is not None:
            raise ValueError("the adapter must be unmounted before it is mounted again")
        unet = unmounted(unet)
        attentions = self_attentions(unet)
        for name, shape in self.config.layers.items():
            if name not in attentions:
                raise ValueError(f"the adapter is for another UNet: {type(unet).__name__} has no {name}")
            have = shape_of(unet, name)
            if have != dict(shape):
                raise ValueError(f"the adapter is for another UNet: {name} must be {dict(shape)}, is {have}")
        place(self, unet, next(iter(self.config.layers)), dtype_of(unet) if cast else None)
        self.train(unet.training)
        mixers = {name: self.mixer_of(name) for name in self.config.layers}
        self.__dict__["_mounted"] = attach(self, unet, mixers, discard)
        return self

    def unmount(self) -> nn.Module:
        """Let the self-attentions compute again and return the UNet.

        Raises:
            ValueError: the adapter is not mounted, the attentions were discarded or have a hook around their forward,
                or the mixers have a LoRA of their own; nothing has changed then.
        """
        mounted = self.__dict__["_mounted"]
        if mounted is None:
            raise ValueError("the adapter must be mounted to be unmounted")
        if mounted["discard"]:
            raise ValueError("an adapter mounted with discard=True cannot be unmounted; load the UNet again")
        if any(base_of(module) is not module for module in self.modules()):
            raise ValueError("the mixers have a LoRA of their own, unload it before the adapter is unmounted")
        hooked = [name for name, attention in mounted["attentions"].items() if "forward" in vars(attention)]
        if hooked:
            raise ValueError(f"{hooked[0]} has had its forward replaced, by a hook perhaps; remove it, then unmount")
        detach(self, mounted)
        self.__dict__["_mounted"] = None
        unet: nn.Module = mounted["unet"]
        return unet
