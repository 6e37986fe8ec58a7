"""Text to image with GSPN mixers instead of self-attention, on diffusers' pipelines."""

from typing import TYPE_CHECKING

from gspn_core._lazy import lazy_attributes

if TYPE_CHECKING:
    from .adapter import GSPNAdapter
    from .mixers import SelfAttentionMixer

__version__ = "0.1.0"

__all__ = ["GSPNAdapter", "SelfAttentionMixer", "__version__"]

__getattr__ = lazy_attributes(__name__, {"GSPNAdapter": "adapter", "SelfAttentionMixer": "mixers"})
