"""C-GSPN's mixer: line scans of a narrow latent, in the place of a vision transformer's attention."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gspn_core import SpatialPropagation

from .grid import current_grid

SHARE = 1 / 18  # of C, the best of 1/12, 1/18 and 1/72 in the paper


def latent_channels(dim: int, latent: float) -> int:
    """Return P: `latent` itself if it is an integer, else that share of `dim`, rounded up to a multiple of 8.

    Raises:
        ValueError: it is neither an integer from 1 nor a share between 0 and 1.
    """
    if isinstance(latent, float) and 0 < latent < 1:
        return 8 * max(1, -int(-dim * latent // 8))
    if isinstance(latent, bool) or not isinstance(latent, int) or latent < 1:
        raise ValueError(f"latent must be a number of channels from 1 or a share between 0 and 1, got {latent!r}")
    return latent


@torch.fx.wrap
def _check_call(
    x: Tensor, prefix_tokens: int, height: int, width: int, attn_mask: Tensor | None, is_causal: bool
) -> None:
    """Refuse a mask, and tokens that do not fill the grid; torch.fx calls it when the graph runs."""
    if attn_mask is not None or is_causal:
        raise ValueError("a converted block mixes whole images, got attn_mask or is_causal")
    if x.shape[1] != prefix_tokens + height * width:
        wanted = f"{prefix_tokens} prefix tokens and those of a grid of {height}x{width}"
        raise ValueError(f"x must have {wanted}, got {x.shape[1]} tokens")


class CompressedPropagation(nn.Module):
    r"""Mix an image's tokens by line scans of a latent, and prefix tokens by an attention of T queries.

        z   = down(x)                                      image tokens, C to P channels
        y   = propagation(z)                               gates and weights from z, see `gspn_core.SpatialPropagation`
        y  += softmax(z K(p)' / sqrt(P)) V(p)              image tokens read the T prefix tokens p in the latent
        out = up(y)                                        P to C channels
        p'  = O concat over heads of softmax(Q p (K [p, x])' / sqrt(d)) V [p, x]

    No inner residual and no expansion. Without prefix tokens it is the paper's layer. T queries need neither keys nor
    values of every token: K goes to the side of the queries and V behind the weighted sum, which is the same attention
    at T times the number of heads multiplications per pixel and channel, instead of 2 C.

    Args:
        dim: C, channels of a token.
        prefix_tokens: T, tokens before those of the image.
        num_heads: of the prefix tokens' attention, dividing C.
        latent: P, or as a share of C, rounded up to a multiple of 8.
        weight_groups: groups of latent channels that share scan weights; "channels" gives each channel its own.
        chunk_size: lines per independent chunk; None scans the whole image.
        prefix: "attend", or "drop": prefix tokens are neither mixed (their output is 0) nor read.

    Shapes: (N, T + H W, C) to the same, in the dtype of the parameters: float32, float64, bfloat16 or float16.

    Raises:
        ValueError: an argument does not fit; in a call, an attention mask is given, or the tokens do not fill the grid.
        RuntimeError: a call is outside a converted model's, and names no grid.

    Sources: C-GSPN, CVPR 2026, arXiv 2606.00746. The prefix tokens' paths are ours: the paper has none.
    """

    def __init__(
        self,
        dim: int,
        *,
        prefix_tokens: int = 0,
        num_heads: int = 1,
        latent: float = SHARE,
        weight_groups: int | Literal["channels"] = 1,
        chunk_size: int | None = None,
        prefix: Literal["attend", "drop"] = "attend",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if prefix not in ("attend", "drop"):
            raise ValueError(f"prefix must be 'attend' or 'drop', got {prefix!r}")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide the {dim} channels, got {num_heads}")
        width = latent_channels(dim, latent)
        groups = width if weight_groups == "channels" else weight_groups
        if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
            raise ValueError(f"weight_groups must be an integer from 1 or 'channels', got {weight_groups!r}")
        if isinstance(latent, float):
            width = -(-width // groups) * groups
        self.prefix_tokens = prefix_tokens
        self.num_heads = num_heads
        self.attends = prefix == "attend" and prefix_tokens > 0
        self.down = nn.Linear(dim, width, device=device, dtype=dtype)
        self.propagation = SpatialPropagation(
            width, weight_groups=groups, chunk_size=chunk_size, device=device, dtype=dtype
        )
        self.up = nn.Linear(width, dim, device=device, dtype=dtype)
        if self.attends:
            self.prefix_k = nn.Linear(dim, width, bias=False, device=device, dtype=dtype)  # softmax cancels a bias
            self.prefix_v = nn.Linear(dim, width, device=device, dtype=dtype)
            self.q = nn.Linear(dim, dim, device=device, dtype=dtype)
            self.k = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
            self.v = nn.Linear(dim, dim, device=device, dtype=dtype)
            self.out = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.reset_parameters()

    def set_window_size(self, *_: object, **__: object) -> None:
        """Do nothing: scans have no window. timm tells the attention of some models their window for another size."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise: every projection keeps the variance of its input."""
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.propagation.reset_parameters()

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        shared_rel_pos: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """Mix tokens x, (N, T + H W, C); `grid` is (H, W), by default that of the model's call.

        The scans know where a token is: rotary embeddings and relative position biases are not used.
        """
        height, width = grid or current_grid()
        _check_call(x, self.prefix_tokens, height, width, attn_mask, is_causal)
        prefix = x[:, : self.prefix_tokens]
        z = self.down(x)[:, self.prefix_tokens :]
        y = self.propagation(z.transpose(1, 2).unflatten(2, (height, width)))
        y = y.flatten(2).transpose(1, 2)
        if self.attends:
            k, v = (layer(prefix).unsqueeze(1) for layer in (self.prefix_k, self.prefix_v))
            y = y + F.scaled_dot_product_attention(z.unsqueeze(1), k, v).squeeze(1)
        mixed: Tensor = self.up(y)
        if self.prefix_tokens == 0:
            return mixed
        return torch.cat([self._read(prefix, x) if self.attends else torch.zeros_like(prefix), mixed], dim=1)

    def _read(self, prefix: Tensor, x: Tensor) -> Tensor:
        """Return what the prefix tokens, (N, T, C), read of all tokens x, (N, T + H W, C)."""
        n, t, c = prefix.shape
        heads = (self.num_heads, c // self.num_heads)  # h, d
        q = self.q(prefix).unflatten(2, heads)
        keys = torch.einsum("nthd,hdc->nthc", q, self.k.weight.unflatten(0, heads)).flatten(1, 2)
        every = x.unsqueeze(1)
        seen = F.scaled_dot_product_attention(keys.unsqueeze(1), every, every, scale=heads[1] ** -0.5)
        seen = seen.view(n, t, heads[0], c)
        values = torch.einsum("nthc,hdc->nthd", seen, self.v.weight.unflatten(0, heads)).flatten(2)
        read: Tensor = self.out(values + self.v.bias)
        return read
