"""`upscale`: a larger image in steps of twice the size, each by image to image with a UNet with or without mixers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

from .demofusion import Predictor, Terms, chunk_feed_forward, decode, image_to_image
from .files import save_png, write_text
from .generate import DTYPES, TILED_FROM, load_pipeline, own_size, use_cpu

# Strength by the size of a step, as `nominal` has it; beyond either end the end's counts.
SCHEDULES = {
    "1k-8k": {1024: 0.42, 2048: 0.32, 4096: 0.32, 8192: 0.28},
    "2k-16k": {2048: 0.4, 4096: 0.3, 8192: 0.2, 16384: 0.1},
}
LARGE = 4096  # from here on fewer steps and the stronger savers


@dataclasses.dataclass(kw_only=True, frozen=True)
class UpscaleConfig:
    """Every option of `gspn-t2i upscale`.

    Args:
        pipeline: diffusers pipeline of Stable Diffusion or SDXL, a folder or the name of one on the Hub
        prompt: what the image shows
        adapter: GSPN adapter to mount on its UNet, a folder or the name of one on the Hub
        negative_prompt: what not to draw
        image: file to start from; absent: one is drawn first
        height: of the image that is drawn first, in pixels; absent: the pipeline's own
        width: likewise
        scale: how many times higher and wider the result is
        target: height and width of the result, instead of scale; of the image's shape
        out: folder of the images, of each step one; a run that was interrupted continues there
        strengths: share of noise in each step, by a schedule for its longer side or as a list of one for each
        steps: of the sampler
        steps_from_4k: of the sampler where the longer side is about 4096 or more
        guidance: scale of classifier-free guidance
        seed: the image is drawn with seed, step i with seed + i
        demofusion: skip_residual and dilated
        skip_residual: mix noised latents of the smaller image into each step's
        dilated: denoise interlaced latents of about the pipeline's own size too
        cosine_scale_1: how fast the skip residual fades
        cosine_scale_2: how fast the dilated pass fades
        sigma: greatest blur before the dilated pass, in latent pixels
        dilated_batch: interlaced latents in a pass of the UNet
        memory: auto saves memory by size where the following three say auto; none does not
        vae_tiling: encode and decode in tiles; auto does above 1024x1024 pixels
        split_guidance: predict with and without the prompt one after the other; auto does from about 4096
        chunked_feed_forward: feed-forward layers in chunks; auto does from about 4096
        offload: keep on the accelerator only what computes, to save memory
        layerwise_casting: store the UNet's weights in 8 bits
        dtype: of weights and activations
        device: auto takes the accelerator if any
        progress: show progress bars and what each step took
    """

    pipeline: str
    prompt: str
    adapter: str | None = None
    negative_prompt: str | None = None
    image: str | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    scale: Literal[2, 4, 8, 16] | None = None
    target: tuple[PositiveInt, PositiveInt] | None = None
    out: str = "upscaled"
    strengths: Literal["1k-8k", "2k-16k"] | list[float] = "1k-8k"
    steps: PositiveInt = 50
    steps_from_4k: PositiveInt = 30
    guidance: NonNegativeFloat = 7.5
    seed: NonNegativeInt = 0
    demofusion: bool = False
    skip_residual: bool = False
    dilated: bool = False
    cosine_scale_1: NonNegativeFloat = 3.0
    cosine_scale_2: NonNegativeFloat = 1.0
    sigma: PositiveFloat = 1.0
    dilated_batch: PositiveInt = 4
    memory: Literal["auto", "none"] = "auto"
    vae_tiling: Literal["auto", "on", "off"] = "auto"
    split_guidance: Literal["auto", "on", "off"] = "auto"
    chunked_feed_forward: Literal["auto", "on", "off"] = "auto"
    offload: Literal["none", "model", "sequential", "group"] = "none"
    layerwise_casting: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Literal["auto", "cpu"] = "auto"
    progress: bool = True


@dataclasses.dataclass(kw_only=True, frozen=True)
class Step:
    """One step: its image's size, share of noise, the sampler's steps if that were 1, and rows per interlaced one."""

    height: int
    width: int
    strength: float
    steps: int
    dilation: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"step-{self.height}x{self.width}.png"


@dataclasses.dataclass(kw_only=True, frozen=True)
class Savers:
    """What saves memory at a size."""

    vae_tiling: bool
    split_guidance: bool
    chunked_feed_forward: bool


def nominal(height: int, width: int) -> int:
    """Return the power of two that is nearest, as a factor, to the longer side: 4096 for 3840 x 2160."""
    return int(2 ** round(math.log2(max(height, width))))


def savers(config: UpscaleConfig, height: int, width: int) -> Savers:
    """Choose what saves memory at a size in pixels; switches of the configuration that are on or off stay."""
    large = nominal(height, width) >= LARGE
    wanted = {
        "vae_tiling": height * width >= TILED_FROM,
        "split_guidance": large,
        "chunked_feed_forward": large,
    }
    switches = {name: getattr(config, name) for name in wanted}
    automatic = config.memory == "auto"
    return Savers(**{k: switches[k] == "on" or (switches[k] == "auto" and automatic and wanted[k]) for k in wanted})


def sizes(image: tuple[int, int], target: tuple[int, int]) -> list[tuple[int, int]]:
    """Return (height, width) of each step: twice the one before, in multiples of 8, and the target last.

    Raises:
        ValueError: the target is not of multiples of 8, not larger than the image or of another shape.
    """
    (height, width), (last_height, last_width) = image, target
    of_image = f"the image's {height}x{width}"
    if last_height % 8 or last_width % 8:
        raise ValueError(f"target must be multiples of 8, got {last_height}x{last_width}")
    if last_height <= height or last_width <= width:
        raise ValueError(f"target must be larger than {of_image}, got {last_height}x{last_width}")
    if abs(last_height - last_width * height / width) >= 8 and abs(last_width - last_height * width / height) >= 8:
        raise ValueError(f"target must have the shape of {of_image}, got {last_height}x{last_width}")
    found = []
    factor = 2
    while height * factor < last_height and width * factor < last_width:
        size = (8 * round(height * factor / 8), 8 * round(width * factor / 8))
        if size != target:
            found.append(size)
        factor *= 2
    return [*found, target]


def plan(config: UpscaleConfig, image: tuple[int, int], own: int) -> list[Step]:
    """Return the steps from an image of (height, width) on.

    Args:
        config: of the run.
        image: height and width of what is upscaled.
        own: side of the square images that the pipeline is made for: interlaced latents are about that size.

    Raises:
        ValueError: a size or the strengths do not fit.
    """
    target = config.target
    if config.scale is not None:
        target = (image[0] * config.scale, image[1] * config.scale)
        if target[0] % 8 or target[1] % 8:
            raise ValueError(
                f"scale must give multiples of 8, {config.scale} times {image[0]}x{image[1]} is "
                f"{target[0]}x{target[1]}; give a target near it"
            )
    assert target is not None
    found = sizes(image, target)
    if isinstance(config.strengths, str):
        table = SCHEDULES[config.strengths]
        strengths = [table[min(max(nominal(*size), min(table)), max(table))] for size in found]
    else:
        strengths = list(config.strengths)
        if len(strengths) != len(found):
            listed = ", ".join(f"{height}x{width}" for height, width in found)
            raise ValueError(f"strengths must be {len(found)}, for {listed}; got {len(strengths)}: {strengths}")
    made = []
    for (height, width), strength in zip(found, strengths, strict=True):
        steps = config.steps_from_4k if nominal(height, width) >= LARGE else config.steps
        if int(steps * strength) < 1:
            raise ValueError(f"strengths must leave a step to run, {strength} of {steps} steps leaves none")
        dilation = max(1, round(math.sqrt(height * width) / own)) if config.demofusion or config.dilated else 1
        dilation = min(dilation, height // 8, width // 8)
        made.append(Step(height=height, width=width, strength=strength, steps=steps, dilation=dilation))
    return made


def check(config: UpscaleConfig) -> None:
    """Refuse options that do not fit each other or are out of range.

    Raises:
        ValueError, TypeError: with the option, what it must be and what it is.
    """
    if not config.prompt.strip():
        raise ValueError(f"prompt must not be empty, got {config.prompt!r}")
    if (config.scale is None) == (config.target is None):
        raise ValueError(f"one of scale and target must be given, got {config.scale} and {config.target}")
    if config.scale is not None and config.scale not in (2, 4, 8, 16):
        raise ValueError(f"scale must be 2, 4, 8 or 16, got {config.scale}")
    if config.target is not None and (len(config.target) != 2 or not all(isinstance(n, int) for n in config.target)):
        raise TypeError(f"target must be a height and a width, got {config.target}")
    for name, value in (("height", config.height), ("width", config.width)):
        if value is not None and config.image is not None:
            raise ValueError(f"{name} is of an image that is drawn first; image is given, got {value}")
        if value is not None and value % 8:
            raise ValueError(f"{name} must be a multiple of 8, got {value}")
    if isinstance(config.strengths, str):
        if config.strengths not in SCHEDULES:
            raise ValueError(f"strengths must be of {', '.join(SCHEDULES)} or a list, got {config.strengths!r}")
    elif not all(0 < strength <= 1 for strength in config.strengths):
        raise ValueError(f"strengths must be above 0 and at most 1, got {config.strengths}")
    if config.sigma <= 0:
        raise ValueError(f"sigma must be above 0, got {config.sigma}")
    for name in ("cosine_scale_1", "cosine_scale_2"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(config, name)}")


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
