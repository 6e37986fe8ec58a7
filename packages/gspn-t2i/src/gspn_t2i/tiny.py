"""Complete tiny pipelines, built locally without a download: for tests, demonstrations and trying things out.

A byte-level tokenizer, text encoders, an autoencoder and a UNet of a few million parameters in all, with random
weights, in the layout of Stable Diffusion 1.5 ("sd15") or SDXL ("sdxl").
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

FAMILIES = ("sd15", "sdxl")

_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_tokenizer(folder: Path, *, pad: str | None = None) -> Any:
    """Write and open a CLIP tokenizer of the 256 byte symbols and two merges.

    Args:
        folder: for its files.
        pad: padding token of its own, as SDXL's second tokenizer has ("!!!"); None pads with the end token.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "th", "the</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: place for place, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e</w>\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer


def _text_encoder(tokenizer: Any, width: int, *, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def make_vae() -> AutoencoderKL:
    """Build an autoencoder of factor 8 with four latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        latent_channels=4,
    ).eval()


def make_unet(family: str, **changes: Any) -> UNet2DConditionModel:
    """Build a UNet of a family: four levels with single blocks (sd15), or three with one and two blocks (sdxl).

    Args:
        family: "sd15" or "sdxl".
        changes: constructor arguments that differ.

    Raises:
        ValueError: the family is unknown.
    """
    shape: dict[str, Any] = {"norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
    if family == "sd15":
        shape |= {"block_out_channels": (16, 32, 32, 32), "attention_head_dim": 8, "cross_attention_dim": 32}
    elif family == "sdxl":
        shape |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (16, 32, 32),
            "attention_head_dim": (2, 4, 4),
            "transformer_layers_per_block": (1, 2, 2),
            "cross_attention_dim": 64,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 40 + 6 * 8,
        }
    else:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    return UNet2DConditionModel(**{**shape, **changes}).eval()


def build(family: str, *, seed: int = 0) -> DiffusionPipeline:
    """Build a pipeline with random weights, a function of the seed.

    Args:
        family: "sd15" or "sdxl".
        seed: of the weights.

    Raises:
        ValueError: the family is unknown.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, vae = make_unet(family), make_vae()
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = make_tokenizer(Path(folder) / "tokenizer")
            if family == "sd15":
                return StableDiffusionPipeline(
                    vae=vae,
                    text_encoder=_text_encoder(tokenizer, 32, projection=False),
                    tokenizer=tokenizer,
                    unet=unet,
                    scheduler=DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
                    safety_checker=None,
                    feature_extractor=None,
                    requires_safety_checker=False,
                )
            second = make_tokenizer(Path(folder) / "tokenizer_2", pad="!!!")
            return StableDiffusionXLPipeline(
                vae=vae,
                text_encoder=_text_encoder(tokenizer, 24, projection=False),
                text_encoder_2=_text_encoder(second, 40, projection=True),
                tokenizer=tokenizer,
                tokenizer_2=second,
                unet=unet,
                scheduler=EulerDiscreteScheduler(**_BETAS, steps_offset=1),
                add_watermarker=False,
            )


def write(family: str, folder: str | Path, *, seed: int = 0) -> Path:
    """Build a pipeline and save it.

    Raises:
        ValueError: the family is unknown, or the folder holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty, got {str(folder)!r}")
    build(family, seed=seed).save_pretrained(folder)
    return folder
