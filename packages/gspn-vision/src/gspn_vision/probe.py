"""`gspn-vision probe`: how well features tell classes apart, by their nearest neighbours and by a linear classifier."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .config import ProbeConfig
from .features import read_features

FOLDS = 3  # of the cross-validation


def _read(folder: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], dict[str, Any]]:
    features, labels, settings = read_features(folder)
    if not settings["labelled"]:
        raise ValueError(f"{folder} must hold features of images with classes: make them with a split of the data")
    if features.ndim != 2:
        raise ValueError(f"{folder} must hold one vector per image, got maps of {list(features.shape[1:])}")
    return features.float().numpy(), labels.numpy(), settings


def nearest_neighbours(
    train: tuple[Any, Any], val: tuple[Any, Any], *, neighbors: int = 20, temperature: float = 0.07
) -> float:
    r"""Return the top-1 accuracy, per cent, of a vote of the nearest training images, weighted by exp(cos / T).

    Args:
        train, val: features (M, C) and labels (M,), NumPy arrays.
        neighbors: number of training images that vote, at most all.
        temperature: T.

    Source: Wu et al., CVPR 2018, arXiv 1805.01978; 20 and 0.07 are what DINO reports.
    """

    def weights(distances: Any) -> Any:
        # Distance = 1 - cosine; a factor cancels, and that of the nearest keeps all of them from being 0.
        return np.exp((distances.min(axis=1, keepdims=True) - distances) / temperature)

    count = min(neighbors, len(train[1]))
    classifier = KNeighborsClassifier(count, metric="cosine", algorithm="brute", weights=weights)
    return 100 * float(classifier.fit(*train).score(*val))


def linear_probe(
    train: tuple[Any, Any], val: tuple[Any, Any], *, inverse_penalties: list[float], seed: int = 0
) -> tuple[float, float]:
    """Return the top-1 accuracy, per cent, of a logistic regression on standardised features, and its C.

    C is the best of `inverse_penalties` in a threefold cross-validation on the training images, with all of which the
    classifier is made then.

    Raises:
        ValueError: there is something to choose, and a class has fewer than three images.
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    name = "logisticregression__C"
    if len(inverse_penalties) == 1:
        return 100 * float(
            classifier.set_params(**{name: inverse_penalties[0]}).fit(*train).score(*val)
        ), inverse_penalties[0]
    fewest = int(np.unique(train[1], return_counts=True)[1].min())
    if fewest < FOLDS:
        raise ValueError(
            f"inverse_penalties must be one number, since a class has fewer than {FOLDS} images to learn from, "
            f"got {inverse_penalties}"
        )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    search = GridSearchCV(classifier, {name: inverse_penalties}, cv=folds).fit(*train)
    return 100 * float(search.score(*val)), float(search.best_params_[name])


def run(config: ProbeConfig) -> dict[str, Any]:
    """Measure as configured.

    Raises:
        FileNotFoundError: there are no such features.
        ValueError: they have no classes, are maps, or the two folders do not fit each other.
    """
    *train, learned = _read(config.data)
    *val, measured = _read(config.val_data)
    for key in ("model", "weights", "pool", "class_names"):
        if learned[key] != measured[key]:
            raise ValueError(f"val_data must have the same {key} as data, got {measured[key]!r} and {learned[key]!r}")
    if len(np.unique(train[1])) < 2:
        raise ValueError(f"data must have images of at least two classes, got {len(np.unique(train[1]))}")
    pair = ((train[0], train[1]), (val[0], val[1]))
    knn = nearest_neighbours(*pair, neighbors=config.neighbors, temperature=config.temperature)
    linear, best = linear_probe(*pair, inverse_penalties=config.inverse_penalties, seed=config.seed)
    return {
        "train_images": len(train[1]),
        "val_images": len(val[1]),
        "channels": train[0].shape[1],
        "knn_top1": round(knn, 4),
        "linear_top1": round(linear, 4),
        "inverse_penalty": best,
    }


def as_text(result: dict[str, Any]) -> str:
    """Lay a result out."""
    return "\n".join(
        (
            "{train_images:,} images to learn from, {val_images:,} to measure on, {channels} channels".format(**result),
            "nearest neighbours  {knn_top1:.2f}%".format(**result),
            "linear classifier   {linear_top1:.2f}%, C = {inverse_penalty:g}".format(**result),
        )
    )
