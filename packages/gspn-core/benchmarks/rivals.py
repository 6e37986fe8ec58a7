"""What gspn_core is compared with on a GPU: one launch per line (line_launch.cu), and attention of others."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gspn_core import DIRECTIONS
from gspn_core.bench.harness import UnavailableError


def attention(kind: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return attention of q, k and v: by PyTorch's backend flash (for projected too) or cudnn, or linear attention."""
    if kind == "linear":
        chunked = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
        return lambda q, k, v: chunked(q, k, v, scale=1.0, normalize=False)[0]
    backend = SDPBackend.CUDNN_ATTENTION if kind == "cudnn" else SDPBackend.FLASH_ATTENTION

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


@cache
def library() -> ctypes.CDLL:
    """Compile line_launch.cu for this GPU unless that was done before, and load it."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or not torch.cuda.is_available():
        raise UnavailableError("line_launch.cu needs a GPU, and nvcc on PATH")
    architecture = "-arch=sm_{}{}".format(*torch.cuda.get_device_capability())
    source = Path(__file__).with_name("line_launch.cu")
    command = [nvcc, "-O3", "-std=c++17", architecture, "-shared", "-Xcompiler", "-fPIC"]
    digest = hashlib.sha256(" ".join(command).encode() + source.read_bytes()).hexdigest()[:16]
    cache_folder = Path(tempfile.gettempdir()) / f"gspn-line-launch-{os.getuid()}"
    cache_folder.mkdir(mode=0o700, exist_ok=True)
    path = cache_folder / f"{digest}.so"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}")
        command += ["-o", str(unfinished), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UnavailableError(f"line_launch.cu was not built: {done.stderr.strip()}")
        unfinished.replace(path)
    loaded = ctypes.CDLL(str(path))
    sizes, pointer = [ctypes.c_int, ctypes.c_int, *(ctypes.c_int64,) * 3], ctypes.c_void_p
    loaded.line_launch_forward.argtypes = [*sizes, *(pointer,) * 5]
    loaded.line_launch_backward.argtypes = [*sizes, *(pointer,) * 10]
    return loaded


def line_launch(x: Tensor, weights: Tensor, lam: Tensor, *, direction: str) -> Tensor:
    """Scan x (N, C, H, W) with weights (N, C, 3, H, W) and lam (N, C, H, W), one kernel launch per line."""
    return _LineLaunch.apply(x, weights, lam, DIRECTIONS.index(direction))


def _launch(name: str, direction: int, *tensors: Tensor) -> None:
    x = tensors[0]
    n, c, h, w = x.shape
    function = getattr(library(), name)
    assert all(t.is_contiguous() for t in tensors)
    pointers = [*(t.data_ptr() for t in tensors), torch.cuda.current_stream().cuda_stream]
    if error := function(x.dtype == torch.bfloat16, direction, n * c, h, w, *pointers):
        raise RuntimeError(f"{name} failed with CUDA error {error}")


class _LineLaunch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, lam: Tensor, direction: int) -> Tensor:
        h = torch.empty_like(x)
        _launch("line_launch_forward", direction, x, weights, lam, h)
        ctx.save_for_backward(x, weights, lam, h)
        ctx.direction = direction
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Any:
        x, weights, lam, h = ctx.saved_tensors
        gradients = [torch.empty_like(t) for t in (x, weights, lam)]
        positions = x.shape[2] if ctx.direction < 2 else x.shape[3]
        scratch = x.new_empty(2 * x.shape[0] * x.shape[1] * positions, dtype=torch.float32)
        _launch("line_launch_backward", ctx.direction, x, weights, lam, h, dh.contiguous(), *gradients, scratch)
        return *gradients, None
