"""`upscale`: a larger image in steps of twice the size, each by image to image with a UNet with or without mixers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

from .demofusion import Predictor, Terms, chunk_feed_forward, decode, image_to_image
from .files import save_png, write_text
from .generate import DTYPES, load_pipeline, own_size, use_cpu
from .scaling import Savers, UpscaleConfig, check, plan, savers


def read_image(name: str) -> tuple[Image.Image, str]:
    """Return an image file's pixels, upright and in RGB, and the file's digest.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image.
    """
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no image {name!r}")
    try:
        with Image.open(path) as opened:
            pixels = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image must be an image file, {name!r} cannot be read: {error}") from None
    return pixels, hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _explaining_memory(config: UpscaleConfig, chosen: Savers, dilated: bool) -> Iterator[None]:
    """Turn running out of memory into an error that says what saves some."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        useful = {
            "dtype bfloat16": config.dtype == "float32",
            "vae_tiling on": not chosen.vae_tiling,
            "split_guidance on": not chosen.split_guidance,
            "chunked_feed_forward on": not chosen.chunked_feed_forward,
            "dilated_batch 1": dilated and config.dilated_batch > 1,
            "offload model": config.offload == "none",
            "offload group": config.offload in ("none", "model"),
        }
        advice = ", ".join(name for name, of_use in useful.items() if of_use) or "a smaller size"
        raise MemoryError(f"out of memory; what saves some: {advice} ({str(error).splitlines()[0]})") from error


class Upscaling:
    """A folder of an image's sizes: opened, continued and finished.

    Raises:
        ValueError, FileNotFoundError, TypeError: an option, the image, the pipeline or the adapter does not fit.
    """

    def __init__(self, config: UpscaleConfig) -> None:
        self.config = config
        check(config)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"upscale runs in one process, got WORLD_SIZE {os.environ['WORLD_SIZE']}")
        self.given: Image.Image | None = None
        self.digest: str | None = None
        if config.image is not None:
            self.given, self.digest = read_image(config.image)
        on_cpu = use_cpu(config.device)
        if config.offload != "none" and on_cpu:
            raise ValueError(f"offload needs an accelerator to be useful, got {config.offload!r} on the CPU")
        accelerator = None if on_cpu else torch.accelerator.current_accelerator(check_available=True)
        self.device = accelerator or torch.device("cpu")
        self.drawing = load_pipeline(config.pipeline, config.adapter, DTYPES[config.dtype])
        # The same modules, and so the same mixers and hooks.
        self.pipeline = AutoPipelineForImage2Image.from_pipe(self.drawing)
        if not isinstance(self.pipeline, (StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline)):
            raise ValueError(f"pipeline must be of Stable Diffusion or SDXL, got a {type(self.drawing).__name__}")
        height, width = own_size(self.drawing)
        own = round(math.sqrt(height * width))
        self.size = (config.height or height, config.width or width)
        if self.given is not None:
            self.size = (self.given.height, self.given.width)
        self.steps = plan(config, self.size, own)
        self.out = Path(config.out)
        self.files = [self.out / "base.png", *(self.out / step.name for step in self.steps)]
        if (config.demofusion or config.skip_residual or config.dilated) and self.pipeline.scheduler.order != 1:
            name = type(self.pipeline.scheduler).__name__
            raise ValueError(f"the terms of DemoFusion need a scheduler with one prediction in a step, not {name}")
        self._chunked = False

    def _settings(self) -> dict[str, Any]:
        free = {"image", "height", "width", "scale", "target", "out", "strengths", "steps", "steps_from_4k", "memory"}
        # Also free: what saves memory without other weights, so that a run may continue after it ran out.
        free |= {"vae_tiling", "split_guidance", "chunked_feed_forward", "offload", "dilated_batch"}
        free |= {"device", "progress"}
        kept = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in free}
        kept |= {"image": self.digest, "size": list(self.size), "sampler_steps": self.config.steps}
        return kept | {"steps": [dataclasses.asdict(step) for step in self.steps]}

    def _open_folder(self) -> int:
        """Return the number of files that need not be made: of the images before the last finished one, and that."""
        settings, record = self._settings(), self.out / "upscale.json"
        finished = max((number for number, file in enumerate(self.files, 1) if file.is_file()), default=0)
        if record.is_file():
            before = json.loads(record.read_text(encoding="utf-8"))
            for key, value in settings.items():
                if before.get(key) != value:
                    raise ValueError(
                        f"{self.out} holds another image: {key} was {before.get(key)!r}, is {value!r}; "
                        "give another folder as `out`"
                    )
        elif finished:
            raise ValueError(
                f"{self.out} holds {self.files[finished - 1].name} of unknown settings; give another folder"
            )
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            write_text(record, json.dumps(settings, indent=1))
        return finished

    def _place(self) -> None:
        """Put the pipeline where it computes, with what saves memory at every size."""
        config, pipeline = self.config, self.pipeline
        if config.dtype != "float32" and getattr(pipeline.vae.config, "force_upcast", False):
            pipeline.vae.float()  # its activations do not fit float16
        if config.layerwise_casting:
            pipeline.unet.enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn, compute_dtype=DTYPES[config.dtype]
            )
        if config.offload == "none":
            pipeline.to(self.device)
        elif config.offload == "group":
            pipeline.enable_group_offload(onload_device=self.device, offload_type="leaf_level")
        else:
            getattr(pipeline, f"enable_{config.offload}_cpu_offload")(device=self.device)

    def _save_memory(self, chosen: Savers) -> None:
        if chosen.vae_tiling:
            self.pipeline.vae.enable_tiling()
        else:
            self.pipeline.vae.disable_tiling()
        if chosen.chunked_feed_forward and not self._chunked:  # sizes only grow
            chunk_feed_forward(self.pipeline.unet)
            self._chunked = True

    def _draw(self) -> Image.Image:
        """Draw the image to upscale."""
        height, width = self.size
        self.drawing.set_progress_bar_config(disable=not self.config.progress, leave=False)
        latents = self.drawing(
            self.config.prompt,
            negative_prompt=self.config.negative_prompt,
            height=height,
            width=width,
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            # On the CPU, so that an image is the same on every device as far as arithmetic is.
            generator=torch.Generator().manual_seed(self.config.seed),
            output_type="latent",
        ).images
        return decode(self.pipeline, latents)

    def _enlarge(self, image: Image.Image, number: int, split_guidance: bool) -> Image.Image:
        """Make step `number`, from 1, of the image before."""
        config, step = self.config, self.steps[number - 1]
        predict = Predictor(
            self.pipeline,
            self.device,
            (step.height, step.width),
            config.prompt,
            config.negative_prompt,
            config.guidance,
            split_guidance,
        )
        terms = Terms(
            skip_residual=config.demofusion or config.skip_residual,
            dilation=step.dilation,
            cosine_scale_1=config.cosine_scale_1,
            cosine_scale_2=config.cosine_scale_2,
            sigma=config.sigma,
            batch=config.dilated_batch,
        )
        total = int(step.steps * step.strength)
        with tqdm(desc=step.name, total=total, unit="step", leave=False, disable=not config.progress) as bar:
            return image_to_image(
                self.pipeline,
                image.resize((step.width, step.height), Image.Resampling.LANCZOS),
                predict,
                strength=step.strength,
                steps=step.steps,
                generator=torch.Generator().manual_seed(config.seed + number),
                terms=terms,
                device=self.device,
                after_step=bar.update,
            )

    def _make(self, number: int, image: Image.Image | None) -> Image.Image:
        """Make file `number`, 0 being the image to upscale, from the one before."""
        if number == 0 and self.given is not None:
            return self.given
        size = (self.steps[number - 1].height, self.steps[number - 1].width) if number else self.size
        chosen = savers(self.config, *size)
        dilated = number > 0 and self.steps[number - 1].dilation > 1
        with _explaining_memory(self.config, chosen, dilated), torch.inference_mode():
            self._save_memory(chosen)
            made = self._draw() if image is None else self._enlarge(image, number, chosen.split_guidance)
            self.pipeline.maybe_free_model_hooks()
        return made

    def _say(self, text: str) -> None:
        if self.config.progress:
            print(text, file=sys.stderr)

    def run(self) -> dict[str, Any]:
        """Make what is missing; return the folder, the last image, its size, steps, seconds and peak memory.

        Every step starts from the image of the one before in 8 bits, as its file has it, so that a run that was
        interrupted and continued draws the same. Seconds of a step that was there already are None. Peak memory is the
        device's, and on a CPU the process's since it started.

        Raises:
            ValueError: the folder holds images of other settings.
            MemoryError: the device's memory is not enough; the message says what saves some.
        """
        began = time.perf_counter()
        finished = self._open_folder()
        if finished < len(self.files):
            self._place()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        image: Image.Image | None = None
        if 0 < finished < len(self.files):
            # Not by Image.open, which takes large images for an attack.
            with PngImagePlugin.PngImageFile(self.files[finished - 1]) as opened:
                image = opened.convert("RGB")
        seconds: list[float | None] = [None] * len(self.files)
        for number in range(finished, len(self.files)):
            started = time.perf_counter()
            image = self._make(number, image)
            save_png(image, self.files[number])
            seconds[number] = round(time.perf_counter() - started, 1)
            what = "the image to start from"
            if number:
                step = self.steps[number - 1]
                what = f"strength {step.strength}, {int(step.steps * step.strength)} of {step.steps} steps"
            self._say(f"{image.height}x{image.width}: {what}, {seconds[number]} s")
        peak, total = self._peak(), time.perf_counter() - began
        self._say(f"{len(self.files) - finished} images in {total:.1f} s, at most {peak / 2**30:.2f} GiB of memory")
        last = self.steps[-1]
        return {
            "folder": str(self.out),
            "image": str(self.files[-1]),
            "height": last.height,
            "width": last.width,
            "steps": [
                dataclasses.asdict(step) | {"seconds": took} for step, took in zip(self.steps, seconds[1:], strict=True)
            ],
            "drawn": len(self.files) - finished,
            "seconds": round(total, 1),
            "peak_bytes": peak,
        }

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        # Linux counts in KiB, macOS in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def upscale(config: UpscaleConfig) -> dict[str, Any]:
    """Upscale an image as configured and return a summary; see `Upscaling.run`."""
    return Upscaling(config).run()
