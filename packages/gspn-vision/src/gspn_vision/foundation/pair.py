"""What a distillation is made of: teacher, student and images without labels."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gspn_core.runs.options import ImageSize

from ..checkpoint import Loaded, load_model
from ..config import DistillConfig
from ..sources import Source, Unlabelled, open_source
from .convert import blocks, mixers
from .grid import Grid
from .vision import converted, open_vision


def open_images(data: str, split: str | None, root: str | None) -> Source:
    """Open images whose labels, if any, are not used.

    Args:
        data: as of `sources.open_source`; or a folder of images in any folders.
        split: of a data set; None is "train" where a folder has it, and all images of one that has not.
        root: folder that a timm data set is stored in.

    Raises:
        FileNotFoundError, ValueError: as `sources.open_source`; or there is no image.
    """
    folder = Path(data)
    if split is None and folder.is_dir() and not (folder / "train").is_dir():
        return Unlabelled(folder)
    if folder.is_dir() and (folder / (split or "train")).is_dir():
        return Unlabelled(folder / (split or "train"))
    return open_source(data, split or "train", root=root)


@contextmanager
def _called(option: str) -> Iterator[None]:
    """Let errors about `model` name the option that it was given by."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"^model(?= must)", option, str(error))) from None


def open_pair(config: DistillConfig) -> tuple[Loaded, Loaded]:
    """Return the teacher, and the student: the teacher converted, or the converted model of `start_from`.

    Raises:
        ValueError: a model cannot be converted, or was not where it had to be; the two do not fit each other.
        FileNotFoundError: there is no such model.
    """
    with _called("teacher"):
        teacher = open_vision(config.teacher, config.model_kwargs, pretrained=config.pretrained)
    height, width = config.image_size or teacher.preprocessing.size
    size = (height, width)
    given = [name for name in ("keep", "mixer_kwargs") if getattr(config, name)]
    if config.start_from is not None:
        student, origin = load_model(config.start_from), "start_from"
    else:
        student, origin = teacher._replace(model=copy.deepcopy(teacher.model)), "teacher"
    if mixers(student.model) and given:
        raise ValueError(f"{given[0]} must not be given: {origin} is a converted model and has its own")
    if origin == "start_from" and not mixers(student.model):
        raise ValueError(f"start_from must be a converted model (gspn-vision convert), got {config.start_from!r}")
    height, width = config.teacher_image_size or size
    theirs = (height, width)
    if origin == "teacher" and mixers(teacher.model) and theirs == size:
        raise ValueError(
            f"teacher must have attention, {config.teacher!r} is a converted model: its student would be a copy of it; "
            "give it as start_from, or another teacher_image_size"
        )
    student = student.resized(size)
    if not mixers(student.model):
        with _called(origin):
            student = converted(student, config.kept(), config.mixer_kwargs)
    teacher = teacher.resized(theirs)
    _check(teacher, student, config)
    return teacher, student


def check_sizes(config: DistillConfig, sizes: Sequence[ImageSize]) -> None:
    """Refuse a curriculum with a size that the teacher does not take, before the first is learned.

    Raises:
        ValueError: there is one.
    """
    teacher = open_vision(config.teacher, config.model_kwargs, pretrained=config.pretrained)
    for size in sizes:
        try:
            teacher._replace(model=copy.deepcopy(teacher.model)).resized(size)
        except ValueError as error:
            raise ValueError(f"curriculum: {error}") from None


def _check(teacher: Loaded, student: Loaded, config: DistillConfig) -> None:
    """Refuse a pair whose features cannot be compared."""
    about = {
        "blocks": [len(blocks(vision.model)) for vision in (teacher, student)],
        "channels": [vision.model.embed_dim for vision in (teacher, student)],
        "prefix tokens": [getattr(vision.model, "num_prefix_tokens", 0) for vision in (teacher, student)],
        "colour channels": [vision.preprocessing.in_chans for vision in (teacher, student)],
    }
    for name, (theirs, own) in about.items():
        if theirs != own:
            raise ValueError(f"start_from must have as many {name} as the teacher, {theirs}, got {own}")


def grid_of(model: Any, size: tuple[int, int]) -> Grid:
    """Return height and width of the patch grid of images of a size."""
    height, width = model.patch_embed.dynamic_feat_size(size)
    return int(height), int(width)
