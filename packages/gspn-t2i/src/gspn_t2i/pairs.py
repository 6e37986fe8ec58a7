"""Inputs of `evaluate`: captions, images paired with them by index, and reference images."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from gspn_core.runs.errors import reason
from gspn_core.runs.images import find_images

from .captions import METADATA, read_lines
from .config import EvaluateConfig

SUFFIXES = (".png", ".jpg", ".jpeg")
# Formats of captions by suffix.
FORMS = {".json": "COCO's JSON of images and annotations", ".jsonl": "lines of JSON with file_name and text"}


def _coco_captions(text: str) -> list[str]:
    data = json.loads(text)
    images = {image["id"] for image in data["images"]}
    first: dict[Any, str] = {}
    for annotation in data["annotations"]:
        if annotation["image_id"] not in images:
            raise ValueError(f"a caption is of image {annotation['image_id']!r}, which is not among its images")
        first.setdefault(annotation["image_id"], annotation["caption"])
    return [first[image] for image in sorted(first)]


def _folder_captions(text: str, folder: Path) -> list[str]:
    captions = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            entry = json.loads(line)
            if not (folder / entry["file_name"]).is_file():
                raise FileNotFoundError(f"line {number}: there is no image {entry['file_name']!r} in {folder}")
            captions.append(entry["text"])
    return captions


def read_captions(source: str, count: int | None = None, seed: int | None = None) -> list[str]:
    """Read captions; `EvaluateConfig` says from what, which and in what order.

    Raises:
        FileNotFoundError: there is no such file, or an image of metadata.jsonl does not exist.
        ValueError: it holds something else, an empty caption, no captions or fewer than `count`.
    """
    path = Path(source)
    if path.is_dir():
        path /= METADATA
    if not path.is_file():
        raise FileNotFoundError(f"captions: there is no file {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            captions = _coco_captions(text)
        elif path.suffix == ".jsonl":
            captions = _folder_captions(text, path.parent)
        else:  # as `generate` reads prompts
            captions = read_lines(path)
        captions = [caption.strip() for caption in captions]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"captions: {path}, {reason(error)}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        form = FORMS.get(path.suffix, "text in UTF-8")
        why = f"without {error}" if isinstance(error, LookupError) else reason(error)
        raise ValueError(f"captions: {path} must be {form} ({why})") from error
    if not captions:
        raise ValueError(f"captions: {path} must hold captions, got none")
    if "" in captions:
        raise ValueError(f"captions: {path} must not hold empty ones, caption {captions.index('')} is")
    if count is not None and count > len(captions):
        raise ValueError(f"count must be at most the number of captions, {len(captions)}, got {count}")
    if seed is not None:  # RandomState's numbers do not change with numpy's version
        captions = [captions[place] for place in np.random.RandomState(seed).permutation(len(captions))]
    return captions[:count]


def numbered_images(folder: Path) -> dict[int, Path]:
    """Return the images of a folder whose names are numbers, by these.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there are none, or two with one number.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"samples: there is no folder {str(folder)!r}")
    files: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in SUFFIXES and re.fullmatch("[0-9]+", file.stem):
            index = int(file.stem)
            if index in files:
                raise ValueError(f"samples: {files[index].name} and {file.name} in {folder} have one index")
            files[index] = file
    if not files:
        raise ValueError(f"samples: {folder} must hold images named by their index, as 000000.png, got none")
    return files


def choose_images(config: EvaluateConfig, captions: int) -> tuple[dict[int, Path], int]:
    """Return the images to measure, by index, and how many are missing among them.

    Raises:
        FileNotFoundError: there is no such folder, or images are missing and may not.
        ValueError: there are none, or one of them has no caption.
    """
    files = numbered_images(Path(config.samples or ""))
    highest = max(files)
    if config.captions is not None and config.count is None and highest >= captions:
        raise ValueError(f"samples: {files[highest]} has no caption, {config.captions} holds {captions}")
    wanted = range(config.count or captions or highest + 1)
    missing = [index for index in wanted if index not in files]
    if missing and not config.allow_missing:
        raise FileNotFoundError(
            f"samples: {len(missing)} of {len(wanted)} are missing in {config.samples}, the first is "
            f"{missing[0]:06d}.png; allow_missing measures the others"
        )
    return {index: files[index] for index in wanted if index in files}, len(missing)


def list_references(source: str) -> list[Path]:
    """Return the images below a folder, in order; none of an .npz.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: the folder holds fewer than two.
    """
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        return []
    if not path.is_dir():
        raise FileNotFoundError(f"reference: there is no folder or .npz {source!r}")
    files = find_images(path, SUFFIXES)
    if len(files) < 2:
        raise ValueError(f"reference: {source} must hold at least 2 PNG or JPEG files, got {len(files)}")
    return files
