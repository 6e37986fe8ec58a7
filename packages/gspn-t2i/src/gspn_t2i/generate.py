"""`generate`: images of prompts, by a pipeline with or without an adapter, one process or several."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from gspn_core.runs.errors import explaining_memory
from gspn_core.runs.files import check_record, locked, make_folder, read_json, write_json
from gspn_core.runs.images import read_image
from gspn_core.runs.options import to_dict

from .captions import read_lines
from .config import GenerateConfig
from .pipelines import (
    PLACES,
    check_offload,
    hash_parts,
    is_tiled,
    open_pipeline,
    open_processes,
    own_size,
    place,
    precision_of,
    save_png,
)

# Options that images do not depend on, but for rounding; prompts and the control image are recorded after reading.
_LEFT_OUT = {"prompt_file", "control_image", "out", "batch_size", "vae_tiling", "offload", "device", "progress"}
# Recorded, but compared by their content: weights by a hash, prompts each with the images that are there.
_FREE = {*PLACES, "controlnet", "prompts", "images_per_prompt"}


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
        lines = read_lines(path)
        if not lines:
            raise ValueError(f"prompt_file must have a prompt in a line, {config.prompt_file!r} is empty")
        prompts += lines
    if not prompts:
        raise ValueError("prompts or prompt_file must be set, got neither")
    return prompts


def check_growth(record: Path, key: str, now: Sequence[Any], before: Sequence[Any]) -> None:
    """Refuse to continue a folder whose results are others than the first of those asked for now.

    Args:
        record: the folder's, for the message.
        key: option that asks for results.
        now, before: what each result is made of.

    Raises:
        ValueError: one differs, or there are fewer.
    """
    if list(before) != list(now[: len(before)]):
        raise ValueError(
            f"{key} must begin with what the {len(before)} results in {record.parent} were made of, "
            "got others or fewer; give another folder as `out`"
        )


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
        self.precision = precision_of(config)
        self.control = None if config.control_image is None else read_image(config.control_image).convert("RGB")
        self.pipeline = open_pipeline(config, config.pipeline, config.controlnet)
        self.weights = hash_parts(self.pipeline.components)  # before offloading takes them apart
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
        record = self.out / "settings.json"
        settings = {name: value for name, value in to_dict(self.config).items() if name not in _LEFT_OUT}
        settings |= {"prompts": self.prompts, "image_size": str(self.size), "precision": self.precision}
        settings |= {"weights_sha256": self.weights}
        if self.control is not None:
            settings["control_sha256"] = hashlib.sha256(self.control.tobytes()).hexdigest()
        check_record(record, settings, free=_FREE)
        if record.is_file():
            before = read_json(record)
            each = _prompt_of_each(before["prompts"], before["images_per_prompt"])
            check_growth(record, "prompts", _prompt_of_each(self.prompts, self.config.images_per_prompt), each)
        self.state.wait_for_everyone()  # all compare before one writes
        if self.state.is_main_process:
            make_folder(self.out / "images")
            write_json(record, settings)
        missing = [index for index in range(self.count) if not self.path(index).is_file()]
        self.state.wait_for_everyone()  # all list before one draws
        return missing

    def _draw(self, indices: Sequence[int], after_step: Callable[[int], Any]) -> list[Image.Image]:
        config = self.config
        options: dict[str, Any] = {}
        if self.control is not None:
            control = self.control.resize((self.size.width, self.size.height), Image.Resampling.LANCZOS)
            options = {"image": [control] * len(indices), "controlnet_conditioning_scale": config.control_scale}

        def report(pipeline: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            after_step(step + 1)
            return values

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
            callback_on_step_end=report,
            **options,
        ).images
        return images

    def run(self) -> dict[str, Any]:
        """Draw the missing images.

        Returns:
            The `folder`, the number of `images` and of those `drawn` now, `seconds` and, on an accelerator, the peak
            memory in bytes.

        Raises:
            ValueError: the folder holds images of other settings, or another process draws there.
            MemoryError: the device's memory is not enough; the message says what saves some.
            WriteError: the disk is full or not writable.
        """
        with locked(self.out):
            return self._run()

    def _run(self) -> dict[str, Any]:
        began, config = time.perf_counter(), self.config
        missing = self._open_folder()
        own = missing[self.state.process_index :: self.state.num_processes]
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        savers = {
            "--batch-size 1": config.batch_size > 1,
            "--precision bf16": self.precision == "fp32",
            "--vae-tiling always": not self.tiled,
            "--offload model": config.offload == "none" and self.device.type != "cpu",
            "--offload sequential": config.offload == "model",
        }
        hidden = not (config.progress and self.state.is_main_process)
        with tqdm(total=len(own), unit="image", disable=hidden) as bar:
            for first in range(0, len(own), config.batch_size):
                batch = own[first : first + config.batch_size]
                with explaining_memory(savers), torch.inference_mode():
                    images = self._draw(
                        batch, lambda step: bar.set_postfix_str(f"step {step} of {self.pipeline.num_timesteps}")
                    )
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


def _prompt_of_each(prompts: Sequence[str], images_per_prompt: int) -> list[str]:
    return [prompt for prompt in prompts for _ in range(images_per_prompt)]


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Draw images as configured; see `Generation.run`."""
    return Generation(config).run()
