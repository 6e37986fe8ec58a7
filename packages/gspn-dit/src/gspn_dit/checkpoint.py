"""Checkpoints: safetensors and JSON, each folder a diffusers model too.

    checkpoints/
      index.json                                      {"latest": "step-00010000"}
      step-00010000/
        config.json                                   the model's
        diffusion_pytorch_model.safetensors           weights
        diffusion_pytorch_model.ema.safetensors       averaged weights: from_pretrained(folder, variant="ema")
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

from .files import replacing_folder, write_text
from .models import GSPNDiTTransformer2DModel

INDEX = "index.json"
FORMAT = "gspn-dit 1"
WEIGHTS = {"model": "diffusion_pytorch_model.safetensors", "ema": "diffusion_pytorch_model.ema.safetensors"}


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder of checkpoints, if any."""
    index = folder / INDEX
    return folder / json.loads(index.read_text(encoding="utf-8"))["latest"] if index.is_file() else None


def save(
    folder: Path,
    step: int,
    model: GSPNDiTTransformer2DModel,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write a checkpoint and put it in force.

    Args:
        folder: of checkpoints; created if missing.
        step: updates so far.
        model: whose configuration is stored; its weights are among the tensors.
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
            for name, values in tensors.items():
                # Marked as torch's, which diffusers asks for.
                contiguous = {key: value.detach().contiguous() for key, value in values.items()}
                save_file(contiguous, temporary / name, {"format": "pt"})
            (temporary / "config.json").write_text(model.to_json_string(), encoding="utf-8")
            (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        write_text(folder / INDEX, json.dumps({"latest": final.name}))
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write the checkpoint {final}: {error}; last good: {latest(folder) or 'none'}") from error
    old = sorted(path for path in folder.iterdir() if path.is_dir() and path != final)
    whole = [path for path in old if not path.name.startswith(".")]
    for path in set(old) - set(whole[len(whole) - keep + 1 :] if keep > 1 else []):
        shutil.rmtree(path)
    return final


def locate(path: str | Path) -> Path:
    """Return the folder of a model: the newest checkpoint of a run, a checkpoint, or a diffusers folder.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    for folder in (path / "checkpoints", path):
        newest = latest(folder)
        if newest is not None:
            return newest
    if (path / "config.json").is_file():
        return path
    raise FileNotFoundError(f"no checkpoint in {str(path)!r}")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's JSON values; empty for a plain diffusers folder.

    Raises:
        ValueError: it is of another format.
    """
    file = checkpoint / "state.json"
    if not file.is_file():
        return {}
    state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise ValueError(f"{checkpoint} is not a checkpoint of the format {FORMAT!r}, got {state.get('format')!r}")
    return state


def read_tensors(file: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Return the tensors of one file.

    Raises:
        FileNotFoundError: there is no such file; ValueError: it is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {str(file.parent)!r}")
    try:
        return load_file(file, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load weights that must fit exactly.

    Raises:
        ValueError: names or shapes differ, as of another preset; the message names the first.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        want = tuple(own[name].shape) if name in own else "absent"
        have = tuple(weights[name].shape) if name in weights else "absent"
        if want != have:
            raise ValueError(f"{origin} holds another model: {name} must be {want}, is {have}")
    model.load_state_dict(weights)


def load_model(path: str | Path, weights: str = "auto") -> tuple[GSPNDiTTransformer2DModel, dict[str, Any]]:
    """Rebuild a model in evaluation mode, and return the checkpoint's JSON values with it.

    Args:
        path: as in `locate`.
        weights: "model", "ema", or "auto", which takes the averaged weights if there are any.

    Raises:
        FileNotFoundError, ValueError: as `locate`, `read_tensors` and `load_weights`.
    """
    folder = locate(path)
    state = read_state(folder)
    if weights == "auto":
        weights = "ema" if (folder / WEIGHTS["ema"]).is_file() else "model"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config.get("_class_name")
    if name != GSPNDiTTransformer2DModel.__name__:
        raise ValueError(f"{folder} holds a {name}, not a {GSPNDiTTransformer2DModel.__name__}")
    model = GSPNDiTTransformer2DModel.from_config(config)
    assert isinstance(model, GSPNDiTTransformer2DModel)
    load_weights(model, read_tensors(folder / WEIGHTS[weights]), str(folder))
    return model.eval(), state


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
