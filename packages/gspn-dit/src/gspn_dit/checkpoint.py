"""What a checkpoint of gspn-dit holds: each folder is a diffusers model too.

config.json                                   the model's
diffusion_pytorch_model.safetensors           weights
diffusion_pytorch_model.ema.safetensors       averaged weights: from_pretrained(folder, variant="ema")
optimizer.safetensors, state.json             as of `gspn_core.runs.checkpoints`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gspn_core.runs import checkpoints
from gspn_core.runs.files import hash_file, read_json, read_tensors

from .models import GSPNDiTTransformer2DModel

FORMAT = "gspn-dit 2"
CONFIG = "config.json"
WEIGHTS = {"model": "diffusion_pytorch_model.safetensors", "ema": "diffusion_pytorch_model.ema.safetensors"}


def locate(path: str | Path) -> Path:
    """Return the folder of a model: the newest checkpoint of a run, a checkpoint, or a diffusers folder.

    Raises:
        FileNotFoundError: there is none.
    """
    return checkpoints.locate(path, CONFIG)


def weights_file(folder: Path, weights: str) -> Path:
    """Return the file of "model" or "ema" weights; "auto" takes the averaged weights if there are any."""
    if weights == "auto":
        weights = "ema" if (folder / WEIGHTS["ema"]).is_file() else "model"
    return folder / WEIGHTS[weights]


def hash_weights(folder: Path, weights: str) -> str:
    """Return the SHA-256 of a model's file of weights, which tells it from one that took its place."""
    return hash_file(weights_file(folder, weights))


def load_model(path: str | Path, weights: str = "auto") -> tuple[GSPNDiTTransformer2DModel, dict[str, Any]]:
    """Rebuild a model in evaluation mode, and return the checkpoint's JSON values with it.

    Args:
        path: as in `locate`.
        weights: "model", "ema", or "auto", which takes the averaged weights if there are any.

    Raises:
        FileNotFoundError: there is no checkpoint or no such weights.
        ValueError: a file is damaged, or of another model or format.
    """
    folder = locate(path)
    state = checkpoints.read_state(folder, FORMAT)
    config = read_json(folder / CONFIG)
    name = config.get("_class_name")
    if name != GSPNDiTTransformer2DModel.__name__:
        raise ValueError(f"{folder} holds a {name}, not a {GSPNDiTTransformer2DModel.__name__}")
    model = GSPNDiTTransformer2DModel.from_config(config)
    assert isinstance(model, GSPNDiTTransformer2DModel)
    checkpoints.load_weights(model, read_tensors(weights_file(folder, weights)), folder)
    return model.eval(), state
