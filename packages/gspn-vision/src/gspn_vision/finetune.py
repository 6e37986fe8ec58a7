"""Fine-tuning: weights to start from, and modules that stay as they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

from gspn_core.runs.checkpoints import load_weights

from .checkpoint import locate, read_file
from .checkpoint import read_weights as read_checkpoint

_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")


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
    return read_file(path)


def _without_prefix(weights: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Take off what wrappers and other trainers put before names, such as `module.`, where none fits with it."""
    for prefix in _PREFIXES:
        if not any(name in own for name in weights) and any(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return weights


def _adapt_first_convolution(model: nn.Module, weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Sum or repeat the first convolution's weights over colours, as timm does, for other input channels."""
    first: Any = getattr(model, "default_cfg", {}).get("first_conv")
    for name in (f"{layer}.weight" for layer in ([first] if isinstance(first, str) else first or ())):
        if name in weights and name in own and weights[name].shape[1] != own[name].shape[1]:
            try:
                weights[name] = adapt_input_conv(own[name].shape[1], weights[name])
            except NotImplementedError:  # weights of other than 3 channels; load_weights names them
                return


def start_from(model: nn.Module, origin: str) -> list[str]:
    """Load weights to fine-tune; return the names that were not loaded: a classifier with another number of classes.

    Prefixes `module.`, `_orig_mod.`, `model.` and `backbone.` are taken off, and the first convolution is adapted to
    other input channels.

    Raises:
        FileNotFoundError, ValueError: see `read_weights`; or the weights are of another model.
    """
    own = model.state_dict()
    weights = _without_prefix(read_weights(origin), own)
    _adapt_first_convolution(model, weights, own)
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


def training_mode(model: nn.Module, frozen: Sequence[str]) -> None:
    """Put a model in training mode, but for the batch norms of frozen modules, whose running statistics stay."""
    model.train()
    for name in frozen:
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


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
