"""What the backbone is made of: a local perception unit, the mixer, the block and the stage.

A block mixes pixels by line scans and channels by a feed-forward network:

    x = x + drop_path(mixer(norm(x)))
    x = x + drop_path(ffn(norm(x)))

GSPN-2 puts a local perception unit (a residual depthwise 3x3) before each of the two lines.

Sources: GSPN, arXiv 2501.12381; GSPN-2, arXiv 2512.07884; the local perception unit is from CMT, arXiv 2107.06263,
global response normalisation from ConvNeXt V2, arXiv 2301.00808.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ConvMlp, DropPath, LayerNorm2d, is_exportable
from timm.layers.grn import GlobalResponseNorm
from timm.models import checkpoint_seq
from torch import Tensor, nn
from torch.nn import functional as F

from gspn_core import DIRECTIONS, SpatialPropagation, reference


class LocalPerception(nn.Module):
    """Add a depthwise 3x3 convolution of the input to it: (N, C, H, W) to (N, C, H, W)."""

    def __init__(
        self,
        channels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        return x + self.conv(x)


class ExportablePropagation(SpatialPropagation):
    """The same in plain operations of torch, which any exporter knows; the graph grows with the image.

    Models are made of it while `timm.layers.set_exportable` or `create_model(..., exportable=True)` asks for it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        v, logits, lam, u = self.project(x)
        y = [u[:, i] * self._scan(lam[:, i] * v, logits[:, i], DIRECTIONS[d]) for i, d in enumerate(self.directions)]
        return self.lift(torch.stack(y).sum(0))

    def _scan(self, gated: Tensor, logits: Tensor, direction: str) -> Tensor:
        """Scan (N, P, H, W) with logits (N, G, 3, H, W), G being 1 or P: line i of all chunks at once."""
        weights = reference.row_stochastic(_in_scan_order(logits, direction)[:, None], directions=("top_to_bottom",))
        weights, gated = weights[:, 0], _in_scan_order(gated, direction)
        lines = int(gated.shape[-2])  # a number, not a tensor, where jit traces
        size = min(self.chunk_size or lines, lines)
        h = [gated[..., ::size, :]]  # (N, P, chunks, positions)
        for i in range(1, size):
            new = gated[..., i::size, :]
            a, b, c = weights[..., i::size, :].unbind(2)
            last = F.pad(h[-1][..., : int(new.shape[-2]), :], (1, 1))  # the last chunk may be shorter
            h.append(a * last[..., :-2] + b * last[..., 1:-1] + c * last[..., 2:] + new)
        whole = [F.pad(t, (0, 0, 0, int(h[0].shape[-2]) - int(t.shape[-2]))) for t in h]
        out = torch.stack(whole, dim=3).flatten(2, 3)[:, :, :lines]
        out = out.flip(2) if direction in ("right_to_left", "bottom_to_top") else out
        return out.transpose(2, 3) if direction in ("left_to_right", "right_to_left") else out


def _in_scan_order(t: Tensor, direction: str) -> Tensor:
    """`reference.to_scan_order` without `mT`, which torch.onnx's older exporter does not know."""
    t = t.transpose(-2, -1) if direction in ("left_to_right", "right_to_left") else t
    return t.flip(-2) if direction in ("right_to_left", "bottom_to_top") else t


class Mixer(nn.Module):
    """Mix pixels: 1x1 to P channels, depthwise 7x7, propagation, norm, response norm, 1x1 back to C.

    Args:
        channels: C.
        ratio: P is `ratio` times C.
        gate_rank: channels of the bottleneck that propagation weights and gates are made from.
        proxy_channels: None gives every channel weights of its own (GSPN-1); a number shares one set of weights in a
            proxy space of as many channels (GSPN-2).
        chunk_size: lines per independent chunk; None scans the whole map.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float,
        gate_rank: int,
        proxy_channels: int | None,
        chunk_size: int | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = int(ratio * channels)
        self.proj_in = nn.Conv2d(channels, inner, 1, **dd)
        self.conv = nn.Conv2d(inner, inner, 7, padding=3, groups=inner, **dd)
        kind = ExportablePropagation if is_exportable() else SpatialPropagation
        self.propagation = kind(
            inner,
            proxy_channels=proxy_channels,
            gate_rank=gate_rank,
            weight_groups=inner if proxy_channels is None else 1,
            chunk_size=chunk_size,
            **dd,
        )
        # A map lifted from few proxy channels is near zero at every channel wherever they are: the variance added there
        # keeps the norm from enlarging rounding errors. The map's own variance is 2e-3 to 1e-2 to begin with.
        self.norm = LayerNorm2d(inner, eps=1e-6 if proxy_channels is None else 1e-3, **dd)
        self.response_norm = GlobalResponseNorm(inner, channels_last=False, **dd)
        self.proj_out = nn.Conv2d(inner, channels, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        x = self.conv(self.proj_in(x))  # (N, P, H, W)
        x = self.propagation(x)  # (N, P, H, W)
        x = self.response_norm(self.norm(x))  # (N, P, H, W)
        return self.proj_out(x)  # (N, C, H, W)


class Block(nn.Module):
    """Mix pixels, then channels, each as a residual: (N, C, H, W) to (N, C, H, W). `mixer` goes to `Mixer`."""

    def __init__(
        self,
        channels: int,
        *,
        ffn_ratio: float,
        local_perception: bool,
        drop_path: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mixer: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.local1 = LocalPerception(channels, **dd) if local_perception else nn.Identity()
        self.norm1 = LayerNorm2d(channels, **dd)
        self.mixer = Mixer(channels, **mixer, **dd)
        self.local2 = LocalPerception(channels, **dd) if local_perception else nn.Identity()
        self.norm2 = LayerNorm2d(channels, **dd)
        self.ffn = ConvMlp(channels, int(ffn_ratio * channels), act_layer=nn.GELU, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        x = self.local1(x)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        x = self.local2(x)
        return x + self.drop_path(self.ffn(self.norm2(x)))


class Stage(nn.Module):
    """Blocks at one resolution, after halving that of the stage before."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Maps of the stage before to this one's."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)
