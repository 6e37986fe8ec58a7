"""The line-scan operator of Generalized Spatial Propagation Networks for PyTorch."""

from . import _flops, reference  # noqa: F401  (torch counts our operations)
from ._info import __version__, info
from .module import SpatialPropagation
from .ops import line_scan, propagate, row_stochastic
from .reference import DIRECTIONS

__all__ = [
    "DIRECTIONS",
    "SpatialPropagation",
    "__version__",
    "info",
    "line_scan",
    "propagate",
    "reference",
    "row_stochastic",
]
