"""Networks that turn images into the features which the metrics compare."""

from __future__ import annotations

import importlib
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import timm
import torch
from accelerate import PartialState
from accelerate.utils import gather
from timm.data import resolve_model_data_config
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from tqdm import tqdm

from gspn_core.runs.errors import reason

SPATIAL_CHANNELS = 7  # of the 17 x 17 map: 2023 features, about as many as the pooled ones


class Features(NamedTuple):
    """Features of images, as an extractor computes them."""

    pool: Tensor  # (N, F) float32
    spatial: Tensor | None  # (N, 2023) float32
    logits: Tensor | None  # (N, K) float32


class Extractor(nn.Module):
    """A network from uint8 images (N, 1 or 3, H, W) of any size to their `Features`.

    Its `name`, the number of its `classes`, and whether it is the `inception` of the standard FID, so that the
    statistics in ADM's reference files apply.
    """

    name: str
    inception: bool
    classes: int


class Batches(Protocol):
    """Images of one size, read batch by batch."""

    def __len__(self) -> int:
        """Their number."""

    def chunks(self, start: int, stop: int, size: int) -> Iterator[Tensor]:
        """Yield images start to stop, at most `size` at a time, as uint8 (n, C, H, W)."""


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """Repeat grey uint8 images (N, 1, H, W), or weigh colours (N, 3, H, W) as Pillow's `convert("L")`."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    weights = torch.tensor([19595, 38470, 7471], device=images.device).view(1, 3, 1, 1)
    return ((images * weights).sum(1, keepdim=True) + 0x8000 >> 16).to(torch.uint8)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors, or from a pickle of nothing but tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold a state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"extractor_weights: there is no file {path}")
    try:
        return load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch, pickle, zipfile and safetensors raise different exceptions
        raise ValueError(f"extractor_weights: {path} cannot be read as weights ({reason(error)})") from error


# Where a call of Inception keeps its spatial features: of the call, not of the module, which threads may share.
_SPATIAL: ContextVar[list[Tensor]] = ContextVar("_SPATIAL")


def _keep_spatial(module: nn.Module, inputs: tuple[Tensor, ...], output_NCHW: Tensor) -> None:
    _SPATIAL.get().append(output_NCHW[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1))


class InceptionExtractor(Extractor):
    """The InceptionV3 of FID, ported by torch-fidelity, with the spatial features of sFID.

    Args:
        weights: the file that torch-fidelity would download; None lets it.

    Raises:
        FileNotFoundError: there is no such file, or the download fails.
        ValueError: the file holds something else.
    """

    name = "inception"
    inception = True
    classes = 1008

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        file = None
        if weights is not None:
            # torch-fidelity unpickles its file without restriction: give it one that holds only tensors.
            file = io.BytesIO()
            torch.save(read_weights(weights), file)
            file.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
            )
        except Exception as error:
            if weights is not None:
                raise ValueError(
                    f"extractor_weights: {weights} is not of this InceptionV3 ({reason(error)})"
                ) from error
            raise FileNotFoundError(
                f"the InceptionV3 weights cannot be downloaded ({reason(error)}): get {URL_INCEPTION_V3} "
                f"and give the file {URL_INCEPTION_V3.rsplit('/', 1)[1]} as extractor_weights"
            ) from error
        self.network.Mixed_6d.branch1x1.register_forward_hook(_keep_spatial)

    def forward(self, images: Tensor) -> Features:
        """Features (N, 2048), (N, 2023) and logits (N, 1008) without bias, of uint8 images of any size."""
        kept: list[Tensor] = []
        before = _SPATIAL.set(kept)
        try:
            pool, logits = self.network(convert_channels(images, 3))
        finally:
            _SPATIAL.reset(before)
        return Features(pool, kept[0], logits)


class TimmExtractor(Extractor):
    """A timm model: features before its classifier, and logits. Images are resized whole, without a crop.

    Args:
        model: its name in timm.
        weights: state dict; None takes the pretrained weights of that name.
        kwargs: further arguments of `timm.create_model`.
        mean: per channel, of images from 0 to 1; the model's own if absent, averaged for a model of grey images.
        std: likewise.
        size: side of the images it is given; the model's own if absent, 0 as they are.

    Raises:
        FileNotFoundError: there is no such file, or the pretrained weights cannot be had.
        ValueError: timm has no such model, the weights are of another, or mean and std do not suit it.
    """

    inception = False
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: str,
        weights: Path | None = None,
        kwargs: Mapping[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.name = f"timm:{model}"
        kwargs = dict(kwargs or {})
        if ":" not in model and not timm.is_model(model):
            raise ValueError(
                f"extractor: timm has no model {model!r}; extractor_import names modules that register some"
            )
        if weights is None:
            self.network: Any = self._pretrained(model, kwargs)
        else:
            state = read_weights(weights)
            self.network = timm.create_model(model, pretrained=False, **kwargs)
            try:
                self.network.load_state_dict(state)
            except RuntimeError as error:
                raise ValueError(
                    f"extractor_weights: {weights} is not of {model} made with {kwargs} ({reason(error)})"
                ) from error
        self.network.requires_grad_(False).eval()
        self.classes = self.network.num_classes
        config = resolve_model_data_config(self.network)
        self.in_chans = int(kwargs.get("in_chans", config["input_size"][0]))
        if self.in_chans not in (1, 3):
            raise ValueError(f"extractor_kwargs: in_chans must be 1 or 3, got {self.in_chans}")
        self.size = tuple(config["input_size"][1:]) if size is None else (size, size) if size else None
        for field, given in (("mean", mean), ("std", std)):
            values = torch.tensor(config[field] if given is None else list(given), dtype=torch.float32)
            if given is None and self.in_chans == 1:
                values = values.mean(0, keepdim=True)
            if len(values) not in (1, self.in_chans) or (field == "std" and not (values > 0).all()):
                kind = "positive numbers" if field == "std" else "numbers"
                raise ValueError(f"extractor_{field} must be 1 or {self.in_chans} {kind}, got {values.tolist()}")
            self.register_buffer(field, values.view(1, -1, 1, 1), persistent=False)

    @staticmethod
    def _pretrained(model: str, kwargs: dict[str, Any]) -> nn.Module:
        try:
            return timm.create_model(model, pretrained=True, **kwargs)
        except TypeError:  # about the arguments, not the weights
            raise
        except Exception as error:  # the Hub's client and its HTTP library raise different exceptions
            raise FileNotFoundError(
                f"no pretrained weights of {model!r} can be had ({reason(error)}): give a file as extractor_weights"
            ) from error

    def forward(self, images: Tensor) -> Features:
        """Features (N, F) and logits (N, K), None of a model without classifier, of uint8 images."""
        x = convert_channels(images, self.in_chans).float() / 255
        if self.size and x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        features = self.network.forward_features((x - self.mean) / self.std)
        pool = self.network.forward_head(features, pre_logits=True).float()
        if pool.ndim != 2:
            raise ValueError(f"extractor: {self.name} must pool its features to (N, F), got {tuple(pool.shape)}")
        logits = self.network.forward_head(features).float() if self.classes else None
        return Features(pool, None, logits)


def build_extractor(
    name: str,
    *,
    weights: str | Path | None = None,
    kwargs: Mapping[str, Any] | None = None,
    modules: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: int | None = None,
) -> Extractor:
    """Make `inception` or `timm:NAME`; the arguments are those of the classes, and modules to import before.

    Raises:
        FileNotFoundError: the weights cannot be had.
        ValueError: an argument is wrong, or not one of that extractor.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"extractor_import: cannot import {module!r} ({reason(error)})") from error
    path = None if weights is None else Path(weights)
    if name.startswith("timm:"):
        return TimmExtractor(name.removeprefix("timm:"), path, kwargs, mean, std, size)
    if name != "inception":
        raise ValueError(f"extractor must be inception or timm:NAME, got {name!r}")
    for option, given in (("kwargs", kwargs or None), ("mean", mean), ("std", std), ("size", size)):
        if given is not None:
            raise ValueError(f"extractor_{option} is for timm extractors, not for inception; got {given}")
    return InceptionExtractor(path)


@torch.inference_mode()
def extract(
    extractor: Extractor,
    images: Batches,
    count: int,
    fields: Collection[str],
    batch_size: int,
    state: PartialState,
    device: torch.device,
    title: str | None = None,
) -> dict[str, Tensor]:
    """Features of the first images, each process taking a part of them.

    Args:
        extractor: on `device`.
        images: to take them from.
        count: how many.
        fields: of `Features`, those to keep.
        batch_size: images per process and forward pass.
        state: of the processes.
        device: of this process.
        title: of a progress bar, if there is to be one.

    Returns:
        Float32 (count, ...) of each field on the CPU, in the order of the images; on processes other than the main
        one, nothing.
    """
    share = -(-count // state.num_processes)
    # A process without a share computes the last image, whose shape is needed for padding; the result is cut off.
    start = min(state.process_index * share, count - 1)
    stop = min(start + share, count)
    parts: dict[str, list[Tensor]] = {field: [] for field in fields}
    with tqdm(total=stop - start, desc=title, unit="image", disable=title is None, leave=False) as bar:
        for batch in images.chunks(start, stop, batch_size):
            features = extractor(batch.to(device))._asdict()
            for field in parts:
                parts[field].append(features[field].cpu())
            bar.update(len(batch))
    found = {}
    for field in sorted(parts):  # all processes gather in one order
        own = torch.cat(parts[field])
        padded = F.pad(own, (0, 0, 0, share - len(own))).to(state.device)
        whole = gather(padded)[:count].cpu()
        if state.is_main_process:
            found[field] = whole
    return found
