"""Class-conditional diffusion with Generalized Spatial Propagation Networks."""

from typing import TYPE_CHECKING

from gspn_core._lazy import lazy_attributes

if TYPE_CHECKING:
    from .models import PRESETS, GSPNDiTTransformer2DModel

__version__ = "0.1.0"

__all__ = ["PRESETS", "GSPNDiTTransformer2DModel", "__version__"]

__getattr__ = lazy_attributes(__name__, {"PRESETS": "models", "GSPNDiTTransformer2DModel": "models"})
