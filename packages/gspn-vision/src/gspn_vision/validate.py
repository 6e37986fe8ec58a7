"""Validation: top-1, top-5, loss and the confusion matrix, with each image counted exactly once."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from timm.utils import accuracy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from gspn_core.runs.files import make_folder, replacing
from gspn_core.runs.training import make_accelerator

from .checkpoint import load_model
from .config import ValidateConfig
from .data import Batch, Samples, Unreadable, validation_loader
from .sources import Source, open_source


@dataclasses.dataclass(kw_only=True, frozen=True)
class Metrics:
    """Results over a data set: percentages, the mean cross-entropy, and confusion[truth, prediction] counts."""

    top1: float
    top5: float
    loss: float
    images: int
    confusion: Tensor


class Prediction(NamedTuple):
    """What the model says of one image of a data set."""

    item: int
    target: int
    predicted: int
    probability: float


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader[Batch],
    accelerator: Accelerator,
    classes: int,
    unreadable: Unreadable,
    *,
    progress: bool = False,
    predictions: list[Prediction] | None = None,
) -> Metrics:
    """Run the model over a loader and add up the results of all processes.

    Args:
        model: in any mode; is in evaluation mode afterwards.
        loader: this process's share of the images.
        accelerator: for the device, mixed precision and the sum over processes.
        classes: of the head; top-5 is top-k of at most as many.
        unreadable: what to do with unreadable images.
        progress: show a bar.
        predictions: a list to append the predictions of all processes to, in the order of the data.

    Raises:
        ValueError: there is not one readable image.
    """
    model.eval()
    top = min(5, classes)
    sums = torch.zeros(4, dtype=torch.float64)
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    own: list[Prediction] = []
    for batch in tqdm(loader, "validate", disable=not progress, leave=False, unit="batch"):
        unreadable.note(batch.unreadable)
        count = len(batch.targets)
        if count == 0:
            continue
        targets = batch.targets.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            logits = model(batch.images.to(accelerator.device, non_blocking=True))
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        right1, right5 = accuracy(logits, targets, topk=(1, top))
        sums += torch.tensor(
            [
                loss.item(),
                *(round(right.item() * count / 100) for right in (right1, right5)),
                count,
            ],
            dtype=torch.float64,
        )
        probability, predicted = logits.softmax(1).max(1)
        pairs = (batch.targets * classes + predicted.cpu()).bincount(minlength=classes * classes)
        confusion += pairs.view(classes, classes)
        rows = zip(batch.items, batch.targets, predicted, probability, strict=True)
        own += [Prediction(int(i), int(target), int(guess), float(p)) for i, target, guess, p in rows]
    if predictions is not None:
        predictions += sorted(gather_object(own))
    total: Any = accelerator.reduce(sums.float().to(accelerator.device), "sum")
    matrix: Any = accelerator.reduce(confusion.to(accelerator.device), "sum")
    loss_sum, right1, right5, images = total.tolist()
    if images == 0:
        raise ValueError("there is not one readable image to validate on")
    return Metrics(
        top1=100 * right1 / images,
        top5=100 * right5 / images,
        loss=loss_sum / images,
        images=int(images),
        confusion=matrix.cpu(),
    )


def validate(config: ValidateConfig) -> tuple[Metrics, list[Prediction], Source, list[str]]:
    """Validate a model, on the data that it was trained with unless told otherwise.

    Returns:
        The metrics, the predictions in the order of the data, the data, and the class names.
    """
    loaded = load_model(config.checkpoint, which=config.which, weights=config.weights)
    loaded = loaded.resized(config.image_size, config.crop_pct)
    class_names = loaded.class_names
    trained_with = loaded.state.get("data") or {}
    if config.data is None and not trained_with:
        raise ValueError(f"data must be given: {config.checkpoint!r} does not say what it was trained with")
    source = open_source(
        config.data or trained_with["name"],
        config.split or trained_with.get("val_split", "validation"),
        root=config.data_root or trained_with.get("root"),
        class_names=class_names,
    )
    accelerator, policy = make_accelerator(config.device), Unreadable(config.unreadable)
    samples = Samples(source, loaded.preprocessing.transform(), loaded.preprocessing.mode)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    loader = validation_loader(samples, config.batch_size, config.workers, **share)
    predictions: list[Prediction] = []
    model, options = loaded.model.to(accelerator.device), {"progress": config.progress, "predictions": predictions}
    metrics = evaluate(model, loader, accelerator, len(class_names), policy, **options)  # type: ignore[arg-type]
    policy.report()
    return metrics, predictions, source, class_names


def prepare_file(path: str | None) -> None:
    """Make the folder of a file that is to be written, before the work.

    Raises:
        ValueError: the file is a folder, or its folder is a file.
    """
    if path is not None:
        if Path(path).is_dir():
            raise ValueError(f"out must name a file, got the folder {path!r}")
        make_folder(Path(path).parent)


def write_predictions(path: Path, predictions: list[Prediction], source: Source, class_names: list[str]) -> None:
    """Write one row per image: its name, true and predicted class, and the latter's probability."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "truth", "prediction", "probability"])
        for p in predictions:
            name = source.name(p.item)
            writer.writerow([name, class_names[p.target], class_names[p.predicted], f"{p.probability:.6f}"])


def run(config: ValidateConfig) -> dict[str, Any]:
    """Validate as configured: percentages, the mean loss, the number of images, and the confusion matrix."""
    prepare_file(config.out)
    metrics, predictions, source, class_names = validate(config)
    if config.out is not None and PartialState().is_main_process:
        write_predictions(Path(config.out), predictions, source, class_names)
    values = {name: getattr(metrics, name) for name in ("top1", "top5", "loss", "images")}
    return {**values, "class_names": class_names, "confusion": metrics.confusion.tolist()}


def as_text(result: dict[str, Any]) -> str:
    """Lay a result out: its figures, and the classes that are most often taken for another."""
    lines = ["top-1 {top1:.2f}%, top-5 {top5:.2f}%, loss {loss:.4f}, {images} images".format(**result)]
    names = result["class_names"]
    wrong = torch.tensor(result["confusion"]).fill_diagonal_(0)
    for place in wrong.flatten().argsort(descending=True, stable=True)[:5].tolist():
        truth, guess = divmod(place, len(names))
        if wrong[truth, guess]:
            lines.append(f"  {int(wrong[truth, guess])} x {names[truth]} taken for {names[guess]}")
    return "\n".join(lines)
