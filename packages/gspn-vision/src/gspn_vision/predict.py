"""Predict the classes of single images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from gspn_core.runs.images import UnreadableImageError, find_images, read_image
from gspn_core.runs.training import device_of

from .checkpoint import load_model
from .config import PredictConfig
from .data import Preprocessing, Unreadable, convert
from .sources import SUFFIXES, Digits


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
            found = find_images(path, SUFFIXES)
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


def predict(
    model: nn.Module,
    preprocessing: Preprocessing,
    class_names: Sequence[str],
    names: Iterable[str],
    *,
    top: int = 5,
    unreadable: Unreadable | None = None,
    batch_size: int = 1,
) -> Iterator[Guess]:
    """Yield the likeliest classes of each image, as soon as they are known.

    Args:
        model: in evaluation mode.
        preprocessing: of its input.
        class_names: of its outputs.
        names: image files, folders of them, or "digits:NUMBER".
        top: classes per image, at most all.
        unreadable: what to do with images that cannot be read; stops at the first by default.
        batch_size: images per forward pass.

    Raises:
        UnreadableImageError: an image cannot be read, and that is to stop; those before it have been yielded.
    """
    policy = unreadable or Unreadable("stop")
    transform = preprocessing.transform()
    device, top = next(model.parameters()).device, min(top, len(class_names))

    def guesses(batch: list[tuple[str, str | None, Tensor]]) -> Iterator[Guess]:
        with torch.inference_mode():
            logits = model(torch.stack([x for _, _, x in batch]).to(device))
        values, places = logits.float().softmax(1).topk(top)
        for (name, truth, _), shares, rows in zip(batch, values.tolist(), places.tolist(), strict=True):
            yield Guess(image=name, classes=[class_names[row] for row in rows], probabilities=shares, truth=truth)

    batch: list[tuple[str, str | None, Tensor]] = []
    for name in expand(names):
        try:
            image, truth = open_image(name)
            image = convert(image, preprocessing.mode, name)
        except UnreadableImageError as error:
            if policy.policy == "stop" and batch:
                yield from guesses(batch)
            policy.note([str(error)])
            continue
        batch.append((name, truth, transform(image)))
        if len(batch) == batch_size:
            yield from guesses(batch)
            batch = []
    if batch:
        yield from guesses(batch)
    policy.report()


def run(config: PredictConfig) -> Iterator[dict[str, Any]]:
    """Predict as configured, image by image."""
    loaded = load_model(config.checkpoint, which=config.which, weights=config.weights)
    if not loaded.class_names:
        raise ValueError(f"checkpoint must be of a model with classes, that of {config.checkpoint!r} has none")
    loaded = loaded.resized(config.image_size, config.crop_pct)
    for guess in predict(
        loaded.model.to(device_of(config.device)),
        loaded.preprocessing,
        loaded.class_names,
        config.images,
        top=config.top,
        unreadable=Unreadable(config.unreadable),
        batch_size=config.batch_size,
    ):
        yield dataclasses.asdict(guess)


def as_text(values: dict[str, Any]) -> str:
    """Return the line of an image."""
    return line_of(Guess(**values))


def line_of(guess: Guess) -> str:
    """Return a readable line."""
    parts = [f"{c} {100 * p:.1f}%" for c, p in zip(guess.classes, guess.probabilities, strict=True)]
    truth = f"   (is {guess.truth})" if guess.truth is not None else ""
    return f"{guess.image}: {', '.join(parts)}{truth}"
