"""Losses over classes of unequal frequency: every formula by hand, counts, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vismt.base.errors import UserError
from vismt.multitask.class_loss import ClassLoss, adjusted, dice_loss
from vismt.multitask.nets import Union
from vismt.multitask.objectives import MultitaskObjective
from vismt.multitask.tasks import IGNORE, make_task

COUNTS = [64, 16, 4]  # N = 84
LN2 = math.log(2)
# p = (1/2, 1/4, 1/4) for each of three labels.
LOGITS = torch.tensor([1 / 2, 1 / 4, 1 / 4]).log().expand(3, 3)
LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("kind", "proportions"),
    [
        # 1/8, 1/4, 1/2 of the counts' square roots 8, 4, 2.
        ("sqrt", [1, 2, 4]),
        # 1/64, 1/16, 1/4.
        ("inverse", [1, 4, 16]),
        # M = 84 / 3 = 28, beta = 27/28: 1 / (1 - beta^64), 1 / (1 - beta^16), 1 / (1 - beta^4).
        ("effective", [1 / (1 - (27 / 28) ** n) for n in COUNTS]),
    ],
)
def test_weights_by_hand(kind: str, proportions: list[float]) -> None:
    weights = ClassLoss(class_weights=kind, class_counts=COUNTS).weights
    assert weights.tolist() == pytest.approx([w * float(weights[0]) / proportions[0] for w in proportions])
    # The mean weight of a training label is 1, not the mean over the classes.
    assert sum(n * w for n, w in zip(COUNTS, weights.tolist())) / 84 == pytest.approx(1)


def test_effective_weights_are_between_none_and_inverse_and_do_not_depend_on_the_resolution() -> None:
    few, many = (
        ClassLoss(class_weights="effective", class_counts=[k * n for n in COUNTS]).weights for k in (1000, 4000)
    )
    assert few.tolist() == pytest.approx(many.tolist(), rel=1e-3)
    assert 1 < float(few[2] / few[0]) < 16


def test_weighted_entropies_by_hand() -> None:
    # sqrt weights ~ 1, 2, 4; sum pi w = (64 + 32 + 16) / 84 = 4/3, so w = 3/4, 3/2, 3. Entropies ln 2, 2 ln 2, 2 ln 2.
    loss = ClassLoss(class_weights="sqrt", class_counts=COUNTS)
    assert loss.entropies(LOGITS, LABELS).tolist() == pytest.approx([0.75 * LN2, 3 * LN2, 6 * LN2])
    task = make_task({"name": "semseg", "classes": 3, "class_weights": "sqrt", "class_counts": COUNTS})
    target = torch.tensor([[[0, 1, 2, IGNORE]]])
    logits = F.pad(LOGITS.T.reshape(1, 3, 1, 3), (0, 1))
    # The mean divides by three pixels; torch's weighted mean would divide by 3/4 + 3/2 + 3.
    assert task.loss(logits, target).item() == pytest.approx(9.75 * LN2 / 3)


def test_adjusted_logits_by_hand() -> None:
    # exp(z - tau log pi) ~ 1/2 / 64, 1/4 / 16, 1/4 / 4, so the rarest class wins; the wrong sign gives the commonest.
    shown = adjusted(LOGITS[:, :, None, None], COUNTS, 1.0)
    assert (shown - shown[:, :1]).exp()[0, :, 0, 0].tolist() == pytest.approx([1, 2, 8])


def test_dice_by_hand() -> None:
    # Labels 0, 0, 1 of three classes, p = (1/2, 1/4, 1/4): class 0: 2 (1/2 + 1/2) / (3/2 + 2) = 4/7; class 1: 2 * 1/4 /
    # (3/4 + 1) = 2/7; class 2 has no label and does not count. 1 - (4/7 + 2/7) / 2 = 4/7.
    assert dice_loss(LOGITS, torch.tensor([0, 0, 1])).item() == pytest.approx(4 / 7)
    sure = 40 * F.one_hot(LABELS, 3).float()
    assert dice_loss(sure, LABELS).item() == pytest.approx(0, abs=1e-6)
    task = make_task({"name": "parts", "classes": 3, "dice": 0.5})
    pixels = LOGITS.T.reshape(1, 3, 1, 3)
    # Entropies ln 2, ln 2, 2 ln 2.
    assert task.loss(pixels, torch.tensor([[[0, 0, 1]]])).item() == pytest.approx(4 / 3 * LN2 + 0.5 * 4 / 7)


@pytest.mark.parametrize("name", ["semseg", "parts", "classify"])
def test_the_options_are_those_of_all_tasks_with_classes(name: str) -> None:
    options = {"class_weights": "inverse", "class_counts": COUNTS}
    task = make_task({"name": name, "classes": 3, **options})
    shape = (3,) if name == "classify" else (1, 1, 3)
    logits = LOGITS if name == "classify" else LOGITS.T.reshape(1, 3, 1, 3)
    wanted = ClassLoss(**options).entropies(LOGITS, LABELS).mean()
    assert task.loss(logits, LABELS.reshape(shape)).item() == pytest.approx(wanted.item())


@pytest.mark.parametrize("head", ["union", "separate"])
def test_the_union_has_counts_over_all_tasks_and_separate_heads_their_own(head: str) -> None:
    union, counts = Union(("birds", "cars"), (2, 3)), [30, 10, 60, 60, 20]
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 3, 4])
    options = {"class_weights": "sqrt"}
    objective = MultitaskObjective(
        torch.nn.Identity(),
        (),
        union,
        head=head,
        class_loss=ClassLoss(**options, class_counts=counts),
        label_smoothing=0.1,
    )
    got = objective({"images": logits, "labels": labels})["loss"].item()
    if head == "union":
        wanted = ClassLoss(**options, class_counts=counts).entropies(logits, labels, 0.1)
    else:
        birds = ClassLoss(**options, class_counts=counts[:2]).entropies(logits[:2, :2], labels[:2], 0.1)
        cars = ClassLoss(**options, class_counts=counts[2:]).entropies(logits[2:, 2:], labels[2:] - 2, 0.1)
        wanted = torch.cat([birds, cars])
    assert got == pytest.approx(wanted.mean().item())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_weights": "sqr"}, "class_weights 'sqr'; null for none. Near: 'sqrt'"),
        ({"class_weights": "sqrt", "class_counts": [4, 0, 1]}, "class 1 has 0 training labels"),
        ({"class_counts": [4, 1]}, "class_counts [4, 1]; give the number of training labels of each of 3 classes"),
        ({"class_counts": 7}, "class_counts 7; give the number"),
        ({"dice": "one"}, "dice 'one'; it must be a number, 0 or more"),
        ({"dice": float("nan")}, "dice nan; it must be a number, 0 or more"),
        ({"class_weigths": "sqrt"}, "no option 'class_weigths'. Near: 'class_weights'"),
    ],
)
def test_bad_options_are_one_line(options: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        make_task({"name": "semseg", "classes": 3, **options})
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_loss_without_its_counts_is_an_error() -> None:
    task = make_task({"name": "semseg", "classes": 3, "class_weights": "sqrt"})
    assert task.needs_counts
    with pytest.raises(UserError, match="need class_counts"):
        task.loss(LOGITS.T.reshape(1, 3, 1, 3), torch.tensor([[[0, 0, 1]]]))
