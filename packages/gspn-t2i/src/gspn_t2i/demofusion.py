"""Image to image by a loop over a diffusers pipeline's UNet and scheduler, with the terms of DemoFusion if wanted.

At every time t, which falls from T (the scheduler's number of training times) to 0:

    cf = (1 + cos(pi (T - t) / T)) / 2                           falls from 1 to 0
    z  <- c1 noised(z0, t) + (1 - c1) z                          skip residual, c1 = cf^3
    l  = step(z, UNet(z))                                        local
    b  = blur(z), by c3 latent pixels                            c3 = sigma (0.99 cf + 0.01)
    g  = step(b, UNet of every s-th row and column of b)         dilated, or global: s^2 interlaced latents
    z  <- c2 g + (1 - c2) l                                      c2 = cf

z0 are the latents of the image given, noised by the same draw throughout. Without the terms this is what diffusers'
image-to-image pipelines compute, with the choice of two passes instead of a batch of two for guidance.

Source: DemoFusion, arXiv 2311.16973.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

CHUNK = 2**14  # tokens in a chunk of a feed-forward layer, unless a row has more


@dataclasses.dataclass(kw_only=True, frozen=True)
class Terms:
    """DemoFusion's terms.

    Args:
        skip_residual: mix in the noised latents of the image given.
        dilation: s, rows and columns between those of an interlaced latent; 1 leaves the dilated pass out.
        cosine_scale_1: exponent of c1.
        cosine_scale_2: exponent of c2.
        sigma: of the blur before the dilated pass at t = T, in latent pixels.
        batch: interlaced latents in a pass of the UNet.
    """

    skip_residual: bool = False
    dilation: int = 1
    cosine_scale_1: float = 3.0
    cosine_scale_2: float = 1.0
    sigma: float = 1.0
    batch: int = 4


def cosine_factor(t: float, total: int) -> float:
    """Return cf at time t of `total`: 1 at t = total, 0 at t = 0."""
    return (1 + math.cos(math.pi * (total - t) / total)) / 2


def blur(latents: Tensor, sigma: float) -> Tensor:
    """Blur latents (N, C, H, W) by a Gaussian of deviation `sigma`, keeping each channel's mean and deviation.

    A blur removes noise, and the UNet would see less of it than the time says; so the deviation is restored.
    """
    radius = max(1, math.ceil(3 * sigma))
    places = torch.arange(-radius, radius + 1, device=latents.device, dtype=torch.float32)
    kernel = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    n, c, height, width = latents.shape
    x = F.pad(latents.float().reshape(n * c, 1, height, width), (radius,) * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, kernel[None, None, :, None]), kernel[None, None, None, :]).reshape(latents.shape)
    deviation, mean = torch.std_mean(latents.float(), dim=(2, 3), keepdim=True, correction=0)
    blurred, blurred_mean = torch.std_mean(x, dim=(2, 3), keepdim=True, correction=0)
    return ((x - blurred_mean) * (deviation / blurred.clamp(min=1e-6)) + mean).to(latents.dtype)


def interlaced(function: Callable[[Tensor], Tensor], latents: Tensor, dilation: int, batch: int) -> Tensor:
    """Apply a function to the latents that consist of every `dilation`-th row and column, `batch` of them at a time.

    Args:
        function: of latents (B, C, H', W') into ones of the same shape.
        latents: (1, C, H, W); the size needs not be a multiple of the dilation.
        dilation, batch: as of `Terms`.

    Returns:
        The results in their places: (1, C, H, W).
    """
    out = torch.empty_like(latents)
    # Batched by size: where the dilation does not divide H or W, the first ones have a line more.
    offsets = defaultdict(list)
    for i, j in itertools.product(range(dilation), repeat=2):
        offsets[latents[..., i::dilation, j::dilation].shape].append((i, j))
    for group in offsets.values():
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            results = function(torch.cat([latents[..., i::dilation, j::dilation] for i, j in part]))
            for (i, j), result in zip(part, results, strict=True):
                out[..., i::dilation, j::dilation] = result
    return out


class Predictor:
    """Predictions of a pipeline's UNet for a prompt, with classifier-free guidance.

    Args:
        pipeline: image-to-image pipeline of Stable Diffusion 1.5, 2.x or SDXL.
        device: that computes.
        size: (height, width) of the image in pixels, an input of SDXL's UNet.
        prompt, negative_prompt: texts.
        guidance: scale of classifier-free guidance; up to 1 turns it off.
        split: predict with and without the prompt one after the other, which takes half the memory of a batch of two.
    """

    def __init__(
        self,
        pipeline: Any,
        device: torch.device,
        size: tuple[int, int],
        prompt: str,
        negative_prompt: str | None,
        guidance: float,
        split: bool,
    ) -> None:
        self.unet = pipeline.unet
        self.guidance = guidance
        self.split = split
        distilled = self.unet.config.time_cond_proj_dim is not None  # takes the scale of guidance as an input
        guided = guidance > 1 and not distilled
        encoded = pipeline.encode_prompt(
            prompt=prompt,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=negative_prompt,
        )
        with_prompt, without = {"encoder_hidden_states": encoded[0]}, {"encoder_hidden_states": encoded[1]}
        if len(encoded) == 4:
            # SDXL takes pooled texts and sizes too; the scores of its refiner are diffusers' defaults.
            size = (int(size[0]), int(size[1]))
            ids = pipeline._get_add_time_ids(
                *(size, (0, 0), size, 6.0, 2.5, size, (0, 0), size),
                dtype=encoded[0].dtype,
                text_encoder_projection_dim=int(encoded[2].shape[-1]),
            )
            with_prompt |= {"text_embeds": encoded[2], "time_ids": ids[0].to(device)}
            without |= {"text_embeds": encoded[3], "time_ids": ids[1].to(device)}
        self.dtype: torch.dtype = encoded[0].dtype
        self.conditions: list[dict[str, Tensor]] = [without, with_prompt] if guided else [with_prompt]
        if distilled:
            scale = pipeline.get_guidance_scale_embedding(
                torch.tensor([guidance - 1.0]), embedding_dim=self.unet.config.time_cond_proj_dim
            )
            with_prompt["timestep_cond"] = scale.to(device=device, dtype=self.dtype)

    def _run(self, sample: Tensor, t: Tensor, conditions: list[dict[str, Tensor]]) -> Tensor:
        n = len(sample) // len(conditions)
        inputs = {
            name: torch.cat([condition[name].expand(n, *condition[name].shape[1:]) for condition in conditions])
            for name in conditions[0]
        }
        added = {name: inputs.pop(name) for name in ("text_embeds", "time_ids") if name in inputs}
        out: Tensor = self.unet(sample, t, **inputs, added_cond_kwargs=added or None, return_dict=False)[0]
        return out

    def __call__(self, scheduler: Any, latents: Tensor, t: Tensor) -> Tensor:
        """Return the prediction for latents (N, C, H, W) at time t; the scheduler says how they are scaled."""
        sample = scheduler.scale_model_input(latents, t)
        if len(self.conditions) == 1:
            return self._run(sample, t, self.conditions)
        if self.split:
            without, with_prompt = (self._run(sample, t, [condition]) for condition in self.conditions)
        else:
            without, with_prompt = self._run(torch.cat([sample] * 2), t, self.conditions).chunk(2)
        return without + self.guidance * (with_prompt - without)


def _set_chunk(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set the chunks of a transformer's feed-forward layers for its input, (N, C, H, W), before it runs.

    diffusers takes only chunks that divide the number of tokens: whole rows, as many as divide the height.
    """
    height, width = (args[0] if args else kwargs["hidden_states"]).shape[-2:]
    rows = max((n for n in range(1, height + 1) if height % n == 0 and n * width <= CHUNK), default=1)
    for block in transformer.transformer_blocks:  # type: ignore[union-attr]
        block.set_chunk_feed_forward(rows * width, dim=1)


def chunk_feed_forward(unet: nn.Module) -> None:
    """Let a UNet's feed-forward layers work in chunks from now on, at any size."""
    for module in unet.modules():
        if hasattr(module, "transformer_blocks"):
            module.register_forward_pre_hook(_set_chunk, with_kwargs=True)


def _moments(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and deviation of an autoencoder's latents, 0 and 1 where it has none."""
    mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or deviation is None:
        return like.new_zeros(1), like.new_ones(1)
    return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(deviation).view(1, -1, 1, 1)


def encode(
    pipeline: Any, image: Image.Image, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Return latents of an image, (1, C, H / 8, W / 8)."""
    pixels = pipeline.image_processor.preprocess(image).to(device=device, dtype=pipeline.vae.dtype)
    latents: Tensor = retrieve_latents(pipeline.vae.encode(pixels), generator=generator).to(dtype)
    mean, deviation = _moments(pipeline.vae, latents)
    return (latents - mean) * pipeline.vae.config.scaling_factor / deviation


def decode(pipeline: Any, latents: Tensor) -> Image.Image:
    """Return the image of latents (1, C, H, W), past the pipeline's safety checker or watermark if it has one."""
    device, dtype = latents.device, latents.dtype
    latents = latents.to(pipeline.vae.dtype)
    mean, deviation = _moments(pipeline.vae, latents)
    pixels = pipeline.vae.decode(latents * deviation / pipeline.vae.config.scaling_factor + mean, return_dict=False)[0]
    flagged = None
    if getattr(pipeline, "safety_checker", None) is not None:
        pixels, flagged = pipeline.run_safety_checker(pixels, device, dtype)
    if getattr(pipeline, "watermark", None) is not None:
        pixels = pipeline.watermark.apply_watermark(pixels)
    # The checker's black images are not in the range of -1 to 1.
    image: Image.Image = pipeline.image_processor.postprocess(
        pixels, output_type="pil", do_denormalize=[not (flagged and flagged[0])]
    )[0]
    return image


def _mix(first: Tensor, second: Tensor, share: float) -> Tensor:
    return share * first + (1 - share) * second


def image_to_image(
    pipeline: Any,
    image: Image.Image,
    predict: Predictor,
    *,
    strength: float,
    steps: int,
    generator: torch.Generator,
    terms: Terms,
    device: torch.device,
    after_step: Callable[[], Any] = lambda: None,
) -> Image.Image:
    """Noise an image and denoise it.

    Args:
        pipeline: image-to-image pipeline of Stable Diffusion 1.5, 2.x or SDXL.
        image: of the size to draw, multiples of 8.
        predict: its UNet under a prompt.
        strength: share of the steps that is run, and so the noise: 1 leaves nothing of the image.
        steps: of the sampler, if the strength were 1.
        generator: of every draw.
        terms: of DemoFusion; `Terms()` leaves them out.
        device: that computes.
        after_step: called after every step.
    """
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps, device=device)
    timesteps, _ = pipeline.get_timesteps(steps, strength, device)
    # Schedulers have state: the global path needs one of its own.
    scheduler_of_global = copy.deepcopy(scheduler)
    options = pipeline.prepare_extra_step_kwargs(generator, 0.0)
    clean = encode(pipeline, image, device, predict.dtype, generator)
    noise = randn_tensor(clean.shape, generator=generator, device=device, dtype=clean.dtype)
    latents = scheduler.add_noise(clean, noise, timesteps[:1])
    for t in timesteps:
        cf = cosine_factor(float(t), scheduler.config.num_train_timesteps)
        if terms.skip_residual:
            latents = _mix(scheduler.add_noise(clean, noise, t[None]), latents, cf**terms.cosine_scale_1)
        prediction = predict(scheduler, latents, t)
        before = generator.get_state()
        local = scheduler.step(prediction, t, latents, **options, return_dict=False)[0]
        if terms.dilation > 1:
            blurred = blur(latents, terms.sigma * (0.99 * cf + 0.01))
            # Bound at once: the function is called within this iteration.
            prediction = interlaced(
                lambda part, t=t: predict(scheduler_of_global, part, t),  # type: ignore[misc]
                blurred,
                terms.dilation,
                terms.batch,
            )
            # Schedulers that draw noise draw the same in both paths: a mixture of two draws would have less noise.
            generator.set_state(before)
            overall = scheduler_of_global.step(prediction, t, blurred, **options, return_dict=False)[0]
            local = _mix(overall, local, cf**terms.cosine_scale_2)
        latents = local.to(clean.dtype)
        after_step()
    return decode(pipeline, latents)
