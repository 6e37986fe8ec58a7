"""GSPN in the place of attention in vision transformers (C-GSPN)."""

# The models first, which import `cgspn`: timm, once it is imported, imports them.
from .. import models as _models  # noqa: F401
from .build import cgspn
from .convert import blocks, convert, kept_blocks, mixers
from .mixer import CompressedPropagation

__all__ = ["CompressedPropagation", "blocks", "cgspn", "convert", "kept_blocks", "mixers"]
