"""What upscaling is asked for and how it is done: options, the sizes between, strengths, and what saves memory."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from .generate import TILED_FROM

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
