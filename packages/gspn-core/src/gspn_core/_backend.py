"""Loads the compiled extension once, and calls its kernels with pointers, sizes and strides."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Lines between two checkpoints of the scan's state, and lines in a tile of the kernels.
CHECKPOINT_INTERVAL = 16

_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


@cache
def extension() -> ModuleType | ImportError:
    """Return the compiled module, or the error that importing it raised."""
    try:
        module = importlib.import_module("gspn_core._C")
    except ImportError as error:
        return error
    isa = os.environ.get("GSPN_CPU_ISA")
    if isa:
        choices = ["auto", *module.build_info()["supported_isas"]]
        if isa not in choices:
            raise _wrong_setting(f"GSPN_CPU_ISA must be one of {', '.join(choices)} on this machine, got {isa!r}")
        module.select_isa(isa)
    return module


def _wrong_setting(message: str) -> ValueError:
    """Return an error that our commands show on one line."""
    from ._command import UserError  # here, because the operator needs no command line

    return UserError(message)


@cache
def _warn_once(device_type: str) -> None:
    module = extension()
    if device_type == "cpu" or not isinstance(module, ModuleType):
        how = f"its compiled module did not load ({module}); install gspn-core again, from its checkout or wheel"
    elif device_type == "cuda" and hasattr(module, "cuda_forward"):
        built = module.build_info()["cuda"]["architectures"].replace(" ", ", ")
        how = (
            f"this build has kernels for the compute capabilities {built} and none for this GPU; "
            "install gspn-core again with that of the GPU in GSPN_CUDA_ARCHITECTURES"
        )
    elif device_type == "cuda":
        how = (
            "this build has no CUDA kernels; install gspn-core again, with GSPN_CUDA=on to make sure of them: it needs "
            "nvcc 12.4 or later, or fetches it where the driver serves CUDA 13"
        )
    else:
        how = f"there are kernels for cpu and cuda; move the tensors there, or see `gspn-core info` ({device_type})"
    message = f"gspn_core runs its slow PyTorch reference on {device_type}: {how}"
    warnings.warn(message, RuntimeWarning, stacklevel=_levels_to_caller())


def _levels_to_caller() -> int:
    """Return the stack level, as `warnings.warn` counts, of the code that called gspn_core, through torch or not."""
    ours = tuple(os.path.dirname(module.__file__ or "") + os.sep for module in (torch, sys.modules[__package__]))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        level, frame = level + 1, frame.f_back
    return level


@cache
def _supports_gpu(device: int) -> bool:
    module = extension()
    return isinstance(module, ModuleType) and hasattr(module, "cuda_forward") and bool(module.cuda_supports(device))


def has_kernels(x: Tensor) -> bool:
    """Tell whether there are compiled kernels for the device of x; warn once if the reference runs instead."""
    module = extension()
    if isinstance(module, ModuleType) and (x.is_cpu or (x.is_cuda and _supports_gpu(x.get_device()))):
        return True
    _warn_once(x.device.type)
    return False


def checkpoint_size(height: int, width: int, directions: Sequence[int], chunk_size: int | None) -> int:
    """Return the elements of saved state per image and channel: every 16th line of each direction."""
    if chunk_size is not None and CHECKPOINT_INTERVAL % chunk_size == 0:
        return 0  # every checkpointed line would start a chunk, where the state is zero
    size = 0
    for direction in directions:
        lines, length = (width, height) if direction < 2 else (height, width)
        size += (lines - 1) // CHECKPOINT_INTERVAL * length if lines > 0 else 0
    return size


_TensorArg = tuple[int, Sequence[int], Sequence[int]]


def _arg(t: Tensor | None) -> _TensorArg | None:
    return None if t is None else (t.data_ptr(), t.shape, t.stride())


# ---- layouts, which matter on a GPU: there are kernels for planes whose rows are neighbours in memory, and for images
# of channels_last, where channels are. Others are served pixel by pixel, which takes longer than a copy.

# From so many channels on, multiples of so many, and up to some length of lines, channels are lanes of a warp; see
# csrc/cuda/lanes.cuh. A warp has so many positions of a line.
_LANE_CHANNELS, _LANE_UNIT, _LANE_POSITIONS = 16, 8, 8


def is_on_gpu(t: Tensor) -> bool:
    """Tell whether the kernels for a GPU serve a tensor; tests of their emulation replace this."""
    return t.is_cuda


@cache
def _shared_memory(device: int | None) -> int:
    """Return the bytes of shared memory that a block may have; those of an H100 where there is no GPU to ask."""
    if not torch.cuda.is_available():
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def has_lanes(x: Tensor, *, backward: bool) -> bool:
    """Tell whether there are kernels for an image of channels_last that is as large as x."""
    if not is_on_gpu(x) or x.dtype == torch.float64:
        return False
    _, channels, height, width = x.shape
    if channels < _LANE_CHANNELS or channels % _LANE_UNIT != 0 or max(height, width) > (64 if backward else 80):
        return False
    # As lane_forward_bytes and lane_backward_bytes in csrc/cuda have it: the inputs of some lines, the backward pass's
    # states, and the edges of each warp.
    row, state = _LANE_POSITIONS * 32 * x.element_size(), _LANE_POSITIONS * 32 * 4
    warp = 2 * (7 * row + state) + (CHECKPOINT_INTERVAL + 1) * state if backward else 3 * (6 * row + state)
    return 128 + -(-max(height, width) // _LANE_POSITIONS) * (warp + 512) <= _shared_memory(x.device.index)


def _channel_dim(number: int, t: Tensor) -> int:
    """Return the dimension of the channels of x (number 0), weights (1), lam or u."""
    return t.dim() - (4 if number == 1 else 3)


def _are_lanes(x: Tensor, weights: Tensor, lam: Tensor | None, u: Tensor | None, *, backward: bool) -> bool:
    """Tell whether such kernels serve a call: channels are neighbours in memory; all of them may share the weights."""
    if not has_lanes(x, backward=backward):
        return False
    for number, t in enumerate((x, weights, lam, u)):
        if t is None:
            continue
        dim = _channel_dim(number, t)
        own = t.shape[dim] == x.shape[1] and t.stride(dim) == 1
        if not own and not (number == 1 and t.shape[dim] == 1):
            return False
    return True


def _in_lanes(t: Tensor | None, dim: int, channels: int) -> Tensor | None:
    """Return a tensor whose channels, in `dim`, are neighbours in units of 16 bytes, if it has as many."""
    if t is None or t.shape[dim] != channels:
        return t
    unit = 16 // t.element_size()
    strides = (stride for i, stride in enumerate(t.stride()) if i != dim)
    if t.stride(dim) == 1 and t.data_ptr() % 16 == 0 and all(stride % unit == 0 for stride in strides):
        return t
    return t.movedim(dim, -1).clone(memory_format=torch.contiguous_format).movedim(-1, dim)


def _in_rows(t: Tensor | None) -> Tensor | None:
    """Return a tensor whose pixels of a row are neighbours."""
    return t if t is None or t.stride(-1) <= 1 or t.shape[-1] <= 1 else t.contiguous()


def _gradients_are_lanes(
    x: Tensor, weights: Tensor, lam: Tensor | None, u: Tensor | None, wanted: Sequence[bool]
) -> bool:
    """Tell whether they serve a backward call: only with a gradient of weights or u, which take the states."""
    return (wanted[1] or wanted[3]) and _are_lanes(x, weights, lam, u, backward=True)


def _laid_out(lanes: bool, x: Any, weights: Any, lam: Any, u: Any, *others: Any) -> list[Any]:
    """Return a call's tensors as its kernels read them, x and `others` of one shape: copies where they must be."""
    tensors = [x, weights, lam, u, *others]
    if not lanes:
        return [_in_rows(t) for t in tensors]
    dims = [0 if t is None else _channel_dim(number, t) for number, t in enumerate(tensors)]
    return [_in_lanes(t, dim, x.shape[1]) for t, dim in zip(tensors, dims, strict=True)]


def empty_output(x: Tensor, weights: Tensor, lam: Tensor | None, u: Tensor | None) -> Tensor:
    """Return a tensor for y, in the layout that the kernels write."""
    lanes = _are_lanes(x, weights, lam, u, backward=False)
    return torch.empty_like(x, memory_format=torch.channels_last if lanes else torch.contiguous_format)


def empty_gradients(
    x: Tensor, weights: Tensor, lam: Tensor | None, u: Tensor | None, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Return tensors for the gradients that are wanted, in the layout that the kernels write."""
    lanes = _gradients_are_lanes(x, weights, lam, u, wanted)
    gradients: list[Tensor | None] = []
    for number, (t, want) in enumerate(zip((x, weights, lam, u), wanted, strict=True)):
        if t is None or not want:
            gradients.append(None)
        elif lanes:
            # In memory (N, H, W, D, 3, C): channels last.
            planes = t.transpose(-3, -4) if number == 1 else t
            sizes = (t.shape[0], *t.shape[-2:], *planes.shape[1:-2])
            gradient = t.new_empty(sizes).movedim((1, 2), (-2, -1))
            gradients.append(gradient.transpose(-3, -4) if number == 1 else gradient)
        else:
            gradients.append(t.new_empty(t.shape))
    return gradients


@lru_cache(maxsize=128)
def _call(dtype: torch.dtype, stochastic: bool, directions: tuple[int, ...], chunk_size: int, threads: int) -> Any:
    """Return the extension's object of a call's options, cached because every call needs one."""
    module = extension()
    assert isinstance(module, ModuleType)
    return module.Call(_DTYPE_NAMES[dtype], stochastic, directions, chunk_size, CHECKPOINT_INTERVAL, threads)


class Kernels:
    """Binds the kernels to one call's options, device and dtype. The caller checks the arguments."""

    __slots__ = ("_backward", "_forward", "_launch", "_on_gpu")

    def __init__(self, x: Tensor, stochastic: bool, directions: Sequence[int], chunk_size: int | None) -> None:
        module = extension()
        assert isinstance(module, ModuleType)
        call = _call(x.dtype, stochastic, tuple(directions), chunk_size or 0, torch.get_num_threads())
        self._launch: tuple[Any, ...] = (call,)
        self._on_gpu = is_on_gpu(x)
        if x.is_cuda:
            self._launch = (_cuda_launch(module, x.device), call)
            self._forward, self._backward = module.cuda_forward, module.cuda_backward
        else:
            self._forward, self._backward = module.forward, module.backward

    def forward(
        self, x: Tensor, weights: Tensor, lam: Tensor | None, u: Tensor | None, y: Tensor, checkpoints: Tensor | None
    ) -> None:
        """Write y, and the checkpoints unless they are None."""
        if self._on_gpu:
            lanes = _are_lanes(x, weights, lam, u, backward=False)
            x, weights, lam, u = _laid_out(lanes, x, weights, lam, u)
        pointer = 0 if checkpoints is None else checkpoints.data_ptr()
        self._forward(*self._launch, _arg(x), _arg(weights), _arg(lam), _arg(u), _arg(y), pointer)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weights: Tensor,
        lam: Tensor | None,
        u: Tensor | None,
        checkpoints: Tensor,
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Write the gradients of x, weights, lam and u, those that are not None."""
        if self._on_gpu:
            lanes = _gradients_are_lanes(x, weights, lam, u, [gradient is not None for gradient in gradients])
            x, weights, lam, u, dy = _laid_out(lanes, x, weights, lam, u, dy)
        self._backward(
            *self._launch,
            _arg(dy),
            _arg(x),
            _arg(weights),
            _arg(lam),
            _arg(u),
            checkpoints.data_ptr(),
            *(_arg(gradient) for gradient in gradients),
        )


class LowRankKernels:
    """The same with gates of low rank, on the CPU."""

    __slots__ = ("_call", "_module")

    def __init__(self, x: Tensor, directions: Sequence[int], chunk_size: int | None) -> None:
        self._module: Any = extension()
        self._call = _call(x.dtype, True, tuple(directions), chunk_size or 0, torch.get_num_threads())

    def forward(
        self, x: Tensor, r: Tensor, weight: Tensor, bias: Tensor, y: Tensor, checkpoints: Tensor | None
    ) -> None:
        """Write y, and the checkpoints unless they are None."""
        pointer = 0 if checkpoints is None else checkpoints.data_ptr()
        self._module.low_rank_forward(self._call, _arg(x), _arg(r), _arg(weight), _arg(bias), _arg(y), pointer)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        r: Tensor,
        weight: Tensor,
        bias: Tensor,
        checkpoints: Tensor,
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Write the gradients of x, r, weight and bias, those that are not None."""
        tensors = (_arg(t) for t in (dy, x, r, weight, bias))
        self._module.low_rank_backward(self._call, *tensors, checkpoints.data_ptr(), *(_arg(g) for g in gradients))


def _cuda_launch(module: ModuleType, device: torch.device) -> Any:
    """Return the device, the current stream and an allocator of scratch memory for a call on a GPU."""

    def allocate(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device)

    stream = torch.cuda.current_stream(device)
    return module.Launch(stream.device_index, stream.cuda_stream, allocate)
