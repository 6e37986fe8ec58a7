"""What a training configuration says of the model and of its input."""

from __future__ import annotations

from typing import Any

from timm.data import resolve_model_data_config
from torch import nn

from .config import TrainConfig
from .data import Preprocessing
from .models import check_name, has_fixed_size


def model_arguments(config: TrainConfig, classes: int) -> dict[str, Any]:
    """Return the constructor arguments of a configuration's model.

    Raises:
        ValueError: model_kwargs hold one that is an option, or not a constructor's.
    """
    for name in ("pretrained", "checkpoint_path", "num_classes", "in_chans", "drop_rate", "drop_path_rate"):
        if name in config.model_kwargs:
            raise ValueError(f"model_kwargs must not hold {name!r}: it is an option, or follows from the data")
    check_name(config.model)
    size = config.image_size
    return {
        **({"img_size": (size.height, size.width)} if has_fixed_size(config.model) else {}),
        "num_classes": classes,
        "in_chans": config.in_chans,
        "drop_rate": config.drop_rate,
        "drop_path_rate": config.drop_path_rate,
        **config.model_kwargs,
    }


def preprocessing_of(config: TrainConfig, model: nn.Module) -> Preprocessing:
    """Return the preprocessing of a configuration, with the model's own mean and deviation where it has none."""
    own = resolve_model_data_config(model)

    def fit(values: tuple[float, ...]) -> tuple[float, ...]:
        return values if len(values) == config.in_chans else (sum(values) / len(values),)

    return Preprocessing(
        in_chans=config.in_chans,
        size=(config.image_size.height, config.image_size.width),
        mean=config.mean or fit(tuple(own["mean"])),
        std=config.std or fit(tuple(own["std"])),
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
    )
