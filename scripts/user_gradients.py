"""Do clusters of similar users pull one LoRA apart? The premise of iLoRA: `python -m scripts.user_gradients [RUN]`.

RUN is a finished run of configs/lm/ilora_lastfm.yaml. Its arm `lora` is measured, and the numbers are written to
docs/results/rows/user_gradients.json. Table and picture of docs/results/ilora_lastfm.md are made from this file.

The users are clustered by balanced k-means on the recommender's representations. g_u is the gradient of the mean loss of user
u's rows with respect to all factors of the LoRA, divided by its norm. A pair of clusters has

    c_ab = mean <g_u, g_v>  over users u of a and v of b, u != v

the mean cosine between their users. A pair u = u would add the variance of a single user. "Same" is the mean of c_aa, and "other"
the mean of c_ab for a != b. A step for one cluster harms another on average if c_ab < 0. Clusters have no directions of their own
if same = other. The intervals come from a bootstrap over the users of each cluster.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.study_rows import ROWS
from vismt.base import console
from vismt.base.errors import UserError
from vismt.engine.study import Training
from vismt.jobs import open_run
from vismt.jobs.lm.job import LmJob
from vismt.llm.ilora.recommenders import pad_histories
from vismt.llm.net import LmNet
from vismt.llm.tasks.base import Item, gather_items
from vismt.llm.tasks.recommendation import listed_of
from vismt.multitask.emtal.clusters import balanced_kmeans
from vismt.report.plotting import INK, axes_at, dress, new_figure, save_figure
from vismt.report.tables import interval_text
from vismt.storage.files import atomic_write
from vismt.storage.paths import CHECKOUT
from vismt.uncertainty.intervals import NUMBER

NUMBERS = CHECKOUT / ROWS / "user_gradients.json"
PAGE = CHECKOUT / "docs" / "results" / "ilora_lastfm.md"
PICTURE = CHECKOUT / "docs" / "user_gradients.svg"
MARKED = re.compile(r"(?<=<!-- user_gradients -->\n).*?(?=<!-- end -->)", re.S)
ARM = "lora"
CLUSTERS = 8
DRAWS = 1000
SHOWN = ("same cluster", "other clusters", "same − other")
STATES = ("before training, training users", "after training, training users", "after training, held-out users")


def user_gradients(net: LmNet, job: LmJob, items: Sequence[Item], seed: int) -> tuple[Tensor, list[str]]:
    """Return the gradient of each user's mean loss (users, parameters) fp32, and the users' names.

    items: Items of training form, whose frozen states are cached.
    """
    data = job.fold(seed).data
    task = data.tasks[data.trained]
    by_user: dict[str, list[Item]] = {}
    for item in items:
        by_user.setdefault(listed_of(item).user, []).append(item)
    factors = [p for p in net.lm.parameters() if p.requires_grad]
    rows = []
    for of in console.track(by_user.values(), "gradients", f"{len(by_user):,} users", len(by_user)):
        loss = task.loss(net, gather_items(task.form(of, 0, 1, seed)))["loss"]
        rows.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, factors)]))
    return torch.stack(rows), list(by_user)


def cosines(gram: Tensor, weights: Tensor) -> Tensor:
    """Return the mean cosine between users of two clusters (k, k).

    Args:
        gram: Products of the users' normalised gradients (u, u), fp64.
        weights: Weight of each user in each cluster (k, u), fp64. A user of weight 2 is two users, whose product with each
            other is left out.
    """
    total, own = weights.sum(1), weights.square()
    within = ((weights @ gram * weights).sum(1) - own @ gram.diagonal()) / (total.square() - own.sum(1))
    return (weights @ gram @ weights.T / total.outer(total)).diagonal_scatter(within)


def summary(matrix: Tensor) -> Tensor:
    """Return same, other and same minus other (3,) of the mean cosines (k, k)."""
    same, count = matrix.diagonal().mean(), len(matrix)
    other = (matrix.sum() - matrix.diagonal().sum()) / (count * (count - 1))
    return torch.stack([same, other, same - other])


def measured(grams: Sequence[Tensor], clusters: Tensor) -> dict[str, Any]:
    """Return the mean cosines with their intervals, as means over the trainings.

    Args:
        grams: Products of the users' normalised gradients (u, u) of each training, of the same users.
        clusters: Cluster of each user, int64 (u,).
    """
    generator = torch.Generator().manual_seed(0)
    gram = torch.stack(list(grams)).mean(0)
    of = F.one_hot(clusters).T.double()  # (k, u)
    places = torch.stack([row.nonzero().flatten() for row in of])  # (k, users of a cluster)
    drawn = []
    for _ in range(DRAWS):
        chosen = places.gather(1, torch.randint(places.shape[1], places.shape, generator=generator))
        weights = torch.zeros_like(of).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=of.dtype))
        drawn.append(summary(cosines(gram, weights)))
    matrix = cosines(gram, of)
    ends = torch.stack(drawn).quantile(torch.tensor([0.025, 0.975], dtype=of.dtype), dim=0).T
    return {
        "users": len(clusters),
        **{name: [value, *pair] for name, value, pair in zip(SHOWN, summary(matrix).tolist(), ends.tolist())},
        "negative": int((matrix.triu(1) < 0).sum()),
        "matrix": [[round(value, 4) for value in row] for row in matrix.tolist()],
    }


def measure(run: Path) -> dict[str, Any]:
    """Return the numbers of all states of a finished run, by state."""
    job = open_run(run).job
    if not isinstance(job, LmJob) or ARM not in job.study.arms:
        raise UserError(
            f"run '{run}': it has no arm '{ARM}' of a language model; give a run of configs/lm/ilora_lastfm.yaml."
        )
    grams: dict[str, list[Tensor]] = {state: [] for state in STATES}
    clusters: dict[str, Tensor] = {}
    for training in job.trainings(ARM):
        data = job.fold(training.seed).data
        held_out = data.tasks[data.trained].training(data.all_rows("test"))
        for state, items in zip(STATES, (data.training(), data.training(), held_out)):
            net = _net(job, training, trained=state.startswith("after"))
            data.cache([item.hybrid or item for item in items], net, state)
            gradients, users = user_gradients(net, job, items, training.seed)
            if state not in clusters:
                clusters[state] = _clusters(job, items, users, training.seed)
            kept = F.normalize(gradients[: len(clusters[state])].double())
            grams[state].append(kept @ kept.T)
    return {state: measured(grams[state], clusters[state]) for state in STATES}


def _net(job: LmJob, training: Training, *, trained: bool) -> LmNet:
    """Return the net of a training at its start or its end, with the LoRA's factors as the only trainable parameters."""
    config = job.study.config_of(training)
    net = job.fresh(config)
    job.prepare(net, config)
    names = [name for name, parameter in net.lm.named_parameters() if parameter.requires_grad]
    if trained:
        net = job.loaded(training)
    net.requires_grad_(False)
    for name in names:
        net.lm.get_parameter(name).requires_grad_(True)
    return net.eval()


def _clusters(job: LmJob, items: Sequence[Item], users: Sequence[str], seed: int) -> Tensor:
    """Return the cluster of each user but the last few, so that all clusters have the same size."""
    latest = {listed_of(item).user: listed_of(item).history for item in items}
    with torch.no_grad():
        points = job.recommender_of(seed).net(pad_histories([latest[user] for user in users]))
    return balanced_kmeans(points[: len(users) // CLUSTERS * CLUSTERS], CLUSTERS)


def table(numbers: Mapping[str, Any]) -> str:
    """Return the Markdown table of the page."""
    lines = [
        f"| Gradients | users | {' | '.join(SHOWN)} | pairs of clusters below 0 |",
        "|---|---|" + "---|" * (len(SHOWN) + 1),
    ]
    for state, found in numbers.items():
        cells = (interval_text(*found[name], NUMBER) for name in SHOWN)
        pairs = f"{found['negative']} of {CLUSTERS * (CLUSTERS - 1) // 2}"
        lines.append(f"| {state} | {found['users']} | {' | '.join(cells)} | {pairs} |")
    return "\n".join(["", *lines, "", ""])


def draw(numbers: Mapping[str, Any], path: Path) -> None:
    """Draw 100 times the mean cosines between users of two clusters, a panel with a colour scale of its own for each state."""
    side, gap = 1.9, 0.3
    figure = new_figure(0.2 + len(numbers) * (side + gap), side + 0.85)
    for number, (state, found) in enumerate(numbers.items()):
        axes = axes_at(figure, 0.3 + number * (side + gap), 0.45, side, side)
        hundredths = 100 * np.array(found["matrix"])
        largest = np.abs(hundredths).max()
        axes.imshow(hundredths, vmin=-largest, vmax=largest, cmap="RdBu")
        for (i, j), value in np.ndenumerate(hundredths):
            color = INK if abs(value) < 0.6 * largest else "white"
            axes.text(j, i, f"{round(value, 1) + 0:.1f}", ha="center", va="center", fontsize=5.5, color=color)
        dress(axes, state.replace(", ", "\n"))
        axes.set(xticks=range(CLUSTERS), yticks=range(CLUSTERS))
        axes.set_xlabel("cluster of users", color=INK, fontsize=8)
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Return 2 after an error of the user."""
    parser = argparse.ArgumentParser(prog="python -m scripts.user_gradients", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "run", nargs="?", type=Path, help="run folder to measure; without it, table and picture are written again"
    )
    given = parser.parse_args(arguments)
    try:
        if given.run is not None:
            atomic_write(NUMBERS, json.dumps(measure(given.run), indent=1) + "\n")
        numbers = json.loads(NUMBERS.read_text())
        atomic_write(PAGE, MARKED.sub(table(numbers), PAGE.read_text(encoding="utf8"), count=1))
        draw(numbers, PICTURE)
    except UserError as error:
        console.error(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
