"""The UNets and autoencoders of Stable Diffusion 1.5 and SDXL with random weights: no download, on any device."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

# Arguments that differ from diffusers' defaults.
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    },
}
FAMILIES = tuple(SHAPES)
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_unet(
    family: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """Build the UNet of "sd15" (860M parameters) or "sdxl" (2,567M), in evaluation mode.

    Raises:
        ValueError: the family is unknown.
    """
    if family not in SHAPES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    with torch.device(device):
        unet = UNet2DConditionModel(**SHAPES[family])
    nn.Module.to(unet, dtype)  # diffusers' own warns that nothing is left in float32
    return unet.eval().requires_grad_(False)


def make_vae(family: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Build the autoencoder of a family (84M parameters), in evaluation mode; they differ in the size of a tile."""
    with torch.device(device):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=8 * SHAPES[family]["sample_size"],
        )
    nn.Module.to(vae, dtype)
    return vae.eval().requires_grad_(False)


def make_pipeline(unet: UNet2DConditionModel, vae: AutoencoderKL, **texts: Any) -> Any:
    """Put a UNet and an autoencoder into a pipeline of the UNet's family, with the sampler of that family.

    Args:
        unet, vae: of one family.
        texts: tokenizers and text encoders; a pipeline without them takes embeddings of prompts.
    """
    parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
    if unet.config.addition_embed_type == "text_time":
        parts |= {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        return StableDiffusionXLPipeline(
            vae=vae, unet=unet, scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1), **parts | texts
        )
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(vae=vae, unet=unet, scheduler=scheduler, **parts | texts)


def make_inputs(unet: UNet2DConditionModel, height: int, width: int, batch: int = 1) -> dict[str, Any]:
    """Build a UNet's inputs for an image of height and width in pixels; zeros, as their values do not matter.

    Raises:
        ValueError: height or width is not a multiple of 8, the autoencoder's factor.
    """
    if height % 8 or width % 8:
        raise ValueError(f"height and width must be multiples of 8, got {height} x {width}")
    like = next(unet.parameters())

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, device=like.device, dtype=like.dtype)

    config = unet.config
    values: dict[str, Any] = {
        "sample": zeros(batch, config.in_channels, height // 8, width // 8),
        "timestep": torch.full((batch,), 500, device=like.device),
        "encoder_hidden_states": zeros(batch, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        values["added_cond_kwargs"] = {"text_embeds": zeros(batch, pooled), "time_ids": zeros(batch, 6)}
    return values
