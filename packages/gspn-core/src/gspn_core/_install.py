"""How to install the kernels on each kind of machine, and which kind this one is."""

from __future__ import annotations

import os
import shutil
from typing import NamedTuple

_CHECKOUT = "pip install ./packages/gspn-core"
_REFERENCE = "tensors on the accelerator run the slow PyTorch reference, with one warning"


class Row(NamedTuple):
    """A kind of machine, the commands that install gspn-core there from a checkout, and what then computes."""

    machine: str
    commands: tuple[str, ...]
    kernels: str


ROWS = {
    "cpu": Row("CPU only", (_CHECKOUT,), "CPU kernels: AVX-512, AVX2 or baseline, chosen at run time"),
    "nvidia_nvcc": Row("NVIDIA GPU, nvcc 12.4 or later on PATH or in CUDACXX", (_CHECKOUT,), "CPU and CUDA kernels"),
    "nvidia": Row(
        "NVIDIA GPU, no nvcc",
        (_CHECKOUT,),
        f"CPU and CUDA kernels where the driver serves CUDA 13, for which the build fetches nvcc; else {_REFERENCE}",
    ),
    "other": Row("another accelerator (ROCm, XPU, MPS)", (_CHECKOUT,), f"CPU kernels; {_REFERENCE}"),
}


def kind_of_machine() -> str:
    """Return the key in `ROWS` of this machine: by its driver, its nvcc, and the accelerator that torch finds."""
    import torch

    is_nvidia = shutil.which("nvidia-smi") is not None or (torch.version.hip is None and torch.cuda.is_available())
    if is_nvidia:
        return "nvidia_nvcc" if shutil.which(os.environ.get("CUDACXX") or "nvcc") else "nvidia"
    return "other" if torch.accelerator.is_available() else "cpu"


def as_markdown() -> str:
    """Return the rows as the table of the documentation."""
    lines = ["| machine | installation, in a checkout | what computes |", "|---|---|---|"]
    for row in ROWS.values():
        commands = "<br>".join(f"`{command}`" for command in row.commands)
        lines.append(f"| {row.machine} | {commands} | {row.kernels} |")
    return "\n".join(lines)
