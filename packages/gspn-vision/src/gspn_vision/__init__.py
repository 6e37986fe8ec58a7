"""Image backbones built on Generalized Spatial Propagation Networks, registered with timm.

Importing this package registers the models: `timm.create_model("gspn2_nano")` works after `import gspn_vision`.
"""

from .models import Gspn

__version__ = "0.1.0"

__all__ = ["Gspn", "__version__"]
