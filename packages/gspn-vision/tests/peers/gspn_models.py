"""A plugin of pytest that points timm's own tests (tests/test_models.py of its sdist) at the models of gspn-vision.

Tests over all of timm's models run over ours; tests of models that timm names itself are left out. The session `peers`
of nox uses it, and `GSPN_PEERS_MODELS="gspn*_nano"` takes fewer models,
`*_cgspn` converted vision transformers.
"""

from __future__ import annotations

import os
from fnmatch import fnmatch
from typing import Any

import pytest
import timm

from gspn_vision.models import cgspn

# A registered model each: timm's tests build models by name alone, and know by the first word that they are ViTs.
CONVERTED = {
    "vit_tiny_cgspn": {"base": "vit_tiny_patch16_224"},
    "deit_tiny_cgspn": {"base": "deit_tiny_patch16_224"},
    "deit_tiny_distilled_cgspn": {"base": "deit_tiny_distilled_patch16_224"},
    "eva02_tiny_cgspn": {"base": "eva02_tiny_patch14_224"},
    "vit_siglip_tiny_cgspn": {"base": "vit_base_patch16_siglip_224", "embed_dim": 192, "depth": 6, "num_heads": 3},
}


def _register(name: str, kwargs: dict[str, Any]) -> None:
    def entry(pretrained: bool = False, **others: Any) -> Any:
        return cgspn(pretrained, **{**kwargs, "keep": [-1], **others})

    entry.__name__, entry.__module__ = name, __name__
    base_cfg = timm.models.get_pretrained_cfg(str(kwargs["base"])).to_dict()
    default_cfgs[name] = {**base_cfg, "url": "", "hf_hub_id": None, "tag": None, "file": None}
    timm.models.register_model(entry)


default_cfgs: dict[str, Any] = {}
for name, kwargs in CONVERTED.items():
    _register(name, kwargs)

MODELS = timm.list_models(os.environ.get("GSPN_PEERS_MODELS", "gspn*"))


def _list_models(
    filter: Any = "*", module: Any = "", pretrained: bool = False, exclude_filters: Any = (), **_: Any
) -> list[str]:
    """Stand for `timm.list_models`: those of ours that the patterns take, but none with pretrained weights."""
    wanted, unwanted = ([p] if isinstance(p, str) else p for p in (filter or "*", exclude_filters))
    names = [] if pretrained or module else MODELS
    taken = [name for name in names if any(fnmatch(name, p) for p in wanted)]
    return [name for name in taken if not any(fnmatch(name, p) for p in unwanted)]


timm.list_models = _list_models


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of other models, and what converted models do not do."""
    of = {item: getattr(item, "callspec", None) for item in items}
    ours = [item for item in items if of[item] and of[item].params.get("model_name") in MODELS]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours
    reason = "TorchScript has no place for the grid of a call; a graph of torch.fx of the same model can be scripted"
    for item in items:
        if item.name.startswith("test_model_forward_torchscript[") and "cgspn" in item.name:
            item.add_marker(pytest.mark.skip(reason=reason))
