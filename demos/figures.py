"""Figures of a run: its curves, a confusion matrix, and images with their predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from gspn_core.runs.logs import read_table


def training_curve(run: Path, path: str | Path, title: str) -> None:
    """Draw the losses and the accuracy of a run's `train.csv` and `validation.csv`."""
    rows, measured = read_table(run / "train.csv"), read_table(run / "validation.csv")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = [int(row["step"]) for row in measured]
    left.plot([int(row["step"]) for row in rows], [float(row["loss"]) for row in rows], label="training")
    left.plot(at, [float(row["loss"]) for row in measured], "o-", ms=3, label="validation")
    left.set(xlabel="update", ylabel="cross-entropy", title="loss")
    left.legend()
    top1 = [float(row["top1"]) for row in measured]
    right.plot(at, top1, "o-", ms=3, color="tab:green")
    right.set(xlabel="update", ylabel="top-1 (%)", title=f"validation accuracy, best {max(top1):.2f}%")
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def confusion_matrix(confusion: Tensor, class_names: Sequence[str], path: str | Path, title: str) -> None:
    """Draw confusion[truth, prediction] in per cent of the truth's images; counts are written where they fit."""
    count = len(class_names)
    shares = 100 * confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    side = min(3 + 0.45 * count, 14)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    if count <= 25:
        axis.set_xticks(range(count), class_names, rotation=0 if max(map(len, class_names)) < 4 else 60)
        axis.set_yticks(range(count), class_names)
        for truth in range(count):
            for guess in range(count):
                number = int(confusion[truth, guess])
                if number:
                    color = "white" if shares[truth, guess] > 50 else "black"
                    axis.text(guess, truth, str(number), ha="center", va="center", color=color, fontsize=9)
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
    figure.colorbar(image, label="% of the true class", shrink=0.8)
    figure.savefig(path, dpi=110)


def gallery(
    images: Sequence[Image.Image],
    predicted: Sequence[str],
    truth: Sequence[str],
    probabilities: Sequence[float],
    path: str | Path,
    title: str,
    *,
    columns: int = 8,
) -> None:
    """Draw images with what was predicted under each, in red where it is wrong."""
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.35 * columns, 1.75 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, guess, true, p in zip(axes, images, predicted, truth, probabilities, strict=False):
        axis.imshow(image, cmap="gray_r" if image.mode == "L" else None)
        right = guess == true
        label = f"{guess} ({100 * p:.0f}%)" if right else f"{guess} ({100 * p:.0f}%), is {true}"
        axis.set_title(label, fontsize=10, color="black" if right else "crimson")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
