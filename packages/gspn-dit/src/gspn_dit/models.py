"""The denoiser: a U-shaped stack of GSPN blocks over patches, as a diffusers model.

    tokens = patch_embed(latents) + t_embed(t) + class_embed(y)                        (N, C, H, W)
    in-blocks (depth / 2), one middle block, out-blocks (depth / 2)
        each out-block first fuses the output of its in-block:  x = fuse([x, skip])    Linear 2C -> C
    out    = unpatchify(linear(adaLN(x | t, y)))

There is no positional embedding and no feed-forward network: the scans tell where a token is and mix pixels, the
projections around them mix channels. Any latent height and width that the patch divides.

Sources: GSPN, arXiv 2501.12381 (the generation model of section 4 and its appendix); the U shape is U-ViT's,
arXiv 2209.12152; the conditioning DiT's, arXiv 2212.09748.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from gspn_core import SpatialPropagation

# Width and depth as published; the parameters at patch 2 are 137, 443 and 690 million for B, L and XL.
_SIZES = {"S": (368, 24), "B": (900, 30), "L": (1200, 56), "XL": (1500, 56)}


def _presets() -> dict[str, dict[str, Any]]:
    presets: dict[str, dict[str, Any]] = {}
    for size, (width, depth) in _SIZES.items():
        for patch in (2, 4):
            shape = {"hidden_size": width, "num_layers": depth, "patch_size": patch}
            presets[f"GSPN-{size}/{patch}"] = shape
            # Shared weights in a proxy space of an eighth of the channels, as GSPN-2 does for text to image.
            presets[f"GSPN2-{size}/{patch}"] = {**shape, "proxy_channels": width // 8}
    return presets


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(_presets())

# The null class that diffusers' DiTPipeline writes into its guidance, whatever the model.
_PIPELINE_NULL = 1000


class DropPath(nn.Module):
    """Leave a residual branch out for some images while training: y B / (1 - rate), B in {0, 1} per image.

    The rate is a buffer, not a number: compiled blocks of other rates then share one graph.

    Args:
        rate: probability of leaving it out.

    Source: stochastic depth, arXiv 1603.09382.
    """

    keep: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, y: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        if not self.training:
            return y
        kept = torch.rand(len(y), 1, 1, 1, device=y.device) < self.keep
        return y * (kept / self.keep).to(y.dtype)


class GSPNDiTBlock(nn.Module):
    """Mix pixels and channels, as a residual: (N, C, H, W) to (N, C, H, W).

    x + drop_path(out(square(local(mix(propagate(conv(proj(norm(x)))))))))    with square(x) = x ReLU(x)

    Args:
        channels: C.
        gate_rank: channels of the bottleneck that weights and gates are made from.
        proxy_channels: None gives every channel weights of its own (GSPN-1), a number shares one set (GSPN-2).
        drop_path: probability of leaving the branch out; None never does.
    """

    def __init__(self, channels: int, *, gate_rank: int, proxy_channels: int | None, drop_path: float | None) -> None:
        super().__init__()
        self.norm = LayerNorm2d(channels, eps=1e-5)
        self.proj_in = nn.Conv2d(channels, channels, 1, bias=False)
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, bias=False)
        self.propagation = SpatialPropagation(
            channels,
            gate_rank=gate_rank,
            proxy_channels=proxy_channels,
            weight_groups=channels if proxy_channels is None else 1,
        )
        self.mix = nn.Conv2d(channels, channels, 1, bias=False)
        self.local = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        self.drop_path = nn.Identity() if drop_path is None else DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        y = self.conv(self.proj_in(self.norm(x)))  # (N, C, H, W)
        y = self.local(self.mix(self.propagation(y)))  # (N, C, H, W)
        y = self.proj_out(y * F.relu(y))  # (N, C, H, W)
        out: Tensor = x + self.drop_path(y)
        return out


class GSPNDiTOutBlock(GSPNDiTBlock):
    """A block that first fuses the output of its in-block into its input: x = fuse([x, skip])."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.fuse = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:  # type: ignore[override]
        """(N, C, H, W) each, to (N, C, H, W)."""
        return super().forward(self.fuse(torch.cat((x, skip), dim=1)))


class FinalLayer(nn.Module):
    """Normalise with shift and scale from the condition, then project: (N, C, H, W) to (N, P^2 O, H, W)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(channels, eps=1e-6, affine=False)
        self.modulation = nn.Linear(channels, 2 * channels)
        self.proj = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (N, C, H, W) and condition (N, C)."""
        shift, scale = self.modulation(F.silu(condition))[:, :, None, None].chunk(2, dim=1)  # (N, C, 1, 1) each
        y: Tensor = self.proj(self.norm(x) * (1 + scale) + shift)
        return y


class GSPNDiTTransformer2DModel(ModelMixin, ConfigMixin):
    """Predict noise (and its variance) or velocity of latents, given a time and a class.

    Args:
        sample_size: latent height and width trained at; others work as well.
        patch_size: pixels of a patch's side, P.
        in_channels: latent channels.
        out_channels: None is twice the latent channels, for noise and learned variance.
        hidden_size: C.
        num_layers: blocks besides the middle one; even.
        num_classes: of the table; class `num_classes` is the null class, which means none.
        gate_rank: bottleneck of weights and gates; None is C // 16.
        proxy_channels: None is GSPN-1; a number propagates as many channels with shared weights, GSPN-2.
        drop_path_rate: of the last block; linear in depth from 0.

    Raises:
        ValueError: a number is too small, or num_layers is odd.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["GSPNDiTBlock", "GSPNDiTOutBlock"]
    _repeated_blocks: ClassVar = ["GSPNDiTBlock", "GSPNDiTOutBlock"]
    _skip_layerwise_casting_patterns: ClassVar = ["patch_embed", "norm", "class_embed", "final"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        hidden_size: int = 900,
        num_layers: int = 30,
        num_classes: int = 1000,
        gate_rank: int | None = None,
        proxy_channels: int | None = None,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__()
        out_channels = 2 * in_channels if out_channels is None else out_channels
        gate_rank = max(1, hidden_size // 16) if gate_rank is None else gate_rank
        counts = {
            "sample_size": sample_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "hidden_size": hidden_size,
            "num_classes": num_classes,
        }
        for name, count in counts.items():
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
        if num_layers < 0 or num_layers % 2:
            raise ValueError(f"num_layers must be even, half of them before the middle block, got {num_layers}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {drop_path_rate}")
        self.register_to_config(out_channels=out_channels, gate_rank=gate_rank)
        self.out_channels = out_channels
        self.gradient_checkpointing = False

        def block(place: int) -> GSPNDiTBlock:
            kind = GSPNDiTOutBlock if place > num_layers // 2 else GSPNDiTBlock
            rate = drop_path_rate * place / max(1, num_layers) if drop_path_rate > 0 else None
            return kind(hidden_size, gate_rank=gate_rank, proxy_channels=proxy_channels, drop_path=rate)

        half = num_layers // 2
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, hidden_size)
        self.class_embed = nn.Embedding(num_classes + 1, hidden_size)
        self.in_blocks = nn.ModuleList(block(place) for place in range(half))
        self.middle_block = block(half)
        self.out_blocks = nn.ModuleList(block(place) for place in range(half + 1, num_layers + 1))
        self.final = FinalLayer(hidden_size, patch_size**2 * out_channels)
        self.reset_parameters()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> GSPNDiTTransformer2DModel:
        """Build a published architecture, such as "GSPN-XL/2", or with GSPN-2 mixers, "GSPN2-XL/2".

        Raises:
            ValueError: the name is unknown; TypeError: an override is.
        """
        if name not in PRESETS:
            raise ValueError(f"model must be one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **overrides})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise: Xavier for projections and patches, small normal embeddings, and an output of zero."""
        own = {id(layer) for m in self.modules() if isinstance(m, SpatialPropagation) for layer in m.modules()}
        for layer in self.modules():
            if id(layer) in own:
                continue  # initialises itself
            pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
            if pointwise or isinstance(layer, nn.Linear) or layer is self.patch_embed:
                assert isinstance(layer, (nn.Conv2d, nn.Linear))
                nn.init.xavier_uniform_(layer.weight.flatten(1))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        for linear in (self.time_embed.linear_1, self.time_embed.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        for last in (self.final.modulation, self.final.proj):
            nn.init.zeros_(last.weight)
            assert last.bias is not None
            nn.init.zeros_(last.bias)

    def _condition(self, timestep: Tensor, class_labels: Tensor, batch: int) -> Tensor:
        """Add the embeddings of times and classes: (N, C)."""
        dtype = self.class_embed.weight.dtype
        times = self.time_proj(timestep.reshape(-1).expand(batch))
        if self.config.num_classes < _PIPELINE_NULL:
            class_labels = torch.where(class_labels == _PIPELINE_NULL, self.config.num_classes, class_labels)
        condition: Tensor = self.time_embed(times.to(dtype)) + self.class_embed(class_labels)
        return condition

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | int | float,
        class_labels: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict.

        Args:
            hidden_states: noisy latents, (N, in_channels, H, W).
            timestep: 0 to 999, one or N; whole numbers or fractions.
            class_labels: (N,) integers; `num_classes` is the null class (so is 1000, diffusers' DiTPipeline's, if the
                table is smaller).
            cross_attention_kwargs: unused; what diffusers' pipelines may pass.
            return_dict: whether to return diffusers' output object, or a tuple.

        Returns:
            `sample`, (N, out_channels, H, W).

        Raises:
            ValueError: the rank or channels are wrong, or the patch does not divide H or W.
        """
        patch, channels = self.config.patch_size, self.config.in_channels
        if hidden_states.ndim != 4 or hidden_states.shape[1] != channels:
            shape = tuple(hidden_states.shape)
            raise ValueError(f"hidden_states must be (N, {channels}, H, W), got {shape}")
        n, _, height, width = hidden_states.shape
        if height % patch or width % patch:
            raise ValueError(f"latent height and width must be multiples of {patch}, got {height} x {width}")
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, device=hidden_states.device)
        condition = self._condition(timestep.to(hidden_states.device), class_labels, n)  # (N, C)
        x = self.patch_embed(hidden_states) + condition[:, :, None, None]  # (N, C, H/P, W/P)
        skips = []
        for block in self.in_blocks:
            x = self._run(block, x)
            skips.append(x)
        x = self._run(self.middle_block, x)
        for block in self.out_blocks:
            x = self._run(block, x, skips.pop())
        sample = F.pixel_shuffle(self.final(x, condition), patch)  # (N, O, H, W)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _run(self, block: nn.Module, *maps: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            out: Tensor = self._gradient_checkpointing_func(block, *maps)
            return out
        out = block(*maps)
        return out
