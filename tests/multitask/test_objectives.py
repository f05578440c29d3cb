"""The union of label spaces and its objective: cross-entropies, quality retaining, balancing, separate heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.multitask.balancing.base import make_balancer
from vismt.multitask.emtal.retain import QualityRetaining
from vismt.multitask.nets import TaskClassifier, Union
from vismt.multitask.objectives import WHOLE_IMAGES, MultitaskObjective

UNION = Union(("birds", "cars", "signs"), (3, 2, 4))
LABELS = torch.tensor([0, 2, 2, 4, 3, 1])  # birds and cars, no signs


class Fixed(nn.Module):
    """A net with logits that are a parameter and do not depend on the images."""

    def __init__(self, seed: int = 0, count: int = 6) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(count, 9, generator=torch.Generator().manual_seed(seed)))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[: len(images)]


def batch(labels: Tensor = LABELS) -> dict[str, Tensor]:
    return {"images": torch.zeros(len(labels), 3, 2, 2), "labels": labels}


def test_offsets_and_tasks() -> None:
    assert UNION.num_classes == 9
    assert [UNION.offset(task) for task in range(3)] == [0, 3, 5]
    assert UNION.task_of_class().tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]


def test_the_right_class_of_the_wrong_task_is_wrong() -> None:
    net = Fixed(count=2)
    with torch.no_grad():
        net.logits.zero_()
        net.logits[:, 1] = 5.0  # the second bird
        net.logits[:, 4] = 4.0  # the second car
    labels = torch.tensor([4, 4])
    assert TaskClassifier(net, UNION, 1, task_aware=False)(batch(labels)["images"]).argmax(1).tolist() == [1, 1]
    assert TaskClassifier(net, UNION, 1, task_aware=True)(batch(labels)["images"]).argmax(1).tolist() == [4, 4]
    logits = TaskClassifier(net, UNION, 1, task_aware=True)(batch(labels)["images"])
    assert bool(logits.diff(dim=1).isfinite().all()) and torch.equal(
        logits[:, UNION.span(1)], net.logits[:, UNION.span(1)]
    )
    assert torch.allclose(F.cross_entropy(logits, labels), F.cross_entropy(net.logits[:, 3:5], labels - 3))
    assert float(MultitaskObjective(net, (), UNION)(batch(labels))["accuracy"]) == 0
    assert float(MultitaskObjective(net, (), UNION, head="separate")(batch(labels))["accuracy"]) == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_mean_over_the_mixed_batch(smoothing: float) -> None:
    net = Fixed()
    scalars = MultitaskObjective(net, (), UNION, label_smoothing=smoothing)(batch())
    expected = F.cross_entropy(net.logits, LABELS, label_smoothing=smoothing)
    assert torch.allclose(scalars["loss"], expected) and torch.allclose(scalars["ce"], expected)
    # Not the mean of the tasks' means: birds have four images, cars two.
    means = [
        F.cross_entropy(net.logits[rows], LABELS[rows], label_smoothing=smoothing) for rows in ([0, 1, 2, 5], [3, 4])
    ]
    assert not torch.allclose(scalars["loss"], sum(means) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_separate_heads_are_a_softmax_over_the_own_slice(smoothing: float) -> None:
    net = Fixed()
    MultitaskObjective(net, (), UNION, head="separate", label_smoothing=smoothing)(batch())["loss"].backward()
    twin = net.logits.detach().clone().requires_grad_()
    parts = [(rows, UNION.span(task)) for task, rows in ((0, [0, 1, 2, 5]), (1, [3, 4]))]
    total = sum(
        F.cross_entropy(twin[rows][:, span], LABELS[rows] - span.start, label_smoothing=smoothing, reduction="sum")
        for rows, span in parts
    )
    (total / 6).backward()
    assert torch.allclose(net.logits.grad, twin.grad, atol=1e-7)
    assert bool((net.logits.grad[:, 5:] == 0).all())  # the head of an absent task is in the graph with gradient 0


def test_the_loss_sees_the_bank_before_its_own_logits() -> None:
    net, retain = Fixed(), QualityRetaining(9, UNION.task_of_class())
    objective = MultitaskObjective(net, (), UNION, label_smoothing=0.1, retain={WHOLE_IMAGES: retain})
    fresh = QualityRetaining(9, UNION.task_of_class())
    for _ in range(3):  # the second and third step use the bank of the steps before
        scalars = objective(batch())
        expected = F.cross_entropy(net.logits, LABELS, label_smoothing=0.1) + fresh.loss(net.logits, LABELS)
        assert torch.allclose(scalars["loss"], expected) and scalars["retain"] > 0
        assert torch.equal(retain.bank, fresh.bank)  # forward does not change the bank
        objective.step()
        fresh.update(net.logits, LABELS)
        assert torch.equal(retain.bank, fresh.bank) and torch.equal(retain.ema, fresh.ema)
        with torch.no_grad():
            net.logits.mul_(1.5)


def test_an_accumulated_step_moves_the_bank_once() -> None:
    net, retain = Fixed(), QualityRetaining(9, UNION.task_of_class())
    objective = MultitaskObjective(net, (), UNION, retain={WHOLE_IMAGES: retain})
    objective(batch(LABELS[:3])), objective(batch(LABELS[:3]))
    objective.step()
    fresh = QualityRetaining(9, UNION.task_of_class())
    fresh.update(torch.cat([net.logits[:3]] * 2), LABELS[:3].repeat(2))
    assert torch.equal(retain.bank, fresh.bank) and torch.equal(retain.ema, fresh.ema)
    assert bool((retain.bank[:, 0] == 0).all())  # a single shift: the older slot is still empty
    objective.step()
    assert torch.equal(retain.bank, fresh.bank)


def test_a_balancer_gets_one_mean_for_each_task_that_is_there() -> None:
    net = Fixed()
    balancer = make_balancer("ew", UNION.tasks, weights={"cars": 2.0})
    objective = MultitaskObjective(net, (), UNION, balancer=balancer, balanced=[net.logits])
    scalars = objective(batch())
    birds, cars = (F.cross_entropy(net.logits[rows], LABELS[rows]) for rows in ([0, 1, 2, 5], [3, 4]))
    assert torch.allclose(scalars["loss"], birds + 2 * cars)
    assert [float(scalars[f"weight/{task}"]) for task in UNION.tasks] == [1, 1, 0]


def test_famo_sees_the_same_batch_before_and_after_the_step() -> None:
    net, twin = Fixed(), Fixed()
    balancer, reference = (make_balancer("famo", UNION.tasks) for _ in range(2))
    objective = MultitaskObjective(net, (), UNION, balancer=balancer, balanced=[net.logits])
    steps = [LABELS, LABELS.flip(0), LABELS]
    for labels in steps:
        objective(batch(labels))["loss"].backward()
        reference.combine(objective.losses(batch(labels)), [net.logits])
        with torch.no_grad():
            net.logits -= 0.5 * net.logits.grad
        net.logits.grad = None
        objective.step()
        with torch.no_grad():
            after = objective.losses(batch(labels))
        reference.update(after)
        assert torch.equal(balancer.xi, reference.xi) and balancer.before.isnan().all()
    assert balancer.xi[:2].abs().min() > 0 and int(balancer.updates) == 3
    # Without the call the next batch takes its place.
    late = MultitaskObjective(twin, (), UNION, balancer=make_balancer("famo", UNION.tasks), balanced=[twin.logits])
    late(batch(steps[0]))
    assert not late.balancer.before[:2].isnan().any() and not late.balancer.xi.any()
    objective.step()  # nothing since the last step
    assert int(balancer.updates) == 3


def test_only_balancers_of_gradients_clip_the_balanced_parameters_alone() -> None:
    net = Fixed()
    for name, alone in (("nash", True), ("fairgrad", True), ("ew", False), ("famo", False)):
        objective = MultitaskObjective(net, (), UNION, balancer=make_balancer(name, UNION.tasks), balanced=[net.logits])
        assert (objective.clipped == (net.logits,)) if alone else objective.clipped is None
    assert MultitaskObjective(net, (), UNION).clipped is None


def test_the_state_of_retaining_is_the_objectives() -> None:
    objective, twin = (
        MultitaskObjective(Fixed(seed), (), UNION, retain={WHOLE_IMAGES: QualityRetaining(9, UNION.task_of_class())})
        for seed in (0, 1)
    )
    objective(batch())
    objective.step()
    assert not torch.equal(twin.retain[WHOLE_IMAGES].ema, objective.retain[WHOLE_IMAGES].ema)
    twin.load_state_dict(objective.state_dict())
    state = objective.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in twin.retain.state_dict(prefix="retain.").items())
