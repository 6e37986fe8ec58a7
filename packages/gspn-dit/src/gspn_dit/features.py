"""Stored features: what `gspn-dit extract` writes and training reads.

    features/
      extraction.json               settings, written first
      shard-00000.safetensors       moments (n, 2, 2C, H, W) of image and mirror image, labels (n,), index (n,)
      shard-00001.safetensors
      index.json                    names, images, bytes and CRC-32 of the shards, written last

Moments are means and then log-variances of the VAE's posterior; `index` counts the images in their source. A folder
without index.json is an extraction that has not ended.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from gspn_core.runs.errors import reason
from gspn_core.runs.files import read_json

FORMAT = "gspn-dit features 2"
SETTINGS = "extraction.json"
INDEX = "index.json"


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{number:05d}.safetensors"


def shard_items(settings: Mapping[str, Any], number: int) -> range:
    """Return which images of the source are in a shard."""
    first = number * settings["shard_size"]
    return range(first, min(first + settings["shard_size"], settings["images"]))


def count_shards(settings: Mapping[str, Any]) -> int:
    """Return how many shards there are when all are."""
    return -(-int(settings["images"]) // int(settings["shard_size"]))


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what the features in a folder were made of, and how.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are of another format, or the file is damaged.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"no features in {str(folder)!r}: it has no {SETTINGS}")
    settings: dict[str, Any] = read_json(path)
    if settings.get("format") != FORMAT:
        raise ValueError(f"{path} must be of format {FORMAT!r}, got {settings.get('format')!r}")
    return settings


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file's content."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value


def open_shard(folder: Path, settings: Mapping[str, Any], number: int) -> tuple[Any, Tensor]:
    """Return a shard's moments, as a lazy slice, and its labels (n,).

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, or a shard of something else.
    """
    path = folder / shard_name(number)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run `gspn-dit extract` again")
    items = shard_items(settings, number)
    channels, height, width = settings["latent_shape"]
    try:
        shard = safe_open(path, framework="pt")
        moments, labels, index = shard.get_slice("moments"), shard.get_tensor("labels"), shard.get_tensor("index")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {reason(error)}; run `gspn-dit extract` again") from None
    shape = [len(items), 2, 2 * channels, height, width]
    if moments.get_shape() != shape or index.tolist() != list(items) or labels.shape != index.shape:
        raise ValueError(
            f"{path} must hold images {items.start} to {items.stop - 1} as moments {shape}, "
            f"got {len(index)} images from {int(index[0])} as moments {moments.get_shape()}"
        )
    if labels.min() < 0 or labels.max() >= len(settings["class_names"]):
        raise ValueError(
            f"labels must be from 0 to {len(settings['class_names']) - 1}, "
            f"got {int(labels.min())} to {int(labels.max())} in {path}"
        )
    return moments, labels


class Features(Dataset[tuple[Tensor, int]]):
    """Stored features, read one row at a time.

    Args:
        folder: that `gspn-dit extract` wrote.
        vae_fingerprint: of the VAE that they must be made with, if given.

    Raises:
        FileNotFoundError: there are no features, or a shard is missing.
        ValueError: the extraction has not ended, a shard is damaged, or the features are of another VAE.
    """

    def __init__(self, folder: str | Path, vae_fingerprint: str | None = None) -> None:
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        if vae_fingerprint is not None and vae_fingerprint != self.vae_fingerprint:
            raise ValueError(
                f"vae must be the one that the features in {self.folder} were made with, {self.vae_fingerprint[:12]}, "
                f"got {vae_fingerprint[:12]}"
            )
        self._check()
        self._shards: dict[int, tuple[Any, Tensor]] = {}

    def _check(self) -> None:
        count = count_shards(self.settings)
        path = self.folder / INDEX
        if not path.is_file():
            there = sum((self.folder / shard_name(number)).is_file() for number in range(count))
            raise ValueError(
                f"the extraction in {self.folder} has not ended: {there} of {count} shards are there; "
                "run `gspn-dit extract` again"
            )
        entries = read_json(path)["shards"]
        if len(entries) != count:
            raise ValueError(f"{path} must name {count} shards, got {len(entries)}")
        self._checksums = [entry["crc32"] for entry in entries]
        for number, entry in enumerate(entries):
            shard = self.folder / shard_name(number)
            if shard.is_file() and shard.stat().st_size != entry["bytes"]:
                raise ValueError(
                    f"{shard} is damaged: it must have {entry['bytes']} bytes, got {shard.stat().st_size}; "
                    "run `gspn-dit extract` again"
                )
            open_shard(self.folder, self.settings, number)

    def __len__(self) -> int:
        return int(self.settings["images"])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return moments (2, 2C, H, W) of image and mirror image, and the class."""
        number, row = divmod(range(len(self))[index], self.settings["shard_size"])
        if number not in self._shards:
            self._verify(number)
            self._shards[number] = open_shard(self.folder, self.settings, number)
        moments, labels = self._shards[number]
        # Without a copy the row would keep the whole shard in memory.
        return moments[row].clone(), int(labels[row])

    def _verify(self, number: int) -> None:
        """Compare a shard's content with its checksum; once in each process, before its first row is read.

        Raises:
            ValueError: they differ.
        """
        shard = self.folder / shard_name(number)
        if checksum(shard) != self._checksums[number]:
            raise ValueError(f"{shard} is damaged: its checksum is not that of the index; run `gspn-dit extract` again")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in their order."""
        return list(self.settings["class_names"])

    @property
    def fingerprint(self) -> str:
        """What the features are, wherever they and their images are stored."""
        content = {key: value for key, value in self.settings.items() if key not in ("source", "split")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        channels, height, width = self.settings["latent_shape"]
        return channels, height, width

    @property
    def scaling_factor(self) -> float:
        """Factor of the latents that models are trained on."""
        return float(self.settings["scaling_factor"])

    @property
    def shift_factor(self) -> float | None:
        """What is taken off latents before they are scaled."""
        shift: float | None = self.settings["shift_factor"]
        return shift

    @property
    def vae_fingerprint(self) -> str:
        """Fingerprint of the VAE that made them."""
        return str(self.settings["vae_fingerprint"])
