"""Clusters of hidden units: planted clusters are found, the assignment is as cheap as scipy's, the cache."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_vit
from scipy.optimize import linear_sum_assignment
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.multitask.emtal import clusters
from vismt.multitask.emtal.clusters import (
    assign,
    balanced_kmeans,
    cluster_model,
    cluster_neurons,
    explained_variance,
    plain_mlp,
    random_neurons,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path))
    return tmp_path / "experts"


def planted(seed: int = 0, units: int = 256, width: int = 32, clusters: int = 8) -> tuple[Tensor, Tensor]:
    """Return rows around `clusters` directions, with log-normal norms, in random order, and their true clusters."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(units) % clusters
    truth = truth[torch.randperm(units, generator=generator)]
    directions = nn.functional.normalize(torch.randn(clusters, width, generator=generator), dim=1)
    rows = directions[truth] + 0.05 * torch.randn(units, width, generator=generator)
    return rows * torch.exp(torch.randn(units, 1, generator=generator)), truth


def agreement(labels: Tensor, truth: Tensor) -> float:
    return pytest.importorskip("sklearn.metrics").adjusted_rand_score(truth.numpy(), labels.numpy())


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_planted_clusters_are_found_whatever_the_norms(seed: int) -> None:
    weight, truth = planted(seed)
    labels = cluster_neurons(weight, 8)
    assert labels.bincount().tolist() == [32] * 8
    assert agreement(labels, truth) == 1.0
    # Without normalisation long rows form separate clusters; a contiguous split does not recover the clusters.
    assert agreement(balanced_kmeans(weight, 8), truth) < 0.9
    assert abs(agreement(torch.arange(256) // 32, truth)) < 0.1

    def concentration(split: Tensor) -> float:
        blocks = [torch.linalg.svdvals(weight[split == expert]) for expert in range(8)]
        return sum(float(values[:3].sum() / values.sum()) for values in blocks) / 8

    assert concentration(labels) > concentration(torch.arange(256) // 32) + 0.1


def test_scaling_a_unit_or_the_dtype_changes_nothing() -> None:
    weight, _ = planted()
    labels = cluster_neurons(weight, 8, seed=1)
    assert torch.equal(
        labels, cluster_neurons(weight * 2.0 ** torch.arange(-128, 128).div(16).floor()[:, None], 8, seed=1)
    )
    assert torch.equal(cluster_neurons(weight.bfloat16(), 8), cluster_neurons(weight.bfloat16().float(), 8))
    weight[3:5] = 0  # pruned units
    assert cluster_neurons(weight, 8).bincount().tolist() == [32] * 8


def test_every_block_has_its_own_labels() -> None:
    vit = tiny_vit()
    first, second = cluster_model(vit, 4)
    assert not torch.equal(first, second)
    assert torch.equal(first, cluster_neurons(vit.blocks[0].mlp.fc1.weight, 4))


def test_the_cache_is_used_and_mended(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit, calls = tiny_vit(), []

    def counted(*arguments: object) -> Tensor:
        calls.append(arguments)
        return cluster_neurons(*arguments)

    monkeypatch.setattr(clusters, "cluster_neurons", counted)
    labels = cluster_model(vit, 4)
    files = sorted(cache.iterdir())
    assert len(calls) == len(files) == 2
    assert all(torch.equal(first, second) for first, second in zip(labels, cluster_model(vit, 4))) and len(calls) == 2
    # A truncated file is written again; another seed, number of experts or weight has another file.
    files[0].write_bytes(files[0].read_bytes()[:50])
    assert all(torch.equal(first, second) for first, second in zip(labels, cluster_model(vit, 4))) and len(calls) == 3
    for change in ((4, 1), (8, 0)):
        cluster_model(vit, *change)
    assert len(calls) == 7 and len(list(cache.iterdir())) == 6
    other = copy.deepcopy(vit)
    other.blocks[1].mlp.fc1.weight.data[0, 0] += 1e-3
    cluster_model(other, 4)
    assert len(calls) == 8


def test_labels_of_a_foreign_file_are_not_believed(cache: Path) -> None:
    import safetensors.torch

    vit = tiny_vit()
    labels = cluster_model(vit, 4)
    for file in cache.iterdir():
        file.write_bytes(safetensors.torch.save({"labels": torch.zeros(128, dtype=torch.int64)}))
    assert all(torch.equal(first, second) for first, second in zip(labels, cluster_model(vit, 4)))


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        (SwiGLU(8, 16), "SwiGLU is a gated FFN"),
        (GluMlp(8, 16), "GluMlp is a gated FFN"),
        (Mlp(8, 16, norm_layer=nn.LayerNorm), "normalises its hidden units"),
        (Mlp(8, 16, use_conv=True), "fc1 is Conv2d"),
        (nn.Identity(), "no fc1 and fc2"),
    ],
)
def test_other_ffns_are_refused_with_the_reason(mlp: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plain_mlp(mlp)


def test_a_gated_block_is_named() -> None:
    vit = tiny_vit()
    vit.blocks[1].mlp = SwiGLU(32, 64)
    with pytest.raises(UserError, match="SwiGLU of block 1 is a gated FFN"):
        cluster_model(vit, 4)


def test_other_errors() -> None:
    vit = tiny_vit()
    with pytest.raises(UserError, match="5 experts cannot share 128 hidden units equally; use 4 or 8"):
        cluster_model(vit, 5)
    with pytest.raises(UserError, match="5 experts cannot share"):
        cluster_neurons(torch.randn(128, 4), 5)
    with pytest.raises(UserError, match="no blocks"):
        cluster_model(nn.Linear(2, 2), 4)
    for weight in (torch.randn(8), torch.zeros(8, 2, dtype=torch.int64), torch.zeros(8, 2, device="meta")):
        with pytest.raises(UserError, match="needed a floating point matrix"):
            cluster_neurons(weight, 4)
    with pytest.raises(UserError, match="infinite or NaN"):
        cluster_neurons(torch.full((8, 2), torch.inf), 4)


def test_explained_variance_by_hand() -> None:
    # Directions e1, e1, e2, e2 in two groups. Together W = 0. Apart each group has two rows at distance 1/sqrt(2) of its mean:
    # W = 4 / 2 = 2; T = 4 * 1/2 = 2, E = 2 (4 - 2) / 3 = 4/3, the mean over the three pairings: (0 + 2 + 2) / 3.
    weight = torch.tensor([[2.0, 0], [5, 0], [0, 1], [0, 3]])
    assert explained_variance(weight, torch.tensor([0, 0, 1, 1]), 2) == pytest.approx(1)
    assert explained_variance(weight, torch.tensor([0, 1, 0, 1]), 2) == pytest.approx(1 - 2 / (4 / 3))
    weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    random = [explained_variance(weight, random_neurons(64, 4, seed), 4) for seed in range(40)]
    assert abs(sum(random) / 40) < 0.01 < explained_variance(weight, cluster_neurons(weight, 4), 4)


def test_random_experts_are_balanced_and_a_function_of_the_seed() -> None:
    labels = random_neurons(32, 4, 1)
    assert labels.bincount().tolist() == [8] * 4 and torch.equal(labels, random_neurons(32, 4, 1))
    assert not torch.equal(labels, random_neurons(32, 4, 2)) and not torch.equal(labels, labels.sort().values)
    with pytest.raises(UserError):
        random_neurons(30, 4)


# ---- k-means
@pytest.mark.parametrize("span", [2, 5, 1000, 2**40])
def test_the_assignment_is_the_cheapest(span: int) -> None:
    """Compare with linear_sum_assignment on copies of each cluster; small spans have many ties."""
    rng = np.random.default_rng(span)
    for _ in range(40):
        count, size = int(rng.integers(1, 7)), int(rng.integers(1, 9))
        cost = rng.integers(-span, span, (count * size, count))
        copies = cost.repeat(size, 1)
        best = copies[linear_sum_assignment(copies)].sum()
        # Any start of the prices leads to the same cost.
        for prices in (None, rng.integers(-span, span, count)):
            labels = assign(cost, prices)
            if prices is not None:  # a certificate: at the returned prices every row is in its best cluster
                priced = cost - prices
                assert (np.take_along_axis(priced, labels[:, None], 1)[:, 0] == priced.min(1)).all()
            assert (np.bincount(labels, minlength=count) == size).all()
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


@pytest.mark.parametrize("count", [1, 3, 12])
def test_equal_rows_and_the_ends_of_the_range(count: int) -> None:
    for points in (torch.zeros(12, 3), torch.ones(12, 3)):
        assert balanced_kmeans(points, count).bincount().tolist() == [12 // count] * count


def test_it_stops_when_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(clusters, "assign", lambda *arguments: calls.append(arguments) or assign(*arguments))
    points = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    for pairs in (torch.cat([points, -points]), torch.cat([points, points]), torch.eye(64)):
        calls.clear()
        balanced_kmeans(pairs, 2, restarts=10)
        assert len(calls) < 200  # 3000 without a stop


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (5, "5 experts cannot share 12 rows equally; use 4 or 6"),
        (24, "use 12"),
        (7, "use 6 or 12"),
        (0, "is 0; it must be a whole number"),
        (2.0, r"is 2\.0"),
        (True, "is True"),
    ],
)
def test_numbers_that_do_not_divide(count: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        balanced_kmeans(torch.randn(12, 2), count)


def test_broken_points_and_counts() -> None:
    with pytest.raises(UserError, match="infinite or NaN"):
        balanced_kmeans(torch.full((4, 2), torch.nan), 2)
    with pytest.raises(UserError, match="0 restarts; it needs at least one"):
        balanced_kmeans(torch.randn(4, 2), 2, restarts=0)
