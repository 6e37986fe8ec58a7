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
            raise
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
