"""Diffusers pipelines as the commands use them: loading, mounting an adapter, devices, and saving images."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from diffusers import (
    AutoPipelineForText2Image,
    ControlNetModel,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor, nn

from gspn_core.runs.errors import is_unreachable, reason
from gspn_core.runs.files import replacing
from gspn_core.runs.options import ImageSize, Precision
from gspn_core.runs.training import use_cpu

from .adapter import GSPNAdapter
from .config import DrawingOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What one file of weights can be, by diffusers' names of kinds.
_SINGLE_FILES = {"v1": StableDiffusionPipeline, "v2": StableDiffusionPipeline}
_SINGLE_FILES |= dict.fromkeys(("xl_base", "playground-v2-5"), StableDiffusionXLPipeline)
# Options of where weights lie, which records compare by a hash of the weights.
PLACES = ("pipeline", "adapter", "variant", "revision", "pipeline_config", "lora")
TILED_ABOVE = 1024 * 1024  # pixels, SDXL's own size: larger images are decoded in tiles unless asked otherwise
CPU = torch.device("cpu")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name."""
    return reason(error)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hide the bars of loading weights, a line of each part; those of downloads stay."""
    libraries = [transformers.utils.logging, diffusers_logging]
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def load_adapter(name: str) -> GSPNAdapter:
    """Load an adapter.

    Raises:
        FileNotFoundError: there is none of this name, or it cannot be downloaded.
        ValueError: it is not an adapter, lacks a weight, or has one that is not finite.
    """
    try:
        adapter: GSPNAdapter = GSPNAdapter.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(f"no adapter {name!r}: {first_line(error)}") from None
    return adapter


def _load_single_file(name: str, config: str | None, **options: Any) -> Any:
    """Load a pipeline from one file of all its weights, as of Stable Diffusion's authors and Civitai."""
    if not Path(name).is_file():
        raise FileNotFoundError(f"no pipeline {name!r}: there is no such file")
    weights = load_single_file_checkpoint(name)
    # Whatever diffusers does not know is "v1".
    kind = (
        infer_diffusers_model_type(weights) if any(key.startswith("model.diffusion_model.") for key in weights) else ""
    )
    if kind not in _SINGLE_FILES:
        reason = f"of the kind {kind!r}" if kind else "no pipeline's"
        raise ValueError(f"pipeline must be of Stable Diffusion 1.5, 2.x or SDXL, {name!r} is {reason}")
    return _SINGLE_FILES[kind].from_single_file(name, config=config, **options)


def load_pipeline(
    name: str,
    adapter: str | None,
    dtype: torch.dtype,
    *,
    variant: str | None = None,
    revision: str | None = None,
    pipeline_config: str | None = None,
    controlnet: str | None = None,
) -> Any:
    """Load a pipeline and mount an adapter on its UNet.

    Args:
        name: a folder, a name on the Hub, or a `.safetensors` file.
        adapter: as of `load_adapter`; None mounts none.
        dtype: of the weights.
        variant, revision: of the weights, by diffusers' names; not of a file.
        pipeline_config: folder or name of a pipeline like that in a file; None is the usual one, on the Hub.
        controlnet: folder or name of a ControlNet to draw with.

    Raises:
        FileNotFoundError: there is none of this name, or it cannot be downloaded.
        ValueError: the pipeline has no UNet, or one that takes more than noisy latents, or the adapter does not fit.
    """
    try:
        with _no_bars():
            if name.endswith(".safetensors"):
                pipeline = _load_single_file(name, pipeline_config, dtype=dtype)
            else:
                where = {"variant": variant, "revision": revision}
                pipeline = AutoPipelineForText2Image.from_pretrained(name, dtype=dtype, **where)
            if controlnet is not None:
                control = ControlNetModel.from_pretrained(controlnet, dtype=dtype)
                pipeline = AutoPipelineForText2Image.from_pipe(pipeline, controlnet=control)
    except OSError as error:
        missing = f"pipeline {name!r}" + ("" if controlnet is None else f" or ControlNet {controlnet!r}")
        raise FileNotFoundError(f"no {missing}: {first_line(error)}") from None
    if getattr(pipeline, "unet", None) is None:
        raise ValueError(f"pipeline must have a UNet to mount mixers on, {type(pipeline).__name__} has none")
    takes, latents = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if takes != latents:
        raise ValueError(
            f"pipeline must draw from noise alone, in {latents} channels, the UNet of {name!r} takes {takes} "
            "(as for inpainting)"
        )
    if adapter is not None:
        _mount(pipeline, adapter)
    return pipeline


def _mount(pipeline: Any, adapter: str) -> None:
    # Commands have no use for the attention any more.
    load_adapter(adapter).mount(pipeline.unet, discard=True)


def open_pipeline(config: DrawingOptions, name: str, controlnet: str | None = None) -> Any:
    """Load a pipeline to draw with, as the options say: its adapter, LoRAs and scheduler.

    Raises:
        FileNotFoundError, ValueError: as `load_pipeline`; or a LoRA or the scheduler does not fit.
    """
    pipeline = load_pipeline(
        name,
        None,
        DTYPES[precision_of(config)],
        variant=config.variant,
        revision=config.revision,
        pipeline_config=config.pipeline_config,
        controlnet=controlnet,
    )
    _load_loras(pipeline, config)
    if config.adapter is not None:
        _mount(pipeline, config.adapter)  # after the LoRAs, some of which would look for the attentions
    if config.scheduler is not None or config.scheduler_kwargs:
        pipeline.scheduler = _make_scheduler(pipeline.scheduler, config)
    return pipeline


def _load_loras(pipeline: Any, config: DrawingOptions) -> None:
    names = [f"lora-{number}" for number in range(len(config.lora))]
    for name, lora in zip(names, config.lora, strict=True):
        where, options = lora, {}
        if lora.endswith(".safetensors") and not Path(lora).is_file():  # of a repository on the Hub that has several
            owner, _, rest = lora.partition("/")
            repository, _, options["weight_name"] = rest.partition("/")
            where = f"{owner}/{repository}"
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of the LoRA before
                pipeline.load_lora_weights(where, adapter_name=name, **options)
        except Exception as error:  # whatever diffusers, peft, safetensors and the Hub's client meet
            if isinstance(error, OSError) or is_unreachable(error):
                raise FileNotFoundError(f"no LoRA {lora!r}: {first_line(error)}") from None
            raise ValueError(f"lora {lora!r} does not fit the pipeline: {first_line(error)}") from error
    if names:
        pipeline.set_adapters(names, config.lora_scales or [1.0] * len(names))


def _make_scheduler(own: Any, config: DrawingOptions) -> Any:
    """Return the scheduler of the options, with the noise of a pipeline's own."""
    known = {kind.__name__: kind for kind in (*own.compatibles, type(own))}
    name = config.scheduler or type(own).__name__
    if name not in known:
        raise ValueError(f"scheduler must be one of {', '.join(sorted(known))}, got {name!r}")
    unknown = sorted(config.scheduler_kwargs.keys() - inspect.signature(known[name].__init__).parameters.keys())
    if unknown:
        raise ValueError(f"scheduler_kwargs must be arguments of {name}, got {unknown[0]!r}")
    return known[name].from_config(own.config, **config.scheduler_kwargs)


def precision_of(config: DrawingOptions) -> Precision:
    """Return the precision of the options; without one, half on an accelerator."""
    return config.precision or ("fp32" if use_cpu(config.device) else "fp16")


def hash_parts(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the weights of modules and of the settings of schedulers, by their names.

    It is the same wherever they were loaded from, and on every device.
    """

    def digest(tensor: Tensor) -> str:
        return hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()

    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            own = dict(part.named_parameters()) | dict(part.named_buffers())
            tensors |= {f"{name}.{key}": value for key, value in own.items() if not value.is_meta}
        elif isinstance(part, SchedulerMixin):
            values = {key: str(value) for key, value in part.config.items() if not key.startswith("_")}
            settings[name] = {"class": type(part).__name__, **values}
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock to others
        hashes = dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))
    shapes = {key: [str(tensor.dtype), *tensor.shape, hashes[key]] for key, tensor in tensors.items()}
    return hashlib.sha256(json.dumps([shapes, settings], sort_keys=True).encode()).hexdigest()


def own_size(pipeline: Any) -> ImageSize:
    """Return the image size that a pipeline was trained for."""
    size, factor = pipeline.unet.config.sample_size, pipeline.vae_scale_factor
    height, width = (size, size) if isinstance(size, int) else size
    return ImageSize(height * factor, width * factor)


def is_tiled(choice: str, size: ImageSize) -> bool:
    """Tell whether an option `vae_tiling` means tiles for an image of this size."""
    return choice == "always" or (choice == "auto" and size.height * size.width > TILED_ABOVE)


def one_device(device: str) -> torch.device:
    """Return the device of a command that runs in one process, by its option `device`."""
    accelerator = None if use_cpu(device) else torch.accelerator.current_accelerator(check_available=True)
    return accelerator or CPU


def open_processes(device: str) -> tuple[PartialState, torch.device]:
    """Join the other processes, if there are any; return accelerate's view of them and the device of this one."""
    on_cpu = use_cpu(device)
    state = PartialState(cpu=on_cpu)
    return state, CPU if on_cpu else state.device


def check_offload(offload: str, device: str) -> None:
    """Refuse to offload where there is nothing to offload from.

    Raises:
        ValueError: with the option `offload`.
    """
    if offload != "none" and use_cpu(device):
        raise ValueError(f"offload needs an accelerator to be useful, got {offload!r} on the CPU")


def place(pipeline: Any, device: torch.device, offload: str) -> None:
    """Put a pipeline where it computes, or let its parts come there in turn: by "model", "sequential" or "group"."""
    if offload == "none":
        pipeline.to(device)
    elif offload == "group":
        pipeline.enable_group_offload(onload_device=device, offload_type="leaf_level")
    else:
        getattr(pipeline, f"enable_{offload}_cpu_offload")(device=device)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        WriteError: the disk is full or not writable.
    """
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
