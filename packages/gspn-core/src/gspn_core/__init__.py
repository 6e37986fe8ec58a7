"""The line-scan operator of Generalized Spatial Propagation Networks for PyTorch.

Importing it registers `torch.ops.gspn`, which exported programs and AOTInductor packages need.
"""

from typing import TYPE_CHECKING

from ._lazy import lazy_attributes, when_imported
from ._version import __version__

if TYPE_CHECKING:
    from . import reference
    from ._directions import DIRECTIONS
    from ._info import info
    from .module import SpatialPropagation
    from .ops import line_scan, propagate, propagate_low_rank, row_stochastic

__all__ = [
    "DIRECTIONS",
    "SpatialPropagation",
    "__version__",
    "info",
    "line_scan",
    "propagate",
    "propagate_low_rank",
    "reference",
    "row_stochastic",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "DIRECTIONS": "_directions",
        "SpatialPropagation": "module",
        "info": "_info",
        "line_scan": "ops",
        "propagate": "ops",
        "propagate_low_rank": "ops",
        "reference": "reference",
        "row_stochastic": "ops",
    },
)

when_imported("torch", f"{__name__}._library")
