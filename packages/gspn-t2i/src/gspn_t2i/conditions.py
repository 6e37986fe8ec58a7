"""Latents and text embeddings of images and captions, by the frozen parts of a pipeline: at once, or from a cache.

    cache/
      settings.json                 what was encoded and how, written first
      shard-00000.safetensors       moments, states, pooled, sizes of some images
      index.json                    written last

Moments are means and log-variances of the autoencoder's posterior, of an image and, where training mirrors images, of
its mirror image.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from gspn_core.runs.errors import reason
from gspn_core.runs.files import check_record, read_json, write_json, write_tensors
from gspn_core.runs.options import ImageSize
from gspn_core.runs.order import AUGMENT, derive_seed

from .captions import Captioned, crop
from .pipelines import hash_parts

FORMAT = "gspn-t2i cache 2"
SETTINGS = "settings.json"
INDEX = "index.json"
SHARD = 256  # images


class Embeddings(NamedTuple):
    """Outputs of the text encoders."""

    states: Tensor  # (N, L, E)
    pooled: Tensor | None  # (N, P), of SDXL


class Frozen:
    """The autoencoder and the text encoders of a pipeline.

    Args:
        pipeline: of Stable Diffusion 1.5, 2.x or SDXL, on the device.
        device: of inputs and results.
    """

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self.pipeline, self.device = pipeline, device
        self.two_encoders = getattr(pipeline, "text_encoder_2", None) is not None

    def fingerprint(self) -> str:
        """Return a hash of the weights of all encoders."""
        return hash_parts(
            {name: getattr(self.pipeline, name, None) for name in ("vae", "text_encoder", "text_encoder_2")}
        )

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Return means and log-variances (N, 2C, h, w), float32, of uint8 images (N, 3, H, W)."""
        vae = self.pipeline.vae
        images = pixels.to(device=self.device, dtype=vae.dtype) / 127.5 - 1
        distribution = vae.encode(images).latent_dist
        return torch.cat((distribution.mean, distribution.logvar), dim=1).float()

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Return scaled latents (N, C, h, w) drawn from the posterior by noise of that shape."""
        config = self.pipeline.vae.config
        mean, log_variance = moments.chunk(2, dim=1)
        x = mean + (0.5 * log_variance).exp() * noise
        return (x - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> Embeddings:
        """Return the embeddings of captions, by the pipeline's own method."""
        options = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        encoded = self.pipeline.encode_prompt(prompt=list(captions), **options)
        return Embeddings(encoded[0], encoded[2] if self.two_encoders else None)

    def unconditional(self) -> Embeddings:
        """Return the embeddings of the empty caption, N = 1, as classifier-free guidance uses them."""
        empty = self.embed([""])
        if self.pipeline.config.get("force_zeros_for_empty_prompt"):
            pooled = None if empty.pooled is None else torch.zeros_like(empty.pooled)
            return Embeddings(torch.zeros_like(empty.states), pooled)
        return empty


class Item(NamedTuple):
    """A loaded training image: pixels and a caption, or moments and embeddings."""

    image: Tensor  # (3, H, W) uint8, or moments (M, 2C, h, w) with M = 2 if there is a mirror image
    caption: str | Embeddings
    size: Tensor  # (6,) float32, as of `captions.crop`


class Batch(NamedTuple):
    """Inputs of the UNet."""

    latents: Tensor  # (N, C, h, w) float32
    embeddings: Embeddings
    sizes: Tensor  # (N, 6) float32


def collate(items: list[Item]) -> Any:
    """Stack items; captions stay a list."""
    captions: Any = [item.caption for item in items]
    if not isinstance(captions[0], str):
        pooled = None if captions[0].pooled is None else torch.stack([c.pooled for c in captions])
        captions = Embeddings(torch.stack([c.states for c in captions]), pooled)
    return torch.stack([item.image for item in items]), captions, torch.stack([item.size for item in items])


class Pixels(Dataset[Item]):
    """Images and captions, encoded anew in every batch.

    An item is named by its index, or by (epoch, index), on which a random cut depends.

    Args:
        captioned: images.
        size: that they are resized and cropped to.
        skip_unreadable: take the next readable image and its caption where one cannot be read, instead of stopping.
        size_of: a size for each image, instead of `size`.
        crop_seed: of random cuts; None cuts the centre.

    Attributes:
        fingerprint: of the images and captions, wherever they are stored.
    """

    def __init__(
        self,
        captioned: Captioned,
        size: ImageSize,
        *,
        skip_unreadable: bool = False,
        size_of: Sequence[ImageSize] | None = None,
        crop_seed: int | None = None,
    ) -> None:
        self.captioned, self.size, self.skip_unreadable = captioned, size, skip_unreadable
        self.size_of, self.crop_seed = size_of, crop_seed
        self.fingerprint = captioned.fingerprint
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.captioned)

    def _read(self, index: int) -> tuple[Image.Image, str]:
        """Return an image and its caption, or what takes their place.

        Raises:
            ValueError: the image cannot be read; or none can.
        """
        if not self.skip_unreadable:
            return self.captioned[index]
        for place in (*range(index, len(self)), *range(index)):
            if place not in self._unreadable:
                try:
                    return self.captioned[place]
                except ValueError as error:
                    self._unreadable.add(place)
                    print(f"skipped: {error}", file=sys.stderr, flush=True)
        raise ValueError(f"none of the {len(self)} images can be read")

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, caption = self._read(index)
        at = (0.5, 0.5)
        if self.crop_seed is not None:
            draws = random.Random(derive_seed(AUGMENT, self.crop_seed, epoch, index))
            at = (draws.random(), draws.random())
        image, size = crop(image, self.size_of[index] if self.size_of else self.size, at)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return Item(pixels, caption, torch.tensor(size, dtype=torch.float32))

    @staticmethod
    def latent_size(loaded: Any, factor: int) -> tuple[int, int]:
        """Return height and width of the latents of a collated batch, whose images have `factor` times as many."""
        height, width = loaded[0].shape[-2:]
        return height // factor, width // factor

    def encode(self, loaded: Any, frozen: Frozen, mirrored: Tensor, noise: Tensor) -> Batch:
        """Return a collated batch as inputs of the UNet; images where `mirrored` (N,) is set are flipped."""
        pixels, captions, sizes = loaded
        pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        moments = frozen.moments(pixels)
        latents = frozen.latents(moments, noise.to(moments.device))
        if self.crop_seed is not None:
            sizes = mirror_sizes(sizes, mirrored)
        return Batch(latents, frozen.embed(captions), sizes.to(frozen.device))


def mirror_sizes(sizes: Tensor, mirrored: Tensor) -> Tensor:
    """Return size conditions (N, 6) where the crops that are mirrored lie as in the mirrored whole image."""
    original, (left, height, width) = sizes[:, :2].double(), sizes[:, 3:].double().unbind(1)
    scale = torch.maximum(height / original[:, 0], width / original[:, 1])
    covering = torch.maximum(width, (original[:, 1] * scale).round())
    moved = sizes.clone()
    moved[:, 3] = torch.where(mirrored, covering - width - left, left).float()
    return moved


class Encoded(Dataset[Item]):
    """A cache that `encode` wrote.

    Args:
        folder: of the cache.

    Attributes:
        fingerprint: of the images and captions that were encoded.

    Raises:
        FileNotFoundError: there is no cache, it is not finished, or a shard is missing.
        ValueError: it is of another format, or a shard is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        for name in (SETTINGS, INDEX):
            if not (self.folder / name).is_file():
                raise FileNotFoundError(f"no finished cache in {str(folder)!r}: there is no {name}")
        self.settings = read_json(self.folder / SETTINGS)
        if self.settings.get("format") != FORMAT:
            raise ValueError(f"{folder} must be a cache of the format {FORMAT!r}, got {self.settings.get('format')!r}")
        self.fingerprint = self.settings["data"]
        self._shards: dict[int, Any] = {}
        for number in range(_shards(self.settings)):
            self._open(number)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # each loading process opens its own

    def _open(self, number: int) -> Any:
        if number not in self._shards:
            path = self.folder / _shard_name(number)
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; encode again into another folder")
            try:
                self._shards[number] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(
                    f"{path} is damaged: {reason(error)}; remove it and {INDEX} to encode it again"
                ) from None
        return self._shards[number]

    def __len__(self) -> int:
        return int(self.settings["images"])

    def __getitem__(self, index: int) -> Item:
        shard, row = self._open(index // SHARD), index % SHARD
        values = {name: shard.get_slice(name)[row] for name in shard.keys()}  # noqa: SIM118, no mapping
        return Item(values["moments"], Embeddings(values["states"], values.get("pooled")), values["sizes"])

    @staticmethod
    def latent_size(loaded: Any, factor: int) -> tuple[int, int]:
        """As of `Pixels`."""
        height, width = loaded[0].shape[-2:]
        return height, width

    def encode(self, loaded: Any, frozen: Frozen, mirrored: Tensor, noise: Tensor) -> Batch:
        """As of `Pixels`."""
        device = frozen.device
        stored, (states, pooled), sizes = loaded
        moments = stored[torch.arange(len(stored)), mirrored.long()].to(device)
        embeddings = Embeddings(states.to(device), None if pooled is None else pooled.to(device))
        return Batch(frozen.latents(moments, noise.to(device)), embeddings, sizes.to(device))


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _shards(settings: dict[str, Any]) -> int:
    return -(-int(settings["images"]) // SHARD)


def encode(
    pixels: Pixels, frozen: Frozen, folder: str | Path, *, mirrored: bool, batch_size: int, progress: bool = True
) -> Encoded:
    """Encode all images and captions into a cache, or continue to, and open it; every process takes shards.

    Args:
        pixels: images and captions.
        frozen: encodes them.
        folder: of the cache.
        mirrored: store mirror images too.
        batch_size: images per forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: the folder holds another cache, or what was encoded is not finite.
        WriteError: the disk is full or not writable; whole shards stay.
    """
    folder = Path(folder)
    state = PartialState()
    settings = {
        "format": FORMAT,
        "images": len(pixels),
        "data": pixels.captioned.fingerprint,
        "image_size": str(pixels.size),
        "mirrored": mirrored,
        "encoders": frozen.fingerprint(),
    }
    check_record(folder / SETTINGS, settings, option="cache")
    missing = [number for number in range(_shards(settings)) if not (folder / _shard_name(number)).is_file()]
    state.wait_for_everyone()  # all list missing shards before any writes
    if state.is_main_process:
        write_json(folder / SETTINGS, settings)
    state.wait_for_everyone()
    own = missing[state.process_index :: state.num_processes]
    for number in tqdm(own, "encode", unit="shard", disable=not (own and progress and state.is_main_process)):
        indices = range(number * SHARD, min((number + 1) * SHARD, len(pixels)))
        write_tensors(folder / _shard_name(number), _encode_shard(pixels, frozen, indices, mirrored, batch_size))
    state.wait_for_everyone()
    if state.is_main_process:
        write_json(folder / INDEX, {"shards": _shards(settings)})
    state.wait_for_everyone()
    return Encoded(folder)


def _encode_shard(pixels: Pixels, frozen: Frozen, indices: range, mirrored: bool, batch_size: int) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {"moments": [], "states": [], "pooled": [], "sizes": []}
    for first in range(indices.start, indices.stop, batch_size):
        loaded = [pixels[index] for index in range(first, min(first + batch_size, indices.stop))]
        images, captions, sizes = collate(loaded)
        sides = [frozen.moments(images)] + ([frozen.moments(images.flip(-1))] if mirrored else [])
        embeddings = frozen.embed(captions)
        parts["moments"].append(torch.stack(sides, dim=1).cpu())
        parts["states"].append(embeddings.states.cpu())
        if embeddings.pooled is not None:
            parts["pooled"].append(embeddings.pooled.cpu())
        parts["sizes"].append(sizes)
    encoded = {name: torch.cat(tensors) for name, tensors in parts.items() if tensors}
    for name, values in encoded.items():
        finite = values.isfinite().flatten(1).all(1)
        if not finite.all():
            raise ValueError(
                f"{name} of image {indices[int(finite.int().argmin())]} are not finite; try another precision, "
                "or another autoencoder in the pipeline"
            )
    return encoded
