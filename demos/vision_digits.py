"""A demonstration that trains a small model for a minute and draws what it learned.

python demos/vision_digits.py --out demo-output
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import figures
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

from gspn_core.runs.checkpoints import latest
from gspn_core.runs.options import make, read_config
from gspn_vision.checkpoint import load_model
from gspn_vision.config import CONFIGS, TrainConfig, ValidateConfig
from gspn_vision.data import Preprocessing
from gspn_vision.predict import line_of, predict
from gspn_vision.sources import Digits
from gspn_vision.train import train
from gspn_vision.validate import validate
from gspn_vision.visualize import draw, heat_maps

# Row and column in scikit-learn's photographs of 427 by 640 pixels: a petal, and the pagoda's wall.
_PIXELS = {"flower.jpg": (210, 330), "china.jpg": (200, 330)}


def run(out: str | Path, *, config: str = "gspn2_nano_digits", epochs: int | None = None) -> list[Path]:
    """Train on handwritten digits, predict held-out ones, and draw figures.

    Args:
        out: folder for everything; a run in it is continued.
        config: to train with, a shipped one or a file.
        epochs: a number other than its.

    Returns:
        The figures' files.
    """
    out = Path(out)
    values = read_config(config, CONFIGS) | {"out": str(out / "run")}
    if epochs is not None:
        values |= {"epochs": epochs, "warmup_epochs": min(1, epochs - 1)}
    options = make(TrainConfig, values)
    continued = latest(options.folder / "checkpoints") is not None
    summary = train(options)
    metrics, predictions, source, class_names = validate(ValidateConfig(checkpoint=summary["folder"], workers=0))
    name = options.model
    trained = f"a run found in {out}, continued for" if continued else "trained in"
    print(
        f"{name}, {summary['parameters']:,} parameters, {trained} {summary['seconds']} s: "
        f"{metrics.top1:.2f}% of {metrics.images} held-out digits recognised"
    )

    files = [out / f"{stem}.png" for stem in ("curve", "confusion", "digits")]
    figures.training_curve(options.folder, files[0], f"{name} on handwritten digits")
    title = f"{name}: {metrics.top1:.2f}% of {metrics.images} held-out digits"
    figures.confusion_matrix(metrics.confusion, class_names, files[1], title)
    # The mistakes first, then others, so that the figure shows both.
    shown = sorted(predictions, key=lambda p: p.predicted == p.target)[:32]
    figures.gallery(
        [source[p.item][0] for p in shown],
        [class_names[p.predicted] for p in shown],
        [class_names[p.target] for p in shown],
        [p.probability for p in shown],
        files[2],
        "held-out digits: prediction and its probability, mistakes first in red",
    )
    loaded = load_model(summary["model"])
    assert isinstance(source, Digits)
    some = [source.name(p.item) for p in predictions[:5]]
    for guess in predict(loaded.model, loaded.preprocessing, class_names, some, top=3):
        print(line_of(guess))
    files += _heat_maps(loaded.model, loaded.preprocessing, out, name)
    print("figures:", *files, sep="\n  ")
    return files


def _heat_maps(model: nn.Module, preprocessing: Preprocessing, out: Path, name: str) -> list[Path]:
    files = []
    for photograph, pixel in _PIXELS.items():
        image = Image.fromarray(load_sample_image(photograph))
        result = heat_maps(model, preprocessing, image, pixel=pixel)
        files.append(out / f"propagation_{Path(photograph).stem}.png")
        draw(result, files[-1], title=f"{name}, trained on digits, looking at {photograph}")
    return files


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demonstration from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", default="demo-output", help="folder for the run and the figures (default: %(default)s)"
    )
    parser.add_argument("--config", default="gspn2_nano_digits", help="configuration (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="a number other than the configuration's")
    arguments = parser.parse_args(argv)
    run(arguments.out, config=arguments.config, epochs=arguments.epochs)


if __name__ == "__main__":
    main()
