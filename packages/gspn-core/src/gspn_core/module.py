"""The mixer module: computes weights and gates from its input, propagates in all directions, and merges the results."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _check, _library  # noqa: F401  (registers torch.ops.gspn)
from ._directions import DIRECTIONS

# Initial input gate of scans without chunks. A scan accumulates its input: over L lines noise grows like L^(1/4), but
# the mean of a smooth image like L, so that no single value suits both. With this one, a branch of a pre-norm residual
# network neither dominates its input nor vanishes at a depth of 50 (test_module.py measures it, up to 512 x 512).
_INITIAL_LAM = 1 / 128


def holds_its_weights(layer: nn.Module) -> bool:
    """Tell whether a convolution or linear layer is its weight and bias, and calling it does nothing else.

    Not so with hooks, as of accelerate's and diffusers' offloading and layerwise casting, whose weights are elsewhere
    until the layer is called, or with a layer around it, as of a LoRA.
    """
    plain = type(layer) in (nn.Conv2d, nn.Linear) and "forward" not in layer.__dict__
    return plain and not layer._forward_hooks and not layer._forward_pre_hooks


class SpatialPropagation(nn.Module):
    r"""Mix an image's pixels by line scans whose weights and gates are computed from the image.

        v          = value(x)                                  1x1 convolution to P channels, or x itself
        l, lam, u  = gates(bottleneck(x))                      1x1 convolutions
        y          = sum over d of m_d u_d * scan_d(l_d, lam_d * v)      (see `gspn_core.propagate`)
        out        = lift(y)                                   1x1 convolution back to C channels, or y itself

    The learned merge m has one entry per direction and is folded into u. Any H and W, non-square included; no
    positional embedding is needed.

        GSPN-1    SpatialPropagation(C, gate_rank=8, weight_groups=C)        weights of its own for every channel
        GSPN-2    SpatialPropagation(C, proxy_channels=2)                    weights shared in a proxy space
        local     SpatialPropagation(C, ..., chunk_size=2)                   independent chunks of two lines

    Args:
        channels: C of the input and output.
        proxy_channels: P, channels that are propagated, projected from and lifted back to C by 1x1 convolutions.
            None propagates the C channels themselves, without projections.
        gate_rank: channels of the bottleneck between the input and the gates. None computes them from the input itself.
        weight_groups: G, dividing P; each group of P/G consecutive channels shares its weights.
        directions: names out of `DIRECTIONS`.
        chunk_size: lines per independent chunk; None scans the whole image.
        bias: whether the 1x1 convolutions of value, bottleneck and lift have a bias. The gates always have one.

    Shapes: (N, C, H, W) to (N, C, H, W), in the dtype of the parameters: float32, float64, bfloat16 or float16.

    Raises:
        ValueError: a count is below 1, G does not divide P, a direction is unknown or repeated, or chunk_size < 1; in
            a call, the input is not of shape (N, C, H, W).
        TypeError: chunk_size is no integer, or directions no sequence; in a call, the input is not of a floating dtype.

    Sources: GSPN, arXiv 2501.12381, section 3 and appendix; GSPN-2, arXiv 2512.07884, section 3.
    """

    directions: list[int]  # indices into DIRECTIONS

    def __init__(
        self,
        channels: int,
        *,
        proxy_channels: int | None = None,
        gate_rank: int | None = None,
        weight_groups: int = 1,
        directions: Sequence[str] = DIRECTIONS,
        chunk_size: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        counts = {
            "channels": channels,
            "proxy_channels": proxy_channels,
            "gate_rank": gate_rank,
            "weight_groups": weight_groups,
        }
        for name, count in counts.items():
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {count!r}")
        propagated = proxy_channels or channels
        if propagated % weight_groups != 0:
            raise ValueError(f"weight_groups must divide the {propagated} propagated channels, got {weight_groups}")
        self.directions = _check.distinct_directions(directions)
        self.channels = channels
        self.proxy_channels = proxy_channels
        self.gate_rank = gate_rank
        self.weight_groups = weight_groups
        self.chunk_size = _check.chunk_size_argument(chunk_size)
        self.propagated_channels = propagated
        # The gates of every channel are made from the bottleneck where they are needed, and are never in memory.
        self._is_low_rank = gate_rank is not None and weight_groups == propagated

        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        count = len(self.directions)
        self._splits = [count * weight_groups * 3, count * propagated, count * propagated]
        self.value: nn.Module = nn.Identity()
        self.lift: nn.Module = nn.Identity()
        self.bottleneck: nn.Module = nn.Identity()
        if proxy_channels is not None:
            self.value = nn.Conv2d(channels, proxy_channels, 1, bias=bias, **kwargs)
            self.lift = nn.Conv2d(proxy_channels, channels, 1, bias=bias, **kwargs)
        if gate_rank is not None:
            self.bottleneck = nn.Conv2d(channels, gate_rank, 1, bias=bias, **kwargs)
        self.gates = nn.Conv2d(gate_rank or channels, sum(self._splits), 1, **kwargs)
        self.merge = nn.Parameter(torch.empty(count, **kwargs))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise: projections keep the variance, directions are averaged, gates start near a constant.

        The input gate starts below one over the number of lines that a scan accumulates. The output gate starts at a
        random sign, so that the means of many layers do not accumulate. Both vary by a tenth with the input.
        """
        initial_lam = _INITIAL_LAM
        if self.chunk_size is not None:
            initial_lam = max(initial_lam, 1 / (4 * self.chunk_size))
        for layer in (self.value, self.lift, self.bottleneck, self.gates):
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=layer.in_channels**-0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        assert self.gates.bias is not None
        _, lam_weight, u_weight = self.gates.weight.split(self._splits)
        _, lam_bias, u_bias = self.gates.bias.split(self._splits)
        lam_weight.mul_(0.1 * initial_lam)
        lam_bias.fill_(initial_lam)
        u_weight.mul_(0.1)
        u_bias.copy_(torch.randint_like(u_bias, 2).mul_(2).sub_(1))
        nn.init.constant_(self.merge, 1 / len(self.directions))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the arguments of `propagate`: v (N, P, H, W), logits (N, D, G, 3, H, W), lam and u (N, D, P, H, W)."""
        count = len(self.directions)
        logits, lam, u = self.gates(self.bottleneck(x)).split(self._splits, dim=1)
        logits = logits.unflatten(1, (count, self.weight_groups, 3))
        lam = lam.unflatten(1, (count, self.propagated_channels))
        u = u.unflatten(1, (count, self.propagated_channels)) * self.merge.to(u.dtype).view(-1, 1, 1, 1)
        return self.value(x), logits, lam, u

    def projection(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias as `propagate_low_rank` takes them, of one weight group per channel."""
        bias = self.gates.bias
        assert bias is not None
        weight = torch.cat([bias.unsqueeze(1), self.gates.weight.flatten(1)], dim=1)  # (5 D P, 1 + R)
        count, channels = len(self.directions), self.propagated_channels
        logits, lam, u = weight.split(self._splits)
        logits = logits.view(count, channels, 3, -1).transpose(1, 2)
        lam = lam.view(count, 1, channels, -1)
        u = u.view(count, 1, channels, -1) * self.merge.view(-1, 1, 1, 1)
        rows = torch.cat([logits, lam, u], dim=1)  # (D, 5, P, 1 + R)
        return rows[..., 1:], rows[..., 0]

    @torch.jit.unused
    def _gates_are_plain(self) -> bool:
        return holds_its_weights(self.gates)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the pixels of x, (N, C, H, W), into a tensor of the same shape."""
        _check.check_module_input(x, self.channels)
        if self._is_low_rank and (torch.jit.is_scripting() or self._gates_are_plain()):
            r, v = self.bottleneck(x), self.value(x)
            weight, bias = self.projection()
            y = torch.ops.gspn.propagate_low_rank(v, r, weight, bias, self.directions, self.chunk_size)[0]
        else:
            v, logits, lam, u = self.project(x)
            y = torch.ops.gspn.propagate(v, logits, lam, u, self.directions, self.chunk_size)[0]
        out: Tensor = self.lift(y)
        return out

    def extra_repr(self) -> str:
        """List the options that differ from their defaults."""
        parts = [f"{self.channels}"]
        for name, default in (
            ("proxy_channels", None),
            ("gate_rank", None),
            ("weight_groups", 1),
            ("chunk_size", None),
        ):
            value = getattr(self, name)
            if value != default:
                parts.append(f"{name}={value}")
        if self.directions != [0, 1, 2, 3]:
            parts.append(f"directions={tuple(DIRECTIONS[d] for d in self.directions)}")
        return ", ".join(parts)
