"""Image backbones built on Generalized Spatial Propagation Networks, registered with timm.

Importing this package registers the models: `timm.create_model("gspn2_nano")` works after `import gspn_vision`.
"""

from typing import TYPE_CHECKING

from gspn_core._lazy import lazy_attributes, when_imported

if TYPE_CHECKING:
    from .foundation import convert
    from .models import Gspn

__version__ = "0.1.0"

__all__ = ["Gspn", "__version__", "convert"]

__getattr__ = lazy_attributes(__name__, {"Gspn": "models", "convert": "foundation"})

when_imported("timm", f"{__name__}.models")
