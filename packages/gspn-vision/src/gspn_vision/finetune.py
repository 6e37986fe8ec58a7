"""Fine-tuning: weights to start from, and modules that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor, nn

from gspn_core.runs.checkpoints import load_weights

from .checkpoint import locate
from .checkpoint import read_weights as read_checkpoint
from .models import checkpoint_filter_fn


def read_weights(origin: str) -> dict[str, Tensor]:
    """Read the weights of a run, a checkpoint or a timm folder, averaged ones first, or of a file that timm reads.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: the file holds no weights.
    """
    path = Path(origin)
    if path.is_dir():
        return read_checkpoint(locate(path))
    if not path.is_file():
        raise FileNotFoundError(f"start_from must be a run, a checkpoint or a file of weights, got {origin!r}")
    try:
        return checkpoint_filter_fn(load_state_dict(origin), nn.Identity())
    except Exception as error:
        # timm delegates to readers of several formats, each of which raises its own exceptions.
        raise ValueError(f"start_from cannot be read: {origin}: {error}") from None


def start_from(model: nn.Module, origin: str) -> list[str]:
    """Load weights to fine-tune; return the names that were not loaded: a classifier with another number of classes.

    Raises:
        FileNotFoundError, ValueError: see `read_weights`; or the weights are of another model.
    """
    weights = read_weights(origin)
    own = model.state_dict()
    classifier = model.get_classifier()  # type: ignore[operator]
    of_head = {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if module is classifier
        for parameter in module.state_dict()
    }
    fresh = sorted(name for name in of_head if name not in weights or weights[name].shape != own[name].shape)
    if not isinstance(classifier, nn.Identity):
        weights = {name: tensor for name, tensor in weights.items() if name not in fresh}
        weights |= {name: own[name] for name in fresh}
    load_weights(model, weights, origin)
    return fresh


def freeze(model: nn.Module, names: Sequence[str]) -> None:
    """Keep the parameters of the named modules from being trained.

    Raises:
        ValueError: a name is no module of the model, or nothing is left to train.
    """
    for name in names:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            known = [child for child, _ in model.named_modules() if child and child.count(".") < 2]
            raise ValueError(f"freeze must name modules of the model, among them {known}; got {name!r}") from None
        module.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"freeze leaves nothing to train, got {list(names)}")
