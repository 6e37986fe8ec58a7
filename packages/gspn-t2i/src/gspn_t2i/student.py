"""Teacher and student of a distillation: two UNets that share all weights but those of the student's mixers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gspn_core.runs.order import INIT, derive_seed

from .adapter import GSPNAdapter
from .conditions import Batch
from .config import DistillConfig
from .pipelines import DTYPES, load_adapter, load_pipeline

# The files of an adapter, by diffusers' names: `from_pretrained(folder, variant="ema")` reads the averaged mixers.
WEIGHTS = "diffusion_pytorch_model.safetensors"
AVERAGED = "diffusion_pytorch_model.ema.safetensors"
CONFIG = "config.json"


def with_start(config: DistillConfig) -> DistillConfig:
    """Return the options with those that the adapter of `start_from` was built with, which a run records.

    Raises:
        ValueError: an option asks for another adapter.
    """
    if config.start_from is None:
        return config
    try:
        own = GSPNAdapter.load_config(config.start_from)
    except OSError:
        return config  # `build_adapter` says what is wrong with it
    defaults = DistillConfig(pipeline=config.pipeline, data=config.data)
    kept = {"init": defaults.init, "keep_attention": defaults.keep_attention}
    built = {name: own.get(name) for name in ("mixer", "proxy", "bottleneck", "chunk_size")} | kept
    for name, value in built.items():
        asked = getattr(config, name)
        if asked not in (value, getattr(defaults, name)):
            raise ValueError(f"{name} is for a new adapter, start_from names one with {value!r}, got {asked!r}")
    return dataclasses.replace(config, **built)


def load_teacher(config: DistillConfig, device: torch.device) -> Any:
    """Load the pipeline whose UNet is the teacher, frozen.

    Raises:
        FileNotFoundError: there is none of this name, or it cannot be downloaded.
        ValueError: the pipeline has no UNet.
    """
    pipeline = load_pipeline(
        config.pipeline,
        None,
        DTYPES[config.precision],
        variant=config.variant,
        revision=config.revision,
        pipeline_config=config.pipeline_config,
    )
    for name in ("vae", "unet", "text_encoder", "text_encoder_2"):
        module: nn.Module | None = getattr(pipeline, name, None)
        if module is not None:
            module.requires_grad_(False).eval().to(device)
    if pipeline.vae.config.get("force_upcast"):
        pipeline.vae.float()  # of SDXL: half precision is too narrow for it
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_adapter(config: DistillConfig, teacher: nn.Module) -> GSPNAdapter:
    """Build the mixers to train, or load those to begin with, in float32.

    Raises:
        FileNotFoundError: there is no adapter of this name.
        ValueError: an option does not fit the teacher.
    """
    torch.manual_seed(derive_seed(INIT, config.seed))
    if config.start_from is not None:
        adapter = load_adapter(config.start_from)
    else:
        adapter = GSPNAdapter.for_unet(
            teacher,
            mixer=config.mixer,
            proxy=config.proxy,
            bottleneck=config.bottleneck,
            chunk_size=config.chunk_size,
            init=config.init,
            keep_attention=config.keep_attention,
        )
    adapter.mixers.to(device=next(teacher.parameters()).device, dtype=torch.float32).requires_grad_(True)
    return adapter


def make_optimizer(config: DistillConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Make AdamW, torch's or the one of bitsandbytes, which keeps its moments in 8 bits.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, **options)
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise ValueError("use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from None

    class Adam(AdamW8bit):  # type: ignore[misc, unused-ignore]
        # Its own hides the moments within a dictionary, for FSDP, where checkpoints do not find them.
        state_dict = torch.optim.Optimizer.state_dict

    optimizer: torch.optim.Optimizer = Adam(parameters, **options)
    return optimizer


def student_of(unet: nn.Module) -> nn.Module:
    """Return a copy of a UNet that shares its parameters and buffers."""
    shared = {id(tensor): tensor for tensors in (unet.parameters(), unet.buffers()) for tensor in tensors}
    return copy.deepcopy(unet, shared)


def predict(unet: Any, noisy: Tensor, times: Tensor, batch: Batch) -> Tensor:
    """Return what a UNet predicts, (N, C, h, w), for noisy latents of that shape at times (N,)."""
    added = None
    if batch.embeddings.pooled is not None:
        added = {"text_embeds": batch.embeddings.pooled, "time_ids": batch.sizes.to(batch.embeddings.pooled.dtype)}
    prediction: Tensor = unet(
        noisy, times, encoder_hidden_states=batch.embeddings.states, added_cond_kwargs=added, return_dict=False
    )[0]
    return prediction
