import os

os.environ.setdefault("ACCELERATE_USE_CPU", "true")

from pathlib import Path

import pytest
from vision_cases import tiny_run, write_images

import gspn_vision  # noqa: F401  (registers the models)


@pytest.fixture(scope="session")
def training_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of 3 classes for training, and as many for validation. Not to be changed."""
    return write_images(tmp_path_factory.mktemp("data"), {"red": 16, "green": 16, "blue": 16})


@pytest.fixture
def tiny_options(training_folder: Path, tmp_path: Path) -> dict:
    """Options of a run of 2 epochs of 4 updates with everything random switched on."""
    return tiny_run(training_folder) | {"out": str(tmp_path / "run")}


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", {"red": 6, "green": 6, "blue": 6})
