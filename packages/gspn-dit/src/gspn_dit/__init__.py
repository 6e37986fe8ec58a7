"""Class-conditional diffusion with Generalized Spatial Propagation Networks."""

from .models import PRESETS, GSPNDiTTransformer2DModel

__version__ = "0.1.0"

__all__ = ["PRESETS", "GSPNDiTTransformer2DModel", "__version__"]
