"""The union of label spaces, and the objective over it: cross-entropies, order of the bank, balancing, separate heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.errors import UserError
from vismt.multitask.balancing import make_balancer
from vismt.multitask.fading import RouterFade
from vismt.multitask.retain import QualityRetaining
from vismt.multitask.union import TaskClassifier, Union, UnionObjective

UNION = Union(("birds", "cars", "signs"), (3, 2, 4))
LABELS = torch.tensor([0, 2, 2, 4, 3, 1])  # birds and cars; no sign


class Fixed(nn.Module):
    """Logits that do not depend on the images; they are the parameter."""

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
    assert TaskClassifier(net, UNION, 1, told=False)(batch(labels)["images"]).argmax(1).tolist() == [1, 1]
    assert TaskClassifier(net, UNION, 1, told=True)(batch(labels)["images"]).argmax(1).tolist() == [4, 4]
    told = TaskClassifier(net, UNION, 1, told=True)(batch(labels)["images"])
    assert bool(told.diff(dim=1).isfinite().all()) and torch.equal(told[:, UNION.span(1)], net.logits[:, UNION.span(1)])
    assert torch.allclose(F.cross_entropy(told, labels), F.cross_entropy(net.logits[:, 3:5], labels - 3))
    assert float(UnionObjective(net, UNION)(batch(labels))["accuracy"]) == 0
    assert float(UnionObjective(net, UNION, head="separate")(batch(labels))["accuracy"]) == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_mean_over_the_mixed_batch(smoothing: float) -> None:
    net = Fixed()
    found = UnionObjective(net, UNION, label_smoothing=smoothing)(batch())
    expected = F.cross_entropy(net.logits, LABELS, label_smoothing=smoothing)
    assert torch.allclose(found["loss"], expected) and torch.allclose(found["ce"], expected)
    # Not the mean of the tasks' means: birds have four images, cars two.
    means = [
        F.cross_entropy(net.logits[rows], LABELS[rows], label_smoothing=smoothing) for rows in ([0, 1, 2, 5], [3, 4])
    ]
    assert not torch.allclose(found["loss"], sum(means) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_separate_heads_are_a_softmax_over_the_own_slice(smoothing: float) -> None:
    net = Fixed()
    UnionObjective(net, UNION, head="separate", label_smoothing=smoothing)(batch())["loss"].backward()
    twin = net.logits.detach().clone().requires_grad_()
    parts = [(rows, UNION.span(task)) for task, rows in ((0, [0, 1, 2, 5]), (1, [3, 4]))]
    total = sum(
        F.cross_entropy(twin[rows][:, span], LABELS[rows] - span.start, label_smoothing=smoothing, reduction="sum")
        for rows, span in parts
    )
    (total / 6).backward()
    assert torch.allclose(net.logits.grad, twin.grad, atol=1e-7)
    assert bool((net.logits.grad[:, 5:] == 0).all())  # the head of an absent task is in the graph and does not move


def test_the_loss_sees_the_bank_before_its_own_logits() -> None:
    net, retain = Fixed(), QualityRetaining(9, UNION.task_of_class())
    objective = UnionObjective(net, UNION, label_smoothing=0.1, retain=retain)
    fresh = QualityRetaining(9, UNION.task_of_class())
    for _ in range(3):  # three steps: the second and third see what the ones before them stored
        found = objective(batch())
        expected = F.cross_entropy(net.logits, LABELS, label_smoothing=0.1) + fresh.loss(net.logits, LABELS)
        assert torch.allclose(found["loss"], expected) and found["retain"] > 0
        assert torch.equal(retain.bank, fresh.bank)  # forward alone stores nothing
        objective.step()
        fresh.update(net.logits, LABELS)
        assert torch.equal(retain.bank, fresh.bank) and torch.equal(retain.ema, fresh.ema)
        with torch.no_grad():
            net.logits.mul_(1.5)


def test_an_accumulated_step_moves_the_bank_once() -> None:
    net, retain = Fixed(), QualityRetaining(9, UNION.task_of_class())
    objective = UnionObjective(net, UNION, retain=retain)
    objective(batch(LABELS[:3])), objective(batch(LABELS[:3]))
    objective.step()
    fresh = QualityRetaining(9, UNION.task_of_class())
    fresh.update(torch.cat([net.logits[:3]] * 2), LABELS[:3].repeat(2))
    assert torch.equal(retain.bank, fresh.bank) and torch.equal(retain.ema, fresh.ema)
    assert bool((retain.bank[:, 0] == 0).all())  # one move: nothing has reached the older slot
    objective.step()
    assert torch.equal(retain.bank, fresh.bank)


def test_a_balancer_gets_one_mean_for_each_task_that_is_there() -> None:
    net = Fixed()
    balancer = make_balancer("ew", UNION.tasks, weights={"cars": 2.0})
    objective = UnionObjective(net, UNION, balancer=balancer, balanced=[net.logits])
    found = objective(batch())
    birds, cars = (F.cross_entropy(net.logits[rows], LABELS[rows]) for rows in ([0, 1, 2, 5], [3, 4]))
    assert torch.allclose(found["loss"], birds + 2 * cars)
    assert [float(found[f"weight/{task}"]) for task in UNION.tasks] == [1, 1, 0]


def test_the_fade_goes_on_with_every_step_and_its_state_is_the_objectives() -> None:
    objective = UnionObjective(
        Fixed(), UNION, fade=RouterFade(4, end=1.0), retain=QualityRetaining(9, UNION.task_of_class())
    )
    assert float(objective(batch())["fade"]) == 0
    objective.step()
    assert float(objective(batch())["fade"]) == 0.25
    twin = UnionObjective(
        Fixed(1), UNION, fade=RouterFade(4, end=1.0), retain=QualityRetaining(9, UNION.task_of_class())
    )
    twin.load_state_dict(objective.state_dict())
    assert twin.fade.taken == 1 and torch.equal(twin.retain.ema, objective.retain.ema)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"head": "unoin"}, "head: 'unoin'.*union"),
        ({"label_smoothing": 1.0}, "label_smoothing: 1.0"),
        ({"head": "separate", "retain": True}, "needs head: union"),
    ],
)
def test_errors(options: dict, told: str) -> None:
    if options.pop("retain", False):
        options["retain"] = QualityRetaining(9, UNION.task_of_class())
    with pytest.raises(UserError, match=told):
        UnionObjective(Fixed(), UNION, **options)
