"""The replacement of a self-attention: the same four projections around line scans.

Linear attention is  y_i = q_i sum_j (k_j v_j),  GSPN  y_i = u_i sum_j w_ij (lam_j x_j),  where scans compute the sum: u
corresponds to the queries, the input gate lam to the keys and the scanned input x to the values. So a mixer can start
from an attention's projections.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils.modeling import align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.nn import functional as F

from gspn_core import DIRECTIONS, propagate, propagate_low_rank
from gspn_core.module import holds_its_weights

KINDS = ("gspn", "gspn2")


def base_of(layer: Any) -> Any:
    """Return the layer that peft wraps, or the layer itself."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


@contextlib.contextmanager
def with_data(module: nn.Module) -> Iterator[nn.Module]:
    """Hold a module's own parameters in memory, where accelerate offloads them and leaves meta tensors behind."""
    with align_module_device(module, torch.device("cpu")) if has_offloaded_params(module) else contextlib.nullcontext():
        yield module


class SelfAttentionMixer(nn.Module):
    r"""Mix the tokens of an image by line scans; it has the projections of a diffusers `Attention`.

        q, k, v = to_q(x), to_k(x), to_v(x)                                            (N, L, I) each, on an H x W grid
        w       = row_stochastic(gates(bottleneck(x)))
        h       = sum over d of m_d scan_d(w_d, k v)                                   kind "gspn", weights per channel
        h       = lift(sum over d of m_d scan_d(w_d, down(k v)))                       kind "gspn2", weights shared
        out     = to_out(q h)

    With shared weights a scan commutes with mixing channels, so that the scan in the proxy space of "gspn2" is a
    low-rank form of the full one; keys, values and queries keep their width.

    Args:
        channels: C of the tokens.
        inner: I of the projections; the attention's heads times their width.
        kind: "gspn" or "gspn2".
        bottleneck: channels that the weights are made from.
        proxy: channels that are scanned, for "gspn2".
        chunk_size: lines per independent chunk; None scans the whole image.
        bias: whether to_q, to_k and to_v have one.

    Sources: GSPN, arXiv 2501.12381, section 4 (text to image); GSPN-2, arXiv 2512.07884.
    """

    def __init__(
        self,
        channels: int,
        inner: int,
        *,
        kind: str,
        bottleneck: int,
        proxy: int,
        chunk_size: int | None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"mixer must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = kind
        self.chunk_size = chunk_size
        self.to_q = nn.Linear(channels, inner, bias=bias)
        self.to_k = nn.Linear(channels, inner, bias=bias)
        self.to_v = nn.Linear(channels, inner, bias=bias)
        # As in diffusers' Attention, whose weights it takes.
        self.to_out = nn.ModuleList((nn.Linear(inner, channels), nn.Dropout(0.0)))
        scanned = inner if kind == "gspn" else proxy
        self.groups = inner if kind == "gspn" else 1
        self.bottleneck = nn.Linear(channels, bottleneck)
        self.gates = nn.Linear(bottleneck, 3 * len(DIRECTIONS) * self.groups)
        self.down: nn.Module = nn.Identity()
        self.lift: nn.Module = nn.Identity()
        if kind == "gspn2":
            self.down = nn.Linear(inner, proxy, bias=False)
            self.lift = nn.Linear(proxy, inner, bias=False)
        self.merge = nn.Parameter(torch.empty(len(DIRECTIONS), scanned))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise: projections keep the variance, down and lift are transposes, directions are averaged."""
        for layer in (self.to_q, self.to_k, self.to_v, self.to_out[0], self.bottleneck, self.gates):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if isinstance(self.down, nn.Linear) and isinstance(self.lift, nn.Linear):
            nn.init.orthogonal_(self.down.weight)
            self.lift.weight.copy_(self.down.weight.T)
        nn.init.constant_(self.merge, 1 / len(DIRECTIONS))

    @torch.no_grad()
    def copy_projections(self, attention: Any) -> None:
        """Copy an attention's projections: Q to u, K to lam, V to the scanned input, and the output projection.

        Raises:
            ValueError: they are quantized.
        """
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            ours: Any = self.get_submodule(name)
            theirs = base_of(attention.get_submodule(name))
            if not theirs.weight.is_floating_point():
                raise ValueError(f"projections must be floating-point to be copied, got {theirs.weight.dtype}")
            with with_data(theirs):
                ours.weight.copy_(theirs.weight)
                if theirs.bias is not None:
                    ours.bias.copy_(theirs.bias)
                elif ours.bias is not None:
                    nn.init.zeros_(ours.bias)

    def _projection(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the logits and gates, as `propagate_low_rank` takes them: lam is 1, u is merge."""
        rows = torch.cat([self.gates.bias[:, None], self.gates.weight], dim=1)  # (3 D I, 1 + R)
        rows = rows.unflatten(0, (len(DIRECTIONS), self.groups, 3)).transpose(1, 2)  # (D, 3, I, 1 + R)
        lam, u = F.pad(torch.ones_like(rows[:, :2, :, :1]), (0, rows.shape[-1] - 1)).split(1, dim=1)
        rows = torch.cat([rows, lam, u * self.merge.to(u.dtype)[:, None, :, None]], dim=1)
        return rows[..., 1:], rows[..., 0]

    def forward(self, hidden_states: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """Mix tokens (N, L, C) of a grid of height and width, row by row, into tokens of the same shape.

        Raises:
            ValueError: the grid does not have L places.
        """
        n, length, _ = hidden_states.shape
        if grid is None or grid[0] * grid[1] != length:
            raise ValueError(f"the grid must have {length} places, got {grid}")
        height, width = grid

        def as_map(tokens: Tensor) -> Tensor:  # (N, L, E) to (N, E, H, W), without a copy
            return tokens.transpose(1, 2).unflatten(2, (height, width))

        q, k, v = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)  # (N, L, I)
        r = self.bottleneck(hidden_states)  # (N, L, R)
        x = as_map(self.down(k * v))  # (N, S, H, W)
        if self.kind == "gspn" and holds_its_weights(self.gates):
            weight, bias = self._projection()
            h = propagate_low_rank(x, as_map(r), weight.to(x.dtype), bias.to(x.dtype), chunk_size=self.chunk_size)
        else:
            logits = as_map(self.gates(r)).unflatten(1, (len(DIRECTIONS), self.groups, 3))  # (N, D, G, 3, H, W)
            u = self.merge.to(x.dtype)[None, :, :, None, None].expand(n, -1, -1, height, width)
            h = propagate(x, logits, None, u, chunk_size=self.chunk_size)  # (N, S, H, W)
        y = self.lift(h.flatten(2).transpose(1, 2))  # (N, L, I)
        out: Tensor = self.to_out[1](self.to_out[0](q * y))
        return out
