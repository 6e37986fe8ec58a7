"""Metrics of images: networks that turn images and captions into features, and the distance of two sets of these."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import open_clip  # type: ignore[import-untyped]
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from gspn_core.runs.errors import reason
from gspn_core.runs.files import make_folder, replacing
from gspn_core.runs.images import read_image

ROWS = 4096  # features that are centred in float64 at a time
# The names that the moments of a metric have in an .npz, those of FID as other tools write them.
STATISTICS = {"fid": ("mu", "sigma"), "clip_fid": ("clip_mu", "clip_sigma")}


class Moments(NamedTuple):
    """Mean (F,) and covariance (F, F) of features, in float64."""

    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]


def moments(features: Tensor) -> Moments:
    """Mean and unbiased covariance of features (N, F), N at least 2, added up in float64."""
    mean = features.mean(0, dtype=torch.float64)
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for rows in features.split(ROWS):
        centred = rows.double() - mean
        covariance += centred.T @ centred
    return Moments(mean.numpy(), (covariance / (len(features) - 1)).numpy())


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), of moments with equal shapes (Heusel et al. 2017)."""
    statistics = [{"mu": mean, "sigma": covariance} for mean, covariance in (first, second)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def save_statistics(path: Path, statistics: Mapping[str, Moments], origin: Mapping[str, Any]) -> None:
    """Write the moments of each metric, and what they depend on, to an .npz, whole or not at all.

    Raises:
        WriteError: the disk is full or not writable.
    """
    arrays: dict[str, Any] = dict(origin)
    for metric, values in statistics.items():
        arrays |= zip(STATISTICS[metric], values, strict=True)
    make_folder(path.parent)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read_statistics(path: Path, widths: Mapping[Any, int], origin: Mapping[str, Any]) -> dict[str, Moments]:
    """Read the moments of each metric from an .npz.

    Args:
        path: of the file.
        widths: number of features of each metric.
        origin: what they depend on; the file must agree where it says the same.

    Raises:
        ValueError: the file is damaged or does not hold what is needed.
    """
    try:
        with zipfile.ZipFile(path), np.load(path) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"reference: {path} is no .npz of numbers, or a damaged one ({reason(error)})") from error
    for name, value in origin.items():
        if name in arrays and arrays[name].item() != value:
            raise ValueError(f"reference: {path} is of {name} {arrays[name].item()}, not {value}")
    statistics = {}
    for metric, width in widths.items():
        for name, shape in zip(STATISTICS[metric], [(width,), (width, width)], strict=True):
            if name not in arrays:
                raise ValueError(
                    f"reference: {path} must hold {name} for {metric}, got {', '.join(arrays) or 'nothing'}"
                )
            if arrays[name].shape != shape or arrays[name].dtype.kind != "f" or not np.isfinite(arrays[name]).all():
                raise ValueError(
                    f"reference: {name} in {path} must be finite numbers of {shape}, "
                    f"got {arrays[name].dtype} {arrays[name].shape}"
                )
        mean, covariance = (arrays[name].astype(np.float64) for name in STATISTICS[metric])
        statistics[metric] = Moments(mean, covariance)
    return statistics


def square(image: Image.Image, side: int) -> Image.Image:
    """Crop the centre to the short side, and resize it with Pillow's Lanczos filter."""
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) // 2, (height - short) // 2
    return image.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)


def clean_resize(image: Image.Image, side: int) -> Tensor:
    """Resize as clean-fid (Parmar et al. 2022): antialiased bicubic, each channel in float32, not rounded.

    Returns:
        (3, side, side) float32 from 0 to 255; what the filter overshoots is cut off, as clean-fid does.
    """
    channels = [
        np.asarray(Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC))
        for channel in np.asarray(image, np.float32).transpose(2, 0, 1)
    ]
    return torch.from_numpy(np.stack(channels).clip(0, 255))


def brief(error: Exception) -> str:
    """Put an error of another library, which may list every weight of a model, in one line."""
    return shorten(str(error), 300)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"inception_weights: there is no file {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch, pickle, zipfile and safetensors have each their own
        raise ValueError(f"inception_weights: {path} cannot be read as weights ({brief(error)})") from error


class Inception(nn.Module):
    """The InceptionV3 of FID, in torch-fidelity's port, up to its pooled features.

    Args:
        size: side of the squares that images are cropped and resized to, before the network's 299.
        weights: the file that torch-fidelity would download; None lets it.

    Raises:
        FileNotFoundError: there is no such file, or the download fails.
        ValueError: the file holds something else.
    """

    width = 2048

    def __init__(self, size: int, weights: str | None = None) -> None:
        super().__init__()
        self.size = size
        file = None
        if weights is not None:
            # torch-fidelity unpickles what it is given, whatever that runs; so it is given tensors only.
            file = io.BytesIO()
            torch.save(_read_weights(Path(weights)), file)
            file.seek(0)
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=file)
        except Exception as error:
            if weights is not None:
                raise ValueError(f"inception_weights: {weights} is not of this InceptionV3 ({brief(error)})") from error
            raise FileNotFoundError(
                f"the InceptionV3 weights cannot be downloaded ({brief(error)}): get {URL_INCEPTION_V3} "
                "and give the file as inception_weights"
            ) from error
        # Its own forward takes nothing but bytes, and resizes them; the layers are called in their order instead.
        self.layers = nn.Sequential(*(layer for name, layer in network.named_children() if name != "fc")).eval()

    def prepare(self, file: Path) -> Tensor:
        """Read an image as (3, 299, 299) float32 from 0 to 255."""
        return clean_resize(
            square(read_image(file).convert("RGB"), self.size), FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE
        )

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Features (N, 2048) of what `prepare` returns."""
        features: Tensor = self.layers((images_NCHW - 128) / 128).flatten(1)
        return features


def _add_clip_configs(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"clip_config: there is no folder {str(folder)!r}")
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:  # before open_clip remembers the folder, which it reads again each time
            raise ValueError(f"clip_config: {file} is not JSON ({reason(error)})") from error
    open_clip.add_model_config(folder)


class Clip(nn.Module):
    """A CLIP model of open_clip, in float32, with the transform and the tokenizer that open_clip gives it.

    Args:
        model: its name in open_clip.
        pretrained: open_clip's name of its weights, or a file of them.
        config_folder: folder of JSON files which define further models.

    Raises:
        FileNotFoundError: a file or folder does not exist, or the download fails.
        ValueError: open_clip has no such model, or the file is of another.
    """

    def __init__(self, model: str, pretrained: str, config_folder: str | None = None) -> None:
        super().__init__()
        if config_folder is not None:
            _add_clip_configs(Path(config_folder))
        if model not in open_clip.list_models():
            raise ValueError(f"clip_model: open_clip has no model {model!r}; clip_config is a folder that defines some")
        known = open_clip.get_pretrained_cfg(model, pretrained)
        if not known and not Path(pretrained).is_file():
            names = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
            raise FileNotFoundError(
                f"clip_pretrained: {pretrained!r} is neither a file nor one of open_clip's weights of {model} ({names})"
            )
        try:
            self.network, self.transform = open_clip.create_model_from_pretrained(model, pretrained)
            self.tokenizer = open_clip.get_tokenizer(model)
        except Exception as error:  # the hub's client, torch and safetensors have each their own
            if not known:
                raise ValueError(f"clip_pretrained: {pretrained} is not of {model} ({brief(error)})") from error
            source = f"https://huggingface.co/{known['hf_hub'].rstrip('/')}" if known.get("hf_hub") else known["url"]
            raise FileNotFoundError(
                f"the weights {pretrained} of {model} cannot be downloaded ({brief(error)}): get them from {source} "
                "and give the file as clip_pretrained"
            ) from error
        self.requires_grad_(False).eval()
        self.width = int(open_clip.get_model_config(model)["embed_dim"])

    def prepare(self, file: Path) -> Tensor:
        """Read an image and apply open_clip's transform: (3, S, S) float32."""
        image: Tensor = self.transform(read_image(file).convert("RGB"))
        return image

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Embeddings (N, F) of what `prepare` returns, not normalised."""
        features: Tensor = self.network.encode_image(images_NCHW)
        return features

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (N, F), not normalised; a text that is too long for the model is cut."""
        tokens = self.tokenizer(list(texts)).to(next(self.parameters()).device)
        features: Tensor = self.network.encode_text(tokens)
        return features
