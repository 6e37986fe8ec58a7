"""What a checkpoint of gspn-vision holds: each folder is a timm model too, and so is the run's folder `model`.

README.md                             a model card, of folders `model`
config.json                           architecture, arguments, classes and preprocessing, as timm's hub helpers write it
model.safetensors                     weights: timm.create_model("local-dir:FOLDER", pretrained=True)
ema.safetensors                       averaged weights, if there are any
optimizer.safetensors, state.json     as of `gspn_core.runs.checkpoints`
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import load_state_dict
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

import gspn_core
from gspn_core.runs import checkpoints
from gspn_core.runs.cards import CARD, Figure, model_card
from gspn_core.runs.errors import reason
from gspn_core.runs.files import read_json, read_tensors, replacing_folder, store_tensors
from gspn_core.runs.options import ImageSize

from .data import Preprocessing
from .models import checkpoint_filter_fn, set_size

FORMAT = "gspn-vision 2"
CONFIG = "config.json"
CURRICULUM = "curriculum.json"  # of a run over several sizes: which, written first
WEIGHTS = {"model": "model.safetensors", "ema": "ema.safetensors"}
MODEL_FILES = (CARD, CONFIG, WEIGHTS["model"])  # what `write_model` writes


def timm_config(
    model: nn.Module, kwargs: Mapping[str, Any], class_names: Sequence[str], preprocessing: Preprocessing
) -> str:
    """Return what `config.json` of a timm folder holds."""
    about = {"label_names": list(class_names), "pretrained_cfg": preprocessing.to_timm()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / CONFIG
        save_config_for_hf(model, str(file), model_config=about, model_args=dict(kwargs))
        return file.read_text(encoding="utf-8")


def card_of(
    model: nn.Module, name: str, made_by: str, config: Any, about: str = "", figures: Sequence[Figure] = ()
) -> str:
    """Return the model card of a timm folder.

    Args:
        model, name: the model, and its architecture's name.
        made_by: the command.
        config: its options.
        about: further sentences on what it is.
        figures: measured on it.
    """
    parameters = sum(p.numel() for p in model.parameters())
    usage = (
        "import gspn_vision  # registers the models\nimport timm\n\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True)  # the folder of this file'
    )
    return model_card(
        name,
        f"The image model `{name}` of timm and gspn-vision, with {parameters:,} parameters. {about}".strip(),
        made_by=f"gspn-vision {made_by}",
        config=config,
        usage=usage,
        library="timm",
        task="image-classification",
        tags=("timm",),
        figures=figures,
        versions={"timm": timm.__version__, "gspn-core": gspn_core.__version__},
    )


def write_model(folder: Path, config: str, weights: Mapping[str, Tensor], card: str | None = None) -> None:
    """Write a timm folder, with its card, whole or not at all.

    Raises:
        WriteError: the disk is full or not writable.
    """
    with replacing_folder(folder) as temporary:
        store_tensors(temporary / WEIGHTS["model"], weights)
        (temporary / CONFIG).write_text(config, encoding="utf-8")
        if card is not None:
            (temporary / CARD).write_text(card, encoding="utf-8")


def locate(path: str | Path, which: str = "best") -> Path:
    """Return the folder of a model: a run's best or latest checkpoint, a checkpoint, or a timm folder.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(path)
    if (folder / CURRICULUM).is_file() and (folder / "model" / CONFIG).is_file():
        return folder / "model"
    return checkpoints.locate(path, CONFIG, which)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's JSON values; empty for a timm folder.

    Raises:
        ValueError: it is damaged or of another format.
    """
    return checkpoints.read_state(checkpoint, FORMAT)


def read_weights(checkpoint: Path, weights: str = "auto") -> dict[str, Tensor]:
    """Return the weights of a checkpoint: "model", "ema", or "auto", the averaged ones if there are any.

    Raises:
        FileNotFoundError: there are no such weights; ValueError: they are damaged.
    """
    if weights == "auto":
        weights = "ema" if (checkpoint / WEIGHTS["ema"]).is_file() else "model"
    return read_tensors(checkpoint / WEIGHTS[weights])


def read_file(file: str | Path) -> dict[str, Tensor]:
    """Return the weights in a file of safetensors or of torch, without what trainers wrap around them.

    Raises:
        ValueError: it holds none.
    """
    try:
        return checkpoint_filter_fn(load_state_dict(str(file)), nn.Identity())
    except Exception as error:
        # timm delegates to readers of several formats, each of which raises its own exceptions.
        raise ValueError(f"the weights cannot be read: {file}: {reason(error).partition('. ')[0]}") from None


class Loaded(NamedTuple):
    """A timm model, of a folder or made by its name, and what is known of it."""

    model: Any
    preprocessing: Preprocessing
    class_names: list[str]
    name: str  # in timm
    state: dict[str, Any]  # the checkpoint's JSON values
    kwargs: dict[str, Any]  # of its constructor

    def config(self) -> str:
        """Return what `config.json` of its timm folder holds."""
        return timm_config(self.model, self.kwargs, self.class_names, self.preprocessing)

    def resized(self, size: ImageSize | tuple[int, int] | None, crop_pct: float | None = None) -> Loaded:
        """Return the same for another size or crop, as of a test at a larger size than trained at; model in place.

        Args:
            size, crop_pct: None leaves them as they are.

        Raises:
            ValueError: the model takes images of its own size alone; see `models.set_size`.
        """
        before = self.preprocessing
        height, width = before.size if size is None else size
        changed = set_size(self.model, (height, width), before.size)
        kwargs = {**self.kwargs, "img_size": [height, width]} if changed else self.kwargs
        preprocessing = dataclasses.replace(before, size=(height, width)).cropped(crop_pct)
        return self._replace(preprocessing=preprocessing, kwargs=kwargs)


def load_model(path: str | Path, *, which: str = "best", weights: str = "auto") -> Loaded:
    """Rebuild a model, in evaluation mode.

    Args:
        path, which: as in `locate`; or a file of weights beside the `config.json` of their model.
        weights: as in `read_weights`.

    Raises:
        FileNotFoundError: there is no checkpoint, or no such weights.
        ValueError: a file is damaged, or timm does not know the model.
    """
    file = Path(path) if Path(path).is_file() else None
    folder = file.parent if file else locate(path, which)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"no {CONFIG} beside {str(file)!r}, which would say what model its weights are of")
    state = read_state(folder)
    config = read_json(folder / CONFIG)
    try:
        model: nn.Module = timm.create_model(f"local-dir:{folder}")
    except (RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{folder} does not hold a model that timm can build: {reason(error)}") from None
    checkpoints.load_weights(model, read_file(file) if file else read_weights(folder, weights), file or folder)
    names = config.get("label_names") or [str(number) for number in range(config["num_classes"])]
    preprocessing = Preprocessing.from_timm(config["pretrained_cfg"])
    kwargs = config.get("model_args") or {}
    return Loaded(model.eval(), preprocessing, list(names), config["architecture"], state, kwargs)


def hash_weights(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights, the same wherever they were loaded from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
