"""What a choice among experts for each task is worth, from answers to queries that the choice has not seen.

y_teq is 1 where expert e answers query q of task t right, else 0, and mu_te is its expectation. The queries of a task are divided
into F folds at random, class by class, and e_f is the best expert on all folds but f (ties share the weight):

    value of choosing   mean_t sum_f sum_{q in f} y_{t e_f q} / Q_t       F = 2: split halves; the mean of many divisions
    optimistic value    mean_t max_e mean_q y_teq                         chosen on the queries that it is scored on
    fixed expert        mean_t mean_q y_{t e(t) q}                        e(t) the best on average over the other tasks

The expected score on queries that the choice has not seen is mu_te of the chosen expert, so the first line estimates without
bias what a choice by (F - 1) / F of the queries is worth; it is at most the mean of max_e mu_te. The second line is biased
upwards: of experts that are equal it takes the luckiest. Divisions of the same queries are not replications: the uncertainty is
that of tasks, or of groups of tasks which share no image (Cawley and Talbot, On Over-fitting in Model Selection, JMLR 11, 2010).

How much do tasks differ in which expert suits them? For the difference d_tq = y_taq - y_tbq of two experts, the means over the
two halves of a task's queries have independent errors, so that their covariance over the tasks is the variance of the true
differences mu_ta - mu_tb. Its mean over all divisions into halves has a closed form, the estimator of a random effect from an
analysis of variance (Searle, Casella and McCulloch, Variance Components, 1992),

    sigma^2 = var_t(mean_q d_tq) - mean_t sum_c n_tc s_tc^2 / Q_t^2

with s_tc^2 the variance (n - 1) of d over the n_tc queries of class c. Of P experts it is the mean over the pairs, by which it is
2 / (P - 1) times the sum over the experts of the same form in y_teq - mean_e y_teq. It can be negative, most where it is truly 0.
The support is the same in both halves, so its luck counts as part of the task.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.base.errors import UserError

DIVISIONS = 20  # of the queries of a task into folds
FOLDS = 10


@dataclass(frozen=True)
class ChoiceValues:
    """Values (g,), float64, by group of tasks: by task where tasks are independent; the mean is the estimate.

    fixed: of the best expert on the tasks of the other groups. halves, folds: of choosing an expert by half, or by nine tenths,
    of a task's queries. optimistic: by the queries that it is scored on. variance: pseudo-values of the delete-a-group
    jackknife of sigma^2, whose spread is that of the estimate.
    """

    fixed: Tensor
    halves: Tensor
    folds: Tensor
    optimistic: Tensor
    variance: Tensor


def choice(right: Tensor, labels: Tensor, groups: Tensor | None = None, seed: int = 0) -> ChoiceValues:
    """Return what a choice among experts is worth.

    Args:
        right: (e, t, q), whether each of e >= 2 experts answers query q of task t right.
        labels: (t, q) int, the class of each query; negative where a task has fewer than q queries.
        groups: (t,) int, the same number for tasks that may share images; None for independent tasks. Groups weigh the same.
        seed: of the divisions.

    Raises:
        UserError: fewer than two experts or queries, fewer than three groups, or shapes that do not fit.
    """
    tasks = len(labels)
    groups = torch.arange(tasks) if groups is None else groups.unique(return_inverse=True)[1]
    count = int(groups.max()) + 1 if tasks else 0
    fits = right.ndim == 3 and right.shape[1:] == labels.shape and groups.shape == (tasks,)
    if not fits or len(right) < 2 or count < 3 or int((labels >= 0).sum(1).min()) < 2:
        raise UserError(
            f"choice among experts: answers {tuple(right.shape)}, labels {tuple(labels.shape)}, {count} groups of tasks: needed "
            "(experts, tasks, queries) and (tasks, queries), two or more experts and queries, three or more groups."
        )
    right = right.double() * (labels >= 0)
    accuracies = right.sum(2) / (labels >= 0).sum(1)
    member = F.one_hot(groups, count).double()  # (t, g)

    def by_group(values: Tensor) -> Tensor:
        return values @ member / member.sum(0)

    sums = accuracies @ member
    best = _winners(sums.sum(1, keepdim=True) - sums)  # (e, g)
    return ChoiceValues(
        fixed=by_group((best[:, groups] * accuracies).sum(0)),
        halves=by_group(crossed(right, labels, 2, seed)),
        folds=by_group(crossed(right, labels, FOLDS, seed)),
        optimistic=by_group(accuracies.amax(0)),
        variance=_jackknife(*_moments(right, labels), member),
    )


def crossed(right: Tensor, labels: Tensor, folds: int, seed: int = 0) -> Tensor:
    """Return the value of choosing (t,) by all folds but the one that is scored, the mean of DIVISIONS divisions.

    Arguments as in `choice`.
    """
    generator = torch.Generator().manual_seed(seed)
    valid = (labels >= 0).double()
    total = (right * valid).sum(2)[:, None]
    found = torch.zeros(len(labels), dtype=torch.float64)
    for _ in range(DIVISIONS):
        drawn = torch.rand(labels.shape, generator=generator, dtype=torch.float64)
        order = torch.where(labels < 0, torch.inf, labels + drawn).argsort(1)  # by class, at random within it
        number = torch.empty_like(order).scatter_(1, order, torch.arange(labels.shape[1]).expand_as(order) % folds)
        fold = F.one_hot(number, folds) * valid[..., None]
        inside = torch.einsum("etq,tqf->eft", right.double(), fold)
        found += (_winners(total - inside) * inside).sum((0, 1))
    return found / valid.sum(1) / DIVISIONS


def _winners(scores: Tensor) -> Tensor:
    """Return the weights (e, ...) of the best experts; ties, up to rounding, share the weight."""
    return F.normalize((scores >= scores.amax(0) - 1e-9).double(), p=1, dim=0)


def _moments(right: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (e, t) and error variance of it (t,), the latter summed over the experts, of answers less their mean over e.

    Where a class of a task has one query alone, the queries of the task count as one class: the error variance is then
    overestimated by the spread of the classes.
    """
    centred = right - right.mean(0)
    members = F.one_hot(labels + 1)[..., 1:].double()  # (t, q, c)
    counts = members.sum(1)
    if bool((counts == 1).any()):
        members = members.sum(2, keepdim=True)
        counts = members.sum(1)
    sums = torch.einsum("etq,tqc->etc", centred, members)
    squares = torch.einsum("etq,tqc->etc", centred.square(), members)
    variances = (squares - sums.square() / counts.clamp_min(1)) / (counts - 1).clamp_min(1)
    queries = counts.sum(1)
    return sums.sum(2) / queries, (counts * variances).sum((0, 2)) / queries.square()


def _jackknife(means: Tensor, errors: Tensor, member: Tensor) -> Tensor:
    """Return pseudo-values (g,) of sigma^2, with the estimate from all tasks as their mean.

    means: (e, t); errors: (t,); member: (t, g), one where a task belongs to a group.
    """

    def estimate(weights: Tensor) -> Tensor:
        """Return sigma^2 from the tasks with weight 1 in weights (t, k), one estimate for each column."""
        count = weights.sum(0)
        spread = means.square() @ weights - (means @ weights).square() / count
        return 2 / (len(means) - 1) * (spread.sum(0) / (count - 1) - errors @ weights / count)

    groups = member.shape[1]
    without = estimate(1 - member)
    return estimate(torch.ones_like(member[:, :1])) + (groups - 1) * (without.mean() - without)
