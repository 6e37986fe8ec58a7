"""Builds any timm model by name, with readable errors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from gspn_core.runs.errors import reason


def check_name(name: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        ValueError: it suggests names that are close.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; perhaps one of {', '.join(close)}" if close else ""
        raise ValueError(f"model must be a timm model (`gspn*` are this package's), got {name!r}{hint}")


def has_fixed_size(name: str) -> bool:
    """Tell whether a timm model takes images of the size alone that it was made for, as a ViT does."""
    about = timm.models.get_pretrained_cfg(name)
    return about is not None and bool(about.fixed_input_size)


def takes_any_size(model: Any) -> bool:
    """Tell whether a timm model takes images of any size as it is; not so a ViT that was not made for that."""
    strict = getattr(getattr(model, "patch_embed", None), "strict_img_size", True)
    return not (model.pretrained_cfg.get("fixed_input_size") and strict)


def set_size(model: Any, size: tuple[int, int], own: tuple[int, int]) -> bool:
    """Make a timm model, in place, one for images of another height and width, if it needs to be told.

    Position embeddings are resampled, as timm does where a model is made for another size.

    Args:
        model: a timm model.
        size: height and width that images will have.
        own: those that it was made for.

    Returns:
        Whether the model has changed: its `img_size` is another one now.

    Raises:
        ValueError: it takes images of its own size alone, or its patches do not fill images of this one.
    """
    patches = getattr(model, "patch_embed", None)
    height, width = getattr(patches, "patch_size", (1, 1))
    padded = getattr(patches, "dynamic_img_pad", False)
    if not padded and (size[0] % height or size[1] % width):
        raise ValueError(f"image_size must be a multiple of the patches of {height}x{width}, got {size[0]}x{size[1]}")
    if size == own or takes_any_size(model):
        return False
    alone = f"image_size must be {own[0]}x{own[1]}, the model's only one, got {size[0]}x{size[1]}"
    if not hasattr(model, "set_input_size"):
        raise ValueError(alone)
    try:
        model.set_input_size(img_size=size)
    except (AssertionError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{alone}: {reason(error)}") from error
    return True


def build_model(name: str, kwargs: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Make a timm model, with pretrained weights if wanted, which timm adapts to other classes and input channels.

    Raises:
        ValueError: the name or an argument is unknown, or there are no pretrained weights.
        FileNotFoundError: these cannot be had.
    """
    check_name(name)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **kwargs)
    except (AssertionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"model_kwargs do not suit {name}: {reason(error)}") from None
    except RuntimeError as error:
        if "No pretrained weights" not in str(error):
            raise ValueError(f"model_kwargs do not suit {name}: {reason(error)}") from None
        raise ValueError(f"pretrained: timm has no weights of {name}; give a file as start_from") from None
    except OSError as error:
        raise FileNotFoundError(f"pretrained: the weights of {name} cannot be had ({reason(error)})") from None
    return model


def check_classifier(model: nn.Module, input_size: tuple[int, int, int], classes: int) -> None:
    """Try a model on one image, (C, H, W) = `input_size`; it is in evaluation mode afterwards.

    Raises:
        ValueError: it does not take it, or its output is not a score per class.
    """
    wanted, (_, height, width) = (1, classes), input_size
    try:
        with torch.no_grad():
            scores: object = model.eval()(torch.zeros(1, *input_size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the model does not take images of {height}x{width}: {reason(error)}") from None
    if not isinstance(scores, Tensor) or scores.shape != wanted:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"the model must turn an image into scores of the shape {wanted}, got {found}; see model_kwargs"
        )
