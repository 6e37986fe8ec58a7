"""What the papers report of their ImageNet-1K models at 224x224: for comparison, never results of this package.

Sources: GSPN, CVPR 2025, arXiv 2501.12381; GSPN-2, NeurIPS 2025, arXiv 2512.07884.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Millions of parameters, billions of multiply-adds, top-1 accuracy in percent, and where they stand."""

    params: float
    macs: float
    top1: float
    source: str


PUBLISHED = {
    "gspn_tiny": Published(30, 5.3, 83.0, "GSPN"),
    "gspn_small": Published(50, 9.0, 83.8, "GSPN"),
    "gspn_base": Published(89, 15.9, 84.3, "GSPN"),
    "gspn2_tiny": Published(24, 4.2, 83.0, "GSPN-2"),
    "gspn2_small": Published(50, 9.2, 84.4, "GSPN-2"),
    "gspn2_base": Published(89, 14.2, 84.6, "GSPN-2"),
}
