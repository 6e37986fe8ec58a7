"""Sampling: image i is a function of the seed, of i and of its class, whatever the processes and interruptions."""

from __future__ import annotations

import math
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from gspn_core.runs.files import check_record, locked, make_folder, read_json, replacing, write_json
from gspn_core.runs.options import to_dict
from gspn_core.runs.training import make_accelerator

from . import checkpoint
from .config import SampleConfig
from .models import GSPNDiTTransformer2DModel
from .samplers import SAMPLERS, run_sampler
from .vae import DECODER, ENCODER, VAE, decode, factor, fingerprint, load_vae


def guide(output: Tensor, scale: float, channels: int) -> Tensor:
    """Push the conditional half of an output away from the unconditional one.

    out = null + scale (cond - null) in the first `channels` channels, cond in the others.

    Args:
        output: (2N, O, H, W), conditional predictions first.
        scale: of the difference.
        channels: that are guided; a learned variance never is.

    Returns:
        (N, O, H, W).
    """
    conditional, null = output.chunk(2)
    guided = null[:, :channels] + scale * (conditional[:, :channels] - null[:, :channels])
    return torch.cat((guided, conditional[:, channels:]), dim=1)


@torch.no_grad()
def generate(
    model: GSPNDiTTransformer2DModel,
    labels: Sequence[int],
    indices: Sequence[int],
    *,
    sampler: str,
    steps: int,
    seed: int = 0,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    time_shift: float = 1.0,
    guidance_channels: int | None = None,
    size: tuple[int, int] | None = None,
    autocast: Callable[[], Any] | None = None,
) -> Tensor:
    """Draw latents (or pixels) of classes.

    Args:
        model: on its device, in evaluation mode.
        labels: a class per sample.
        indices: a number per sample; its noise is drawn with `seed` plus that number.
        sampler: "ancestral" or "ddim" for noise, "euler", "heun", "sde" or "dopri5" for velocity.
        steps: of the sampler.
        guidance: scale; 1 is none.
        guidance_interval: times from 0 (data) to 1 (noise) that guidance applies to (arXiv 2404.07724).
        time_shift: of the flow, as in `FlowLoss`.
        guidance_channels: channels it applies to; None is all.
        size: height and width; None is the model's `sample_size`.
        autocast: makes the context of the forward passes.

    Returns:
        (N, in_channels, H, W) in float32.
    """
    config, device = model.config, model.device
    channels = config.in_channels
    height, width = size or (config.sample_size, config.sample_size)
    generators = [torch.Generator().manual_seed(seed + index) for index in indices]
    x = randn_tensor((len(labels), channels, height, width), generators, device, torch.float32)
    classes = torch.tensor(labels, device=device)
    null = torch.full_like(classes, config.num_classes)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        with autocast() if autocast else torch.autocast(device.type, enabled=False):
            if guidance == 1 or not guidance_interval[0] <= float(t) / 1000 <= guidance_interval[1]:
                alone: Tensor = model(x.to(model.dtype), t, classes).sample.float()
                return alone
            both = torch.cat((x, x)).to(model.dtype)
            output = model(both, t, torch.cat((classes, null))).sample.float()
            return guide(output, guidance, min(guidance_channels or channels, channels))

    return run_sampler(sampler, predict, x, steps=steps, time_shift=time_shift, generator=generators)


def to_pixels(images: Tensor) -> np.ndarray[Any, Any]:
    """Turn (N, C, H, W) in [-1, 1] into uint8 (N, H, W, 3); one channel is repeated."""
    pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got {pixels.shape[1]}: latents need `vae` to be decoded")
    out: np.ndarray[Any, Any] = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    return out


def grid(images: np.ndarray[Any, Any], columns: int | None = None, gap: int = 2) -> np.ndarray[Any, Any]:
    """Lay uint8 (N, H, W, 3) out in rows, each image at least 64 pixels high: (H', W', 3)."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = max(1, math.ceil(64 / images.shape[1]))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, _ = images.shape
    rows = math.ceil(n / columns)
    page = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for place, image in enumerate(images):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        page[top : top + height, left : left + width] = image
    return page


def columns_for(count: int, classes: int) -> int | None:
    """Return the columns of a grid of images that take the classes in turn: one per class, if they fill a row."""
    return classes if 1 < classes <= min(count, 20) else None


def save_png(pixels: np.ndarray[Any, Any], path: Path) -> None:
    """Write uint8 (H, W, 3) as a PNG, atomically."""
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def read_png(path: Path) -> np.ndarray[Any, Any]:
    """Read an image as uint8 (H, W, 3)."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def write_npz(files: Sequence[Path], path: Path) -> None:
    """Stream images of one size into an .npz as ADM's: `arr_0`, uint8 (N, H, W, 3), one image in memory at a time."""
    shape = (len(files), *read_png(files[0]).shape)
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        for file in files:
            member.write(read_png(file).tobytes())


def _labels(config: SampleConfig, class_names: list[str]) -> list[int]:
    """Return the class of every image."""
    if config.classes is None:
        return [index % len(class_names) for index in range(config.count)]
    numbers = []
    for given in config.classes:
        number = class_names.index(given) if isinstance(given, str) and given in class_names else given
        try:
            number = int(number)
        except ValueError:
            raise ValueError(f"classes must be numbers or among {', '.join(class_names)}, got {given!r}") from None
        if not 0 <= number < len(class_names):
            raise ValueError(f"classes must be from 0 to {len(class_names) - 1}, got {number}")
        numbers.append(number)
    return [numbers[index % len(numbers)] for index in range(config.count)]


class Sampling:
    """A folder of samples: opened, continued and finished.

    Raises:
        ValueError, FileNotFoundError: an option, the checkpoint or what is in the folder does not fit.
    """

    def __init__(self, config: SampleConfig) -> None:
        self.config = config
        self.accelerator = make_accelerator(config.device, config.precision)
        folder = checkpoint.locate(config.checkpoint)
        model, state = checkpoint.load_model(folder, config.weights)
        self.model = model.to(self.accelerator.device)
        class_names = state.get("class_names") or [str(number) for number in range(model.config.num_classes)]
        self.labels = _labels(config, class_names)
        objective = state.get("objective") or ("noise" if model.out_channels > model.config.in_channels else "flow")
        self.sampler = SAMPLERS[objective][0] if config.sampler == "auto" else config.sampler
        if self.sampler not in SAMPLERS[objective]:
            known = ", ".join(SAMPLERS[objective])
            raise ValueError(f"sampler must be one of {known} for a model of {objective}, got {config.sampler!r}")
        self.vae = self._open_vae(state)
        self.size = self._latent_size(state)
        self.out = Path(config.out)
        self.images = self.out / "images"
        trained_shift = state.get("time_shift", 1.0)
        self.time_shift = trained_shift if config.time_shift is None else config.time_shift
        # All that the images depend on, but the paths, which may change.
        kept = ["count", "classes", "sampler_steps", "guidance", "guidance_interval", "guidance_channels", "seed"]
        kept += ["batch_size", "precision"]
        self.settings = {key: to_dict(config)[key] for key in kept} | {
            "checkpoint": str(folder),
            "checkpoint_sha256": checkpoint.hash_weights(folder, config.weights),
            "step": state.get("step"),
            "time_shift": self.time_shift,
            "weights": config.weights,
            "sampler": self.sampler,
            "latent_size": list(self.size),
            "vae": fingerprint(self.vae, ENCODER + DECODER) if self.vae else None,
        }

    def _open_vae(self, state: dict[str, Any]) -> VAE | None:
        channels = self.model.config.in_channels
        if self.config.vae is None:
            if channels not in (1, 3) or state.get("vae_fingerprint"):
                raise ValueError("vae must be given: the model makes latents; got none")
            return None
        vae = load_vae(self.config.vae)
        wanted = state.get("vae_fingerprint")
        if wanted and fingerprint(vae) != wanted:
            raise ValueError(f"vae must be the one the features were made with, got another in {self.config.vae!r}")
        if vae.config.latent_channels != channels:
            raise ValueError(f"vae must have {channels} latent channels as the model, got {vae.config.latent_channels}")
        return vae.to(self.accelerator.device).eval()

    def _latent_size(self, state: dict[str, Any]) -> tuple[int, int]:
        if self.config.image_size is None:
            own = self.model.config.sample_size
            height, width = state.get("latent_size") or (own, own)
            return height, width
        reduction = factor(self.vae) if self.vae else 1
        step = reduction * self.model.config.patch_size
        height, width = self.config.image_size
        if height % step or width % step:
            raise ValueError(f"image_size must be multiples of {step} (VAE and patch), got {self.config.image_size}")
        return height // reduction, width // reduction

    def _file(self, index: int) -> Path:
        return self.images / f"{index:06d}.png"

    def _open_folder(self) -> None:
        check_record(self.out / "settings.json", self.settings, free=("checkpoint", "count"))
        self._check_count()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            make_folder(self.images)
            write_json(self.out / "settings.json", self.settings)
            write_json(self.out / "labels.json", self.labels)
        self.accelerator.wait_for_everyone()

    def _check_count(self) -> None:
        """More images may be drawn into a folder, but not fewer, which would leave some that nothing names."""
        record = self.out / "settings.json"
        before = read_json(record)["count"] if record.is_file() else 0
        if before > self.config.count:
            raise ValueError(f"count must be at least the {before} images in {self.out}, got {self.config.count}")

    def run(self) -> dict[str, Any]:
        """Draw what is missing; return the folder, images, how many were drawn now, and seconds.

        Raises:
            ValueError: the folder holds samples of other settings, or another process draws there.
        """
        with locked(self.out):
            return self._run()

    def _run(self) -> dict[str, Any]:
        began = time.perf_counter()
        self._open_folder()
        config, accelerator = self.config, self.accelerator
        # Batches do not depend on the number of processes, since the last bits may depend on the batch.
        batches = [
            range(first, min(first + config.batch_size, config.count))
            for first in range(0, config.count, config.batch_size)
        ]
        missing = [batch for batch in batches if not all(self._file(index).is_file() for index in batch)]
        accelerator.wait_for_everyone()  # all list what is missing before any draws
        own = missing[accelerator.process_index :: accelerator.num_processes]
        show = config.progress and accelerator.is_main_process
        with tqdm(total=sum(map(len, own)), unit="image", desc="samples", disable=not show) as bar:
            for batch in own:
                pixels = to_pixels(self._images(batch))
                for index, image in zip(batch, pixels, strict=True):
                    save_png(image, self._file(index))
                bar.update(len(batch))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self._finish()
        accelerator.wait_for_everyone()
        drawn = sum(map(len, missing))
        return {
            "folder": str(self.out),
            "images": config.count,
            "drawn": drawn,
            "seconds": round(time.perf_counter() - began, 1),
        }

    def _images(self, batch: range) -> Tensor:
        config = self.config
        x = generate(
            self.model,
            [self.labels[index] for index in batch],
            batch,
            sampler=self.sampler,
            steps=config.sampler_steps,
            seed=config.seed,
            guidance=config.guidance,
            guidance_interval=config.guidance_interval,
            time_shift=self.time_shift,
            guidance_channels=config.guidance_channels,
            size=self.size,
            autocast=self.accelerator.autocast,
        )
        return decode(self.vae, x) if self.vae else x

    def _finish(self) -> None:
        files = [self._file(index) for index in range(self.config.count)]
        if self.config.grid:
            shown = np.stack([read_png(file) for file in files[: self.config.grid]])
            classes = len(set(self.labels)) if self.config.classes is None else len(self.config.classes)
            save_png(grid(shown, columns_for(len(shown), classes)), self.out / "grid.png")
        if self.config.npz:
            write_npz(files, self.out / "samples.npz")


def sample(config: SampleConfig) -> dict[str, Any]:
    """Draw samples as configured and return a summary; see `Sampling.run`."""
    sampling = Sampling(config)
    summary = sampling.run()
    if config.progress and sampling.accelerator.is_main_process and summary["drawn"] == 0:
        print(f"{summary['folder']} is complete: nothing was drawn", file=sys.stderr)
    return summary
