"""Checkpoints of a distillation: safetensors and JSON, each folder an adapter too.

    checkpoints/
      index.json                                      {"latest": "step-00010000"}
      step-00010000/
        config.json                                   the adapter's
        diffusion_pytorch_model.safetensors           its mixers
        diffusion_pytorch_model.ema.safetensors       averaged: GSPNAdapter.from_pretrained(folder, variant="ema")
        optimizer.safetensors
        state.json                                    everything else

A folder is written under another name and renamed when all of it has reached the disk; only then does the index, which
alone says what counts, name it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapter import GSPNAdapter
from .files import replacing_folder, write_text

INDEX = "index.json"
FORMAT = "gspn-t2i 1"
OPTIMIZER = "optimizer.safetensors"
WEIGHTS = {"model": "diffusion_pytorch_model.safetensors", "ema": "diffusion_pytorch_model.ema.safetensors"}


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder of checkpoints, if any."""
    index = folder / INDEX
    return folder / json.loads(index.read_text(encoding="utf-8"))["latest"] if index.is_file() else None


def write_files(folder: Path, adapter: GSPNAdapter, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write an adapter's configuration, and tensors by file name."""
    for name, values in tensors.items():
        # Marked as torch's, which diffusers asks for.
        contiguous = {key: value.detach().contiguous() for key, value in values.items()}
        save_file(contiguous, folder / name, {"format": "pt"})
    (folder / "config.json").write_text(adapter.to_json_string(), encoding="utf-8")


def save(
    folder: Path,
    step: int,
    adapter: GSPNAdapter,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint and put it in force.

    Args:
        folder: of checkpoints; created if missing.
        step: updates so far.
        adapter: whose configuration is stored; its weights are among the tensors.
        tensors: by file name.
        state: plain JSON values.
        keep: newest checkpoints to keep.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    try:
        with replacing_folder(final) as temporary:
            write_files(temporary, adapter, tensors)
            (temporary / "state.json").write_text(json.dumps({"format": FORMAT, **state}, indent=1), encoding="utf-8")
        write_text(folder / INDEX, json.dumps({"latest": final.name}))
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write the checkpoint {final}: {error}; last good: {latest(folder) or 'none'}") from error
    old = sorted(path for path in folder.iterdir() if path.is_dir() and path != final)
    whole = [path for path in old if not path.name.startswith(".")]
    for path in set(old) - set(whole[len(whole) - keep + 1 :] if keep > 1 else []):
        shutil.rmtree(path)
    return final


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's JSON values.

    Raises:
        ValueError: it is of another format.
    """
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise ValueError(f"{checkpoint} is not a checkpoint of the format {FORMAT!r}, got {state.get('format')!r}")
    return state


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of one file.

    Raises:
        FileNotFoundError: there is no such file; ValueError: it is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {str(file.parent)!r}")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load weights that must fit exactly.

    Raises:
        ValueError: names or shapes differ; the message names the first.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        want = tuple(own[name].shape) if name in own else "absent"
        have = tuple(weights[name].shape) if name in weights else "absent"
        if want != have:
            raise ValueError(f"{origin} holds another adapter: {name} must be {want}, is {have}")
    model.load_state_dict(weights)


def pack_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state as tensors named "parameter:entry"; all parameters must be in one group, in order."""
    names = [name for name, _ in model.named_parameters()]
    return {
        f"{names[place]}:{entry}": value
        for place, entries in optimizer.state_dict()["state"].items()
        for entry, value in entries.items()
    }


def unpack_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `pack_optimizer` returned."""
    places = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, entry = key.split(":")
        state.setdefault(places[name], {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
