"""Robust accuracy of any classifier: the numbers by hand, records that resume, and a check that catches masked gradients."""

import json
import math

import pytest
import torch
from torch import nn

from vismt.base.errors import UserError
from vismt.evaluation.quality import Quality
from vismt.robustness.attacks import attacks
from vismt.robustness.attacks.attacks import AttackSpec
from vismt.robustness.corruptions import CorruptionSpec
from vismt.robustness.evaluate import accuracies, evaluate_classifier, evaluate_examples
from vismt.uncertainty.features import PROBABILITIES, Feature
from vismt.uncertainty.intervals import Condition, wilson

PGD = AttackSpec(epsilon=8 / 255, step_size=2 / 255, steps=20)  # enough steps to reach the boundary from any start


@pytest.fixture(autouse=True)
def short_square(monkeypatch):
    """The strong attack asks little of the models here, whose gradients find what there is to find."""
    monkeypatch.setitem(attacks.QUERIES, "strong", 40)


class Linear(nn.Module):
    """Class = the brightest of 3 channels."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return self.drop(images.mean((2, 3)) * self.gain) * 20


class Rounded(Linear):
    """The same function of 16 grey values, with a gradient of zero, so gradient attacks have no effect."""

    def forward(self, images):
        return super().forward((images * 15).round() / 15)


class Misleading(Linear):
    """Rounded, with a small smooth term whose gradient points back to the class."""

    def forward(self, images):
        self.calls += 1
        coarse = (images * 15).round() / 15
        return self.drop(coarse.mean((2, 3)) * self.gain) * 20 - 1e-3 * images.mean((2, 3))


def batches(n=60, size=20, ids=True):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    images = 0.45 + 0.02 * torch.randn(n, 3, 10, 10, generator=generator)
    margins = 0.02 + 0.1 * torch.rand(n, generator=generator)
    images[torch.arange(n), labels] += margins[:, None, None]
    wrong = torch.arange(0, n, 10)
    labels[wrong] = (labels[wrong] + 1) % 3
    names = [f"image/{i}.png" for i in range(n)]
    parts = [slice(i, i + size) for i in range(0, n, size)]
    return [(images[p], labels[p], names[p]) if ids else (images[p], labels[p]) for p in parts]


class Fixed(nn.Module):
    """Logits that do not depend on the images."""

    def forward(self, images):
        # p = (1/2, 1/4, 1/4) and (1/10, 8/10, 1/10).
        return torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()


class Forms(Feature):
    """Twice the logits, and the logits in reverse."""

    key, needs = "forms", frozenset({PROBABILITIES})
    forms = {  # noqa: RUF012  # a constant
        Condition("squared", "variant", "form"): lambda z: 2 * z,
        Condition("turned", "variant", "form"): lambda z: z.flip(1),
    }


def test_forms_of_the_logits_by_hand(tmp_path):
    features = [Quality(None), Forms(None)]
    batch = [(torch.zeros(2, 3, 4, 4), torch.tensor([0, 2]), ["a", "b"])]
    path = tmp_path / "rows.jsonl"
    first, second = evaluate_examples(Fixed(), batch, [], num_classes=3, features=features, records=path)
    assert (first["clean"], first["turned"], second["squared"]) == (0, 2, 1)
    assert first["clean confidence"] == pytest.approx(1 / 2) and second["clean confidence"] == pytest.approx(0.8)
    assert first["clean nll"] == pytest.approx(math.log(2)) and second["clean nll"] == pytest.approx(math.log(10))
    # (1/2)^2 + 2 (1/4)^2 and 0.1^2 + 0.8^2 + 0.9^2.
    assert first["clean brier"] == pytest.approx(3 / 8) and second["clean brier"] == pytest.approx(1.46)
    # Twice the logits square p: (4, 1, 1) / 6 and (1, 64, 1) / 66.
    assert first["squared nll"] == pytest.approx(math.log(1.5)) and second["squared nll"] == pytest.approx(math.log(66))
    assert evaluate_examples(Fixed(), batch, [], num_classes=3, features=features, records=path) == [first, second]
    with pytest.raises(UserError, match="different: features"):
        evaluate_examples(Fixed(), batch, [], num_classes=3, features=features[:1], records=path)


def test_robust_means_right_before_and_after():
    attacked, corrupted = AttackSpec(), CorruptionSpec("fog")
    answers = [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 0, 0), (1, 0, 0, 0)]  # label, clean, attacked, corrupted
    names = ("label", "clean", str(attacked), corrupted.label)
    rows = [{"id": str(number), **dict(zip(names, values))} for number, values in enumerate(answers)]
    table = [list(values.values()) for _, values in accuracies(rows, [attacked, corrupted], 2)]
    # The third was wrong when clean: luck under attack does not make it robust; under a corruption it counts.
    assert table == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]]


def test_rows_and_records(tmp_path):
    path = tmp_path / "a" / "records.jsonl"
    net = Linear().train()
    clean, robust, fog = evaluate_classifier(
        net, batches(), [PGD, CorruptionSpec("fog", 1)], num_classes=3, records=path
    )
    assert net.training and net.drop.training and net.gain.requires_grad and net.gain.grad is None
    # 6 of 60 labels are wrong; a linear model with margin m falls when m < 2 * 8/255 = 0.0627.
    assert (clean.condition, clean.value, clean.n, clean.chance) == ("clean", 0.9, 60, 1 / 3)
    assert (clean.low, clean.high) == wilson(54, 60)
    margins = [
        m
        for images, labels, _ in batches()
        for m in (
            images.mean((2, 3)).gather(1, labels[:, None])[:, 0]
            - images.mean((2, 3)).scatter(1, labels[:, None], -1).amax(1)
        ).tolist()
    ]
    assert (
        robust.condition == "PGD-20 linf 8/255 step 2/255"
        and robust.value == sum(m > 2 * 8 / 255 for m in margins) / 60
    )
    assert fog.condition == "fog 1"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 61 and lines[1]["id"] == "image/0.png" and lines[1]["label"] == 1 and lines[1]["clean"] == 0
    key = "PGD-20 linf 8/255 step 2/255"
    assert 0 < lines[2][f"{key} linf"] <= 8 / 255 + 1e-6
    assert lines[2][f"{key} l2"] <= 8 / 255 * 300**0.5 + 1e-6
    # A record's attacked prediction is that of the attacked image: count them again.
    assert sum(row["clean"] == row["label"] == row[key] for row in lines[1:]) / 60 == robust.value


def test_resume_by_example(tmp_path):
    path = tmp_path / "records.jsonl"
    whole = evaluate_classifier(Linear(), batches(), [PGD], num_classes=3, records=path)
    lines = path.read_text().splitlines(keepends=True)
    full = Linear()
    evaluate_classifier(full, batches(), [PGD], num_classes=3)
    # Killed within the second batch, in the middle of a line.
    path.write_text("".join(lines[:31]) + lines[31][:20])
    rest = Linear()
    again = evaluate_classifier(rest, batches(), [PGD], num_classes=3, records=path)
    assert again == whole and path.read_text() == "".join(lines)
    assert rest.calls < full.calls  # two of three batches
    done = Linear()
    assert evaluate_classifier(done, batches(), [PGD], num_classes=3, records=path) == whole and done.calls == 0


def test_foreign_records_are_refused(tmp_path):
    path = tmp_path / "records.jsonl"
    evaluate_classifier(Linear(), batches(), [PGD], num_classes=3, records=path, fingerprint="a")
    with pytest.raises(UserError, match="different: weights"):
        evaluate_classifier(Linear(), batches(), [PGD], num_classes=3, records=path, fingerprint="b")
    moved = [(images, (labels + 1) % 3, ids) for images, labels, ids in batches()]
    with pytest.raises(UserError, match=r"'image/0.png' is on record with label 1, now it has 2"):
        evaluate_classifier(Linear(), moved, [PGD], num_classes=3, records=path, fingerprint="a")


@pytest.mark.parametrize(
    ("data", "classes", "message"),
    [
        ([], 3, "no example"),
        ([(torch.rand(2, 3, 4, 4), torch.tensor([0, 3]))], 3, "labels 0 to 3 for 3 classes"),
        ([(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))], 4, r"logits \(2, 3\) for 4 classes"),
        ([(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]), ["a", "a"])], 3, "'a' comes twice"),
        ([(torch.rand(1, 3, 4, 4), torch.tensor([0]), ["a"])] * 2, 3, "'a' comes twice"),
        ([(torch.rand(2, 3, 4, 4), torch.tensor([0]))], 3, "2 images, 1 labels"),
        ([(torch.rand(2, 3, 4, 4) * 255, torch.tensor([0, 1]))], 3, r"need \[0, 1\]"),
    ],
)
def test_errors(data, classes, message):
    with pytest.raises(UserError, match=message):
        evaluate_classifier(Linear(), data, [PGD], num_classes=classes)


def test_equal_attacks_are_refused():
    with pytest.raises(UserError, match="two conditions have the same text"):
        evaluate_classifier(Linear(), batches(), [PGD, PGD], num_classes=3)


def test_ids_default_to_running_numbers(tmp_path):
    path = tmp_path / "records.jsonl"
    evaluate_classifier(Linear(), batches(ids=False), [], num_classes=3, records=path)
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()[1:]] == [str(i) for i in range(60)]


def test_attacks_of_one_budget_get_a_worst_case(tmp_path):
    path = tmp_path / "records.jsonl"
    specs = [AttackSpec("fgsm", 8 / 255), PGD]
    evaluate_classifier(Linear(), batches(), specs, num_classes=3, records=path)
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    table = {condition.label: values for condition, values in accuracies(rows, specs, 3)}
    assert list(table) == ["clean", "FGSM linf 8/255", str(PGD), "worst of 2 linf 8/255"]
    both = {name: min(table["FGSM linf 8/255"][name], table[str(PGD)][name]) for name in table["clean"]}
    assert table["worst of 2 linf 8/255"] == both
