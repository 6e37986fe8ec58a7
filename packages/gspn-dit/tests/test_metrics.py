"""Every figure against its definition, written out with numpy and scipy."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch

from gspn_dit.metrics import (
    Moments,
    accuracy,
    frechet_distance,
    inception_score,
    moments,
    precision_recall,
)


def gaussian(count: int, features: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Correlated features (count, features) of unequal scales."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, features)) @ rng.standard_normal((features, features))
    return torch.from_numpy((mixed * np.linspace(0.2, 2, features) + shift).astype(np.float32))


def test_moments_are_numpys() -> None:
    features = gaussian(5000, 7, 0, shift=100.0)  # over several pieces, and far from zero
    found = moments(features)
    np.testing.assert_allclose(found.mean, features.numpy().astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.numpy().astype(np.float64), rowvar=False), rtol=1e-10)


@pytest.mark.parametrize(
    "features, message",
    [(torch.zeros(1, 4), "N of at least 2"), (torch.zeros(4), "shape"), (torch.full((3, 2), torch.nan), "finite")],
)
def test_moments_refuses(features: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moments(features)


@pytest.mark.parametrize("count", [400, 20])  # fewer than features: singular covariances
def test_frechet_distance_by_matrix_square_root(count: int) -> None:
    first, second = gaussian(count, 30, 0), gaussian(300, 30, 1, shift=0.3)
    means = [f.numpy().astype(np.float64).mean(0) for f in (first, second)]
    a, b = (np.cov(f.numpy().astype(np.float64), rowvar=False) for f in (first, second))
    # tr (A B)^(1/2) = tr (B^(1/2) A B^(1/2))^(1/2), whose argument is symmetric.
    root = np.real(scipy.linalg.sqrtm(b))
    trace = np.sqrt(np.linalg.eigvalsh(root @ a @ root).clip(0)).sum()
    if count > 30:
        assert trace == pytest.approx(np.trace(np.real(scipy.linalg.sqrtm(a @ b))), rel=1e-8)
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * trace
    assert frechet_distance(moments(first), moments(second)) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_known_gaussians() -> None:
    """Of diagonal covariances it is |m1 - m2|^2 + |s1 - s2|^2, of the standard deviations s."""
    first = Moments(np.array([0.0, 1, 2]), np.diag([1.0, 4, 9]))
    second = Moments(np.array([3.0, 1, 0], dtype=np.float32), np.diag([4.0, 4, 0.25]).astype(np.float32))
    assert frechet_distance(first, second) == pytest.approx(9 + 4 + (1 - 2) ** 2 + (3 - 0.5) ** 2)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_refuses_other_features() -> None:
    with pytest.raises(ValueError, match=r"\(3,\)"):
        frechet_distance(moments(gaussian(9, 2, 0)), moments(gaussian(9, 3, 0)))


def score_by_definition(logits: np.ndarray) -> float:
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    marginal = p.mean(0)
    return float(np.exp(np.mean([sum(q * np.log(q / m) for q, m in zip(row, marginal, strict=True)) for row in p])))


def test_inception_score_is_of_consecutive_splits() -> None:
    logits = gaussian(60, 5, 0)
    logits[:20, 0] += 6  # a shuffle would be seen
    scores = [score_by_definition(part) for part in logits.double().numpy().reshape(3, 20, 5)]
    assert inception_score(logits, split=20) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-6)


@pytest.mark.parametrize("split, bounds", [(25, [0, 30, 60]), (100, [0, 60]), (60, [0, 60])])
def test_inception_score_of_counts_that_do_not_divide(split: int, bounds: list[int]) -> None:
    logits = gaussian(60, 5, 1)
    scores = [score_by_definition(logits[a:b].double().numpy()) for a, b in itertools.pairwise(bounds)]
    assert inception_score(logits, split) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-6)


def test_inception_score_of_certain_classes_is_their_number() -> None:
    assert inception_score(100 * torch.eye(4).repeat(5, 1)).mean == pytest.approx(4)
    assert inception_score(torch.zeros(20, 4)).mean == pytest.approx(1)


def share_within(points: np.ndarray, manifold: np.ndarray, neighbors: int) -> float:
    """Share of points that lie within the ball of a manifold's point up to its k-th other point."""
    radii = []
    for i, center in enumerate(manifold):
        others = sorted(np.linalg.norm(center - other) for j, other in enumerate(manifold) if j != i)
        radii.append(others[neighbors - 1])
    inside = [
        any(np.linalg.norm(point - center) <= radius for center, radius in zip(manifold, radii, strict=True))
        for point in points
    ]
    return float(np.mean(inside))


@pytest.mark.parametrize("neighbors", [1, 3])
def test_precision_recall_by_loops(neighbors: int) -> None:
    samples, references = gaussian(40, 3, 0), gaussian(55, 3, 0, shift=1.0)
    a, b = samples.double().numpy(), references.double().numpy()
    expected = share_within(a, b, neighbors), share_within(b, a, neighbors)
    assert expected[0] != expected[1] and all(0 < value < 1 for value in expected)
    assert precision_recall(samples, references, neighbors) == pytest.approx(expected)


def test_precision_recall_of_a_collapsed_generator() -> None:
    references = gaussian(50, 4, 0)
    samples = references[:1] + 1e-3 * gaussian(50, 4, 1)
    found = precision_recall(samples, references)
    assert found.precision == 1 and found.recall <= 0.1


@pytest.mark.parametrize("neighbors", [0, 5, 8])
def test_precision_recall_refuses_neighbors(neighbors: int) -> None:
    with pytest.raises(ValueError, match=f"neighbors must be .* got {neighbors}"):
        precision_recall(gaussian(9, 2, 0), gaussian(5, 2, 0), neighbors)


def test_accuracy() -> None:
    logits = torch.tensor([[0.0, 2], [3, 1], [0, 1], [5, 4]])
    assert accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.75
    with pytest.raises(ValueError, match="from 0 to 1, got 0 to 2"):
        accuracy(logits, torch.tensor([1, 0, 0, 2]))
    with pytest.raises(ValueError, match=r"\(4,\), got \(3,\)"):
        accuracy(logits, torch.tensor([1, 0, 0]))
