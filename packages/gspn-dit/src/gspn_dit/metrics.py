"""Metrics of generated images, from features of samples and of references."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

ROWS = 4096  # features that are centred in float64 at a time


class Moments(NamedTuple):
    """Mean (F,) and covariance (F, F) of features, in float64."""

    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]


def moments(features: Tensor) -> Moments:
    """Mean and unbiased covariance of features (N, F), added up in float64.

    Raises:
        ValueError: there are fewer than two rows, or a value is not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, F) with N of at least 2, got shape {tuple(features.shape)}")
    mean = features.mean(0, dtype=torch.float64)
    if not mean.isfinite().all():
        raise ValueError("features must be finite, got NaN or infinity; see the extractor and its weights")
    covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for rows in features.split(ROWS):
        centred = rows.double() - mean
        covariance += centred.T @ centred
    return Moments(mean.numpy(), (covariance / (len(features) - 1)).numpy())


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): FID on pooled features, sFID on spatial ones (Heusel et al. 2017).

    Raises:
        ValueError: the two have different numbers of features.
    """
    statistics = []
    for mean, covariance in (first, second):
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape or mean.shape != first.mean.shape:
            raise ValueError(
                f"statistics must be of {first.mean.shape} and {2 * first.mean.shape}, "
                f"got {mean.shape} and {covariance.shape}"
            )
        # torch-fidelity asserts equal types; files of statistics hold float32 or float64.
        statistics.append({"mu": mean.astype(np.float64), "sigma": covariance.astype(np.float64)})
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits."""

    mean: float
    std: float


def inception_score(logits: Tensor, split: int = 5000) -> InceptionScore:
    """exp(mean KL(p(y|x) || p(y))) over consecutive splits, in the order of the images (Salimans et al. 2016).

    Args:
        logits: (N, K).
        split: images in one; where N is no multiple of it, N // split (at least one) nearly equal splits are made.
    """
    scores = isc_features_to_metric(logits, splits=max(1, len(logits) // split), shuffle=False)
    return InceptionScore(scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD])


class PrecisionRecall(NamedTuple):
    """Share of samples within the references' manifold, and of references within the samples'."""

    precision: float
    recall: float


def check_neighbors(neighbors: int, **counts: int) -> None:
    """Refuse a k that is not smaller than every set of points.

    Raises:
        ValueError: neighbors is not below each of the counts.
    """
    for name, count in counts.items():
        if not 0 < neighbors < count:
            raise ValueError(f"neighbors must be at least 1 and below the number of {name}, {count}, got {neighbors}")


def precision_recall(
    samples: Tensor, references: Tensor, neighbors: int = 3, *, device: torch.device | str = "cpu"
) -> PrecisionRecall:
    """Improved precision and recall: manifolds are balls up to the k-th neighbour (Kynkäänniemi et al. 2019).

    Args:
        samples: features (N, F).
        references: features (M, F).
        neighbors: k, not counting the point itself.
        device: to compute the distances on.

    Raises:
        ValueError: there are not more samples, or references, than neighbours.
    """
    check_neighbors(neighbors, samples=len(samples), references=len(references))
    found = prc_features_to_metric(
        samples.to(device), references.to(device), prc_neighborhood=neighbors, save_cpu_ram=True, verbose=False
    )
    return PrecisionRecall(found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL])


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are no class.

    Raises:
        ValueError: a label is below 0, or not below the number of classes.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must be from 0 to {classes - 1}, got {low} to {high}")


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows of logits (N, K) whose largest value is at the label (N,).

    Raises:
        ValueError: the counts differ, or a label is no class.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must be {tuple(logits.shape[:1])}, got {tuple(labels.shape)}")
    check_labels(labels, logits.shape[1])
    return (logits.argmax(1) == labels).double().mean().item()
