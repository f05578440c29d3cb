"""Which outputs of a multi-task classifier are the classes of a card in a robustness run."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.card_scores import score_set
from helpers.own_images import SIZE, ByColour, picture, write_folder
from torch import nn

from vismt.base.errors import UserError
from vismt.data.batching import InOrder
from vismt.data.images import open_images
from vismt.data.pixels import Pixels
from vismt.evaluation.ood import Ood
from vismt.evaluation.temperature import TEMPERED, Temperature
from vismt.jobs.evaluation_job import EvaluationJob
from vismt.jobs.robustness.config import RobustnessConfig
from vismt.jobs.robustness.data import Cards
from vismt.jobs.robustness.models import Classifier
from vismt.uncertainty.intervals import CLEAN, NUMBER, SHARE, Condition, Measure, Score
from vismt.uncertainty.temperature import fit_temperature

LABELS = ["first/0", "first/1", "second/0", "second/1", "scenes/a/abbey", "scenes/a/alley", "scenes/b/alley"]
CARDS = {"first": {"mnist"}, "second": {"digits"}, "scenes": {"grocery"}}


def outputs(name, classes, labels=LABELS, cards=CARDS, task=None):
    opened = Cards(RobustnessConfig())
    opened._sets[name] = SimpleNamespace(classes=classes)
    return opened.outputs(name, Classifier(nn.Identity(), len(labels), 8, labels, cards, task))


def test_the_task_with_the_card_is_meant_where_several_have_the_names_of_its_classes():
    assert outputs("digits:test", ["1", "0"]) == [3, 2] and outputs("mnist:test", ["1", "0"]) == [1, 0]


def test_the_key_names_the_task_of_another_card():
    assert outputs("usps", ["0", "1"], task="second") == [2, 3]
    assert outputs("mnist", ["0", "1"], task="second") == [2, 3]  # over the card


def test_names_of_classes_may_have_slashes():
    assert outputs("grocery:test", ["b/alley", "a/abbey"]) == [6, 4]
    assert outputs("other", ["a/abbey"], cards={}) == [4]
    plain = ["alphabet/1", "alphabet/2"]  # of a classifier without tasks
    assert outputs("omniglot", plain, labels=plain, cards={}) == [0, 1]


@pytest.mark.parametrize(
    ("name", "classes", "task", "words"),
    [
        ("usps", ["0", "1"], None, "class '0' of 'usps' is in the tasks first, second; name one as classifier.task"),
        ("usps", ["abbey"], None, "has class 'abbey', which the classifier was not trained on"),
        ("mnist", ["a/abbey"], None, "has class 'a/abbey', which the classifier was not trained on"),
        ("usps", ["0"], "secnd", "classifier.task: no task 'secnd'. Near: 'second'"),
        ("usps", ["2"], "second", "has class '2', which the classifier was not trained on"),
    ],
)
def test_what_does_not_fit_is_one_line(name, classes, task, words):
    with pytest.raises(UserError) as caught:
        outputs(name, classes, task=task)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_thresholds_are_of_the_answers_that_are_evaluated(tmp_path):
    """Pixels are float32; a net that takes bfloat16 alone gets that, for its thresholds as for its scores."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 3)).to(torch.bfloat16)
    images = Drawn(60)
    batches, fitting = InOrder(images, 30, torch.arange(30)), InOrder(images, 30)
    scores = score_set(Classifier(net, 3, 1), batches, [], folder=tmp_path, fitting=fitting)
    assert any(score.measure.metric != "accuracy" for score in scores)


@pytest.mark.parametrize("other", ["pixels", "labels"])
def test_scores_tell_their_images_from_others_of_the_same_names(tmp_path, monkeypatch, capsys, other):
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))

    def scores(run, size=SIZE):
        batches = InOrder(Pixels(open_images(tmp_path / "data"), size), 30)
        folder = tmp_path / run
        return score_set(Classifier(ByColour(), 3, size), batches, [], folder=folder)[0]

    write_folder(tmp_path / "data", 4)
    first = scores("first")
    assert first.examples and scores("at another size", 8).examples == first.examples
    if other == "pixels":
        picture((0, 0, 0), 7).save(tmp_path / "data" / "red" / "00.png")
    else:
        (tmp_path / "data" / "red" / "00.png").rename(tmp_path / "data" / "blue" / "09.png")
    assert scores("second").examples not in (first.examples, "")
    assert "other images" not in capsys.readouterr().out
    if other == "pixels":
        assert scores("first") == first  # whose answers are on record
        assert "is of other examples than are there now; move it away" in capsys.readouterr().out


def test_answers_to_other_images_of_the_same_names_are_noticed(tmp_path, capsys):
    net, images = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3, 3)), 3, 1), Drawn(4)
    images.content = "first"

    def found():
        features, others = (Ood(["other"]),), {"other": images}
        return score_set(net, InOrder(Drawn(60), 30), [], folder=tmp_path, features=features, others=others)

    first = found()
    images.content, images.pixels = "second", 1 - images.pixels
    assert found() == first and "is of other examples than are there now" in capsys.readouterr().out


def test_a_classifier_on_a_card_has_the_temperature_of_the_images_for_fitting(tmp_path):
    torch.manual_seed(0)
    net, images = nn.Sequential(nn.Flatten(), nn.Linear(3, 3)), Drawn(60)
    batches = InOrder(images, 30)
    found = score_set(
        Classifier(net, 3, 1), batches, [], folder=tmp_path, fitting=batches, features=(Temperature(True),)
    )
    values = {(of.condition.label, of.measure.metric): of.measure.score for of in found}
    with torch.no_grad():
        logits = net(images.pixels).double()
    temperature = fit_temperature(logits, images.labels)
    tempered = values[TEMPERED.label, "NLL in nats"]
    assert tempered == pytest.approx(float(nn.functional.cross_entropy(logits / temperature, images.labels)), abs=1e-5)
    assert tempered < values["clean", "NLL in nats"] and (TEMPERED.label, "accuracy") not in values


def test_thresholds_of_other_images_of_the_same_names_are_noticed(tmp_path, capsys):
    images, classifier = Drawn(60), Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3, 3)), 3, 1)

    def scores(content):
        images.content = content
        batches = InOrder(images, 30)
        return score_set(classifier, InOrder(Drawn(60), 30), [], folder=tmp_path, fitting=batches)

    first = scores("first")
    assert scores("first") == scores("") == first and "other" not in capsys.readouterr().out
    images.pixels = 1 - images.pixels
    assert scores("second") == first and "is of other validation images than are there now" in capsys.readouterr().out


@pytest.mark.parametrize(("metric", "scale", "text"), [("accuracy", SHARE, "45.0"), ("RMSE in m", NUMBER, "0.45")])
def test_the_mean_of_corruptions_has_the_scale_of_its_score(capsys, metric, scale, text):
    conditions = [CLEAN, *(Condition(f"fog {level}", "corruption", "fog", level) for level in range(1, 5))]
    measures = [Measure(metric, {"a": level / 10, "b": level / 5}, scale) for level in (1, 1, 2, 4, 5)]
    scores = [Score("t", "x", "all", measure, of) for measure, of in zip(measures, conditions, strict=True)]
    EvaluationJob._print(SimpleNamespace(names_tasks=False, _printed=set()), "arm", scores, 1)
    assert f"mean of 4 corruptions {text}   (n = 2 images" in capsys.readouterr().out


class Drawn:
    """Random images of three classes."""

    content = ""

    def __init__(self, count: int) -> None:
        self.pixels, self.labels = torch.rand(count, 3, 1, 1), torch.arange(count) % 3
        self.ids = [str(number) for number in range(count)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self.pixels[index]

    def groups(self, index: torch.Tensor) -> tuple[dict[str, str], str]:
        return {}, ""


class Signed(nn.Module):
    """A net of which a test changes the code, not the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.weights(images.flatten(1))


def test_records_are_of_the_code_of_a_net_and_thresholds_of_their_images(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net, images = Signed(), Drawn(60)

    def scores() -> dict[str, float]:
        found = score_set(
            Classifier(net, 3, 1),
            InOrder(images, 30),
            [],
            folder=tmp_path,
            fitting=InOrder(images, 30),
        )
        return {score.measure.metric: score.measure.score for score in found}

    first = scores()
    assert scores() == first
    thresholds = (tmp_path / "risk-x-images.json").read_text()
    monkeypatch.setattr(Signed, "forward", lambda self, images: -self.weights(images.flatten(1)))
    with pytest.raises(UserError, match="another"):  # records of other weights or code are refused, not read
        scores()
    monkeypatch.undo()
    images.labels = images.labels.flip(0)
    with contextlib.suppress(UserError):
        scores()
    assert (tmp_path / "risk-x-images.json").read_text() != thresholds


def test_a_softmax_for_each_task_answers_among_the_classes_of_the_task_of_the_card(tmp_path):
    cards, net = Cards(RobustnessConfig()), nn.Sequential(nn.Flatten(), nn.Linear(3, 4))
    with torch.no_grad():
        net[1].bias[:2] += 9  # the other task always wins over all classes
    given = Classifier(net, 4, 1, LABELS[:4], {"first": {"mnist"}, "second": {"digits"}}, separate=True)
    cards._sets |= {"digits": SimpleNamespace(classes=["0", "1"]), "usps": SimpleNamespace(classes=["0", "1"])}
    classifier, images = cards.classifier("digits", given), Drawn(12)
    images.labels = images.labels % 2 + 2
    right = (net(images.pixels)[:, 2:].argmax(1) + 2 == images.labels).double().mean()
    (score, *_) = score_set(classifier, InOrder(images, 6), [], folder=tmp_path)
    assert score.measure.score == float(right) and score.protocol == "task known"
    with pytest.raises(UserError, match=r"in the tasks first, second; name one as classifier\.task"):
        cards.classifier("usps", given)
    assert cards.classifier("digits", replace(given, separate=False)).net is net


def test_two_tasks_with_one_card_are_ambiguous():
    with pytest.raises(UserError, match=r"tasks first, second; name one as classifier\.task"):
        outputs("mnist", ["0"], cards={"first": {"mnist"}, "second": {"mnist"}})


def test_a_classifier_without_names_has_no_task():
    opened = Cards(RobustnessConfig())
    opened._sets["usps"] = SimpleNamespace(classes=["0", "1"])
    assert opened.outputs("usps", Classifier(nn.Identity(), 2, 8)) == [0, 1]
    with pytest.raises(UserError, match=r"classifier\.task: no task 'second'"):
        opened.outputs("usps", Classifier(nn.Identity(), 2, 8, task="second"))
