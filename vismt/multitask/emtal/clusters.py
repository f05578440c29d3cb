"""Experts of a pre-trained FFN: groups of hidden units with similar input weights, found by k-means with equal sizes.

    FFN(x) = sum_h GELU(x . w_h + b_h) v_h                w_h row h of fc1.weight, v_h column h of fc2.weight
    maximise  sum_h x_h . c_k(h)   subject to   |{h : k(h) = k}| = H / K        x_h = w_h / |w_h|, c_k the mean of its cluster

EMTAL (Zhong et al., NeurIPS 2024, arXiv 2501.06884) clusters the x_h of each block and orders the units by cluster, which does
not change the function. Here a unit keeps its place and gets a label. The clustered matrix is fc1 of the given model. The
released script reads its matrices from a checkpoint that another script writes. Left out: the paper's ablations (clustering by
activations and by gradients) and gated FFNs.

With equal sizes sum_h |c_k(h)|^2 does not depend on the assignment, so inner products are enough. The assignment is a
transportation problem, solved by successive shortest paths (Ahuja, Magnanti, Orlin, Network Flows, 1993, ch. 9). Every row
starts in its best cluster at the current prices. Then rows move from overfull to underfull clusters along shortest paths of the
residual graph. The graph reduces to K nodes, because only the cheapest row of each pair of clusters matters. Costs are
integers, so the optimum is exact. Each k-means iteration starts from the prices of the iteration before, close to its solution.
A restart at 3072 x 768, K = 16 takes 0.15 s. scipy's linear_sum_assignment on H / K copies of each centroid gives the same cost
in 0.6 s for every single iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from vismt.base import console
from vismt.base.errors import UserError, need_whole
from vismt.base.identity import Identity, version
from vismt.lowrank.contexts import one_thread
from vismt.storage.paths import cache_root
from vismt.storage.stored_tensors import read_stored, write_stored

RESTARTS, _ITERATIONS = 10, 300  # a start also ends if the objective does not improve
# Costs span 2^41 steps, so sums along any path stay far below the distance of unreachable clusters.
_STEPS, UNREACHABLE = 2.0**40, 2**60


def cluster_neurons(weight: Tensor, n_experts: int, seed: int = 0) -> Tensor:
    """Assign the hidden units of an FFN to experts of exactly H / n_experts units.

    Args:
        weight: Matrix (H, D), fc1.weight. Its rows are scaled to length one, except rows of zeros.
        n_experts: Number of experts, a divisor of H.
        seed: Seed of the k-means, see `balanced_kmeans`.

    Returns:
        The expert of each unit, int64 (H,) on the CPU.

    Raises:
        UserError: If n_experts does not divide H, or the weight is not a finite matrix with values.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        kind = f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
        raise UserError(f"experts: the weight is {kind}, needed a floating point matrix (units, width) with values.")
    check_divides(len(weight), n_experts, "hidden units")
    rows = weight.detach().to("cpu", torch.float64)
    return balanced_kmeans(nn.functional.normalize(rows, dim=1, eps=1e-30), n_experts, seed)


def cluster_model(vit: nn.Module, n_experts: int, seed: int = 0) -> list[Tensor]:
    """Cluster the hidden units of every block of a timm ViT, without changing the model.

    Return the labels of each block, see `cluster_neurons`. Raise UserError for a model without blocks, an FFN that is not two
    plain linear layers, and an n_experts that does not divide its hidden width.
    """
    if not hasattr(vit, "blocks"):
        raise UserError(
            f"experts: {type(vit).__name__} has no blocks; give the timm model (of a Backbone: backbone.vit)."
        )
    blocks: Any = vit.blocks
    mlps = [plain_mlp(block, f"block {number}") for number, block in enumerate(blocks)]
    return cluster_ffns(mlps, n_experts, seed)


def cluster_ffns(mlps: Sequence[nn.Module], n_experts: int, seed: int) -> list[Tensor]:
    """Return the labels of each FFN, see `cluster_neurons`.

    Labels are stored under the cache folder, one file for each FFN, by a hash of its fc1.weight and the settings. Stored labels
    are not computed again, so an interrupted call resumes.
    """
    weights = [fc1_weight(mlp) for mlp in mlps]
    for weight in weights:
        check_divides(len(weight), n_experts, "hidden units")
    code = version("vismt.multitask")
    files = [cache_root() / "experts" / f"{Identity(w, n_experts, seed, RESTARTS, code)}.safetensors" for w in weights]
    stored = [read_stored(file) for file in files]
    labels = {number: tensors["labels"] for number, tensors in enumerate(stored) if tensors is not None}
    missing = [number for number in range(len(weights)) if number not in labels]
    for number in console.track(missing, "experts", "blocks clustered") if missing else ():
        labels[number] = cluster_neurons(weights[number], n_experts, seed)
        write_stored(files[number], {"labels": labels[number]})
    return [labels[number] for number in range(len(weights))]


def fc1_weight(mlp: Any) -> Tensor:
    """Return the weight (H, D) of the first linear of an FFN."""
    return mlp.fc1.weight


def plain_mlp(block_or_mlp: nn.Module, name: str = "") -> nn.Module:
    """Return the FFN of a block, or the FFN itself: fc1, an activation, fc2.

    name: Name of the block in errors. Raise UserError with the reason if a router cannot weigh its units.
    """
    mlp = getattr(block_or_mlp, "mlp", block_or_mlp)
    what = f"experts: {type(mlp).__name__} of {name}" if name else f"experts: {type(mlp).__name__}"
    fc1, fc2 = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
    gated = hasattr(mlp, "fc1_g") or hasattr(mlp, "w12")
    if isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear):
        gated = gated or fc1.out_features != fc2.in_features
    if gated:
        raise UserError(
            f"{what} is a gated FFN: a unit has two pre-activations, EMTAL's router scales one; use a ViT with a plain FFN."
        )
    if not (isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)):
        layers = (
            f"fc1 is {type(fc1).__name__}, fc2 {type(fc2).__name__}" if fc1 is not None else "it has no fc1 and fc2"
        )
        raise UserError(f"{what}: {layers}, needed two nn.Linear; use a plain ViT that is not adapted yet.")
    if not isinstance(getattr(mlp, "norm", None), nn.Identity | None):
        raise UserError(
            f"{what} normalises its hidden units, which makes experts depend on each other; use a ViT without that norm."
        )
    return mlp


def random_neurons(hidden: int, n_experts: int, seed: int = 0) -> Tensor:
    """Assign hidden units to experts of exactly hidden / n_experts units at random, the control for `cluster_neurons`.

    Return the expert of each unit, int64 (hidden,). Raise UserError if n_experts does not divide hidden.
    """
    check_divides(hidden, n_experts, "hidden units")
    order = torch.randperm(hidden, generator=torch.Generator().manual_seed(seed))
    return torch.empty(hidden, dtype=torch.int64).scatter_(0, order, torch.arange(hidden) // (hidden // n_experts))


@torch.no_grad()
def explained_variance(weight: Tensor, labels: Tensor, n_experts: int) -> float:
    """Return the share of the variance within random groups of equal sizes that groups of units do not have.

        1 - W / E,   W = sum_h |x_h - c_k(h)|^2,   E = T (H - K) / (H - 1),   T = sum_h |x_h - mean|^2

    x_h = w_h / |w_h|, and c_k is the mean of group k. E is the mean of W over all assignments to K groups of H / K units.
    Random groups give 0, and K different rows would give 1.

    Args:
        weight: Matrix (H, D).
        labels: Groups int64 (H,), with H / n_experts units in each group.
        n_experts: Number of groups, K < H.
    """
    rows = nn.functional.normalize(weight.detach().to("cpu", torch.float64), dim=1, eps=1e-30)
    order = labels.cpu().argsort(stable=True)
    groups = rearrange(rows[order], "(e h) d -> e h d", e=n_experts)
    within = (groups - groups.mean(1, keepdim=True)).square().sum()
    total = (rows - rows.mean(0)).square().sum()
    expected = total * (len(rows) - n_experts) / (len(rows) - 1)
    return float(1 - within / expected)


def balanced_kmeans(points: Tensor, n_clusters: int, seed: int = 0, restarts: int = RESTARTS) -> Tensor:
    """Cluster points into clusters of exactly H / n_clusters rows.

    The clusters are computed in fp64 on one thread of the CPU, so the result depends on `seed` and not on the number of
    threads.

    Args:
        points: Points (H, D), any floating dtype.
        n_clusters: Number of clusters, a divisor of H.
        seed: Seed of the k-means++ starts.
        restarts: Number of k-means++ starts. The best result is kept.

    Returns:
        The cluster of each row, int64 (H,) on the CPU. Clusters are numbered in the order of their first rows.

    Raises:
        UserError: If n_clusters does not divide H, restarts is below 1, or points are not finite.
    """
    check_divides(len(points), n_clusters, "rows")
    if restarts < 1:
        raise UserError(f"k-means: {restarts} restarts; it needs at least one.")
    if not bool(points.isfinite().all()):
        raise UserError("k-means: some values are infinite or NaN; the weights are broken.")
    points = points.detach().to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with one_thread():
        best, best_gain = np.zeros(len(points), np.int64), -1.0
        for _ in range(restarts):
            labels, gain = _lloyd(points, _seeds(points, n_clusters, generator))
            if gain > best_gain:
                best, best_gain = labels, gain
    first = np.unique(best, return_index=True)[1]
    return torch.from_numpy(first.argsort().argsort()[best])


def assign(cost: np.ndarray, prices: np.ndarray | None = None) -> np.ndarray:
    """Return the cheapest assignment of H rows to K clusters of H / K rows each, int64 (H,).

    Args:
        cost: Costs int64 (H, K), absolute values up to 2^41.
        prices: Start values int64 (K,) of the clusters' prices, updated in place. They affect the running time and the choice
            among equally cheap assignments.
    """
    rows, clusters = cost.shape
    size = rows // clusters
    prices = np.zeros(clusters, np.int64) if prices is None else prices
    labels = (cost - prices).argmin(1)
    move = cost - np.take_along_axis(cost, labels[:, None], 1)  # cost of moving each row to each cluster
    count = np.bincount(labels, minlength=clusters)
    cheapest = np.full((clusters, clusters), UNREACHABLE)
    mover = np.zeros((clusters, clusters), np.int64)

    def refresh(source: int) -> None:
        members = np.flatnonzero(labels == source)
        cheapest[source] = UNREACHABLE
        if len(members):
            place = move[members].argmin(0)
            mover[source] = members[place]
            cheapest[source] = np.take_along_axis(move[members], place[None], 0)[0]

    for source in range(clusters):
        refresh(source)
    while (count > size).any():
        node, distance, parent = _shortest_path(cheapest, prices, count, size)
        prices += np.minimum(distance, distance[node])
        count[node] += 1
        path = [node]
        while (source := int(parent[node])) >= 0:
            row = mover[source, node]
            move[row] -= move[row, node]
            labels[row] = node
            node = source
            path.append(node)
        count[node] -= 1
        for source in path:
            refresh(source)
    prices -= prices.min()
    return labels


def check_divides(rows: int, clusters: int, what: str) -> None:
    """Raise UserError, with the nearest divisors, unless `clusters` divides `rows`."""
    need_whole("experts: n_experts is", clusters)
    if clusters > rows or rows % clusters:
        divisors = [number for number in range(1, rows + 1) if rows % number == 0]
        below = max((n for n in divisors if n < clusters), default=1)
        above = min((n for n in divisors if n > clusters), default=rows)
        close = " or ".join(str(number) for number in sorted({below, above}))
        raise UserError(f"experts: {clusters} experts cannot share {rows} {what} equally; use {close}.")


def _shortest_path(
    cheapest: np.ndarray, prices: np.ndarray, count: np.ndarray, size: int
) -> tuple[int, np.ndarray, np.ndarray]:
    """Run Dijkstra's algorithm from all overfull clusters to the nearest underfull one.

    Return that cluster, the distances, and the parents (-1 at a start). Prices make every edge non-negative. At the current
    prices no row gains by leaving its cluster.
    """
    distance = np.where(count > size, 0, UNREACHABLE)
    waiting, parent = distance.copy(), np.full(len(count), -1)
    while True:
        node = int(waiting.argmin())
        if count[node] < size:
            return node, distance, parent
        through = cheapest[node] + (distance[node] + prices[node] - prices)
        better = through < distance
        distance[better] = waiting[better] = through[better]
        parent[better] = node
        waiting[node] = 2 * UNREACHABLE


def _seeds(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return k-means++ seeds. Each is drawn with probability proportional to its squared distance from the earlier seeds."""
    draws = torch.rand(count, generator=generator, dtype=torch.float64)
    chosen = [int(draws[0] * len(points))]
    square = points.square().sum(1)
    far = torch.full_like(square, torch.inf)
    for draw in draws[1:]:
        seed = chosen[-1]
        far = torch.minimum(far, (square + square[seed] - 2 * points @ points[seed]).clamp_min(0))
        far[seed] = 0
        mass = far.cumsum(0)
        # Equal rows leave no mass. Then any row may be the seed.
        place = torch.searchsorted(mass, draw * mass[-1], right=True) if mass[-1] > 0 else draw * len(points)
        chosen.append(min(int(place), len(points) - 1))
    return points[chosen]


def _lloyd(points: Tensor, centroids: Tensor) -> tuple[np.ndarray, float]:
    """Return labels and sum_k |sum of cluster k|^2, which increases as the distances within clusters decrease."""
    clusters = len(centroids)
    prices, labels, best = np.zeros(clusters, np.int64), np.zeros(len(points), np.int64), -1.0
    for _ in range(_ITERATIONS):
        score = points @ centroids.T
        largest = float(score.abs().max())
        cost = torch.round(score * (-_STEPS / largest if largest > 0 else 0.0)).to(torch.int64).numpy()
        assigned = assign(cost, prices)
        sums = torch.nn.functional.one_hot(torch.from_numpy(assigned), clusters).T.to(points.dtype) @ points
        gain = float(sums.square().sum())
        # Comparing labels instead could cycle for ever among equally good labels.
        if gain <= best * (1 + 1e-12):
            break
        labels, best, centroids = assigned, gain, sums / (len(points) // clusters)
    return labels, best
