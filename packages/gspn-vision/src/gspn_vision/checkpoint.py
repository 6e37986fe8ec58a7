"""Checkpoints: safetensors and JSON, written so that a crash at any moment leaves the last whole one in force.

    checkpoints/
      index.json               {"latest": "step-00000120", "best": "step-00000090"}
      step-00000120/
        model.safetensors      weights
        ema.safetensors        averaged weights, if there are any
        optimizer.safetensors  the optimizer's tensors
        state.json             everything else

A checkpoint is written to a folder of another name, which is renamed when all of it has reached the disk; only then is
the index, which alone says what counts, replaced. Folders that the index does not name are leftovers.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .data import Preprocessing

INDEX = "index.json"


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file as a whole: after a crash it holds either the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def read_index(folder: Path) -> dict[str, str]:
    """Return the names of the latest and best checkpoint in a folder of checkpoints; empty if there is none."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    index: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return index


def save(
    folder: Path,
    name: str,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    best: str | None,
    keep: int = 1,
) -> None:
    """Write a checkpoint and put it in force.

    Args:
        folder: of checkpoints; created if missing.
        name: of the checkpoint; names must sort as the checkpoints follow each other.
        tensors: for each file's stem, the tensors in it.
        state: plain JSON values.
        best: the best checkpoint's name from now on, possibly this one's.
        keep: newest checkpoints to keep, besides the best.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary, final = folder / f".{name}.tmp", folder / name
    for leftover in (temporary, final):
        # A run that was killed after the renaming and before the index was replaced arrives here again.
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir()
    for stem, values in tensors.items():
        save_file(
            {k: v.detach().contiguous() for k, v in values.items()},
            temporary / f"{stem}.safetensors",
        )
    (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for path in temporary.iterdir():
        _sync(path)
    _sync(temporary)
    os.replace(temporary, final)
    _sync(folder)
    write_atomically(folder / INDEX, json.dumps({"latest": name, "best": best}))
    _prune(folder, {name, best}, keep)


def _prune(folder: Path, named: set[str | None], keep: int) -> None:
    old = sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in named)
    whole = [path for path in old if not path.name.startswith(".")]
    for path in set(old) - set(whole[len(whole) - keep + 1 :] if keep > 1 else []):
        shutil.rmtree(path)


def locate(path: str | Path, which: str = "best") -> Path:
    """Return the folder of a checkpoint.

    Args:
        path: a run's folder, its folder of checkpoints, or one checkpoint's folder.
        which: "best" or "latest", for a run; without a best one, the latest.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    path = Path(path)
    if (path / "state.json").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        index = read_index(folder)
        if index:
            return folder / (index.get(which) or index["latest"])
    raise FileNotFoundError(f"no checkpoint in {str(path)!r}")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's JSON values.

    Raises:
        ValueError: it is not a checkpoint of this package.
    """
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != "gspn-vision 1":
        raise ValueError(f"{checkpoint} is not a gspn-vision checkpoint of format 1")
    return state


def read_tensors(checkpoint: Path, stem: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Return the tensors of one file of a checkpoint.

    Raises:
        ValueError: the file is damaged.
        FileNotFoundError: there is no such file.
    """
    path = checkpoint / f"{stem}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in the checkpoint {str(checkpoint)!r}")
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load weights that must fit the model exactly.

    Raises:
        ValueError: names or shapes differ, as with a checkpoint of another model; the message names the first.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        have = tuple(weights[name].shape) if name in weights else None
        want = tuple(own[name].shape) if name in own else None
        if have != want:
            raise ValueError(
                f"{origin} is a checkpoint of another model: {name} must be {want or 'absent'}, got {have or 'nothing'}"
            )
    model.load_state_dict(weights)


def build_model(name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Make a timm model.

    Raises:
        ValueError: the name or an argument is unknown.
    """
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; perhaps one of {', '.join(close)}" if close else ""
        raise ValueError(f"unknown model {name!r}{hint}")
    try:
        model: nn.Module = timm.create_model(name, **kwargs)
    except TypeError as error:
        raise ValueError(f"model_kwargs do not suit {name}: {error}") from None
    return model


def load_model(
    path: str | Path, *, which: str = "best", weights: str = "auto"
) -> tuple[nn.Module, Preprocessing, dict[str, Any]]:
    """Rebuild the model of a checkpoint, in evaluation mode.

    Args:
        path, which: as in `locate`.
        weights: "model", "ema", or "auto", which takes the averaged weights if there are any.

    Returns:
        The model, the preprocessing of its input, and the checkpoint's JSON values.
    """
    checkpoint = locate(path, which)
    state = read_state(checkpoint)
    if weights == "auto":
        weights = "ema" if (checkpoint / "ema.safetensors").is_file() else "model"
    model = build_model(state["model"]["name"], state["model"]["kwargs"])
    load_weights(model, read_tensors(checkpoint, weights), str(checkpoint))
    return model.eval(), Preprocessing.from_dict(state["preprocessing"]), state


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors and JSON values.

    Raises:
        ValueError: the optimizer keeps something that is neither.
    """
    state = optimizer.state_dict()
    entries = {f"state.{number}": entry for number, entry in state["state"].items()}
    entries |= {f"group.{number}": group for number, group in enumerate(state["param_groups"])}
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        values[name] = {}
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value
            elif _is_json(value):
                values[name][key] = value
            else:
                kind = f"{type(optimizer).__name__}: {key} is a {type(value).__name__}"
                raise ValueError(f"cannot store the state of {kind}")
    return tensors, values


def _is_json(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_json(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], packed: Mapping[str, dict[str, Any]]
) -> None:
    """Restore what `pack_optimizer` made."""
    entries = {name: dict(entry) for name, entry in packed.items()}
    for name, value in tensors.items():
        kind, number, key = name.split(".", 2)
        entries[f"{kind}.{number}"][key] = value
    state = {int(name[6:]): entry for name, entry in entries.items() if name.startswith("state.")}
    groups = []
    for place, current in enumerate(optimizer.state_dict()["param_groups"]):
        saved = entries[f"group.{place}"]
        # JSON has no tuples; betas are one.
        groups.append({k: tuple(v) if isinstance(current.get(k), tuple) else v for k, v in saved.items()})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
