"""The folder of a run's checkpoints: safetensors and JSON, put in force as a whole or not at all.

    checkpoints/
      index.json                 {"latest": "step-00010000", "best": "step-00008000"}; best only where there is one
      step-00010000/
        ...                      the model, in the form of its own library, and its averaged weights
        optimizer.safetensors    the optimizer's tensors
        state.json               everything else

A folder is written under another name and renamed when all of it has reached the disk; only then does the index, which
says what counts, name it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .errors import NonFiniteLossError, WriteError, reason
from .files import damaged, make_folder, missing, read_json, read_tensors, replacing_folder, store_tensors, write_json

INDEX = "index.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"


def _whole(folder: Path) -> list[Path]:
    """Return the folders of checkpoints, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _whole_name(path.name))


def _whole_name(name: str) -> bool:
    """Tell whether a name is of a checkpoint that is whole."""
    return re.fullmatch(r"step-\d{8,}", name) is not None


def read_index(folder: Path) -> dict[str, str]:
    """Return the names of the latest and, where there is one, the best checkpoint; empty if there is none.

    Where the index was lost, the newest folder is the latest: each got its name when all of it was on the disk.
    """
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        if not isinstance(index, dict) or not all(isinstance(index.get(key, ""), str) for key in ("latest", "best")):
            raise damaged(folder / INDEX, "it must hold the names of checkpoints")
        if index.get("latest"):
            return index
        raise damaged(folder / INDEX, "it names no latest checkpoint")
    whole = _whole(folder)
    return {"latest": whole[-1].name} if whole else {}


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder of checkpoints, if any.

    Raises:
        FileNotFoundError: it has been removed.
    """
    index = read_index(folder)
    return _existing(folder / index["latest"]) if index else None


def _existing(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise FileNotFoundError(
            f"{checkpoint} has been removed; to go on from an older checkpoint, name it in {checkpoint.parent / INDEX}"
        )
    return checkpoint


def name_of(step: int) -> str:
    """Return the name of the checkpoint after so many updates."""
    return f"step-{step:08d}"


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    texts: Mapping[str, str],
    state: Mapping[str, Any],
    *,
    keep: int,
    best: str | None = None,
) -> Path:
    """Write a checkpoint, put it in force, and remove old ones.

    Args:
        folder: of checkpoints; created if missing.
        step: updates so far.
        tensors: by file name.
        texts: further files, such as the model's configuration, by name.
        state: plain JSON values.
        keep: newest checkpoints to keep, this one among them.
        best: name of the best checkpoint from now on, which is kept too.

    Raises:
        NonFiniteLossError: a tensor holds infinity or NaN; older checkpoints are as they were.
        WriteError: the disk is full or not writable; likewise.
    """
    final = folder / name_of(step)
    for file, values in tensors.items():
        for name, tensor in values.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise NonFiniteLossError(
                    f"{name} of {file} is not finite at step {step}; last good checkpoint: {latest(folder) or 'none'}"
                )
    try:
        make_folder(folder)
        with replacing_folder(final) as temporary:
            for name, values in tensors.items():
                store_tensors(temporary / name, values)
            for name, text in texts.items():
                (temporary / name).write_text(text, encoding="utf-8")
            (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        write_json(folder / INDEX, {"latest": final.name} | ({} if best is None else {"best": best}))
    except WriteError as error:
        raise WriteError(f"{reason(error)}; last good checkpoint: {latest(folder) or 'none'}") from error
    whole = _whole(folder)
    kept = {*whole[-keep:], final, folder / (best or final.name)}
    for path in {*whole, *folder.glob(".step-*")} - kept:
        shutil.rmtree(path)
    return final


def locate(path: str | Path, model_file: str, which: str = "latest") -> Path:
    """Return the folder of a checkpoint or model.

    Args:
        path: a run's folder, its folder of checkpoints, one checkpoint's folder, or a saved model's.
        model_file: a file that every folder of a model has.
        which: "latest" or "best", for a run; without a best one, the latest.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    for folder in (path / "checkpoints", path):
        index = read_index(folder)
        if index:
            return _existing(folder / index.get(which, index["latest"]))
    if (path / model_file).is_file():
        return path
    raise FileNotFoundError(f"no checkpoint in {str(path)!r}")


def read_state(checkpoint: Path, format: str) -> dict[str, Any]:
    """Return a checkpoint's JSON values; empty for the folder of a model that is not a checkpoint.

    Raises:
        FileNotFoundError: a checkpoint has none; ValueError: it is damaged or of another format.
    """
    if not (checkpoint / STATE).is_file():
        if _whole_name(checkpoint.name):
            raise missing(checkpoint / STATE)
        return {}
    state = read_json(checkpoint / STATE)
    if not isinstance(state, dict):
        raise damaged(checkpoint / STATE, f"it must hold values by name, got {type(state).__name__}")
    if state.get("format") != format:
        raise ValueError(f"{checkpoint} must be a checkpoint of the format {format!r}, got {state.get('format')!r}")
    return state


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], origin: str | Path) -> None:
    """Load weights that must fit exactly.

    Raises:
        ValueError: names or shapes differ, as of another model; the message names the first.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        want = tuple(own[name].shape) if name in own else "absent"
        have = tuple(weights[name].shape) if name in weights else "absent"
        if want != have:
            raise ValueError(f"{origin} holds the weights of another model: {name} must be {want}, got {have}")
    model.load_state_dict(weights)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as tensors and JSON values, by the parameters' names.

    Raises:
        ValueError: the optimizer keeps something that is neither.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)
    try:
        with _keeping_weights(model):
            flat: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    except NotImplementedError as error:
        raise ValueError(f"the state of {type(optimizer).__name__} cannot be stored: {reason(error)}") from error
    # Of a group's tensors every parameter of the group has the same one, which safetensors refuses.
    tensors = {name: value.clone() for name, value in flat.items() if isinstance(value, Tensor)}
    values = {name: value for name, value in flat.items() if name not in tensors}
    try:
        json.dumps(values)
    except TypeError as error:
        raise ValueError(f"the state of {type(optimizer).__name__} cannot be stored: {reason(error)}") from error
    return tensors, values


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path, values: Mapping[str, Any]
) -> None:
    """Restore an optimizer's state from a checkpoint's tensors and the JSON values of `optimizer_state`."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    # JSON has no tuples; AdamW's betas are one.
    flat: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    flat |= read_tensors(checkpoint / OPTIMIZER)
    with _keeping_weights(model):
        set_optimizer_state_dict(model, optimizer, flat, options=StateDictOptions(flatten_optimizer_state_dict=True))


@contextmanager
def _keeping_weights(model: nn.Module) -> Iterator[None]:
    """Undo what torch's initialisation of an optimizer without state, a step at rate 0, does to weights: of MADGRAD."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    yield
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)


def pack(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel | None, scaler: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what training keeps beside weights: the optimizer's tensors, and JSON values for the state.

    Args:
        model, optimizer: of the run.
        average: of `runs.training.averaged`; its weights are stored apart.
        scaler: the gradient scaler of float16 training, if any.

    Raises:
        ValueError: as `optimizer_state`.
    """
    tensors, values = optimizer_state(model, optimizer)
    return tensors, {
        "optimizer": values,
        "averaged": None if average is None else int(average.n_averaged),
        "scaler": None if scaler is None else scaler.state_dict(),
    }


def unpack(
    checkpoint: Path,
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: AveragedModel | None,
    average_file: str,
    scaler: Any,
) -> None:
    """Restore what `pack` returned, and the averaged weights from their file in the checkpoint.

    Raises:
        FileNotFoundError: a file is missing; ValueError: one is damaged or of another model.
    """
    restore_optimizer(model, optimizer, checkpoint, state["optimizer"])
    if average is not None:
        load_weights(average.module, read_tensors(checkpoint / average_file), checkpoint)
        average.n_averaged.fill_(state["averaged"])
    if scaler is not None:
        scaler.load_state_dict(state["scaler"])
