"""What several test files share: tiny UNets of the two families, and inputs."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from gspn_t2i.tiny import make_unet


def _unet(family: str, seed: int, changes: dict[str, Any]) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return make_unet(family, **changes)


def sd_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A tiny UNet as of SD 1.5."""
    return _unet("sd15", seed, changes)


def sdxl_unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A tiny UNet as of SDXL."""
    return _unet("sdxl", seed, changes)


UNETS = {"sd15": sd_unet, "sdxl": sdxl_unet}


def inputs(unet: UNet2DConditionModel, height: int = 8, width: int = 8, n: int = 2) -> dict[str, Any]:
    """What the UNet is called with."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    values: dict[str, Any] = {
        "sample": randn(n, 4, height, width),
        "timestep": torch.full((n,), 500),
        "encoder_hidden_states": randn(n, 7, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(n, -1)
        values["added_cond_kwargs"] = {"text_embeds": randn(n, 40), "time_ids": ids}
    return values


def run(unet: UNet2DConditionModel, **size: int) -> torch.Tensor:
    with torch.no_grad():
        return unet(**inputs(unet, **size)).sample
