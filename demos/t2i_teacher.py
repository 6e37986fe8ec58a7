"""What t2i_digits.py trains beside the student: a teacher with softmax attention on captioned digits, and a CLIP."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from tqdm import trange

from gspn_core.runs.files import read_json, replacing_folder, write_json, write_tensors
from gspn_t2i.architectures import make_pipeline
from gspn_t2i.captions import METADATA
from gspn_t2i.objective import training_schedule
from gspn_t2i.tiny import make_text_encoder, make_tokenizer, make_vae

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = (32, 32)  # of an image, in pixels
BATCH = 64


def draw_digits() -> tuple[Tensor, list[str]]:
    """Return scikit-learn's 1,797 digits as uint8 images (N, 32, 32), and captions."""
    data = load_digits()
    small = np.round(data.images * (255 / 16)).astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(image).resize(SIZE[::-1])) for image in small])
    return torch.from_numpy(images), [f"a handwritten {NAMES[label]}" for label in data.target]


def write_images(folder: Path, images_NHW: Tensor, captions: Sequence[str]) -> None:
    """Write a folder of images with captions, as `distill` reads it."""
    with replacing_folder(folder) as temporary:
        rows = []
        for index, (pixels, caption) in enumerate(zip(images_NHW, captions, strict=True)):
            Image.fromarray(pixels.numpy()).save(temporary / f"{index:05d}.png")
            rows.append(json.dumps({"file_name": f"{index:05d}.png", "text": caption}) + "\n")
        (temporary / METADATA).write_text("".join(rows), encoding="utf-8")


def build_pipeline() -> Any:
    """Build an untrained pipeline: latents of 8 x 8, a UNet with seven self-attentions, a token for each word."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer(Path(folder), words=("a", "handwritten", *NAMES), length=8)
    unet = UNet2DConditionModel(
        sample_size=SIZE[0] // 4,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=64,
    )
    texts = {"tokenizer": tokenizer, "text_encoder": make_text_encoder(tokenizer, 64, layers=2)}
    return make_pipeline(unet, make_vae((16, 32, 32), groups=8), **texts)


def _one_cycle(parameters: Sequence[Tensor], lr: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)


def _descend(loss: Tensor, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def train_vae(vae: Any, images_NHW: Tensor, steps: int) -> None:
    """Train an autoencoder: squared error and a little of the divergence; then set its scaling factor."""
    torch.manual_seed(1)
    parameters = list(vae.train().parameters())
    optimizer, schedule = _one_cycle(parameters, 3e-3, steps)
    for _ in (bar := trange(steps, desc="autoencoder", unit="update")):
        images = to_input(images_NHW[torch.randint(len(images_NHW), (BATCH // 2,))])
        posterior = vae.encode(images).latent_dist
        latents = posterior.sample()
        error = F.mse_loss(vae.decode(latents).sample, images)
        _descend(error + 1e-5 * posterior.kl().mean() / latents[0].numel(), parameters, optimizer, schedule)
        bar.set_postfix_str(f"error {error.item():.4f}")
    vae.eval()
    vae.register_to_config(scaling_factor=1 / encode(vae, images_NHW[:500])[:, :4].std().item())


def to_input(images_NHW: Tensor) -> Tensor:
    """Turn uint8 grey images into inputs of an autoencoder: (N, 3, H, W) from -1 to 1."""
    return images_NHW[:, None].expand(-1, 3, -1, -1).float() / 127.5 - 1


@torch.no_grad()
def encode(vae: Any, images_NHW: Tensor) -> Tensor:
    """Return the posteriors' means and deviations, (N, 8, H / 4, W / 4)."""
    posteriors = [vae.encode(to_input(part)).latent_dist for part in images_NHW.split(100)]
    return torch.cat([torch.cat((posterior.mean, posterior.std), dim=1) for posterior in posteriors])


def train_teacher(pipeline: Any, images_NHW: Tensor, captions: Sequence[str], steps: int) -> None:
    """Train UNet and text encoder to predict noise, a tenth of the captions dropped; keep averaged weights."""
    torch.manual_seed(2)
    unet, text = pipeline.unet.train(), pipeline.text_encoder.train()
    schedule = training_schedule(pipeline.scheduler.config)
    means, deviations = (encode(pipeline.vae, images_NHW) * pipeline.vae.config.scaling_factor).chunk(2, dim=1)

    def tokens(texts: Sequence[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids: Tensor = pipeline.tokenizer(list(texts), **options).input_ids
        return ids

    ids, empty = tokens(captions), tokens([""])
    parameters = [*unet.parameters(), *text.parameters()]
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer, rates = _one_cycle(parameters, 2e-3, steps)
    for step in (bar := trange(steps, desc="teacher", unit="update")):
        batch = torch.randint(len(means), (BATCH,))
        latents = means[batch] + deviations[batch] * torch.randn(BATCH, *means.shape[1:])
        dropped = torch.rand(BATCH, 1) < 0.1
        times, noise = torch.randint(1000, (BATCH,)), torch.randn_like(latents)
        states = text(torch.where(dropped, empty, ids[batch]))[0]
        noisy = schedule.add_noise(latents, noise, times)
        loss = F.mse_loss(unet(noisy, times, encoder_hidden_states=states).sample, noise)
        _descend(loss, parameters, optimizer, rates)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, max(0.005, 1 / (step + 1)))
        bar.set_postfix_str(f"loss {loss.item():.4f}")
    with torch.no_grad():
        for parameter, value in zip(parameters, averages, strict=True):
            parameter.copy_(value)
    unet.eval()
    text.eval()


def make_teacher(folder: Path, images_NHW: Tensor, captions: Sequence[str], *, vae_steps: int, steps: int) -> float:
    """Train a pipeline with softmax attention and save it, unless it is there; return its seconds."""
    record = folder / "seconds.json"
    if not record.is_file():
        began = time.perf_counter()
        pipeline = build_pipeline()
        train_vae(pipeline.vae, images_NHW, vae_steps)
        train_teacher(pipeline, images_NHW, captions, steps)
        pipeline.save_pretrained(folder)
        write_json(record, round(time.perf_counter() - began, 1))
    seconds: float = read_json(record)
    return seconds


def make_clip(folder: Path, images_NHW: Tensor, captions: Sequence[str], steps: int) -> dict[str, str]:
    """Train a small CLIP on images and captions, unless it is there; return the options of `evaluate` that name it.

    It learns to choose the caption of an image among all.
    """
    import open_clip  # type: ignore[import-untyped]

    vision = {"image_size": list(SIZE), "layers": 2, "width": 64, "patch_size": 8, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
    weights = folder / "clip.safetensors"
    if not weights.is_file():
        write_json(folder / "digits-clip.json", {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text})
        open_clip.add_model_config(folder)
        torch.manual_seed(4)
        model, _, transform = open_clip.create_model_and_transforms("digits-clip")
        pixels = torch.stack([transform(Image.fromarray(image.numpy())) for image in images_NHW])
        names = sorted(set(captions))
        tokens = open_clip.get_tokenizer("digits-clip")(names)
        labels = torch.tensor([names.index(caption) for caption in captions])
        parameters = list(model.train().parameters())
        optimizer, schedule = _one_cycle(parameters, 1e-3, steps)
        for _ in (bar := trange(steps, desc="CLIP", unit="update")):
            batch = torch.randint(len(pixels), (128,))
            images, texts, scale = model(pixels[batch], tokens)
            logits = scale * images @ texts.T  # (N, all captions)
            loss = F.cross_entropy(logits, labels[batch])
            _descend(loss, parameters, optimizer, schedule)
            bar.set_postfix_str(f"loss {loss.item():.4f}")
        write_tensors(weights, model.state_dict())
    return {"clip_model": "digits-clip", "clip_pretrained": str(weights), "clip_config": str(folder)}
