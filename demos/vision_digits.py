"""A demonstration that trains a small model for a minute and draws what it learned.

python -m gspn_vision.demo --out demo
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

from . import checkpoint, config, figures
from .data import Digits, Preprocessing
from .evaluate import validate
from .predict import as_text, predict
from .train import train
from .visualize import draw, heat_maps

# Row and column in scikit-learn's photographs of 427 by 640 pixels: a petal, and the pagoda's wall.
_PIXELS = {"flower.jpg": (210, 330), "china.jpg": (200, 330)}


def run(out: str | Path, *, preset: str = "gspn2_nano_digits", epochs: int | None = None) -> list[Path]:
    """Train on handwritten digits, predict held-out ones, and draw figures.

    Args:
        out: folder for everything; a run in it is continued.
        preset: configuration to train with.
        epochs: a number other than the preset's.

    Returns:
        The figures' files.
    """
    out = Path(out)
    values = config.read_yaml(preset) | {"out": str(out / "run")}
    if epochs is not None:
        values |= {"epochs": epochs, "warmup_epochs": min(1, epochs - 1)}
    options = config.make_config(values)
    found = checkpoint.read_index(options.folder / "checkpoints")
    summary = train(options)
    metrics, predictions, source, class_names = validate(summary["folder"])
    name = options.model
    trained = f"a run found in {out}, continued for" if found else "trained in"
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
    model, preprocessing, _ = checkpoint.load_model(summary["folder"])
    assert isinstance(source, Digits)
    some = [source.name(p.item) for p in predictions[:5]]
    for guess in predict(model, preprocessing, class_names, some, top=3):
        print(as_text(guess))
    files += _heat_maps(model, preprocessing, out, name)
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
    parser = argparse.ArgumentParser(prog="python -m gspn_vision.demo", description=__doc__)
    parser.add_argument("--out", default="demo", help="folder for the run and the figures (default: demo)")
    parser.add_argument("--preset", default="gspn2_nano_digits", help="configuration (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="a number other than the preset's")
    arguments = parser.parse_args(argv)
    run(arguments.out, preset=arguments.preset, epochs=arguments.epochs)


if __name__ == "__main__":
    main()
