"""Predict the classes of single images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from gspn_core.runs.images import UnreadableImageError, read_image
from gspn_core.runs.training import device_of

from .checkpoint import load_model
from .config import PredictConfig
from .data import Preprocessing, Unreadable
from .sources import Digits

_SUFFIXES = frozenset(Image.registered_extensions())


@dataclasses.dataclass(kw_only=True, frozen=True)
class Guess:
    """The likeliest classes of an image, with their probabilities, and the true one where it is known."""

    image: str
    classes: list[str]
    probabilities: list[float]
    truth: str | None = None


def expand(names: Iterable[str]) -> list[str]:
    """Replace folders by the images in them, sorted."""
    images = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
            if not found:
                raise FileNotFoundError(f"no images in the folder {name!r}")
            images += [str(p) for p in found]
        else:
            images.append(name)
    return images


def open_image(name: str) -> tuple[Image.Image, str | None]:
    """Open an image file, or "digits:17" for number 17 of scikit-learn's digits, with its true class if known.

    Raises:
        UnreadableImageError: as `read_image`.
        ValueError: there is no such digit.
    """
    if not name.startswith("digits:"):
        return read_image(name), None
    digits = Digits("train")
    number = name.removeprefix("digits:")
    if not number.isdecimal() or int(number) >= len(digits.targets):
        raise ValueError(f"digits: must be followed by a number from 0 to {len(digits.targets) - 1}, got {name!r}")
    return Image.fromarray(digits.images[int(number)]), str(digits.targets[int(number)])


@torch.inference_mode()
def predict(
    model: nn.Module,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    names: Iterable[str],
    *,
    top: int = 5,
    unreadable: Unreadable | None = None,
) -> list[Guess]:
    """Return the likeliest classes of each image.

    Args:
        model: in evaluation mode.
        preprocessing: of its input.
        class_names: of its outputs.
        names: image files, folders of them, or "digits:NUMBER".
        top: classes per image, at most all.
        unreadable: what to do with images that cannot be read; stops at the first by default.
    """
    policy = unreadable or Unreadable("stop")
    transform = preprocessing.transform()
    device = next(model.parameters()).device
    guesses = []
    for name in expand(names):
        try:
            image, truth = open_image(name)
        except UnreadableImageError as error:
            policy.note([str(error)])
            continue
        x = transform(image.convert(preprocessing.mode))[None].to(device)
        values, places = model(x)[0].float().softmax(0).topk(min(top, len(class_names)))
        classes = [class_names[place] for place in places.tolist()]
        guesses.append(Guess(image=name, classes=classes, probabilities=values.tolist(), truth=truth))
    policy.report()
    return guesses


def run(config: PredictConfig) -> dict[str, Any]:
    """Predict as configured."""
    loaded = load_model(config.checkpoint, which=config.which, weights=config.weights)
    model = loaded.model.to(device_of(config.device))
    policy = Unreadable(config.unreadable)
    guesses = predict(model, loaded.preprocessing, loaded.class_names, config.images, top=config.top, unreadable=policy)
    return {"images": [dataclasses.asdict(guess) for guess in guesses]}


def as_text(result: dict[str, Any]) -> str:
    """Return a line for each image."""
    return "\n".join(line_of(Guess(**values)) for values in result["images"])


def line_of(guess: Guess) -> str:
    """Return a readable line."""
    parts = [f"{c} {100 * p:.1f}%" for c, p in zip(guess.classes, guess.probabilities, strict=True)]
    truth = f"   (is {guess.truth})" if guess.truth is not None else ""
    return f"{guess.image}: {', '.join(parts)}{truth}"
