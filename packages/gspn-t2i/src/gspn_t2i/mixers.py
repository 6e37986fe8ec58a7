"""The replacement of a self-attention: the same four projections around line scans.

Linear attention is  y_i = q_i sum_j (k_j v_j),  GSPN  y_i = u_i sum_j w_ij (lam_j x_j),  where scans compute the sum: u
corresponds to the queries, the input gate lam to the keys and the scanned input x to the values. So a mixer can start
from an attention's projections.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gspn_core import DIRECTIONS, propagate

KINDS = ("gspn", "gspn2")


class SelfAttentionMixer(nn.Module):
    r"""Mix the tokens of an image by line scans; it has the interface and the projections of a diffusers `Attention`.

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

    The grid is set by the adapter before every forward pass of the transformer around it.

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
        self.grid: tuple[int, int] | None = None
        self.to_q = nn.Linear(channels, inner, bias=bias)
        self.to_k = nn.Linear(channels, inner, bias=bias)
        self.to_v = nn.Linear(channels, inner, bias=bias)
        # As in diffusers' Attention, so that LoRA and conversions find it.
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
        """Copy an attention's projections: Q to u, K to lam, V to the scanned input, and the output projection."""
        for name in ("to_q", "to_k", "to_v"):
            getattr(self, name).load_state_dict(getattr(attention, name).state_dict())
        ours, theirs = self.to_out[0], attention.to_out[0]
        assert isinstance(ours, nn.Linear)
        ours.weight.copy_(theirs.weight)
        if theirs.bias is None:
            nn.init.zeros_(ours.bias)
        else:
            ours.bias.copy_(theirs.bias)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Mix tokens (N, L, C) of the grid set, row by row, into tokens of the same shape; no other input is used.

        Raises:
            ValueError: another sequence or a mask is given, or the grid does not have L places.
        """
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("a mixer is a self-attention without a mask, got another sequence or a mask")
        n, length, _ = hidden_states.shape
        if self.grid is None or self.grid[0] * self.grid[1] != length:
            raise ValueError(f"the grid must have {length} places, got {self.grid}; is the adapter mounted?")
        height, width = self.grid

        def as_map(tokens: Tensor) -> Tensor:  # (N, L, E) to (N, E, H, W), without a copy
            return tokens.transpose(1, 2).unflatten(2, (height, width))

        q, k, v = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)  # (N, L, I)
        logits = as_map(self.gates(self.bottleneck(hidden_states)))
        logits = logits.unflatten(1, (len(DIRECTIONS), self.groups, 3))  # (N, D, G, 3, H, W)
        x = as_map(self.down(k * v))  # (N, S, H, W)
        u = self.merge.to(x.dtype)[None, :, :, None, None].expand(n, -1, -1, height, width)
        h = propagate(x, logits, None, u, chunk_size=self.chunk_size)  # (N, S, H, W)
        y = self.lift(h.flatten(2).transpose(1, 2))  # (N, L, I)
        out: Tensor = self.to_out[1](self.to_out[0](q * y))
        return out
