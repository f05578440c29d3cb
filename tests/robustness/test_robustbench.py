"""RobustBench's models by name, with a module in place of the package."""

from __future__ import annotations

import sys
from enum import Enum
from types import ModuleType

import pytest
import torch
from torch import nn

from vismt.base.errors import UserError
from vismt.jobs.robustness.config import ClassifierConfig
from vismt.jobs.robustness.models import make_classifier
from vismt.robustness.classifier import load_robustbench


class Dataset(Enum):
    cifar_10 = "cifar10"
    imagenet = "imagenet"
    other = "svhn"


class Threat(Enum):
    Linf = "Linf"
    L2 = "L2"


class Small(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, images):
        return self.head(images.mean((2, 3)))


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package `robustbench` with a few models; returns the calls of load_model."""
    calls = []

    def load_model(model_name, **options):
        calls.append((model_name, options))
        if model_name == "Gone2020Lost":
            raise OSError("no route to host\nsecond line")
        return Small(1000 if options["dataset"] == "imagenet" else 10).train()

    zoo, utils = ModuleType("robustbench.model_zoo"), ModuleType("robustbench.utils")
    zoo.model_dicts = {
        Dataset.cifar_10: {
            Threat.Linf: {"Wong2020Fast": {}, "Wang2020Improving": {}, "Gone2020Lost": {}},
            Threat.L2: {"Standard": {}},
        },
        Dataset.imagenet: {Threat.Linf: {"Salman2020Do_R18": {}}},
        Dataset.other: {Threat.Linf: {"A": {}}},
    }
    utils.load_model = load_model
    for name, module in (("robustbench", ModuleType("robustbench")), (zoo.__name__, zoo), (utils.__name__, utils)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path))
    return calls


def test_a_model_is_loaded_by_name_data_set_and_threat(package, tmp_path):
    net, classes, size = load_robustbench("robustbench:Wong2020Fast")
    assert (classes, size) == (10, 32) and not net.training
    folder = str(tmp_path / "robustbench")
    assert package == [("Wong2020Fast", {"model_dir": folder, "dataset": "cifar10", "threat_model": "Linf"})]
    load_robustbench("robustbench:Standard:cifar10:L2")
    assert package[-1][1]["threat_model"] == "L2"
    assert load_robustbench("robustbench:Salman2020Do_R18:imagenet")[1:] == (1000, 224)


def test_a_robustness_run_takes_it_as_a_classifier(package):
    classifier = make_classifier(ClassifierConfig("robustbench:Wong2020Fast"))
    assert (classifier.num_classes, classifier.size, classifier.labels) == (10, 32, None)
    assert classifier.net(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert make_classifier(ClassifierConfig("robustbench:Wong2020Fast", size=28)).size == 28


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Wong2020Fst", r"RobustBench has no model 'Wong2020Fst'\. Near: 'Wong2020Fast'"),
        ("Wong2020Fast:cifar100", r"RobustBench has no data set 'cifar100'\. Near: 'cifar10'"),
        ("Wong2020Fast:cifar10:linf", r"RobustBench has no threat 'linf'\. Near: 'Linf'"),
        ("Standard", r"RobustBench has no model 'Standard'\. Known: 'Gone2020Lost'"),
        ("A:svhn", r"data set 'svhn' is not supported\. Known: 'cifar10'"),
        ("Gone2020Lost", r"cannot get its weights \(no route to host\)"),
        ("", r"need robustbench:MODEL\[:DATASET\[:THREAT\]\]"),
        ("a:b:c:d", r"need robustbench:MODEL\[:DATASET\[:THREAT\]\]"),
    ],
)
def test_errors_name_what_is_near(package, name, message):
    with pytest.raises(UserError, match=message):
        load_robustbench(f"robustbench:{name}")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(UserError, match="package robustbench is not installed: pip install git"):
        load_robustbench("robustbench:Wong2020Fast")
