"""`generate`: images of prompts, by a pipeline with or without an adapter, one process or several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from gspn_core.runs.errors import explaining_memory
from gspn_core.runs.files import check_record, make_folder, write_json
from gspn_core.runs.options import to_dict

from .config import GenerateConfig
from .pipelines import DTYPES, check_offload, is_tiled, load_pipeline, open_processes, own_size, place, save_png

# Options that images do not depend on, but for rounding; prompts are recorded after reading.
_FREE = {"prompts", "prompt_file", "out", "image_size", "batch_size", "vae_tiling", "offload", "device", "progress"}


def read_prompts(config: GenerateConfig) -> list[str]:
    """Return the prompts, those of the command line first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a prompt is empty, or there is none.
    """
    prompts = list(config.prompts)
    if any(not prompt.strip() for prompt in prompts):
        raise ValueError(f"prompts must not be empty, got {prompts}")
    if config.prompt_file is not None:
        path = Path(config.prompt_file)
        if not path.is_file():
            raise FileNotFoundError(f"no prompt file {config.prompt_file!r}")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        if not any(lines):
            raise ValueError(f"prompt_file must have a prompt in a line, {config.prompt_file!r} is empty")
        prompts += [line for line in lines if line]
    if not prompts:
        raise ValueError("prompts or prompt_file must be set, got neither")
    return prompts


class Generation:
    """A folder of images of prompts: opened, continued and finished.

        OUT/settings.json       what the images depend on
        OUT/images/000000.png   image i, drawn with seed + i

    Raises:
        ValueError, FileNotFoundError: an option, the pipeline or the adapter does not fit.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.prompts = read_prompts(config)
        check_offload(config.offload, config.device)
        self.state, self.device = open_processes(config.device)
        self.pipeline = load_pipeline(config.pipeline, config.adapter, DTYPES[config.precision])
        self.size = config.image_size or own_size(self.pipeline)
        self.tiled = is_tiled(config.vae_tiling, self.size)
        if self.tiled:
            self.pipeline.vae.enable_tiling()
        place(self.pipeline, self.device, config.offload)
        self.pipeline.set_progress_bar_config(disable=True)
        self.out = Path(config.out)
        self.count = len(self.prompts) * config.images_per_prompt

    def path(self, index: int) -> Path:
        """Return the file of an image."""
        return self.out / "images" / f"{index:06d}.png"

    def _open_folder(self) -> list[int]:
        """Return the images that are missing."""
        settings = {name: value for name, value in to_dict(self.config).items() if name not in _FREE}
        settings |= {"prompts": self.prompts, "image_size": str(self.size)}
        check_record(self.out / "settings.json", settings)
        self.state.wait_for_everyone()  # all compare before one writes
        if self.state.is_main_process:
            make_folder(self.out / "images")
            write_json(self.out / "settings.json", settings)
        missing = [index for index in range(self.count) if not self.path(index).is_file()]
        self.state.wait_for_everyone()  # all list before one draws
        return missing

    def _draw(self, indices: Sequence[int]) -> list[Image.Image]:
        config = self.config
        # On the CPU, so that an image is the same on every device as far as arithmetic is; and one for each image, so
        # that it does not depend on the others of its batch.
        generators = [torch.Generator().manual_seed(config.seed + index) for index in indices]
        images: list[Image.Image] = self.pipeline(
            [self.prompts[index // config.images_per_prompt] for index in indices],
            negative_prompt=None if config.negative_prompt is None else [config.negative_prompt] * len(indices),
            height=self.size.height,
            width=self.size.width,
            num_inference_steps=config.sampler_steps,
            guidance_scale=config.guidance,
            generator=generators,
        ).images
        return images

    def run(self) -> dict[str, Any]:
        """Draw the missing images.

        Returns:
            The `folder`, the number of `images` and of those `drawn` now, `seconds` and, on an accelerator, the peak
            memory in bytes.

        Raises:
            ValueError: the folder holds images of other settings.
            MemoryError: the device's memory is not enough; the message says what saves some.
            WriteError: the disk is full or not writable.
        """
        began, config = time.perf_counter(), self.config
        missing = self._open_folder()
        own = missing[self.state.process_index :: self.state.num_processes]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        savers = {
            "--batch-size 1": config.batch_size > 1,
            "--precision bf16": config.precision == "fp32",
            "--vae-tiling always": not self.tiled,
            "--offload model": config.offload == "none" and self.device.type != "cpu",
            "--offload sequential": config.offload == "model",
        }
        hidden = not (config.progress and self.state.is_main_process)
        with tqdm(total=len(own), unit="image", disable=hidden) as bar:
            for first in range(0, len(own), config.batch_size):
                batch = own[first : first + config.batch_size]
                with explaining_memory(savers), torch.inference_mode():
                    images = self._draw(batch)
                for index, image in zip(batch, images, strict=True):
                    save_png(image, self.path(index))
                    bar.update()
        self.state.wait_for_everyone()
        return {
            "folder": str(self.out),
            "images": self.count,
            "drawn": len(missing),
            "seconds": round(time.perf_counter() - began, 1),
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
        }


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Draw images as configured; see `Generation.run`."""
    return Generation(config).run()
