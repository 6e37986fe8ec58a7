"""Models that are converted, taught or measured: a timm model by name, a folder or a run, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data import resolve_model_data_config

from gspn_core.runs.errors import reason

from ..checkpoint import Loaded, load_model
from ..config import AnyModelOptions
from ..data import Preprocessing
from ..models import build_model
from .build import CONVERSION, NAME
from .convert import Keep, convert, mixers


def from_name(name: str, kwargs: Mapping[str, Any], *, pretrained: bool = False) -> Loaded:
    """Make a timm model by its name; raises as `build_model`."""
    for key in ("pretrained", "checkpoint_path"):
        if key in kwargs:
            raise ValueError(f"model_kwargs must not hold {key!r}: pretrained is an option, and checkpoint takes files")
    model: Any = build_model(name, kwargs, pretrained=pretrained)
    data = resolve_model_data_config(model)
    channels, *size = data["input_size"]
    size = list(getattr(getattr(model, "patch_embed", None), "img_size", None) or size)
    preprocessing = Preprocessing.from_timm({**model.pretrained_cfg, **data, "input_size": (channels, *size)})
    names = [str(number) for number in range(model.num_classes)]
    return Loaded(model, preprocessing, names, name, {}, dict(kwargs))


def open_model(config: AnyModelOptions) -> Loaded:
    """Make or load the model that options name; raises as `from_name` or `load_model`."""
    if config.checkpoint is not None:
        return load_model(config.checkpoint, which=config.which, weights=config.weights)
    return from_name(str(config.model), config.model_kwargs, pretrained=config.pretrained)


def open_vision(origin: str, kwargs: Mapping[str, Any], *, pretrained: bool = False) -> Loaded:
    """Make a model by its name in timm, or load that of a folder.

    Raises:
        ValueError: arguments of the constructor, or `pretrained`, are given for a folder; or it cannot be built.
        FileNotFoundError: there is no such checkpoint, or no such weights.
    """
    if not Path(origin).exists():
        return from_name(origin, kwargs, pretrained=pretrained)
    if kwargs or pretrained:
        given = "model_kwargs" if kwargs else "pretrained"
        raise ValueError(f"{given} must not be given for a model that is loaded from {origin!r}")
    return load_model(origin)


def converted(vision: Loaded, keep: Keep, mixer_kwargs: Mapping[str, Any]) -> Loaded:
    """Convert a model in place.

    Raises:
        ValueError: an argument is not of the mixers, all blocks would keep their attention, or as `convert`.
    """
    wrong = sorted(set(mixer_kwargs) - set(CONVERSION[1:]))
    if wrong:
        raise ValueError(f"mixer_kwargs must be of {', '.join(CONVERSION[1:])}, got {', '.join(wrong)}")
    try:
        convert(vision.model, keep=keep, **mixer_kwargs)
    except TypeError as error:
        raise ValueError(f"mixer_kwargs: {reason(error)}") from None
    if not mixers(vision.model):
        raise ValueError(f"keep must leave a block without attention, got {keep!r}")
    vision.model.pretrained_cfg["architecture"] = NAME
    kwargs = {**vision.kwargs, "base": vision.name, "keep": keep, **mixer_kwargs}
    return vision._replace(name=NAME, kwargs=kwargs)
