"""Builds any timm model by name, with readable errors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn


def check_name(name: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        ValueError: it suggests names that are close.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; perhaps one of {', '.join(close)}" if close else ""
        raise ValueError(f"model must be a timm model (`gspn*` are this package's), got {name!r}{hint}")


def build_model(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Make a timm model.

    Raises:
        ValueError: the name or an argument is unknown.
    """
    check_name(name)
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except TypeError as error:
        raise ValueError(f"model_kwargs do not suit {name}: {error}") from None
    return model
