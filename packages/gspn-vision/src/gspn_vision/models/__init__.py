"""What builds models: the backbones, their blocks, and any timm model by name."""

from ..foundation.build import cgspn
from .backbones import Gspn, checkpoint_filter_fn
from .build import build_model, check_classifier, check_name, has_fixed_size, set_size, takes_any_size

__all__ = [
    "Gspn",
    "build_model",
    "cgspn",
    "check_classifier",
    "check_name",
    "checkpoint_filter_fn",
    "has_fixed_size",
    "set_size",
    "takes_any_size",
]
