"""The frozen autoencoder between pixels and latents: diffusers' `AutoencoderKL`, `AutoencoderDC` or `AutoencoderTiny`.

The last two have no posterior: theirs is taken to be the latent itself, with no variance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from torch import Tensor

from gspn_core.runs.errors import reason

VAE: TypeAlias = AutoencoderKL | AutoencoderDC | AutoencoderTiny
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderDC, AutoencoderTiny)}
_NO_VARIANCE = -30.0  # the least log-variance that posteriors have

# What latents depend on: of the configuration, without the training size and hints of precision, and of the weights.
_FIELDS = (
    *("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "act_fn", "latent_channels"),
    *("norm_num_groups", "scaling_factor", "shift_factor", "use_quant_conv", "mid_block_add_attention"),
)
ENCODER = ("encoder.", "quant_conv.")
DECODER = ("decoder.", "post_quant_conv.")


def _find(path: str) -> tuple[dict[str, Any], str | None]:
    """Return the configuration at `path`, and the subfolder it is in."""
    folder = Path(path)
    places: list[str | None] = [None, "vae"]
    if folder.is_dir():
        places = [place for place in places if (folder / (place or "") / "config.json").is_file()][:1]
        if not places:
            raise FileNotFoundError(f"no VAE in {path!r}: neither it nor its folder vae has a config.json")
    elif folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise FileNotFoundError(f"no folder {path!r}; vae must be a diffusers folder or the name of one on the Hub")
    reasons = []
    for place in places:
        try:
            return AutoencoderKL.load_config(path, subfolder=place), place
        except OSError as error:
            reasons.append(reason(error))
    if folder.is_dir():
        raise ValueError(f"the VAE in {path!r} is damaged: {reasons[0]}")
    raise FileNotFoundError(f"no folder {path!r}, and the Hub has no such VAE or cannot be reached: {reasons[0]}")


def load_vae(path: str) -> VAE:
    """Load a VAE in float32, in evaluation mode.

    Args:
        path: a diffusers folder of it, or of a pipeline with it in `vae/`, or the name of either on the Hub.

    Raises:
        FileNotFoundError: there is none, or the Hub cannot be reached.
        ValueError: it is no autoencoder of ours, or its files are damaged or incomplete.
    """
    config, place = _find(path)
    kind = config.get("_class_name")
    if kind not in _KINDS:
        raise ValueError(f"vae must be one of {', '.join(_KINDS)}, got {kind} in {path!r}")
    try:
        vae, report = _KINDS[kind].from_pretrained(
            path, subfolder=place, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"the VAE in {path!r} is damaged or incomplete: {reason(error)}") from error
    # diffusers leaves missing weights at random values.
    if report["missing_keys"]:
        raise ValueError(f"the VAE in {path!r} is incomplete: it lacks {report['missing_keys'][0]}")
    found: VAE = vae.float().eval()
    return found


def fingerprint(vae: VAE, parts: tuple[str, ...] = ENCODER) -> str:
    """Return a SHA-256 of the configuration and of weights, the latter as float32.

    By default of those that latents depend on: VAEs that differ in their decoders alone, such as sd-vae-ft-ema and
    sd-vae-ft-mse, have the same.

    Args:
        vae: the VAE.
        parts: prefixes of the names of the weights, ENCODER, DECODER or both.
    """
    fields: Collection[str] = _FIELDS
    if not isinstance(vae, AutoencoderKL):
        fields = sorted(key for key in vae.config if not (key.startswith(("_", "up")) or "decoder" in key))
    about = {field: vae.config.get(field) for field in fields}
    digest = hashlib.sha256(json.dumps(about, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if not name.startswith(parts):
            continue
        values = tensor.detach().cpu().float().contiguous()
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def factor(vae: VAE) -> int:
    """Return how many pixels, in height and in width, become one of the latent."""
    channels = vae.config.get("encoder_block_out_channels") or vae.config.block_out_channels
    return int(2 ** (len(channels) - 1))


def posterior(vae: VAE, images: Tensor) -> Tensor:
    """Encode images (N, 3, fH, fW) in [-1, 1]; return moments (N, 2C, H, W), means and then log-variances."""
    if isinstance(vae, AutoencoderKL):
        moments: Tensor = vae.encode(images).latent_dist.parameters
        return moments
    latents: Tensor = vae.encode(images, return_dict=False)[0]
    return torch.cat((latents, torch.full_like(latents, _NO_VARIANCE)), dim=1)


def sample_moments(
    moments: Tensor, noise: Tensor, scaling_factor: float = 1.0, shift_factor: float | None = None
) -> Tensor:
    """Draw scaled latents from posteriors: (mean + exp(logvar / 2) noise - shift) scale.

    Args:
        moments: (N, 2C, H, W), means and then log-variances.
        noise: (N, C, H, W), standard normal.
        scaling_factor, shift_factor: of the VAE; no shift is 0.

    Returns:
        (N, C, H, W).
    """
    mean, log_variance = moments.chunk(2, dim=1)
    latents = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
    return (latents - (shift_factor or 0.0)) * scaling_factor


@torch.no_grad()
def decode(vae: VAE, latents: Tensor) -> Tensor:
    """Turn scaled latents (N, C, H, W) into images (N, 3, fH, fW) in [-1, 1], float32; f is the VAE's factor."""
    latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    images: Tensor = vae.decode(latents.to(vae.dtype)).sample
    return images.float().clamp(-1, 1)
