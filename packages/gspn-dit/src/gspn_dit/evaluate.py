"""`evaluate`: FID and its kin of samples against references, by one process or several."""

from __future__ import annotations

import csv
import datetime
import io
import json
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from gspn_core.runs.errors import reason
from gspn_core.runs.files import make_folder, write_json, write_text
from gspn_core.runs.options import to_dict
from gspn_core.runs.training import use_cpu

from .config import METRICS, EvaluateConfig
from .extractors import Batches, Extractor, build_extractor, extract
from .metrics import (
    Moments,
    accuracy,
    check_labels,
    check_neighbors,
    frechet_distance,
    inception_score,
    moments,
    precision_recall,
)
from .sources import open_batches, open_reference

FIGURES = ("fid", "sfid", "inception_score", "inception_score_std", "precision", "recall", "accuracy")
COLUMNS = ("date", "samples", "reference", "extractor", "sample_count", "reference_count", *FIGURES)
# The features that a metric is of.
FIELDS: dict[str, str] = {
    **dict.fromkeys(("fid", "precision", "recall"), "pool"),
    "sfid": "spatial",
    **dict.fromkeys(("inception_score", "accuracy"), "logits"),
}


def read_labels(source: str, count: int) -> Tensor:
    """Read one class per sample from a JSON list, an .npy, or the key `labels` of an .npz: (N,) int64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold `count` whole numbers.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"labels: there is no file {path}")
    try:
        if path.suffix == ".json":
            values = np.array(json.loads(path.read_text(encoding="utf-8")))
        else:
            values = np.load(path)
            if isinstance(values, np.lib.npyio.NpzFile):
                with values:
                    values = values["labels"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"labels: {path} must be a JSON list, an .npy, or an .npz with labels ({reason(error)})"
        ) from error
    if values.shape != (count,) or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"labels: {path} must hold {count} whole numbers, got {values.dtype} {values.shape}")
    return torch.from_numpy(values.astype(np.int64))


def append_row(path: Path, row: dict[str, Any] | None) -> None:
    """Add a row to a table of `COLUMNS`, atomically; None only checks the table.

    Raises:
        ValueError: the file has other columns.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    header = next(csv.reader(text.splitlines()), None)
    if header not in (None, list(COLUMNS)):
        raise ValueError(f"csv: {path} must have the columns {', '.join(COLUMNS)}, got {', '.join(header)}")
    if row is None:
        return
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    if header is None:
        writer.writeheader()
    writer.writerow(row)
    make_folder(path.parent)
    write_text(path, text + ("\n" if text and not text.endswith("\n") else "") + table.getvalue())


def _notice(text: str) -> None:
    print(f"evaluate: {text}", file=sys.stderr)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Extract features, by all processes together, and compute the metrics on the main one.

    Returns:
        On the main process, the figures (None: not among the metrics, or left out with a notice on stderr), the counts
        of `samples` and `references` (None if only statistics are given), and the `extractor`. On others, nothing.

    Raises:
        FileNotFoundError: a file, or the extractor's weights, cannot be had.
        ValueError: an option or a file does not suit.
    """
    unknown = [metric for metric in config.metrics if metric not in METRICS]
    if unknown or not config.metrics:
        raise ValueError(f"metrics must be some of {', '.join(METRICS)}, got {unknown or 'none'}")
    if config.csv is not None:
        append_row(Path(config.csv), None)  # refuses before the work
    samples = open_batches(config.samples)
    if len(samples) < 2:
        raise ValueError(f"samples: {config.samples} must hold at least 2 images, got {len(samples)}")
    labels = None if config.labels is None else read_labels(config.labels, len(samples))
    state = PartialState(cpu=use_cpu(config.device))
    device = state.device if config.device == "auto" else torch.device("cpu")
    with state.local_main_process_first():  # which alone downloads
        names = ("weights", "kwargs", "mean", "std", "size")
        options = {name: getattr(config, f"extractor_{name}") for name in names}
        extractor = build_extractor(config.extractor, modules=config.extractor_import, **options).to(device)
    references, statistics = open_reference(config.reference, inception=extractor.inception)
    wanted = _computable(config.metrics, extractor, references, statistics, labels, notify=state.is_main_process)
    if labels is not None and "accuracy" in wanted:
        check_labels(labels, extractor.classes)

    # Of the references, extract only features whose statistics are not given.
    fields = {FIELDS[metric] for metric in wanted}
    reference_fields = {FIELDS[metric] for metric in wanted if metric in ("fid", "sfid") and metric not in statistics}
    reference_count = len(references) if references is not None and reference_fields else 0
    if references is not None and {"precision", "recall"} & wanted:
        near = min(config.precision_reference, len(references))
        check_neighbors(config.neighbors, samples=len(samples), references=near)
        reference_fields.add("pool")
        reference_count = max(reference_count, near)

    def features_of(batches: Batches, count: int, fields: set[str], title: str) -> dict[str, Tensor]:
        bar = title if config.progress and state.is_main_process else None
        features = extract(extractor, batches, count, fields, config.batch_size, state, device, bar)
        for field, rows in features.items():
            if not rows.isfinite().all():
                raise ArithmeticError(f"{field} features of {title} are not finite; see the extractor and its weights")
        return features

    features = features_of(samples, len(samples), fields, "samples")
    known = {}
    if references is not None and reference_count:
        known = features_of(references, reference_count, reference_fields, "references")
    if not state.is_main_process:
        return {}
    result: dict[str, Any] = {
        **_figures(config, wanted, features, known, statistics, labels, device),
        "samples": len(samples),
        "references": None if references is None else len(references),
        "extractor": config.extractor,
    }
    _record(config, result)
    return result


def _figures(
    config: EvaluateConfig,
    wanted: set[str],
    features: Mapping[str, Tensor],
    known: Mapping[str, Tensor],
    statistics: Mapping[str, Moments],
    labels: Tensor | None,
    device: torch.device,
) -> dict[str, float | None]:
    """The figures, from features of the samples, those known of references, and statistics of references."""
    figures: dict[str, float | None] = dict.fromkeys(FIGURES)
    for metric in ("fid", "sfid"):
        if metric in wanted:
            rows = features[FIELDS[metric]]
            if len(rows) <= rows.shape[1]:
                _notice(f"{metric} is biased, its covariance singular: {len(rows)} samples, {rows.shape[1]} features")
            target = statistics[metric] if metric in statistics else moments(known[FIELDS[metric]])
            figures[metric] = frechet_distance(moments(rows), target)
    if {"precision", "recall"} & wanted:
        near = known["pool"][: config.precision_reference]
        found = precision_recall(features["pool"], near, config.neighbors, device=device)
        figures |= {name: value for name, value in found._asdict().items() if name in wanted}
    if "inception_score" in wanted:
        score = inception_score(features["logits"], config.inception_split)
        figures |= {"inception_score": score.mean, "inception_score_std": score.std}
    if "accuracy" in wanted and labels is not None:
        figures["accuracy"] = accuracy(features["logits"], labels)
    return figures


def _computable(
    metrics: Sequence[str],
    extractor: Extractor,
    references: Batches | None,
    statistics: Mapping[str, Moments],
    labels: Tensor | None,
    *,
    notify: bool,
) -> set[str]:
    """Which of the metrics can be computed; a notice says why another cannot."""
    reasons: dict[str, str] = {}
    if references is None:
        without = [metric for metric in ("fid", "sfid", "precision", "recall") if metric not in statistics]
        reasons |= dict.fromkeys(without, "the reference holds statistics, but no images (arr_0)")
    if not extractor.inception:
        reasons["sfid"] = f"{extractor.name} has no spatial features"
    if labels is None:
        reasons["accuracy"] = "no labels are given"
    elif extractor.inception:
        reasons["accuracy"] = "Inception's classes are in an order of its own"
    if not extractor.classes:
        reasons |= dict.fromkeys(("inception_score", "accuracy"), f"{extractor.name} has no classifier")
    left_out = [metric for metric in metrics if metric in reasons]
    for metric in left_out if notify else ():
        _notice(f"{metric} is left out: {reasons[metric]}")
    if len(left_out) == len(metrics):
        raise ValueError(f"metrics: none can be computed; {metrics[0]}: {reasons[metrics[0]]}")
    return set(metrics) - set(left_out)


def _record(config: EvaluateConfig, result: dict[str, Any]) -> None:
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    if config.csv is not None:
        paths = {"date": date, "samples": config.samples, "reference": config.reference}
        counts = {"sample_count": result["samples"], "reference_count": result["references"]}
        append_row(
            Path(config.csv), {**paths, "extractor": config.extractor, **counts, **{f: result[f] for f in FIGURES}}
        )
    if config.out is not None:
        write_json(Path(config.out), {"date": date, **result, "config": to_dict(config)})
