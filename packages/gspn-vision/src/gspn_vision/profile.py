"""Parameters and multiply-adds of models, counted without memory for either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gspn_core.runs.errors import reason

from .config import ProfileConfig
from .models.build import check_name
from .models.published import PUBLISHED


@dataclass(frozen=True)
class Profile:
    """One model at one input size; multiply-adds of convolutions, matrix products and scans."""

    model: str
    size: tuple[int, int]
    params: int
    macs: int

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints: the counts, and the paper's figures where there are any."""
        published = PUBLISHED.get(self.model)
        return {**asdict(self), "published": None if published is None else asdict(published)}


def count(model: nn.Module, size: tuple[int, int], in_chans: int = 3) -> tuple[int, int]:
    """Return parameters and multiply-adds of one image; the model must be on the meta device."""
    params = sum(p.numel() for p in model.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, in_chans, *size, device="meta"))
    return params, counter.get_total_flops() // 2


def profile(name: str, size: tuple[int, int] | None = None, **kwargs: Any) -> Profile:
    """Count a timm model, at its own input size if none is given; `kwargs` go to its constructor.

    Raises:
        ValueError: timm knows no such model, or it does not take images of this size.
    """
    check_name(name)
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs).eval()
    own: Any = model.pretrained_cfg
    height, width = size or own["input_size"][1:]
    try:
        params, macs = count(model, (height, width), kwargs.get("in_chans", 3))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"{name} does not take images of {height}x{width}: {reason(error)}") from error
    return Profile(name, (height, width), params, macs)


def table(profiles: Sequence[Profile]) -> str:
    """Lay out counts beside what the papers report at 224x224."""
    width = max(len("model"), *(len(p.model) for p in profiles))
    lines = [f"{'model':{width}s}  {'input':>9s}  {'params':>8s}  {'MACs':>8s}   published (224x224)"]
    for p in profiles:
        published = PUBLISHED.get(p.model)
        size = f"{p.size[0]}x{p.size[1]}"
        line = f"{p.model:{width}s}  {size:>9s}  {p.params / 1e6:7.2f}M  {p.macs / 1e9:7.2f}G"
        if published is not None:
            line += f"   {published.params:g}M, {published.macs:g}G ({published.source})"
            if p.size == (224, 224):
                line += f": {100 * (p.params / 1e6 / published.params - 1):+.1f}%"
                line += f", {100 * (p.macs / 1e9 / published.macs - 1):+.1f}%"
        lines.append(line)
    return "\n".join(lines)


def run(config: ProfileConfig) -> dict[str, Any]:
    """Count as configured."""
    size = None if config.image_size is None else (config.image_size.height, config.image_size.width)
    profiles = [profile(name, size) for name in config.models or timm.list_models("gspn*")]
    return {"models": [counted.as_dict() for counted in profiles]}


def as_text(result: dict[str, Any]) -> str:
    """Return the table."""
    fields = ("model", "size", "params", "macs")
    return table([Profile(*(values[field] for field in fields)) for values in result["models"]])
