"""`generate`: images of prompts, by a pipeline with or without an adapter, one process or several."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import AutoPipelineForText2Image
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt
from PIL import Image
from tqdm import tqdm

from .adapter import GSPNAdapter
from .files import save_png, write_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Pixels from which the autoencoder works in tiles, unless asked otherwise: beyond SDXL's own size.
TILED_FROM = 1024 * 1024 + 1


@dataclasses.dataclass(kw_only=True, frozen=True)
class GenerateConfig:
    """Every option of `gspn-t2i generate`.

    Args:
        pipeline: diffusers pipeline, a folder or the name of one on the Hub
        adapter: GSPN adapter to mount on its UNet, a folder or the name of one on the Hub
        prompt: what to draw; repeatable as a list
        prompt_file: text file of further prompts, one in a line
        negative_prompt: what not to draw
        out: folder of the images; those that are there are kept
        images_per_prompt: images of each prompt
        height: in pixels; absent: the pipeline's own
        width: likewise
        steps: of the sampler
        guidance: scale of classifier-free guidance
        seed: image i is drawn with seed + i
        batch_size: images per forward pass; another one may change the last bits
        dtype: of weights and activations
        vae_tiling: decode in tiles, to save memory; auto does from 1024x1024 pixels on
        offload: keep on the accelerator only what computes, to save memory
        device: auto takes the accelerator if any
        progress: show progress bars
    """

    pipeline: str
    adapter: str | None = None
    prompt: str | list[str] | None = None
    prompt_file: str | None = None
    negative_prompt: str | None = None
    out: str = "images"
    images_per_prompt: PositiveInt = 1
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    steps: PositiveInt = 50
    guidance: NonNegativeFloat = 7.5
    seed: NonNegativeInt = 0
    batch_size: PositiveInt = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    vae_tiling: Literal["auto", "on", "off"] = "auto"
    offload: Literal["none", "model", "sequential"] = "none"
    device: Literal["auto", "cpu"] = "auto"
    progress: bool = True


def read_prompts(config: GenerateConfig) -> list[str]:
    """Return the prompts, those of the command line first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a prompt is empty, or there is none.
    """
    given = [config.prompt] if isinstance(config.prompt, str) else list(config.prompt or [])
    if any(not prompt.strip() for prompt in given):
        raise ValueError(f"prompt must not be empty, got {given}")
    if config.prompt_file is not None:
        path = Path(config.prompt_file)
        if not path.is_file():
            raise FileNotFoundError(f"no prompt file {config.prompt_file!r}")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        if not any(lines):
            raise ValueError(f"prompt_file must have a prompt in a line, {config.prompt_file!r} is empty")
        given += [line for line in lines if line]
    if not given:
        raise ValueError("prompt or prompt_file must be given, got neither")
    return given


def use_cpu(device: str) -> bool:
    """Tell whether "auto" or "cpu" means the CPU, as accelerate has to be told: otherwise it takes each of several
    processes without an accelerator for the only one.
    """
    return device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def load_adapter(name: str) -> GSPNAdapter:
    """Load an adapter.

    Raises:
        FileNotFoundError: it cannot be had.
    """
    try:
        return GSPNAdapter.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(f"no adapter {name!r}: {str(error).strip().splitlines()[0]}") from None


def load_pipeline(name: str, adapter: str | None, dtype: torch.dtype) -> Any:
    """Load a pipeline and mount an adapter on its UNet.

    Raises:
        FileNotFoundError: one of them cannot be had.
        ValueError: the pipeline has no UNet, or the adapter is for another.
    """
    try:
        pipeline = AutoPipelineForText2Image.from_pretrained(name, dtype=dtype)
    except OSError as error:
        raise FileNotFoundError(f"no pipeline {name!r}: {str(error).strip().splitlines()[0]}") from None
    if getattr(pipeline, "unet", None) is None:
        raise ValueError(f"pipeline must have a UNet to mount mixers on, {type(pipeline).__name__} has none")
    if adapter is not None:
        mixers = load_adapter(adapter)
        mixers.mixers.to(dtype)
        mixers.mount(pipeline.unet)
    return pipeline


def own_size(pipeline: Any) -> tuple[int, int]:
    """Return the height and width in pixels that a pipeline is made for."""
    size, factor = pipeline.unet.config.sample_size, pipeline.vae_scale_factor
    height, width = (size, size) if isinstance(size, int) else size
    return height * factor, width * factor


@contextmanager
def explaining_memory(config: GenerateConfig) -> Iterator[None]:
    """Turn running out of memory into an error that says what saves some."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        savers = [
            ("batch_size 1", config.batch_size > 1),
            ("dtype bfloat16", config.dtype == "float32"),
            ("vae_tiling on", config.vae_tiling != "on"),
            ("offload model", config.offload == "none"),
            ("offload sequential", config.offload == "model"),
        ]
        advice = ", ".join(name for name, useful in savers if useful) or "a smaller size"
        raise MemoryError(f"out of memory; what saves some: {advice} ({str(error).splitlines()[0]})") from error


class Generation:
    """A folder of images of prompts: opened, continued and finished.

    Raises:
        ValueError, FileNotFoundError: an option, the pipeline, the adapter or what is in the folder does not fit.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.prompts = read_prompts(config)
        for name, value in (("height", config.height), ("width", config.width)):
            if value is not None and value % 8:
                raise ValueError(f"{name} must be a multiple of 8, got {value}")
        self.state = PartialState(cpu=use_cpu(config.device))
        self.device = self.state.device if config.device == "auto" else torch.device("cpu")
        if config.offload != "none" and self.device.type == "cpu":
            raise ValueError(f"offload needs an accelerator to be useful, got {config.offload!r} on the CPU")
        self.pipeline = load_pipeline(config.pipeline, config.adapter, DTYPES[config.dtype])
        height, width = own_size(self.pipeline)
        self.size = (config.height or height, config.width or width)
        tiled = config.vae_tiling == "on" or (config.vae_tiling == "auto" and self.size[0] * self.size[1] >= TILED_FROM)
        if tiled:
            self.pipeline.vae.enable_tiling()
        if config.offload == "none":
            self.pipeline.to(self.device)
        else:
            getattr(self.pipeline, f"enable_{config.offload}_cpu_offload")(device=self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.out = Path(config.out)
        self.count = len(self.prompts) * config.images_per_prompt

    def _open_folder(self) -> None:
        kept = ("pipeline", "adapter", "negative_prompt", "images_per_prompt", "steps", "guidance", "seed", "dtype")
        settings = {name: getattr(self.config, name) for name in kept}
        settings |= {"prompts": self.prompts, "size": list(self.size)}
        record = self.out / "generate.json"
        if record.is_file():
            before = json.loads(record.read_text(encoding="utf-8"))
            for key, value in settings.items():
                if before.get(key) != value:
                    raise ValueError(
                        f"{self.out} holds other images: {key} was {before.get(key)!r}, is {value!r}; "
                        "give another folder as `out`"
                    )
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.out.mkdir(parents=True, exist_ok=True)
            write_text(record, json.dumps(settings, indent=1))
        self.state.wait_for_everyone()

    def _draw(self, indices: Sequence[int]) -> list[Image.Image]:
        height, width = self.size
        # On the CPU, so that an image is the same on every device as far as arithmetic is; and one for each image, so
        # that it does not depend on the others of its batch.
        generators = [torch.Generator().manual_seed(self.config.seed + index) for index in indices]
        negative = self.config.negative_prompt
        with explaining_memory(self.config), torch.inference_mode():
            images: list[Image.Image] = self.pipeline(
                [self.prompts[index // self.config.images_per_prompt] for index in indices],
                negative_prompt=None if negative is None else [negative] * len(indices),
                height=height,
                width=width,
                num_inference_steps=self.config.steps,
                guidance_scale=self.config.guidance,
                generator=generators,
            ).images
        return images

    def run(self) -> dict[str, Any]:
        """Draw what is missing; return the folder, images, how many were drawn now, seconds and peak memory.

        Raises:
            ValueError: the folder holds images of other settings.
            MemoryError: the device's memory is not enough; the message says what saves some.
        """
        began = time.perf_counter()
        self._open_folder()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        own = range(self.state.process_index, self.count, self.state.num_processes)
        missing = [index for index in own if not (self.out / f"{index:06d}.png").is_file()]
        show = self.config.progress and self.state.is_main_process
        with tqdm(total=len(own), initial=len(own) - len(missing), unit="image", disable=not show) as bar:
            for first in range(0, len(missing), self.config.batch_size):
                batch = missing[first : first + self.config.batch_size]
                for index, image in zip(batch, self._draw(batch), strict=True):
                    save_png(image, self.out / f"{index:06d}.png")
                    bar.update()
        self.state.wait_for_everyone()
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        seconds = time.perf_counter() - began
        if self.config.progress and self.state.is_main_process:
            memory = f", at most {peak / 2**30:.2f} GiB of the device's memory" if peak else ""
            print(f"{len(missing)} images drawn in {seconds:.1f} s{memory}", file=sys.stderr)
        return {
            "folder": str(self.out),
            "images": self.count,
            "drawn": len(missing),
            "seconds": round(seconds, 1),
            "peak_bytes": peak,
        }


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Draw images as configured and return a summary; see `Generation.run`."""
    return Generation(config).run()
