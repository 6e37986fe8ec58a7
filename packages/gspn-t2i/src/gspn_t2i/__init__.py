"""Text to image with GSPN mixers instead of self-attention, on diffusers' pipelines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import GSPNAdapter
    from .mixers import SelfAttentionMixer

__version__ = "0.1.0"

__all__ = ["GSPNAdapter", "SelfAttentionMixer", "__version__"]

_HOMES = {"GSPNAdapter": ".adapter", "SelfAttentionMixer": ".mixers"}


def __getattr__(name: str) -> Any:
    """Import on first use: diffusers takes seconds, and `gspn-t2i --help` needs none of it."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
