"""`upscale`: a larger image in steps of twice the size, each by image to image with a UNet with or without mixers."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from gspn_core.runs.errors import explaining_memory
from gspn_core.runs.files import check_record, locked, read_json, write_json
from gspn_core.runs.images import read_image
from gspn_core.runs.options import ImageSize, to_dict

from .demofusion import Predictor, Terms, chunk_feed_forward, decode, image_to_image
from .generate import check_growth
from .pipelines import (
    DTYPES,
    PLACES,
    check_offload,
    hash_parts,
    is_tiled,
    one_device,
    open_pipeline,
    own_size,
    place,
    precision_of,
    save_png,
)
from .scaling import LARGE, UpscaleConfig, nominal, plan

# Options that the record leaves out: sizes and strengths, as it has the resulting steps; and what saves memory without
# changing weights, so that a run can continue after memory ran out.
_LEFT_OUT = {"image", "image_size", "scale", "target", "out", "strength_schedule", "strengths", "sampler_steps_from_4k"}
_LEFT_OUT |= {"memory", "vae_tiling", "split_guidance", "chunked_feed_forward", "offload", "dilated_batch"}
_LEFT_OUT |= {"device", "progress"}


def read_original(name: str) -> tuple[Image.Image, str]:
    """Return an image file's pixels, upright and in RGB, and the file's digest.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image.
    """
    if not Path(name).is_file():
        raise FileNotFoundError(f"no image {name!r}")
    content = Path(name).read_bytes()
    return read_image(content, name).convert("RGB"), hashlib.sha256(content).hexdigest()


@dataclasses.dataclass(kw_only=True, frozen=True)
class Savers:
    """Savers of memory at a size."""

    vae_tiling: bool
    split_guidance: bool
    chunked_feed_forward: bool


def savers(config: UpscaleConfig, size: ImageSize) -> Savers:
    """Return the savers at a size: those set to always, and those that `auto` chooses."""

    def choose(choice: str, useful: bool) -> bool:
        return choice == "always" or (choice == "auto" and config.memory == "auto" and useful)

    large = nominal(size) >= LARGE
    return Savers(
        vae_tiling=choose(config.vae_tiling, is_tiled("auto", size)),
        split_guidance=choose(config.split_guidance, large),
        chunked_feed_forward=choose(config.chunked_feed_forward, large),
    )


class Upscaling:
    """A folder of an image's sizes: opened, continued and finished.

        OUT/settings.json       what the images depend on
        OUT/base.png            the image to upscale, drawn or read
        OUT/step-128x160.png    the image of a step

    Raises:
        ValueError, FileNotFoundError: an option, the image, the pipeline or the adapter does not fit.
    """

    def __init__(self, config: UpscaleConfig) -> None:
        self.config = config
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(f"upscale runs in one process, got WORLD_SIZE {os.environ['WORLD_SIZE']}")
        self.original: Image.Image | None = None
        self.digest: str | None = None
        if config.image is not None:
            self.original, self.digest = read_original(config.image)
        check_offload(config.offload, config.device)
        self.device = one_device(config.device)
        self.precision = precision_of(config)
        self.drawing = open_pipeline(config, config.pipeline)
        self.weights = hash_parts(self.drawing.components)
        # The same modules, and so the same mixers and hooks.
        self.pipeline = AutoPipelineForImage2Image.from_pipe(self.drawing)
        if not isinstance(self.pipeline, (StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline)):
            raise ValueError(f"pipeline must be of Stable Diffusion or SDXL, got a {type(self.drawing).__name__}")
        own = own_size(self.drawing)
        self.size = config.image_size or own
        if self.original is not None:
            self.size = ImageSize(self.original.height, self.original.width)
        self.steps = plan(config, self.size, round(math.sqrt(own.height * own.width)))
        self.out = Path(config.out)
        self.files = [self.out / "base.png", *(self.out / step.name for step in self.steps)]
        if (config.demofusion or config.skip_residual or config.dilated) and self.pipeline.scheduler.order != 1:
            name = type(self.pipeline.scheduler).__name__
            raise ValueError(f"the terms of DemoFusion need a scheduler with one prediction in a step, not {name}")
        self._chunked = False

    def _open_folder(self) -> int:
        """Return how many files need not be made: the last one that is there, and those before it."""
        settings = {name: value for name, value in to_dict(self.config).items() if name not in _LEFT_OUT}
        steps = [step.record() for step in self.steps]
        settings |= {"image": self.digest, "size": str(self.size), "steps": steps}
        settings |= {"precision": self.precision, "weights_sha256": self.weights}
        record = self.out / "settings.json"
        finished = max((number for number, file in enumerate(self.files, 1) if file.is_file()), default=0)
        check_record(record, settings, free=(*PLACES, "steps"))
        if record.is_file():
            check_growth(record, "scale or target", steps, read_json(record)["steps"])
        if finished and not record.is_file():
            name = self.files[finished - 1].name
            raise ValueError(f"{self.out} holds {name} of unknown settings; give another folder as `out`")
        write_json(record, settings)
        return finished

    def _place(self) -> None:
        """Put the pipeline where it computes, with what saves memory at every size."""
        config, pipeline = self.config, self.pipeline
        if self.precision != "fp32" and getattr(pipeline.vae.config, "force_upcast", False):
            pipeline.vae.float()  # its activations do not fit float16
        if config.layerwise_casting:
            pipeline.unet.enable_layerwise_casting(
                storage_dtype=torch.float8_e4m3fn, compute_dtype=DTYPES[self.precision]
            )
        place(pipeline, self.device, config.offload)

    def _save_memory(self, saving: Savers) -> None:
        if saving.vae_tiling:
            self.pipeline.vae.enable_tiling()
        else:
            self.pipeline.vae.disable_tiling()
        if saving.chunked_feed_forward and not self._chunked:  # sizes only grow
            chunk_feed_forward(self.pipeline.unet)
            self._chunked = True

    def _draw(self) -> Image.Image:
        """Draw the image to upscale."""
        self.drawing.set_progress_bar_config(disable=not self.config.progress, leave=False)
        latents = self.drawing(
            self.config.prompt,
            negative_prompt=self.config.negative_prompt,
            height=self.size.height,
            width=self.size.width,
            num_inference_steps=self.config.sampler_steps,
            guidance_scale=self.config.guidance,
            # On the CPU, so that an image is the same on every device as far as arithmetic is.
            generator=torch.Generator().manual_seed(self.config.seed),
            output_type="latent",
        ).images
        return decode(self.pipeline, latents)

    def _enlarge(self, image: Image.Image, number: int, split_guidance: bool) -> Image.Image:
        """Make the image of step `number`, from 1, of the one before."""
        config, step = self.config, self.steps[number - 1]
        height, width = step.size
        predict = Predictor(
            self.pipeline,
            self.device,
            (height, width),
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
        with tqdm(desc=step.name, total=step.updates, unit="step", leave=False, disable=not config.progress) as bar:
            return image_to_image(
                self.pipeline,
                image.resize((width, height), Image.Resampling.LANCZOS),
                predict,
                strength=step.strength,
                steps=step.sampler_steps,
                generator=torch.Generator().manual_seed(config.seed + number),
                terms=terms,
                device=self.device,
                after_step=bar.update,
            )

    def _make(self, number: int, image: Image.Image | None) -> Image.Image:
        """Make file `number`, 0 being the image to upscale, from the one before."""
        if number == 0 and self.original is not None:
            return self.original
        config, step = self.config, self.steps[number - 1] if number else None
        saving = savers(config, step.size if step else self.size)
        useful = {
            "--precision bf16": self.precision == "fp32",
            "--vae-tiling always": not saving.vae_tiling,
            "--split-guidance always": not saving.split_guidance,
            "--chunked-feed-forward always": not saving.chunked_feed_forward,
            "--dilated-batch 1": step is not None and step.dilation > 1 and config.dilated_batch > 1,
            "--offload model": config.offload == "none" and self.device.type != "cpu",
            "--offload group": config.offload in ("none", "model") and self.device.type != "cpu",
        }
        with explaining_memory(useful, "a smaller target"), torch.inference_mode():
            self._save_memory(saving)
            image = self._draw() if image is None else self._enlarge(image, number, saving.split_guidance)
            self.pipeline.maybe_free_model_hooks()
        return image

    def run(self) -> dict[str, Any]:
        """Make the missing images.

        Every step starts from the image of the one before in 8 bits, as its file has it, so that a run that was
        interrupted and continued draws the same.

        Returns:
            The `folder`, the last `image` and its `size`; `steps` with their `seconds` (None: it was there), the number
            of images `drawn` now, all `seconds`, and the peak memory in bytes: of the device, or on a CPU of the
            process since it started.

        Raises:
            ValueError: the folder holds images of other settings, or another process draws there.
            MemoryError: the device's memory is not enough; the message says what saves some.
            WriteError: the disk is full or not writable.
        """
        with locked(self.out):
            return self._run()

    def _run(self) -> dict[str, Any]:
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
            if self.config.progress:
                print(f"{self.files[number]}: {seconds[number]} s", file=sys.stderr)
        return {
            "folder": str(self.out),
            "image": str(self.files[-1]),
            "size": str(self.steps[-1].size),
            "steps": [step.record() | {"seconds": took} for step, took in zip(self.steps, seconds[1:], strict=True)],
            "drawn": len(self.files) - finished,
            "seconds": round(time.perf_counter() - began, 1),
            "peak_bytes": self._peak(),
        }

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        # Linux counts in KiB, macOS in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def upscale(config: UpscaleConfig) -> dict[str, Any]:
    """Upscale an image as configured; see `Upscaling.run`."""
    return Upscaling(config).run()
