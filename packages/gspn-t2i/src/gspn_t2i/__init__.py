"""Text to image with GSPN mixers in the place of self-attention, on diffusers' pipelines."""

from .adapter import GSPNAdapter
from .mixers import SelfAttentionMixer

__version__ = "0.1.0"

__all__ = ["GSPNAdapter", "SelfAttentionMixer", "__version__"]
