"""The hierarchical image backbone, GSPN-1 and GSPN-2, registered with timm.

Four stages at a quarter, an eighth, 1/16 and 1/32 of the image's size. A block mixes pixels by line scans and
channels by a feed-forward network:

    x = x + drop_path(mixer(norm(x)))
    x = x + drop_path(ffn(norm(x)))

GSPN-2 puts a local perception unit (a residual depthwise 3x3) before each of the two lines, shares its propagation
weights among all channels and propagates in a proxy space of a few channels. No positional embedding is needed: any
height and width from 32 pixels up work, non-square ones included.

Shape letters: N batch, C channels of a stage, P channels inside the mixer, H and W rows and columns of its map.

Sources: GSPN, arXiv 2501.12381; GSPN-2, arXiv 2512.07884; the local perception unit is from CMT, arXiv 2107.06263,
global response normalisation from ConvNeXt V2, arXiv 2301.00808.
"""

# Annotations are not postponed: TorchScript reads those of a graph that torch.fx traced as objects.

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    LayerNorm2d,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.layers.grn import GlobalResponseNorm
from timm.models import (
    build_model_with_cfg,
    clean_state_dict,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from gspn_core import SpatialPropagation

from .blocks import Block, LocalPerception, Stage

__all__ = [
    "Gspn",
    "gspn2_base",
    "gspn2_nano",
    "gspn2_small",
    "gspn2_tiny",
    "gspn_base",
    "gspn_nano",
    "gspn_small",
    "gspn_tiny",
]


class Gspn(nn.Module):
    """A hierarchical image classifier and feature extractor: images (N, in_chans, H, W) to logits (N, num_classes).

    Args:
        in_chans: image channels.
        num_classes: classes of the head; 0 leaves the pooled features.
        global_pool: pooling before the classifier, as in timm; "" leaves the map.
        widths: C of each stage.
        depths: blocks of each stage.
        mixer_ratio: channels inside the mixer over C.
        ffn_ratio: hidden channels of the feed-forward network over C.
        gate_rank: channels of the bottleneck that weights and gates are made from.
        proxy_channels: None for GSPN-1, the width of the proxy space for GSPN-2.
        chunk_sizes: lines per chunk of each stage's scans; None scans the whole map.
        local_perception: put a local perception unit before mixer and FFN (GSPN-2).
        stem_stride: 4, or 2 or 1 for small images: the first stage's stride, from which the others double.
        drop_rate: dropout before the classifier.
        drop_path_rate: probability of dropping the last block's branches; rises linearly from 0 at the first.

    Raises:
        ValueError: the per-stage options differ in length, or stem_stride is not 1, 2 or 4.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        widths: Sequence[int] = (24, 48, 96, 160),
        depths: Sequence[int] = (1, 1, 2, 1),
        mixer_ratio: float = 1.5,
        ffn_ratio: float = 4.0,
        gate_rank: int = 8,
        proxy_channels: int | None = None,
        chunk_sizes: Sequence[int | None] = (2, 2, None, None),
        local_perception: bool = False,
        stem_stride: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not len(widths) == len(depths) == len(chunk_sizes):
            raise ValueError(
                "widths, depths and chunk_sizes must have one entry per stage, "
                f"got {tuple(widths)}, {tuple(depths)} and {tuple(chunk_sizes)}"
            )
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride must be 1, 2 or 4, got {stem_stride}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = widths[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": stem_stride * 2**i, "module": f"stages.{i}"}
            for i, width in enumerate(widths)
        ]
        strides = (2 if stem_stride > 1 else 1, 2 if stem_stride > 2 else 1)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, widths[0] // 2, 3, stride=strides[0], padding=1, **dd),
            LayerNorm2d(widths[0] // 2, **dd),
            nn.GELU(),
            nn.Conv2d(widths[0] // 2, widths[0], 3, stride=strides[1], padding=1, **dd),
            LayerNorm2d(widths[0], **dd),
        )
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, width in enumerate(widths):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                downsample = nn.Sequential(
                    nn.Conv2d(widths[i - 1], width, 3, stride=2, padding=1, **dd),
                    LayerNorm2d(width, **dd),
                )
            blocks = [
                Block(
                    width,
                    ratio=mixer_ratio,
                    ffn_ratio=ffn_ratio,
                    gate_rank=gate_rank,
                    proxy_channels=proxy_channels,
                    chunk_size=chunk_sizes[i],
                    local_perception=local_perception,
                    drop_path=drop_path,
                    **dd,
                )
                for drop_path in drop_paths[i]
            ]
            stages.append(Stage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = LayerNorm2d(widths[-1], **dd)
        self.head = ClassifierHead(widths[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise every layer.

        Convolutions keep the variance, so that gates see inputs of unit variance whatever the width; the classifier
        starts small, so that the first predictions are near uniform. Local perception units start near the identity:
        they stand on the residual stream itself, and two a block that keep the variance of what they add would double
        the stream with every block, beyond float16 in a deep model.
        """
        propagation: set[nn.Module] = set()
        local = {module.conv for module in self.modules() if isinstance(module, LocalPerception)}
        for module in self.modules():
            if isinstance(module, SpatialPropagation):
                module.reset_parameters()
                propagation.update(module.modules())
            elif isinstance(module, (LayerNorm2d, nn.LayerNorm)):
                module.reset_parameters()
            elif isinstance(module, GlobalResponseNorm):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Conv2d, nn.Linear)) and module not in propagation:
                fan_in = module.weight[0].numel()
                std = 0.02 if isinstance(module, nn.Linear) or module in local else fan_in**-0.5
                trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay beyond the one-dimensional ones: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into a stem and blocks, for layer-wise learning rates."""
        blocks: Any = r"^stages\.(\d+)"
        if not coarse:
            blocks = [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^stem", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier, an Identity without classes."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling if given."""
        like = next(self.parameters())  # of the stem: the head has none where it had no classes
        self.num_classes = num_classes
        self.head.in_features = self.num_features
        self.head.reset(num_classes, global_pool)
        self.head.to(like.device, like.dtype).train(self.training)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the final features and the outputs of chosen stages, or these alone.

        Args:
            x: images (N, in_chans, H, W).
            indices: stages to return; a number n means the last n, None all.
            norm: apply the final norm to the last stage's output.
            stop_early: do not compute stages past the last one wanted.
            output_fmt: only "NCHW".
            intermediates_only: return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got '{output_fmt}'")  # TorchScript does not know !r
        take, last = feature_take_indices(len(self.stages), indices)
        end = last if stop_early else len(self.stages) - 1
        intermediates = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if i <= end:  # TorchScript cannot slice stages
                x = stage(x)
                if i in take:
                    intermediates.append(self.norm(x) if norm and i == len(self.stages) - 1 else x)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if end == len(self.stages) - 1 else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of `indices`, norm and head included; return the stages kept as outputs."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return list(take)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to normalised features (N, num_features, H/32, W/32), sizes rounded up."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (N, num_classes), or to the classifier's input."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a checkpoint that may be wrapped in a "state_dict" or "model" entry or in DDP's names."""
    for key in ("state_dict", "model"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    return clean_state_dict(state_dict)


def _doubling(width: int) -> tuple[int, int, int, int]:
    return width, 2 * width, 4 * width, 8 * width


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        **kwargs,
    }


# One line per model. The sizes of GSPN-1 and GSPN-2 are published, their depths and widths are not: these give the
# published parameters within 3% and multiply-adds, scans included, within 5% (`gspn-vision profile` counts both). Nano
# is ours, for tests, examples and small data: it trains on two CPU cores in about a minute.
_GLOBAL_FROM_16: Any = (2, 2, None, None)  # chunks of two lines at strides 4 and 8, whole maps at 16 and 32
_GLOBAL_AT_32: Any = (2, 2, 2, None)
_GSPN2: dict[str, Any] = {"proxy_channels": 2, "local_perception": True}
_MODELS: dict[str, dict[str, Any]] = {
    "gspn_nano": {"widths": (16, 32, 64, 96), "depths": (1, 1, 2, 1)},
    "gspn_tiny": {"widths": _doubling(96), "depths": (3, 2, 6, 2)},
    "gspn_small": {
        "widths": _doubling(100),
        "depths": (3, 4, 10, 3),
        "gate_rank": 16,
        "chunk_sizes": _GLOBAL_AT_32,
    },
    "gspn_base": {"widths": _doubling(120), "depths": (4, 4, 17, 3)},
    "gspn2_nano": {"widths": (24, 48, 96, 160), "depths": (1, 1, 2, 1), **_GSPN2},
    "gspn2_tiny": {"widths": _doubling(84), "depths": (3, 3, 7, 2), **_GSPN2},
    "gspn2_small": {
        "widths": _doubling(108),
        "depths": (3, 3, 12, 2),
        "gate_rank": 16,
        "chunk_sizes": _GLOBAL_AT_32,
        **_GSPN2,
    },
    "gspn2_base": {"widths": _doubling(120), "depths": (4, 4, 15, 4), **_GSPN2},
}
default_cfgs = generate_default_cfgs({name: _cfg() for name in _MODELS})


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> Gspn:
    return build_model_with_cfg(
        Gspn,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**_MODELS[variant], **kwargs},
    )


@register_model
def gspn_nano(pretrained: bool = False, **kwargs: Any) -> Gspn:
    """GSPN-1 with weights of its own for every channel, small enough for a CPU."""
    return _create("gspn_nano", pretrained, **kwargs)


@register_model
def gspn_tiny(pretrained: bool = False, **kwargs: Any) -> Gspn:
    """GSPN-1, 30M parameters, 5.3G multiply-adds at 224x224."""
    return _create("gspn_tiny", pretrained, **kwargs)


@register_model
def gspn_small(pretrained: bool = False, **kwargs: Any) -> Gspn:
    """GSPN-1, 50M parameters, 9.0G multiply-adds at 224x224."""
    return _create("gspn_small", pretrained, **kwargs)


@register_model
def gspn_base(pretrained: bool = False, **kwargs: Any) -> Gspn:
    """GSPN-1, 88M parameters, 16.2G multiply-adds at 224x224."""
    return _create("gspn_base", pretrained, **kwargs)


@register_model
def gspn2_nano(pretrained: bool = False, **kwargs: Any) -> Gspn:
    """GSPN-2: weights shared in a proxy space of two channels, local perception units; small enough for a CPU."""
    return _create("gspn2_nano", pretrained, **kwargs)


@register_model
def gspn2_tiny(pretrained: bool = False, **kwargs: Any) -> Gspn:
    """GSPN-2, 24M parameters, 4.3G multiply-adds at 224x224."""
    return _create("gspn2_tiny", pretrained, **kwargs)


@register_model
def gspn2_small(pretrained: bool = False, **kwargs: Any) -> Gspn:
    """GSPN-2, 49M parameters, 9.1G multiply-adds at 224x224."""
    return _create("gspn2_small", pretrained, **kwargs)


@register_model
def gspn2_base(pretrained: bool = False, **kwargs: Any) -> Gspn:
    """GSPN-2, 90M parameters, 14.7G multiply-adds at 224x224."""
    return _create("gspn2_base", pretrained, **kwargs)
