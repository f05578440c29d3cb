"""The exact assignment compared with scipy's, and k-means with clusters of equal size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from vismt.base.errors import UserError
from vismt.multitask.emtal import kmeans
from vismt.multitask.emtal.kmeans import assign, balanced_kmeans


@pytest.mark.parametrize("span", [2, 5, 1000, 2**40])
def test_the_assignment_is_the_cheapest(span: int) -> None:
    """Compare with linear_sum_assignment on copies of each cluster; small spans have many ties."""
    rng = np.random.default_rng(span)
    for _ in range(40):
        clusters, size = int(rng.integers(1, 7)), int(rng.integers(1, 9))
        cost = rng.integers(-span, span, (clusters * size, clusters))
        copies = cost.repeat(size, 1)
        best = copies[linear_sum_assignment(copies)].sum()
        # Any start of the prices leads to the same cost.
        for prices in (None, rng.integers(-span, span, clusters)):
            labels = assign(cost, prices)
            if prices is not None:  # a certificate: at the returned prices every row is in its best cluster
                priced = cost - prices
                assert (np.take_along_axis(priced, labels[:, None], 1)[:, 0] == priced.min(1)).all()
            assert (np.bincount(labels, minlength=clusters) == size).all()
            assert np.take_along_axis(cost, labels[:, None], 1).sum() == best


def test_a_greedy_assignment_would_differ() -> None:
    # Cluster 0 is the cheapest for both rows; assigning row 0 to it costs 1 + 9, the optimum is 2 + 3.
    assert assign(np.array([[1, 3], [2, 9]])).tolist() == [1, 0]


def spread(points: Tensor, labels: Tensor) -> float:
    groups = [points[labels == label] for label in labels.unique()]
    return sum(float((group - group.mean(0)).square().sum()) for group in groups)


def test_the_best_of_all_partitions_of_a_few_points() -> None:
    points = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    smallest = spread(points, balanced_kmeans(points, 2, restarts=30))
    halves = itertools.combinations(range(8), 4)
    every = [torch.zeros(8, dtype=torch.int64).index_fill(0, torch.tensor(half), 1) for half in halves]
    assert smallest == pytest.approx(min(spread(points, labels) for labels in every))


def test_sizes_numbering_and_seed() -> None:
    points = torch.randn(120, 6, generator=torch.Generator().manual_seed(1))
    labels = balanced_kmeans(points, 5, seed=3)
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [24] * 5
    first = [int((labels == label).nonzero()[0]) for label in range(5)]
    assert first == sorted(first) and first[0] == 0
    assert torch.equal(labels, balanced_kmeans(points, 5, seed=3))
    assert not torch.equal(labels, balanced_kmeans(points, 5, seed=4, restarts=1))
    state = torch.get_rng_state()
    balanced_kmeans(points, 5)
    assert torch.equal(state, torch.get_rng_state())


def test_the_number_of_threads_changes_nothing() -> None:
    points = torch.randn(512, 128, generator=torch.Generator().manual_seed(2))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(balanced_kmeans(points, 8, restarts=2))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert torch.equal(*results)


@pytest.mark.parametrize("clusters", [1, 3, 12])
def test_equal_rows_and_the_ends_of_the_range(clusters: int) -> None:
    for points in (torch.zeros(12, 3), torch.ones(12, 3)):
        assert balanced_kmeans(points, clusters).bincount().tolist() == [12 // clusters] * clusters


def test_it_stops_when_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(kmeans, "assign", lambda *arguments: calls.append(arguments) or assign(*arguments))
    points = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    for pairs in (torch.cat([points, -points]), torch.cat([points, points]), torch.eye(64)):
        calls.clear()
        balanced_kmeans(pairs, 2, restarts=10)
        assert len(calls) < 200  # 3000 without a stop


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        (5, "5 experts cannot share 12 rows equally; use 4 or 6"),
        (24, "use 12"),
        (7, "use 6 or 12"),
        (0, "is 0; it must be a whole number"),
        (2.0, r"is 2\.0"),
        (True, "is True"),
    ],
)
def test_numbers_that_do_not_divide(clusters: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        balanced_kmeans(torch.randn(12, 2), clusters)


def test_broken_points_and_counts() -> None:
    with pytest.raises(UserError, match="infinite or NaN"):
        balanced_kmeans(torch.full((4, 2), torch.nan), 2)
    for counts in ({"restarts": 0}, {"iterations": 0}):
        with pytest.raises(UserError, match="at least one of each"):
            balanced_kmeans(torch.randn(4, 2), 2, **counts)
