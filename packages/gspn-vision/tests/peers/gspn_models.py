"""A plugin of pytest that points timm's own tests (tests/test_models.py of its sdist) at the models of gspn-vision.

Tests over all of timm's models run over ours; tests of models that timm names itself are left out. The session `peers`
of nox uses it, and `GSPN_PEERS_MODELS="gspn*_nano"` takes fewer models.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import timm

import gspn_vision  # noqa: F401  (registers the models)

MODELS = timm.list_models(os.environ.get("GSPN_PEERS_MODELS", "gspn*"))


def _list_models(filter: Any = "", module: Any = "", pretrained: bool = False, **_: Any) -> list[str]:
    """Stand for `timm.list_models`: all of ours, but none where timm chooses by name or wants pretrained weights."""
    return [] if filter or pretrained else MODELS


timm.list_models = _list_models


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of other models."""
    of = {item: getattr(item, "callspec", None) for item in items}
    ours = [item for item in items if of[item] and of[item].params.get("model_name") in MODELS]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours
