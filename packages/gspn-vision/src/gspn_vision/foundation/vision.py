"""Models that are converted, taught or measured: a timm model by name, a folder or a run, and what is known of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from timm.data import resolve_model_data_config

from gspn_core.runs.errors import reason
from gspn_core.runs.files import read_json

from ..checkpoint import CONFIG, load_model, locate, timm_config
from ..config import AnyModelOptions
from ..data import Preprocessing
from ..models import build_model, set_size
from .build import CONVERSION, NAME
from .convert import Keep, convert, mixers


class Vision(NamedTuple):
    """A timm model, and all that its folder says of it."""

    model: Any
    name: str  # in timm
    kwargs: dict[str, Any]  # of its constructor
    preprocessing: Preprocessing
    class_names: list[str]

    def config(self) -> str:
        """Return what `config.json` of its timm folder holds."""
        return timm_config(self.model, self.kwargs, self.class_names, self.preprocessing)


def from_name(name: str, kwargs: Mapping[str, Any], *, pretrained: bool = False) -> Vision:
    """Make a timm model by its name; raises as `build_model`."""
    for key in ("pretrained", "checkpoint_path"):
        if key in kwargs:
            raise ValueError(f"model_kwargs must not hold {key!r}: pretrained is an option, and checkpoint takes files")
    model: Any = build_model(name, kwargs, pretrained=pretrained)
    data = resolve_model_data_config(model)
    channels, *size = data["input_size"]
    size = list(getattr(getattr(model, "patch_embed", None), "img_size", None) or size)
    preprocessing = Preprocessing.from_timm({**model.pretrained_cfg, **data, "input_size": (channels, *size)})
    return Vision(model, name, dict(kwargs), preprocessing, [str(number) for number in range(model.num_classes)])


def from_folder(folder: str, which: str = "best", weights: str = "auto") -> Vision:
    """Load a model of a run, a checkpoint, a timm folder or a file in one; raises as `load_model`."""
    loaded, path = load_model(folder, which=which, weights=weights), Path(folder)
    config = read_json((path.parent if path.is_file() else locate(path, which)) / CONFIG)
    kwargs = config.get("model_args") or {}
    return Vision(loaded.model, loaded.name, kwargs, loaded.preprocessing, loaded.class_names)


def open_model(config: AnyModelOptions) -> Vision:
    """Make or load the model that options name; raises as `from_name` or `from_folder`."""
    if config.checkpoint is not None:
        return from_folder(config.checkpoint, config.which, config.weights)
    return from_name(str(config.model), config.model_kwargs, pretrained=config.pretrained)


def open_vision(origin: str, kwargs: Mapping[str, Any], *, pretrained: bool = False) -> Vision:
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
    return from_folder(origin)


def resized(vision: Vision, size: tuple[int, int]) -> Vision:
    """Return a model for images of another size, its position embeddings resampled in place.

    Raises:
        ValueError: it takes images of one size alone.
    """
    changed = set_size(vision.model, size, vision.preprocessing.size)
    kwargs = {**vision.kwargs, "img_size": list(size)} if changed else vision.kwargs
    return vision._replace(kwargs=kwargs, preprocessing=dataclasses.replace(vision.preprocessing, size=size))


def converted(vision: Vision, keep: Keep, mixer_kwargs: Mapping[str, Any]) -> Vision:
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
