"""The options of `upscale`, and its steps: sizes and strengths. Imports no torch: help is quick."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt

from gspn_core.runs.options import ImageSize

from .config import Choice, DrawingOptions, check_multiples

# Strength by the nominal size of a step; sizes outside the table take the value of its nearer end.
SCHEDULES = {
    "1k-8k": {1024: 0.42, 2048: 0.32, 4096: 0.32, 8192: 0.28},
    "2k-16k": {2048: 0.4, 4096: 0.3, 8192: 0.2, 16384: 0.1},
}
LARGE = 4096  # nominal size from which on there are fewer steps and more memory is saved


@dataclasses.dataclass(kw_only=True, frozen=True)
class UpscaleConfig(DrawingOptions):
    """Every option of `gspn-t2i upscale`.

    Args:
        pipeline: diffusers pipeline of Stable Diffusion or SDXL, a folder, a name on the Hub, or a .safetensors file
        prompt: what the image shows
        image: file to start from; null is an image is drawn first
        image_size: of the image that is drawn first, multiples of 8; null is the pipeline's own
        scale: how many times higher and wider the result is
        target: size of the result, instead of scale; of the image's shape, multiples of 8
        out: folder of the images, one of each step; an interrupted run continues there
        strength_schedule: published table of the share of noise in each step, by the longer side of its image
        strengths: share of noise in each step, instead of the schedule
        sampler_steps: steps of the sampler at strength 1
        sampler_steps_from_4k: steps of the sampler where the longer side is about 4096 or more
        seed: the first image is drawn with seed, step i with seed + i
        demofusion: both skip_residual and dilated
        skip_residual: mix noised latents of the smaller image into those of each step
        dilated: also denoise interlaced latents, each of about the pipeline's own size
        cosine_scale_1: how fast the skip residual fades
        cosine_scale_2: how fast the dilated pass fades
        sigma: greatest blur before the dilated pass, in latent pixels
        dilated_batch: interlaced latents in a pass of the UNet
        memory: whether auto in the next three options saves memory by the image size, or never
        vae_tiling: encode and decode in tiles; auto does above 1024x1024 pixels
        split_guidance: predict with and without the prompt in two passes; auto does from about 4096 pixels a side
        chunked_feed_forward: compute feed-forward layers in chunks; auto does from about 4096 pixels a side
        layerwise_casting: store the UNet's weights in 8 bits
        progress: show progress bars and the time of each step
    """

    pipeline: str
    prompt: str
    image: str | None = None
    scale: Literal[2, 4, 8, 16] | None = None
    target: ImageSize | None = None
    out: str = "upscaled"
    strength_schedule: Literal["1k-8k", "2k-16k"] = "1k-8k"
    strengths: list[float] | None = None
    sampler_steps_from_4k: PositiveInt = 30
    demofusion: bool = False
    skip_residual: bool = False
    dilated: bool = False
    cosine_scale_1: NonNegativeFloat = 3.0
    cosine_scale_2: NonNegativeFloat = 1.0
    sigma: PositiveFloat = 1.0
    dilated_batch: PositiveInt = 4
    memory: Literal["auto", "never"] = "auto"
    split_guidance: Choice = "auto"
    chunked_feed_forward: Choice = "auto"
    layerwise_casting: bool = False

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError(f"prompt must not be empty, got {self.prompt!r}")
        if (self.scale is None) == (self.target is None):
            raise ValueError(f"either scale or target must be set, got {self.scale} and {self.target}")
        if self.image is not None and self.image_size is not None:
            raise ValueError(f"image_size is for an image that is drawn first, got {self.image_size} and an image")
        if not all(0 < strength <= 1 for strength in self.strengths or ()):
            raise ValueError(f"strengths must be above 0 and at most 1, got {self.strengths}")
        check_multiples("target", self.target)
        super().__post_init__()


@dataclasses.dataclass(kw_only=True, frozen=True)
class Step:
    """One step: its image's size, share of noise, sampler steps at strength 1, and dilation of interlaced latents."""

    size: ImageSize
    strength: float
    sampler_steps: int
    dilation: int

    @property
    def updates(self) -> int:
        """Sampler steps that are run."""
        return int(self.sampler_steps * self.strength)

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"step-{self.size}.png"

    def record(self) -> dict[str, Any]:
        """Return plain values."""
        return {"size": str(self.size)} | {
            name: getattr(self, name) for name in ("strength", "sampler_steps", "dilation")
        }


def nominal(size: ImageSize) -> int:
    """Return the power of two that is nearest, as a factor, to the longer side: 4096 for 3840 x 2160."""
    return int(2 ** round(math.log2(max(size))))


def sizes(image: ImageSize, target: ImageSize) -> list[ImageSize]:
    """Return the size of each step: twice the one before, in multiples of 8, and the target last.

    Raises:
        ValueError: the target is not larger than the image, or of another shape.
    """
    if target.height <= image.height or target.width <= image.width:
        raise ValueError(f"target must be larger than the image's {image}, got {target}")
    ratio = image.height / image.width
    if abs(target.height - target.width * ratio) >= 8 and abs(target.width - target.height / ratio) >= 8:
        raise ValueError(f"target must have the shape of the image's {image}, got {target}")
    steps = []
    factor = 2
    while image.height * factor < target.height and image.width * factor < target.width:
        size = ImageSize(8 * round(image.height * factor / 8), 8 * round(image.width * factor / 8))
        if size != target:
            steps.append(size)
        factor *= 2
    return [*steps, target]


def plan(config: UpscaleConfig, image: ImageSize, own: int) -> list[Step]:
    """Return the steps from an image on.

    Args:
        config: of the run.
        image: size of the image to upscale.
        own: side of the square images that the pipeline was trained for: interlaced latents are about that size.

    Raises:
        ValueError: a size or the strengths do not fit.
    """
    target = config.target
    if config.scale is not None:
        target = ImageSize(image.height * config.scale, image.width * config.scale)
        if target.height % 8 or target.width % 8:
            raise ValueError(
                f"scale must give multiples of 8, {config.scale} times {image} is {target}; give a target near it"
            )
    assert target is not None
    planned = sizes(image, target)
    if config.strengths is None:
        table = SCHEDULES[config.strength_schedule]
        strengths = [table[min(max(nominal(size), min(table)), max(table))] for size in planned]
    else:
        strengths = list(config.strengths)
        if len(strengths) != len(planned):
            listed = ", ".join(map(str, planned))
            raise ValueError(f"strengths must be {len(planned)}, for {listed}; got {len(strengths)}: {strengths}")
    steps = []
    for size, strength in zip(planned, strengths, strict=True):
        dilation = (
            max(1, round(math.sqrt(size.height * size.width) / own)) if config.demofusion or config.dilated else 1
        )
        step = Step(
            size=size,
            strength=strength,
            sampler_steps=config.sampler_steps_from_4k if nominal(size) >= LARGE else config.sampler_steps,
            dilation=min(dilation, size.height // 8, size.width // 8),
        )
        if step.updates < 1:
            raise ValueError(
                f"strengths must leave a step to run, {strength} of {step.sampler_steps} sampler steps leaves none"
            )
        steps.append(step)
    return steps


def as_text(result: Mapping[str, Any]) -> str:
    """Lay the result of `upscale` out: a line for each step, and the last image."""
    lines = [
        f"{step['size']}: strength {step['strength']}, "
        f"{int(step['sampler_steps'] * step['strength'])} of {step['sampler_steps']} sampler steps, "
        + ("was there" if step["seconds"] is None else f"{step['seconds']} s")
        for step in result["steps"]
    ]
    memory = f"at most {result['peak_bytes'] / 2**30:.2f} GiB of memory"
    return "\n".join([*lines, f"{result['image']}: {result['drawn']} images in {result['seconds']} s, {memory}"])
