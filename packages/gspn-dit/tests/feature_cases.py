"""What the tests of extraction and of features share: a tiny VAE, class folders of photographs, options."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from sklearn.datasets import load_sample_images

from gspn_core.runs.options import ImageSize
from gspn_dit.config import ExtractConfig

SIZE = 32
LATENT = SIZE // 8
CLASSES = ("china", "flower")


def tiny_vae(seed: int = 0, **changes: Any) -> AutoencoderKL:
    """A VAE of factor 8 with random weights."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    shape |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(**{**shape, "sample_size": 64, "latent_channels": 4, **changes}).eval()


def save_vae(folder: Path, seed: int = 0, **changes: Any) -> str:
    """Write such a VAE; return its folder."""
    tiny_vae(seed, **changes).save_pretrained(folder)
    return str(folder)


def write_photographs(root: Path, per_class: int = 6) -> Path:
    """Write a folder per photograph of scikit-learn, with pieces of it of several sizes."""
    for name, pixels in zip(CLASSES, load_sample_images().images, strict=True):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            piece = pixels[number * 40 : number * 40 + 70 + number, 100 : 190 - 3 * number]
            Image.fromarray(piece).save(root / name / f"{number}.png")
    return root


def options(data: Path | str, vae: str, out: Path, **changes: Any) -> ExtractConfig:
    """Options of a small extraction in shards of 5 and batches of 2."""
    values: dict[str, Any] = {
        "image_size": ImageSize(SIZE, SIZE),
        "batch_size": 2,
        "shard_size": 5,
        "workers": 0,
        "progress": False,
    }
    return ExtractConfig(data=str(data), vae=vae, out=str(out), **{**values, **changes})


def files(folder: Path) -> dict[str, bytes]:
    """What is in a folder, hidden files too but those of its lock."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name not in (".lock", ".owner")}
