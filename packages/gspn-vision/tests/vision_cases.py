"""What several test files share: a tiny model and folders of images."""

from pathlib import Path

import numpy as np
from PIL import Image

# A model of a few thousand parameters, for tests of everything but the model.
TINY = {"widths": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "gate_rank": 2, "ffn_ratio": 1.0, "stem_stride": 2}


def write_images(folder: Path, counts: dict[str, int], size: tuple[int, int] = (40, 36)) -> Path:
    """Write noise images of a colour per class, as an ImageNet-style folder."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for place, (name, count) in enumerate(counts.items()):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = rng.integers(0, 100, (*size, 3), dtype=np.uint8)
                pixels[..., place % 3] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def tiny_run(folder: Path) -> dict:
    """Options of a run of 2 epochs of 4 updates, for 48 images, with everything random switched on."""
    return {
        "model": "gspn2_nano",
        "model_kwargs": dict(TINY),
        "data": str(folder),
        "image_size": 32,
        "workers": 0,
        "interpolation": "bilinear",
        "epochs": 2,
        "batch_size": 12,
        "warmup_epochs": 1,
        "drop_rate": 0.1,
        "drop_path_rate": 0.2,
        "mixup": 0.4,
        "cutmix": 0.4,
        "auto_augment": "rand-m9-mstd0.5",
        "random_erasing": 0.3,
        "label_smoothing": 0.1,
        "clip_grad": 1.0,
        "ema_decay": 0.9,
        "log_every": 3,
        "progress": False,
        "tensorboard": False,
    }
