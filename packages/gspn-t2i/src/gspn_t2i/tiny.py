"""Complete tiny pipelines, built without a download: for tests, demonstrations and trying things out.

A byte-level tokenizer, text encoders, an autoencoder and a UNet of a few million parameters in all, with random
weights, in the layout of Stable Diffusion 1.5 ("sd15") or SDXL ("sdxl").
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel

from .architectures import FAMILIES, SHAPES, make_pipeline
from .config import TinyConfig


def make_tokenizer(folder: Path, *, pad: str | None = None, words: Sequence[str] = ("the",), length: int = 77) -> Any:
    """Write and open a CLIP tokenizer of the 256 byte symbols and the merges that make some words one token each.

    Args:
        folder: for its files.
        pad: a separate padding token, as of SDXL's second tokenizer ("!!!"); None pads with the end token.
        words: each to become one token.
        length: of a caption in tokens, at most.

    Raises:
        ValueError: the merges of two words conflict.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    merges = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for end in range(2, len(pieces) + 1):
            merge = ("".join(pieces[: end - 1]), pieces[end - 1])
            if merge not in merges:
                merges.append(merge)
                tokens.append("".join(merge))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: place for place, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=length)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise ValueError(f"words must be such that each becomes one token, {word!r} does not")
    if pad is not None:
        tokenizer.add_special_tokens({"pad_token": pad})
    return tokenizer


def make_text_encoder(tokenizer: Any, width: int, *, projection: bool = False, layers: int = 3) -> Any:
    """Build a CLIP text encoder for a tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def make_vae(channels: Sequence[int] = (8, 8, 8, 8), groups: int = 4) -> AutoencoderKL:
    """Build an autoencoder with four latent channels; every level but the last halves height and width."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        norm_num_groups=groups,
        sample_size=8 * 2 ** (len(channels) - 1),
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
    shape: dict[str, Any] = {**SHAPES.get(family, {}), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8}
    if family == "sd15":
        shape |= {"block_out_channels": (16, 32, 32, 32), "cross_attention_dim": 32}
    elif family == "sdxl":
        shape |= {
            "block_out_channels": (16, 32, 32),
            "attention_head_dim": (2, 4, 4),
            "transformer_layers_per_block": (1, 2, 2),
            "cross_attention_dim": 64,
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
                return make_pipeline(unet, vae, tokenizer=tokenizer, text_encoder=make_text_encoder(tokenizer, 32))
            second = make_tokenizer(Path(folder) / "tokenizer_2", pad="!!!")
            return make_pipeline(
                unet,
                vae,
                tokenizer=tokenizer,
                text_encoder=make_text_encoder(tokenizer, 24),
                tokenizer_2=second,
                text_encoder_2=make_text_encoder(second, 40, projection=True),
            )


def write(family: str, folder: str | Path, *, seed: int = 0) -> Path:
    """Build a pipeline and save it.

    Raises:
        ValueError: the family is unknown, or the folder is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out must be a new or empty folder, got {str(folder)!r}")
    build(family, seed=seed).save_pretrained(folder)
    return folder


def run_tiny(config: TinyConfig) -> dict[str, Any]:
    """Build a pipeline and save it as configured; return its folder."""
    return {"folder": str(write(config.family, config.out, seed=config.seed))}
