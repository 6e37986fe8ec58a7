"""The timm model `cgspn`: any timm model by name, converted, so that it saves and loads as a timm folder."""

from __future__ import annotations

import sys
from typing import Any

import timm
from timm.models import generate_default_cfgs, load_pretrained, register_model
from timm.models._builder import pretrained_cfg_for_features
from timm.models._features import FeatureGetterNet
from torch import nn

from .convert import convert

NAME = "cgspn"
DEFAULT_BASE = "vit_tiny_patch16_224"
CONVERSION = ("keep", "latent", "weight_groups", "chunk_size", "prefix")

default_cfgs = generate_default_cfgs({NAME: {"input_size": (3, 224, 224), "fixed_input_size": True}})


def cgspn(pretrained: bool = False, base: str = DEFAULT_BASE, **kwargs: Any) -> nn.Module:
    """Build a timm model and convert it: timm.create_model("cgspn", base="vit_small_patch16_224", keep=1 / 6).

    Args:
        pretrained: load the base's weights before; or those of the converted model, if this is a timm folder's.
        base: timm name of the model that is converted.
        kwargs: those of `gspn_vision.convert`; the rest are the base's.

    Raises:
        ValueError: as `gspn_vision.convert`.
    """
    conversion = {key: kwargs.pop(key) for key in CONVERSION if key in kwargs}
    features = {key: kwargs.pop(key) for key in ("features_only", "out_indices", "feature_cls") if key in kwargs}
    source, _ = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_model_args", None)
    is_folder = source is not None and not isinstance(source, str)
    model: Any = timm.create_model(base, pretrained=pretrained and not is_folder, pretrained_cfg=source, **kwargs)
    convert(model, **conversion)
    model.pretrained_cfg["architecture"] = NAME
    if pretrained and is_folder:
        # As timm does for the base: among other things it resamples position embeddings.
        filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        options = {"num_classes": model.num_classes, "in_chans": kwargs.get("in_chans", 3), "filter_fn": filter_fn}
        load_pretrained(model, model.pretrained_cfg, **options)
    if not features.get("features_only"):
        return model
    wrapped: Any = FeatureGetterNet(model, out_indices=features.get("out_indices", 3))
    wrapped.pretrained_cfg = wrapped.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
    wrapped.in_chans = kwargs.get("in_chans", 3)
    return wrapped


register_model(cgspn)
