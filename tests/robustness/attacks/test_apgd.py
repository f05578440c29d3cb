"""APGD against a plain loop on one image at a time, written from the paper's algorithm; APGD and FAB against torchattacks."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
import torch
import torch.nn.functional as F
from helpers.attack_parts import CLASSES, COUNT, KEYS, seeds_of, survivors, torchattacks_survivors, victim_case

from vismt.base.norm_balls import random_start
from vismt.robustness.attacks.active_set import Outcome, Round, Wave
from vismt.robustness.attacks.attacks import AttackSpec
from vismt.robustness.attacks.pgd import _check_progress, _move, _State

BUDGETS = [("linf", 0.07), ("l2", 0.95)]


def checkpoints(steps):
    """Return w_j = ceil(p_j N) with p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    shares = [Fraction(0), Fraction(22, 100)]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - Fraction(3, 100), Fraction(6, 100)))
    return [ceil(share * steps) for share in shares if share <= 1]


def project(clean, moved, epsilon, norm):
    change = moved - clean
    if norm == "linf":
        change = change.clamp(-epsilon, epsilon)
    elif change.norm() > epsilon:
        change = change * epsilon / change.norm()
    return (clean + change).clamp(0, 1)


def plain_apgd(f, clean, start, epsilon, norm, steps):
    """Return all iterates and the best of them. f: image -> (value, gradient).

    A window in which exactly 75 % of the steps rose counts as oscillating, as in the authors' implementation.
    """
    marks = checkpoints(steps)
    step, x, previous = 2 * epsilon, start, start
    value, gradient = f(x)
    values, best, best_value, best_gradient = [value], x, value, gradient
    halved, best_at_mark, iterates = True, best_value, [x]
    for k in range(steps):
        direction = gradient.sign() if norm == "linf" else gradient / gradient.norm()
        z = project(clean, x + step * direction, epsilon, norm)
        if k > 0:
            z = project(clean, x + 0.75 * (z - x) + 0.25 * (x - previous), epsilon, norm)
        previous, x = x, z
        value, gradient = f(x)
        values.append(value)
        iterates.append(x)
        if value > best_value:
            best, best_value, best_gradient = x, value, gradient
        if k + 1 in marks:
            last = marks[marks.index(k + 1) - 1]
            rose = sum(values[i + 1] > values[i] for i in range(last, k + 1))
            oscillates = rose <= 0.75 * (k + 1 - last)
            stuck = not halved and best_at_mark >= best_value
            halved, best_at_mark = oscillates or stuck, best_value
            if halved:
                step, x, gradient = step / 2, best, best_gradient
    return iterates, best


def losses(net, label, target):
    """Return f of one image: the cross-entropy, or the targeted DLR."""

    def f(image):
        leaf = image[None].double().requires_grad_(True)
        z = net(leaf)[0]
        if target is None:
            value = F.cross_entropy(z[None], label[None])
        else:
            order = z.sort(descending=True).values
            value = -(z[label] - z[target]) / (order[0] - (order[2] + order[3]) / 2)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.item(), gradient[0].float()

    return f


def starts(spec):
    return random_start(victim_case()[1], spec.epsilon, spec.norm, seeds_of(spec), edge=True)


@pytest.mark.parametrize(("norm", "epsilon"), BUDGETS)
def test_apgd_visits_the_points_of_the_papers_algorithm(norm, epsilon):
    net, clean, labels = victim_case()
    spec = AttackSpec("apgd_ce", epsilon, norm=norm, seed=1)
    visited = []
    hook = net.register_forward_pre_hook(lambda _, inputs: visited.append(inputs[0].detach().float()))
    full = spec.perturb(net, clean, labels, num_classes=CLASSES, keys=KEYS, exhaust=True)
    hook.remove()
    visited = torch.stack(visited[1:])  # without the clean pass
    for i, start in list(enumerate(starts(spec)))[::6]:
        iterates, best = plain_apgd(losses(net, labels[i], None), clean[i], start, epsilon, norm, 100)
        # Rounding decides which of two equally good points is the best one, so late points may part.
        distance = (torch.stack(iterates) - visited[:, i]).flatten(1).abs().amax(1) / epsilon
        assert len(distance) == 101 and float((distance < 0.02).double().mean()) > 0.75
        assert torch.allclose(full[i], best, atol=5e-3)


@pytest.mark.parametrize(("norm", "epsilon"), BUDGETS)
def test_apgd_t_breaks_the_images_that_the_papers_algorithm_breaks(norm, epsilon):
    net, clean, labels = victim_case()
    spec = AttackSpec("apgd_t", epsilon, norm=norm, seed=1)
    order, right = net(clean.double()).argsort(1, descending=True), []
    for i, start in list(enumerate(starts(spec)))[::11]:
        stands = order[i, 0] == labels[i]
        for target in [k for k in order[i].tolist() if k != labels[i]]:
            if stands:  # else one point is wrong already
                visited = plain_apgd(losses(net, labels[i], target), clean[i], start, epsilon, norm, 100)[0]
                stands = (net(torch.stack(visited).double()).argmax(1) == labels[i]).all()
        right.append(bool(stands))
    assert survivors(spec)[::11].tolist() == right and 0 < sum(right) < len(right)


def test_checkpoints_are_those_of_the_paper():
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize(
    ("name", "norm", "epsilon", "steps", "kind", "options"),
    [
        ("apgd_ce", "l2", 0.95, 100, "APGD", {"loss": "ce"}),
        ("apgd_t", "linf", 0.07, 100, "APGDT", {"n_classes": CLASSES}),
        ("fab", "linf", 0.08, 20, "FAB", {"n_classes": CLASSES, "multi_targeted": True}),
        ("fab", "l2", 1.1, 20, "FAB", {"n_classes": CLASSES, "multi_targeted": True}),
    ],
)
def test_the_images_that_torchattacks_breaks_are_broken(name, norm, epsilon, steps, kind, options):
    ours = survivors(AttackSpec(name, epsilon, norm=norm, steps=steps))
    theirs = torchattacks_survivors(kind, norm=norm.capitalize(), eps=epsilon, steps=steps, n_restarts=1, **options)
    assert int((ours != theirs).sum()) <= 1 and 0 < ours.sum() < COUNT


def test_a_step_is_halved_when_nothing_has_changed_since_the_last_checkpoint():
    """Steps that rise more than 75 % of the time without a new best loss, which a loop seldom meets."""
    zeros, image = torch.zeros(4), torch.zeros(4, 3, 2, 2)
    values = {name: image for name in ("images", "previous", "gradient", "best", "best_gradient")}
    values |= {name: zeros for name in ("loss", "density", "count", "checked_loss", "best_logits")}
    values |= {"best_loss": torch.tensor([0.0, 0.0, 1.0, 1.0]), "reduced": torch.tensor([False, True, False, True])}
    state = _State(**values, step=torch.ones(4), rises=torch.full((4,), 10.0))
    _check_progress(state, 10)
    assert state.step.tolist() == [0.5, 1, 1, 1] and state.reduced.tolist() == [True, False, False, False]


def test_a_sparse_step_in_l1_has_the_length_of_the_step() -> None:
    """The largest tenth of the gradient's entries moves, by equal amounts that sum to the step; no projection interferes."""
    clean = torch.full((1, 3, 4, 4), 0.5)
    gradient = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    logits = torch.tensor([[1.0, 0.0]])
    outcome = Outcome(clean, torch.tensor([0]), [0], logits, clean, torch.full((1,), -torch.inf), torch.tensor([False]))
    wave = Wave(outcome, torch.tensor([0]), [Round(0)], "test", 1)
    one = torch.ones(1)
    state = _State(
        clean, clean, gradient, one, clean, gradient, one, one[:, None], 0.3 * one, one, one, one > 2, 0.1 * one, one
    )
    change = (_move(wave, state, epsilon=10.0, norm="l1", first=True) - clean).flatten()
    moved = change.nonzero().flatten()
    assert torch.equal(moved.sort().values, gradient.abs().flatten().topk(4).indices.sort().values)
    assert torch.allclose(change[moved].abs(), torch.tensor(0.3 / 4)) and torch.equal(
        change[moved].sign(), gradient.flatten()[moved].sign()
    )


def test_no_step_is_computed_for_an_image_that_is_broken() -> None:
    net, clean, labels = victim_case()
    images = []
    net.register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0])))
    spec = AttackSpec("pgd", 0.3, norm="linf", steps=10, restarts=1)
    spec.perturb(net, clean, labels, num_classes=CLASSES, keys=KEYS)
    few = sum(images)
    images.clear()
    spec.perturb(net, clean, labels, num_classes=CLASSES, keys=KEYS, exhaust=True)
    assert few < sum(images) / 2
