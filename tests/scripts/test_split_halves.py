"""What a choice among experts is worth: exact cases, enumeration of all halvings, and planted effects."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from scripts.expert_choice import ChoiceValues, choice, crossed
from vismt.base.errors import UserError
from vismt.uncertainty.intervals import mean_interval


def answers(
    tasks: int, experts: int, queries: int, sd: float, seed: int = 0, ways: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Return true accuracies (e, t), answers (e, t, q) and labels: normal effects of task and of task and expert, in probits."""
    generator = torch.Generator().manual_seed(seed)
    task = 0.5 + 0.37 * torch.randn(tasks, generator=generator, dtype=torch.float64)
    effect = sd * torch.randn(experts, tasks, generator=generator, dtype=torch.float64)
    true = torch.special.ndtr(task + effect)
    right = torch.rand(experts, tasks, queries, generator=generator, dtype=torch.float64) < true[..., None]
    return true, right, (torch.arange(queries) * ways // queries).expand(tasks, queries)


def means(found: ChoiceValues) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in vars(found).items()}


def test_exact_cases() -> None:
    _, right, labels = answers(6, 1, 20, 0.3)
    same = means(choice(right.expand(3, -1, -1), labels))  # three times the same expert
    accuracy = pytest.approx(float(right.double().mean()), abs=1e-12)
    assert [same[name] for name in ("halves", "folds", "optimistic", "fixed")] == [accuracy] * 4
    assert same["variance"] == pytest.approx(0, abs=1e-12)
    # Expert 1 is always right, expert 0 never.
    clear = choice(torch.stack([torch.zeros(6, 20), torch.ones(6, 20)]), labels)
    assert all(means(clear)[name] == 1 for name in ("halves", "folds", "optimistic", "fixed"))
    assert clear.variance.abs().max() < 1e-12
    # Each is always right on half of the tasks: known within a task, and never from the other tasks.
    even = (torch.arange(6) % 2 == 0)[:, None].expand(6, 20).double()
    apart = means(choice(torch.stack([even, 1 - even]), labels))
    assert apart["halves"] == apart["folds"] == apart["optimistic"] == 1 and apart["fixed"] == 0
    assert apart["variance"] == pytest.approx(6 / 5)  # var of +1, -1 over six tasks


def test_ties_share_the_weight() -> None:
    """Two queries, each right under one expert: chosen on one of them, an expert fails the other."""
    right, labels = torch.eye(2)[:, None].expand(2, 4, 2), torch.zeros(4, 2, dtype=torch.long)
    assert means(choice(right, labels)) == pytest.approx(
        {"halves": 0, "folds": 0, "optimistic": 0.5, "fixed": 0.5, "variance": -1.0}
    )
    # With a third query, right under both, left out one by one: fails, fails, and of the tie either is right.
    assert crossed(torch.cat([right, torch.ones(2, 4, 1)], 2), torch.zeros(4, 3), 3).tolist() == pytest.approx(
        [1 / 3] * 4
    )


def halvings(labels: list[int]) -> list[set[int]]:
    """Return the first halves of all divisions that take half of each class."""
    classes = [[q for q, c in enumerate(labels) if c == k] for k in sorted(set(labels))]
    parts = [list(itertools.combinations(members, len(members) // 2)) for members in classes]
    return [set(itertools.chain(*half)) for half in itertools.product(*parts)]


def test_the_variance_is_the_mean_covariance_of_all_halvings() -> None:
    _, right, _ = answers(3, 2, 6, 1.0, seed=4)
    labels = [0, 0, 1, 1, 1, 1]
    difference = (right[0].double() - right[1].double()).tolist()
    covariances = []
    for halves in itertools.product(halvings(labels), repeat=3):
        first = [sum(d[q] for q in half) / 3 for d, half in zip(difference, halves, strict=True)]
        second = [sum(d[q] for q in range(6) if q not in half) / 3 for d, half in zip(difference, halves, strict=True)]
        covariances.append(float(torch.cov(torch.tensor([first, second], dtype=torch.float64))[0, 1]))
    found = choice(right, torch.tensor(labels).expand(3, 6)).variance
    assert float(found.mean()) == pytest.approx(sum(covariances) / len(covariances), abs=1e-12)


def test_the_pseudo_values_of_the_variance() -> None:
    """Four times the whole less three times the rest, centred."""
    _, right, labels = answers(4, 3, 10, 1.0)
    found = choice(right, labels).variance
    rest = torch.stack([choice(right[:, torch.arange(4) != task], labels[1:]).variance.mean() for task in range(4)])
    assert torch.allclose(found - found.mean(), -3 * (rest - rest.mean()), atol=1e-12)


def test_several_experts_have_the_mean_over_their_pairs() -> None:
    _, right, labels = answers(12, 4, 10, 0.5)
    pairs = [float(choice(right[list(pair)], labels).variance.mean()) for pair in itertools.combinations(range(4), 2)]
    assert float(choice(right, labels).variance.mean()) == pytest.approx(sum(pairs) / 6, abs=1e-12)


@pytest.mark.parametrize(("experts", "sd"), [(4, 0.0), (4, 0.1), (4, 0.3), (8, 0.1)])
def test_planted_effects(experts: int, sd: float) -> None:
    """1,500 tasks of 50 queries: equal experts gain nothing, others less than the best expert of each task has."""
    true, right, labels = answers(1500, experts, 50, sd)
    values, oracle = means(choice(right, labels)), float(true.amax(0).mean())
    if sd == 0:
        # Chosen and scored on the same queries, or on the same half, the best of four would gain 6 points or more.
        assert values["optimistic"] > oracle + 0.05 and abs(values["variance"]) < 0.012**2
        assert [values[name] for name in ("halves", "folds", "fixed")] == pytest.approx([oracle] * 3, abs=0.008)
    else:
        assert values["fixed"] + 0.01 < values["halves"] < values["folds"] < oracle < values["optimistic"]
    if sd == 0.3:
        assert oracle - values["folds"] < 0.025
    if sd == 0.1:  # planted: 4.77 points; the raw differences over 50 queries have 10
        pairs = [float((true[a] - true[b]).var()) for a, b in itertools.combinations(range(experts), 2)]
        assert 100 * (sum(pairs) / len(pairs)) ** 0.5 == pytest.approx(4.77, abs=0.1)
        assert 100 * values["variance"] ** 0.5 == pytest.approx(4.77, abs=0.5)


@pytest.mark.slow
def test_the_intervals_cover() -> None:
    """100 draws of 80 tasks: 88 to 100 are 95 % within three standard errors. 20 divisions are no 20 replications."""
    covered = {"variance": 0, "halves": 0, "halves over divisions": 0}
    expected = float(choice(*answers(8000, 2, 20, 0.2, seed=100)[1:]).halves.mean())
    true = float(answers(200_000, 2, 1, 0.2)[0].diff(dim=0).var())
    for seed in range(100):
        found = choice(*answers(80, 2, 20, 0.2, seed=seed)[1:])
        mean, half = mean_interval(found.variance)
        covered["variance"] += abs(mean - true) <= half
        mean, half = mean_interval(found.halves)
        covered["halves"] += abs(mean - expected) <= half
        covered["halves over divisions"] += abs(mean - expected) <= half / 20**0.5
    assert covered["variance"] >= 88 and covered["halves"] >= 88 and covered["halves over divisions"] < 60


def test_groups_of_tasks_and_tasks_of_fewer_queries() -> None:
    _, right, labels = answers(12, 3, 10, 0.5)
    groups = torch.arange(12) // 3 + 7
    grouped, alone = choice(right, labels, groups), choice(right, labels)
    assert torch.allclose(grouped.halves, alone.halves.view(4, 3).mean(1))
    assert float(grouped.variance.mean()) == pytest.approx(float(alone.variance.mean()))
    # Best on the tasks of the other groups: expert 2 in the groups 0 to 2, which expert 0 never names for itself.
    clear = torch.zeros(3, 12, 10)
    clear[2, :9], clear[0, 9:] = 1, 1
    assert choice(clear, labels, groups).fixed.tolist() == [1, 1, 1, 0]
    padded = torch.cat([right, torch.ones(3, 12, 2)], 2)
    absent = torch.cat([labels, torch.full((12, 2), -1)], 1)
    for name, values in vars(choice(padded, absent)).items():
        assert torch.allclose(
            values.mean(), getattr(alone, name).mean(), atol=0.05 if name in ("halves", "folds") else 1e-12
        )
    single = choice(right[..., :5], torch.arange(5).expand(12, 5))  # one query of each class
    assert bool(single.variance.isfinite().all())


def test_what_cannot_be_estimated_is_refused() -> None:
    _, right, labels = answers(4, 2, 10, 0.1)
    for arguments in (
        (right[:1], labels),
        (right, labels[:3]),
        (right[:, :2], labels[:2]),
        (right, labels, torch.arange(4) % 2),
        (right[..., :1], labels[:, :1]),
    ):
        with pytest.raises(UserError, match="choice among experts: answers"):
            choice(*arguments)
