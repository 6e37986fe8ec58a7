"""What is installed: versions, backends, instruction sets, threads."""

from __future__ import annotations

import platform
from types import ModuleType
from typing import Any

import torch

from . import _backend, _install
from ._version import __version__


def info() -> dict[str, Any]:
    """Return versions, backends, architectures and threads as a dictionary that JSON can hold.

    Keys: `gspn_core`, `torch`, `python`, `platform` (strings); `cpu` with `compiled`, and if true, `compiler`,
    `build_type`, `openmp` (the date of its version, or None), `compiled_isas`, `supported_isas`, `isa` (the one in
    use), otherwise `error`; `cuda` with `compiled`, `architectures` and, if compiled, `compiler`; `threads` of torch,
    which the kernels use too; `checkpoint_interval`, the lines between saved states; `install`, which kind of
    `machine` this is, the `commands` that install gspn-core there from a checkout, and the `kernels` that this gives.
    """
    module = _backend.extension()
    cuda: dict[str, Any] = {"compiled": False, "architectures": []}
    if isinstance(module, ModuleType):
        built = module.build_info()
        if "cuda" in built:
            architectures = built["cuda"].pop("architectures").split()
            cuda = {"compiled": True, "architectures": architectures, **built.pop("cuda")}
        cpu = {"compiled": True, **built}
    else:
        cpu = {"compiled": False, "error": str(module)}
    row = _install.ROWS[_install.kind_of_machine()]
    return {
        "gspn_core": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu,
        "cuda": cuda,
        "threads": torch.get_num_threads(),
        "checkpoint_interval": _backend.CHECKPOINT_INTERVAL,
        "install": {"machine": row.machine, "commands": list(row.commands), "kernels": row.kernels},
    }
